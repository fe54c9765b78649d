"""One call of a transformer as its pipeline would make it, as tensors on the meta device.

For plans: what a call costs follows from its shapes, and those from the resolution that the config
asks for. A class that is not here can still be planned from a recorded call (`recorded`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ppcl.transformer import calls


@dataclass(frozen=True)
class Size:
    """What decides the shapes of a call.

    Attributes:
        height, width: of the picture, in pixels. frames: of the video; 1 for a picture.
        text_tokens: of the longest prompt that the pipeline takes.
        scale: pixels of the picture per latent, along one side.
    """

    height: int
    width: int
    frames: int
    text_tokens: int
    scale: int = 8


@dataclass(frozen=True)
class Pipeline:
    """How the stock pipeline of a class calls it, if the config says no more.

    Attributes:
        size: its usual one.
        steps: denoising steps.
        guidance: the argument above 1 of which both branches are asked for, and its default.
        negative: it also takes a negative prompt for that.
        joined: both branches are one call of twice the batch, not two calls.
        make: (config, batch, size, dtype) -> arguments of the transformer.
    """

    size: Size
    steps: int
    guidance: tuple[str, float]
    negative: bool
    joined: bool
    make: Callable[[Mapping, int, Size, torch.dtype], dict[str, Any]]


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def qwen_image(config: Mapping, batch: int, size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """Pictures as patches of 2 x 2 latents."""
    high, wide = (side // (2 * size.scale) for side in (size.height, size.width))
    return {
        "hidden_states": _empty(dtype, batch, high * wide, config["in_channels"]),
        "encoder_hidden_states": _empty(
            dtype, batch, size.text_tokens, config["joint_attention_dim"]
        ),
        "timestep": _empty(dtype, batch),
        "img_shapes": [[(1, high, wide)]] * batch,
        "return_dict": False,
    }


def flux(config: Mapping, batch: int, size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """Pictures as patches of 2 x 2 latents, with ids of places that the batch shares."""
    tokens = (size.height // (2 * size.scale)) * (size.width // (2 * size.scale))
    found = {
        "hidden_states": _empty(dtype, batch, tokens, config["in_channels"]),
        "encoder_hidden_states": _empty(
            dtype, batch, size.text_tokens, config["joint_attention_dim"]
        ),
        "pooled_projections": _empty(dtype, batch, config["pooled_projection_dim"]),
        "timestep": _empty(dtype, batch),
        "img_ids": _empty(dtype, tokens, 3),
        "txt_ids": _empty(dtype, size.text_tokens, 3),
        "return_dict": False,
    }
    if config["guidance_embeds"]:
        found["guidance"] = _empty(torch.float32, batch)
    return found


def sd3(config: Mapping, batch: int, size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """Latents as they are; text of CLIP (77 tokens) and T5, one after the other."""
    high, wide = size.height // size.scale, size.width // size.scale
    return {
        "hidden_states": _empty(dtype, batch, config["in_channels"], high, wide),
        "encoder_hidden_states": _empty(
            dtype, batch, 77 + size.text_tokens, config["joint_attention_dim"]
        ),
        "pooled_projections": _empty(dtype, batch, config["pooled_projection_dim"]),
        "timestep": _empty(dtype, batch),
        "return_dict": False,
    }


def wan(config: Mapping, batch: int, size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """Latents as they are, a frame for the first and for every four further ones."""
    frames = (size.frames - 1) // 4 + 1
    high, wide = size.height // size.scale, size.width // size.scale
    return {
        "hidden_states": _empty(dtype, batch, config["in_channels"], frames, high, wide),
        "timestep": _empty(torch.int64, batch),
        "encoder_hidden_states": _empty(dtype, batch, size.text_tokens, config["text_dim"]),
        "return_dict": False,
    }


PIPELINES: dict[str, Pipeline] = {
    "QwenImageTransformer2DModel": Pipeline(
        Size(1024, 1024, 1, 512), 50, ("true_cfg_scale", 4.0), True, False, qwen_image
    ),
    "FluxTransformer2DModel": Pipeline(
        Size(1024, 1024, 1, 512), 28, ("true_cfg_scale", 1.0), True, False, flux
    ),
    "SD3Transformer2DModel": Pipeline(
        Size(1024, 1024, 1, 256), 28, ("guidance_scale", 7.0), False, True, sd3
    ),
    "WanTransformer3DModel": Pipeline(
        Size(480, 832, 81, 512), 50, ("guidance_scale", 5.0), False, False, wan
    ),
}


def size_of(usual: Size, asked: Mapping[str, Any], scale: int | None = None) -> Size:
    """The size that the config's `pipeline` asks for; what it leaves out is as usual.

    Args:
        scale: the autoencoder's, if known.
    """
    keys = {
        "height": "height",
        "width": "width",
        "frames": "num_frames",
        "text_tokens": "max_sequence_length",
    }
    chosen = {name: asked.get(key) or getattr(usual, name) for name, key in keys.items()}
    return Size(**chosen, scale=scale or usual.scale)


def guided(pipeline: Pipeline, asked: Mapping[str, Any]) -> bool:
    """Whether the pipeline asks for both branches of guidance."""
    name, usual = pipeline.guidance
    strong = asked.get(name, usual) > 1
    return strong and not (pipeline.negative and asked.get("negative_prompt") is None)


def recorded(path: Path) -> Callable[[int, torch.dtype], dict[str, Any]]:
    """The largest recorded call of a run, for any batch; on the meta device."""
    reader = calls.Reader(path)
    largest = max((bucket[0] for bucket in reader.buckets), key=lambda row: _bytes(reader, row))

    def make(batch: int, dtype: torch.dtype) -> dict[str, Any]:
        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to("meta", dtype if value.is_floating_point() else value.dtype)

        found = reader.batch(np.array([largest] * batch)).arguments
        return tree_map(moved, dict(found)) | {"return_dict": False}

    return make


def _bytes(reader: calls.Reader, row: int) -> int:
    found = reader.batch(np.array([row])).arguments
    return sum(v.nbytes for v in tree_leaves(dict(found)) if isinstance(v, Tensor))
