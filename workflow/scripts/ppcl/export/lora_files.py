"""LoRA files, read in every style that diffusers reads.

What a style's names mean is asked of diffusers itself: `lora_state_dict` of the pipeline's class.
"""

import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import state_dict_utils
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ppcl.errors import UserError
from ppcl.export import lora_foreign
from ppcl.export.lora_layers import Layer, LoraFile, dtype_of
from ppcl.storage import untrusted

LARGEST = 16 << 30  # bytes; the LoRAs of rank 256 of a transformer of 20B have half of that
NOTES = "lora_adapter_metadata"  # diffusers' key for peft's notes
PEFT = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
_ENDS = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
MAGNITUDE = ".lora_magnitude_vector"


class _Traced(Tensor):
    """A tensor that knows which keys of a file it was made from: converters leave keys out without
    a word."""

    keys: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs or {})
        keys = _keys_of(tree_leaves((args, kwargs)))
        for leaf in tree_leaves(made):
            if isinstance(leaf, cls):
                leaf.keys = leaf.keys | keys
        return made


def _keys_of(values: Iterable[Any]) -> frozenset[str]:
    return frozenset().union(*(v.keys for v in values if isinstance(v, _Traced)))


def read(
    pipeline: type[DiffusionPipeline], path: Path, component: str, model: nn.Module
) -> LoraFile:
    """A LoRA file in any style that diffusers or peft reads.

    Args:
        pipeline: class of the teacher's pipeline, which knows its styles.
        component: the pipeline's component that is pruned.
        model: the transformer, pruned or not; the names of its parts tell peft's keys from others.

    Raises:
        UserError: the file can't be read, is no LoRA, or holds nothing for the component.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"--lora: diffusers has no LoRAs for {pipeline.__name__}")
    stored, notes = _stored(path)
    if strange := lora_foreign.other_family(stored, model):
        raise UserError(f"--lora: {path} {strange}")
    parts = {name for name, _ in model.named_children()}
    prefix = prefix_of(pipeline, component)
    try:
        made = converted(pipeline, prefix, stored, parts)
        layers = layers_of(made, notes, prefix)
        others = _scaled(made.others, notes)
    except UserError as error:
        raise UserError(f"--lora: {path}: {error}") from error
    except Exception as error:  # diffusers raises many kinds; all mean "not such a file"
        told = lora_foreign.other_method(stored) or f"can't be read as a LoRA: {error!r}"
        raise UserError(f"--lora: {path} {told}") from error
    if not layers:
        key, why = next(iter(made.unusable.items()), ("", ""))
        more = f"has no layers of '{component}'" + (f"; '{key[:200]}' {why}" if why else "")
        raise UserError(f"--lora: {path} {lora_foreign.other_method(made.unusable) or more}")
    return LoraFile(layers, others, made.unusable, dtype_of(stored))


def prefix_of(pipeline: type[DiffusionPipeline], component: str) -> str:
    """How diffusers calls the component in keys: Wan's two experts have one name."""
    return str(getattr(pipeline, "transformer_name", component))


# ---- from a file to diffusers' keys


def _stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file as they are, and peft's notes of it."""
    if path.suffix != ".safetensors":  # others would be unpickled
        raise UserError(f"--lora: {path} is no .safetensors file; convert it")
    try:
        header = untrusted.safetensors_header(path)
    except FileNotFoundError as error:
        raise UserError(f"--lora: {path} does not exist; name a file on this disk") from error
    except UserError as error:
        raise UserError(f"--lora: {error}") from error
    if path.stat().st_size > LARGEST:
        raise UserError(f"--lora: {path} is larger than {LARGEST >> 30} GiB; that is no LoRA")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in header}
            notes = json.loads((file.metadata() or {}).get(NOTES) or "{}")
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--lora: {path} can't be read as a LoRA: {error}") from error
    if not isinstance(notes, dict):
        raise UserError(f"--lora: {path}: its notes ({NOTES}) are no JSON object")
    if not notes and any(key.startswith(PEFT) for key in tensors):
        notes = _beside(path)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel() > 1:
            raise UserError(
                f"--lora: {path}: '{key[:200]}' is of {tensor.dtype}; give a LoRA that is not "
                "quantised"
            )
        if not tensor.float().isfinite().all():
            raise UserError(f"--lora: {path}: '{key[:200]}' holds NaN or infinity; get it again")
    return tensors, notes


