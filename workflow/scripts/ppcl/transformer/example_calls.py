"""One call of a transformer as its pipeline would make it, as tensors on the meta device.

Forecasts need it: what a call costs follows from its shapes, and these follow from the resolution
in the config. For a family without `Family.pipeline`, a recorded call does instead (`recorded`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ppcl.transformer import calls
from ppcl.transformer.family import Pipeline, Size


def made(
    pipeline: Pipeline, config: Mapping[str, Any], size: Size, batch: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of a transformer's call, by name; tensors are on the meta device.

    Args:
        config: the transformer's.
        batch: number of samples.
        dtype: the transformer's.
    """

    def tensor(*shape: int, dtype: torch.dtype | str = dtype) -> Tensor:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return torch.empty(shape, dtype=kind, device="meta")

    return pipeline.arguments(config, size, batch, tensor)


def size_of(usual: Size, asked: Mapping[str, Any], scale: int | None = None) -> Size:
    """The size of a call.

    Args:
        usual: the default for what the config leaves out.
        asked: the config's `pipeline` mapping.
        scale: the autoencoder's pixels per latent along one side, if known.
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
    """Whether the pipeline calls the transformer for both branches of classifier-free guidance.

    Args:
        asked: the config's `pipeline` mapping.
    """
    name, usual = pipeline.guidance
    strong = asked.get(name, usual) > 1
    return strong and not (pipeline.negative and asked.get("negative_prompt") is None)


def recorded(path: Path) -> Callable[[int, torch.dtype], dict[str, Any]]:
    """A function (batch, dtype) -> arguments of the largest recorded call, with tensors on the meta
    device; calls count as large by the bytes of their arguments.

    Args:
        path: calls.parquet.
    """
    reader = calls.Reader(path)
    largest = max((bucket[0] for bucket in reader.buckets), key=lambda row: _bytes(reader, row))

    def make(batch: int, dtype: torch.dtype) -> dict[str, Any]:
        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to("meta", dtype if value.is_floating_point() else value.dtype)

        arguments = reader.batch(np.array([largest] * batch)).arguments
        return tree_map(moved, dict(arguments)) | {"return_dict": False}

    return make


def _bytes(reader: calls.Reader, row: int) -> int:
    arguments = reader.batch(np.array([row])).arguments
    return sum(v.nbytes for v in tree_leaves(dict(arguments)) if isinstance(v, Tensor))
