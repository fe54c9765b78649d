"""LoRA files, written in four styles.

Original names of Linears are the registry's (`Family.lora_names`). What is written is read back as
diffusers reads it: a style that it would misread, or not read at all, is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import state_dict_utils
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.export import lora_files
from ppcl.export.lora_files import MAGNITUDE, PEFT
from ppcl.export.lora_layers import Layer, LoraFile
from ppcl.pruning import narrow
from ppcl.transformer import blocks

ROUNDING = 0.02  # of a layer's largest value; bfloat16 rounds each factor by 0.004


def styled(
    file: LoraFile, style: str, pipeline: type[DiffusionPipeline], component: str, model: nn.Module
) -> dict[str, Tensor]:
    """A LoRA as the tensors of a file in a style, in the type that the one read was in.

    Args:
        style: one of STYLES.
        model: the one that the LoRA is for.

    Raises:
        UserError: the style can't hold it, or diffusers would not read it back for this pipeline.
    """
    prefix = lora_files.prefix_of(pipeline, component)
    try:
        state = STYLES[style](file, prefix, model)
    except ValueError as error:
        raise _refused(style, pipeline, error) from error
    state = {key: value.to(file.dtype).contiguous() for key, value in state.items()}
    parts = {name for name, _ in model.named_children()}
    try:
        again = lora_files.converted(pipeline, prefix, state, parts)
        layers = lora_files.layers_of(again, {}, prefix)
    except Exception as error:  # whatever a converter raises
        raise _refused(style, pipeline, f"diffusers can't read it back ({error!r})") from error
    for path in file.layers.keys() | layers.keys():
        if not _alike(file.layers.get(path), layers.get(path)):
            raise _refused(style, pipeline, f"diffusers does not read {path} back as it was")
    return state


def _refused(style: str, pipeline: type, why: object) -> UserError:
    return UserError(
        f"--style: {style} can't hold this LoRA of {pipeline.__name__}: {why}; choose diffusers"
    )


def _alike(one: Layer | None, other: Layer | None) -> bool:
    """Whether two layers do the same, but for rounding; a missing one adds nothing."""
    if one is None or other is None:
        left = one or other
        return left is None or left.magnitude is None and not _felt(left).any()
    if (one.magnitude is None) != (other.magnitude is None):
        return False
    wanted = _felt(one)
    return bool((wanted - _felt(other)).abs().max() <= ROUNDING * wanted.abs().max())


def _felt(layer: Layer) -> Tensor:
    """What it makes of a few random inputs, which is quicker than its product."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(layer.a.shape[1], 4, generator=generator)
    return layer.scale * layer.b @ (layer.a @ inputs)


def in_peft(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Layers as peft's state dict of the model; their scales are in B."""
    tensors, biased = {}, any(layer.bias is not None for layer in layers.values())
    for path, layer in layers.items():
        tensors[f"{path}.lora_A.weight"] = layer.a
        tensors[f"{path}.lora_B.weight"] = layer.scale * layer.b
        if biased:  # peft gives all layers one, or none
            bias = layer.bias if layer.bias is not None else layer.b.new_zeros(len(layer.b))
            tensors[f"{path}.lora_B.bias"] = layer.scale * bias
        if layer.magnitude is not None:
            tensors[path + MAGNITUDE] = layer.magnitude
    return tensors


def _diffusers(file: LoraFile, prefix: str, _model: nn.Module) -> dict[str, Tensor]:
    state = {f"{prefix}.{key}": tensor for key, tensor in in_peft(file.layers).items()}
    return state | file.others


def _peft(file: LoraFile, _prefix: str, _model: nn.Module) -> dict[str, Tensor]:
    _alone(file)
    return {PEFT + key: tensor for key, tensor in in_peft(file.layers).items()}


def _comfyui(file: LoraFile, _prefix: str, model: nn.Module) -> dict[str, Tensor]:
    _alone(file)
    state = {}
    for name, layer in _original(file.layers, model).items():
        state[f"diffusion_model.{name}.lora_down.weight"] = layer.a
        state[f"diffusion_model.{name}.lora_up.weight"] = layer.scale * layer.b
        if layer.magnitude is not None:
            state[f"diffusion_model.{name}.dora_scale"] = layer.magnitude[:, None]
    return state


def _kohya(file: LoraFile, _prefix: str, model: nn.Module) -> dict[str, Tensor]:
    _alone(file)
    layers = _original(file.layers, model)
    plain = {name: replace(x, scale=1.0, magnitude=None) for name, x in layers.items()}
    named = {f"unet.{key}": tensor for key, tensor in in_peft(plain).items()}
    made = state_dict_utils.convert_state_dict_to_kohya(named)
    for name, layer in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        made[f"{key}.alpha"] = torch.tensor(layer.scale * len(layer.a))
        if layer.magnitude is not None:
            made[f"{key}.dora_scale"] = layer.magnitude[:, None]
    return made


STYLES = {"diffusers": _diffusers, "peft": _peft, "kohya": _kohya, "comfyui": _comfyui}


def _alone(file: LoraFile) -> None:
    if file.others:
        raise ValueError(f"it has layers of other components ({min(file.others)})")


# ---- original names


def _original(layers: Mapping[str, Layer], model: nn.Module) -> dict[str, Layer]:
    """Layers by the original names of their Linears; several of diffusers may be one there."""
    if biased := next((path for path, layer in layers.items() if layer.bias is not None), None):
        raise ValueError(f"{biased} has a bias")
    if not (names := blocks.family(model).lora_names):
        return dict(layers)
    made: dict[str, Layer] = {}
    for path, layer in layers.items():
        name, paths = _named(path, names)
        if len(paths) == 1:
            made[name] = layer
        elif name not in made:
            made[name] = _side_by_side(name, [layers.get(p) for p in paths], paths, model)
    return made


def _named(path: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, list[str]]:
    """The original name of a Linear, and the paths of all that are one there."""
    for name, patterns in names.items():
        for pattern in patterns:
            match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), path)
            if match:
                return name.format(*match.groups()), [p.format(*match.groups()) for p in patterns]
    raise ValueError(f"the registry knows no original name of {path}")


def _side_by_side(name: str, held: list[Layer | None], paths: list[str], model: nn.Module) -> Layer:
    """One layer of several Linears of the same inputs, whose outputs lie side by side; one without
    a layer adds nothing. All get the same rank, by which diffusers tells them apart again."""
    layers = [layer for layer in held if layer is not None]
    lengths = [layer.magnitude for layer in layers if layer.magnitude is not None]
    if lengths and len(lengths) < len(held):
        raise ValueError(f"{name} is one Linear there, of which only some parts have magnitudes")
    rank, inputs = max(len(layer.a) for layer in layers), layers[0].a.shape[1]
    a, b = [], []
    for layer, path in zip(held, paths, strict=True):
        if layer is None:
            outputs = narrow.linear_at(model, path).out_features
            layer = Layer(torch.zeros(rank, inputs), torch.zeros(outputs, rank))
        more = rank - len(layer.a)
        a.append(nn.functional.pad(layer.a, (0, 0, 0, more)))
        b.append(nn.functional.pad(layer.scale * layer.b, (0, more)))
    whole = torch.cat(lengths) if lengths else None
    return Layer(torch.cat(a), torch.block_diag(*b), 1.0, None, whole)