def _beside(path: Path) -> dict[str, Any]:
    """Notes of a file of peft's, which has them in another one beside it; none without that."""
    config = path.parent / PEFT_CONFIG
    try:
        told = untrusted.json_object(config)
    except FileNotFoundError:
        return {}
    except UserError as error:
        raise UserError(f"--lora: {error}") from error
    if told.get("peft_type", "LORA") != "LORA":
        raise UserError(f"--lora: {config} is of {str(told['peft_type'])[:40]}, which is no LoRA")
    return {"": told}


@dataclass
class Converted:
    """By diffusers' keys, all float32: of the component without its prefix, and of others; alphas
    by a layer's path; key -> why it can't be used."""

    state: dict[str, Tensor]
    alphas: dict[str, float]
    others: dict[str, Tensor]
    unusable: dict[str, str]


def converted(
    pipeline: type[DiffusionPipeline],
    prefix: str,
    stored: Mapping[str, Tensor],
    parts: Collection[str],
) -> Converted:
    """The tensors of a file in diffusers' keys.

    parts: names of the transformer's children.
    """
    made = Converted({}, {}, {}, {})
    foreign: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        path = _own(key, prefix, parts)
        value = tensor.to(torch.float32)
        if path is None and not key.startswith("text_encoder."):
            foreign[key] = value
        elif path is None:
            made.others[key] = value
        elif path.endswith(".alpha"):
            made.alphas[path.removesuffix(".alpha")] = float(value)
        else:
            made.state[path] = value
    if any("lora_linear_layer" in key or ".lora.down." in key for key in made.state):
        made.state = state_dict_utils.convert_unet_state_dict_to_peft(made.state)
    if foreign:
        _convert(pipeline, prefix, foreign, parts, made)
    return made


def _own(key: str, prefix: str, parts: Collection[str]) -> str | None:
    """A key of the component as diffusers and peft write it, without what is before the path."""
    path = key.removeprefix(PEFT).removeprefix(f"{prefix}.")
    if path.partition(".")[0] not in parts:
        return None
    path = re.sub(r"(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)\w+", r"\1", path)
    for old, new in _ENDS.items():
        path = path.removesuffix(old) + new if path.endswith(old) else path
    return path.removesuffix(".weight") if path.endswith(f"{MAGNITUDE}.weight") else path


def _convert(
    pipeline: type[DiffusionPipeline],
    prefix: str,
    foreign: Mapping[str, Tensor],
    parts: Collection[str],
    made: Converted,
) -> None:
    """Adds what diffusers makes of keys in other styles."""
    traced, scales = {}, {}
    for key, tensor in foreign.items():
        if key.endswith(".dora_scale"):
            scales[key] = tensor
            continue
        traced[key] = tensor.as_subclass(_Traced)
        traced[key].keys = frozenset([key])
    state, alphas = _by_diffusers(pipeline, traced)
    used = _keys_of(state.values())
    _sort_out(state, prefix, parts, made)
    made.others |= {k: v.as_subclass(Tensor) for k, v in alphas.items() if torch.is_tensor(v)}
    for key in traced:
        if key not in used and not key.endswith(".alpha"):
            made.unusable[key] = f"is left out by diffusers' reader of {pipeline.__name__}"
    for key, tensor in scales.items():
        base = key.removesuffix(".dora_scale")
        _magnitudes(pipeline, prefix, base, tensor, foreign, parts, made)


def _by_diffusers(
    pipeline: type[DiffusionPipeline], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    more: dict[str, Any] = {}
    reader: Any = pipeline
    if "return_alphas" in inspect.signature(reader.lora_state_dict).parameters:
        more["return_alphas"] = True  # classes without it have put them into the weights
    made = reader.lora_state_dict(dict(state), **more)
    read, alphas = made if isinstance(made, tuple) else (made, None)
    return read, alphas or {}


def _sort_out(
    state: Mapping[str, Tensor], prefix: str, parts: Collection[str], made: Converted
) -> None:
    for key, tensor in state.items():
        path, plain = _own(key, prefix, parts), tensor.as_subclass(Tensor)
        if path is not None:
            made.state[path] = plain
        elif key.startswith("text_encoder"):
            made.others[key] = plain
        else:
            made.unusable[key] = "is of a style that diffusers does not read for this pipeline"


def _magnitudes(
    pipeline: type[DiffusionPipeline],
    prefix: str,
    base: str,
    scale: Tensor,
    foreign: Mapping[str, Tensor],
    parts: Collection[str],
    made: Converted,
) -> None:
    """Adds a layer's magnitudes (DoRA), which diffusers' converters drop: they go through them in
    the place of a matrix of one column, so that they end where its rows do."""
    ends = next(
        (
            e
            for e in ((".lora_down", ".lora_up"), (".lora_A", ".lora_B"))
            if f"{base}{e[0]}.weight" in foreign
        ),
        None,
    )
    rows = foreign[f"{base}{ends[1]}.weight"].shape[0] if ends else -1
    if ends is None or scale.numel() != rows:
        made.unusable[f"{base}.dora_scale"] = "has not one magnitude per output, as peft's have"
        return
    inputs = foreign[f"{base}{ends[0]}.weight"].shape[1]
    state = {
        f"{base}{ends[0]}.weight": torch.ones(1, inputs),
        f"{base}{ends[1]}.weight": scale.reshape(-1, 1),
    }
    if f"{base}.alpha" in foreign:
        state[f"{base}.alpha"] = torch.ones(())
    for key, tensor in _by_diffusers(pipeline, state)[0].items():
        path = _own(key, prefix, parts)
        if path is not None and path.endswith(".lora_B.weight"):
            made.state[path.removesuffix(".lora_B.weight") + MAGNITUDE] = tensor.flatten()


# ---- from keys to layers


def layers_of(made: Converted, notes: Mapping, prefix: str) -> dict[str, Layer]:
    """The layers; notes: peft's. Raises UserError if matrices are missing or do not fit."""
    layers: dict[str, Layer] = {}
    for key, a in made.state.items():
        path, is_down, _ = key.partition(".lora_A.weight")
        if not is_down:
            if not key.endswith((".lora_B.weight", ".lora_B.bias", MAGNITUDE)):
                made.unusable[key] = "is of no LoRA of a linear layer"
            elif f"{path_of(key)}.lora_A.weight" not in made.state:
                raise UserError(f"'{key[:200]}' has no lora_A beside it: the file is damaged")
            continue
        b = made.state.get(f"{path}.lora_B.weight")
        if b is None:
            raise UserError(f"'{key[:200]}' has no lora_B beside it: the file is damaged")
        if a.ndim > 2 and b.ndim > 2:
            made.unusable[key] = "is of a convolution"
            continue
        bias, length = made.state.get(f"{path}.lora_B.bias"), made.state.get(path + MAGNITUDE)
        fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1] and min(*a.shape, *b.shape) > 0
        rows = [x.shape for x in (bias, length) if x is not None]
        if not fits or any(shape != b.shape[:1] for shape in rows):
            raise UserError(f"'{key[:200]}' and what is beside it do not fit together")
        scale = _scale(path, len(a), made.alphas, notes, prefix)
        layers[path] = Layer(a, b, scale, bias, length)
    return layers


def path_of(key: str) -> str:
    """The layer's path in a key of diffusers."""
    return re.split(r"\.lora_(?:[AB]\.|magnitude_vector)", key)[0]


def _scale(path: str, rank: int, alphas: Mapping, notes: Mapping, prefix: str) -> float:
    """What a layer's product is multiplied with: alpha / rank, 1 where no alpha is known."""
    if path in alphas:
        return float(alphas[path]) / rank
    of_peft = notes.get("") or {
        key.removeprefix(f"{prefix}."): value
        for key, value in notes.items()
        if key.startswith(f"{prefix}.")
    }
    alpha: Any = of_peft.get("lora_alpha")
    if alpha is None:
        return 1.0
    patterns = of_peft.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), alpha)  # regular expressions
    return float(alpha) / (rank**0.5 if of_peft.get("use_rslora") else rank)


def _scaled(others: Mapping[str, Tensor], notes: Mapping) -> dict[str, Tensor]:
    """Tensors of other components with the scales that peft's notes tell, which are not written."""
    made = {}
    for key, tensor in others.items():
        name, _, rest = key.partition(".")
        scale = 1.0
        if rest.endswith(".lora_B.weight"):
            scale = _scale(rest.removesuffix(".lora_B.weight"), tensor.shape[-1], {}, notes, name)
        made[key] = scale * tensor
    return made
