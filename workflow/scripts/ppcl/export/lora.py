"""LoRAs of the teacher, put into a pruned model whose modulation is of low rank.

A LoRA adds s B A to a matrix W, with A [p, d] and B [out, p]. Where the pruned model has a product
up (down x) + bias of rank r in place of W, there are two ways to add it.

`merge` makes a product of rank r + p. The LoRA's change stays exact, since A sees x itself:

    up' = [up, s B],   down' = [down; A]

`projected` keeps the rank and makes a LoRA of `up` alone, which sees only down x [r]. With mean m
and covariance C [d, d] of the inputs x, A' fits A x by least squares from down x, and a bias of B
corrects the mean:

    A' = A C down^T (down C down^T)^+,   bias of B: s B (A m - A' down m)
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.pruning import narrow
from ppcl.pruning.narrow_layers import LowRank, Open, is_low_rank
from ppcl.pruning.units import Matrix
from ppcl.runtime import devices
from ppcl.transformer import blocks


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to a Linear: scale * (b (a x) + bias).

    a: [p, inputs]. b: [outputs, p]. bias: [outputs], or None.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    def without(self, at: int, width: int) -> "Layer":
        """Without `width` outputs from `at` on, which a linear FFN cuts out of a modulation."""
        kept = [*range(at), *range(at + width, len(self.b))]
        bias = None if self.bias is None else self.bias[kept]
        return Layer(self.a, self.b[kept], self.scale, bias)


def read(pipeline: type[DiffusionPipeline], path: Path, component: str) -> dict[str, Layer]:
    """The layers of a LoRA file by the path of their Linear, in any format that diffusers reads.

    Args:
        pipeline: class of the teacher's pipeline, which knows its formats.
        component: the pipeline's component that is pruned; layers of others are left out.

    Raises:
        UserError: the file can't be read, is more than a LoRA of linear layers, or has no layer of
            the component.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"--lora: diffusers has no LoRAs for {pipeline.__name__}")
    if path.suffix != ".safetensors":  # diffusers would unpickle it
        raise UserError(f"--lora: {path} is no .safetensors file; convert it")
    if not path.is_file():  # diffusers would look for owner/name/file on the Hub
        raise UserError(f"--lora: {path} does not exist; name a file on this disk")
    more = {"weight_name": path.name, "use_safetensors": True, "return_lora_metadata": True}
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        more["return_alphas"] = True  # classes without it have put them into the weights
    try:
        state, *alphas, about = pipeline.lora_state_dict(str(path.parent), **more)
    except Exception as error:  # diffusers raises many kinds; all mean "not such a file"
        raise UserError(f"--lora: {path} can't be read as a LoRA: {error}") from error
    try:
        layers = _layers(path, state, (alphas[0] if alphas else None) or {}, about or {}, component)
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--lora: {path} can't be read as a LoRA: {error!r}") from error
    if not layers:
        raise UserError(f"--lora: {path} has no layers of '{component}'")
    return layers


def _layers(
    path: Path, state: Mapping[str, Tensor], known: Mapping, about: Mapping, component: str
) -> dict[str, Layer]:
    """As `read`, of what diffusers has read: tensors, alphas (`known`), peft's notes (`about`)."""
    prefix, layers = f"{component}.", {}
    for key in state:
        name, is_down, _ = key.partition(".lora_A.weight")
        if key.startswith(prefix) and not is_down and ".lora_B." not in key:
            raise UserError(f"--lora: {path}: '{key}' is of no LoRA of linear layers (DoRA?)")
        if key.startswith(prefix) and is_down:
            a, b = state[key], state[f"{name}.lora_B.weight"]
            bias = state.get(f"{name}.lora_B.bias")
            fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1]
            if not fits or bias is not None and bias.shape != b.shape[:1]:
                raise UserError(f"--lora: {path}: '{key}' is of no linear layer")
            scale = _scale(name, len(a), known, about, component)
            layers[name.removeprefix(prefix)] = Layer(a, b, scale, bias)
    return layers


def _scale(name: str, rank: int, alphas: Mapping, about: Mapping, component: str) -> float:
    """The scale of a layer: alpha / rank (rslora: alpha / sqrt(rank)); 1 where alpha is unknown."""
    if f"{name}.alpha" in alphas:
        return float(alphas[f"{name}.alpha"]) / rank
    alpha = about.get(f"{component}.lora_alpha")
    if alpha is None:
        return 1.0
    path = name.removeprefix(f"{component}.")
    for key, own in (about.get(f"{component}.alpha_pattern") or {}).items():
        if path == key or path.endswith(f".{key}"):
            alpha = own
    return float(alpha) / (rank**0.5 if about.get(f"{component}.use_rslora") else rank)


# ---- where its layers go


@dataclass(frozen=True)
class Place:
    """Where a layer goes.

    Attributes:
        path: of its Linear, or of the low-rank product in its place, in the pruned model.
        layer: without the outputs that the pruned model has cut out.
        matrix: the Linear's block in the teacher and its path there, which name a modulation.
    """

    path: str
    layer: Layer
    matrix: Matrix


def places(
    model: nn.Module, block_map: list[list[int]], layers: Mapping[str, Layer]
) -> tuple[dict[str, Place], list[str]]:
    """Finds the place of every layer in a pruned model.

    A block that replaces several has places for the layers of the first of them alone.

    Returns:
        Path in the teacher -> place; and the paths of the layers that have no place.

    Raises:
        UserError: a layer has another shape than its Linear, or a bias that the Linear lacks.
    """
    placed, gone = {}, []
    for path, layer in layers.items():
        holder, prefix, matrix = _holder(model, block_map, path)
        inside = _place(holder, matrix[1]) if holder is not None else ""
        if holder is None or not inside:
            gone.append(path)
            continue
        module = narrow.matrix(holder, inside)
        shape = _shape(module)
        if opened := _opened(holder, inside):
            layer = layer.without(opened.at, opened.width)
        if (layer.a.shape[1], len(layer.b)) != shape:
            raise UserError(
                f"--lora: {path} is of {layer.a.shape[1]} inputs and {len(layer.b)} outputs, but "
                f"the model's has {shape[0]} and {shape[1]}: it is of another model"
            )
        if layer.bias is not None and not is_low_rank(module) and module.bias is None:
            raise UserError(
                f"--lora: {path} has a bias, but the model's has none: it is of another model"
            )
        placed[path] = Place(prefix + inside, layer, matrix)
    return placed, gone


def _holder(
    model: nn.Module, block_map: list[list[int]], path: str
) -> tuple[nn.Module | None, str, Matrix]:
    """The module of a pruned model that a path of the teacher leads into.

    Returns:
        The block (None if it is gone; the model itself for a path outside of the blocks), the
        beginning of the block's own path in the model, and the matrix: number of the teacher's
        block (the number of all blocks for a path outside of them), and the path inside.
    """
    attribute, _, rest = path.partition(".")
    members = [b for b in blocks.block_sequence(model) if b.list.attribute == attribute]
    if not members:
        return model, "", (block_map[-1][-1] + 1, path)
    number, _, inside = rest.partition(".")
    if not number.isdecimal():
        return None, "", (-1, inside)
    old = block_map[members[0].index][0] + int(number)
    block = next((b for b in members if block_map[b.index][0] == old), None)
    if block is None:
        return None, "", (old, inside)
    return block.module, f"{attribute}.{block.index - members[0].index}.", (old, inside)


def _place(holder: nn.Module, path: str) -> str:
    """Where a Linear of the stock block is, or the product in its place; empty if it is gone."""
    parent, _, name = path.rpartition(".")
    try:
        wrapped = type(holder.get_submodule(parent)).__name__ in ("Residual", "Borrowed")
    except AttributeError:
        return ""
    return "" if wrapped else narrow.held(holder, path)


def _opened(holder: nn.Module, place: str) -> Open | None:
    """The `Open` behind a modulation that has outputs cut out; None behind any other."""
    parent = holder.get_submodule(place.rpartition(".")[0])
    inside = parent if isinstance(parent, nn.Sequential) else ()
    return next(filter(_is_open, inside), None)


def _is_open(module: nn.Module) -> TypeGuard[Open]:
    """Whether it is an `Open`, of this process's module or of one beside exported weights."""
    return type(module).__name__ == Open.__name__


def _shape(module: nn.Linear | LowRank) -> tuple[int, int]:
    if is_low_rank(module):
        return module.down.in_features, module.up.out_features
    return module.in_features, module.out_features


# ---- exactly: widened and merged


@torch.no_grad()
def merge(model: nn.Module, block_map: list[list[int]], layers: Mapping[str, Layer]) -> list[str]:
    """Adds a LoRA to a model's weights, in place; products of low rank become wider by its rank.

    Returns:
        Paths of layers that the model has no place for.
    """
    placed, gone = places(model, block_map, layers)
    for place in placed.values():
        module, layer = narrow.matrix(model, place.path), place.layer
        if is_low_rank(module):
            bias = _widen(model, place.path, module, layer).up.bias
        else:
            added = layer.scale * (layer.b.double() @ layer.a.double())
            module.weight.copy_(module.weight.double() + added.to(module.weight.device))
            bias = module.bias
        if layer.bias is not None:
            bias.add_((layer.scale * layer.bias).to(bias))
    return gone


def _widen(model: nn.Module, place: str, before: LowRank, layer: Layer) -> LowRank:
    like, (inputs, outputs) = before.up.weight, _shape(before)
    wide = LowRank(inputs, outputs, before.up.in_features + len(layer.a), like)
    wide.up.weight.copy_(torch.cat([like, (layer.scale * layer.b).to(like)], dim=1))
    wide.down.weight.copy_(torch.cat([before.down.weight, layer.a.to(like)]))
    wide.up.bias.copy_(before.up.bias)
    model.set_submodule(place, wide)
    for path, module in model.named_modules():  # a block's spec, saved in the config, has the rank
        for inside in narrow.spec_of(module).get("ranks", {}):
            if f"{path}.{narrow.held(module, inside)}" == place:
                narrow.set_rank(module, inside, wide.up.in_features)
    return wide


# ---- for the rank as it is


@torch.no_grad()
def projected(
    model: nn.Module,
    block_map: list[list[int]],
    layers: Mapping[str, Layer],
    conditioning: modulation.Conditioning,
) -> tuple[dict[str, Layer], dict[str, float], list[str]]:
    """A LoRA for the model as it is: of `up` alone where the modulation is a product.

    Args:
        conditioning: the sums over each modulation's inputs that `extract` wrote.

    Returns:
        Layers by path in the model; for projected layers, by path in the teacher, the share of the
        mean square of their outputs that is lost (0 to 1); and the paths of layers that the model
        has no place for.

    Raises:
        UserError: as `places`, or the sums are of another number of inputs.
    """
    placed, gone = places(model, block_map, layers)
    made, lost = {}, {}
    for path, place in placed.items():
        module = narrow.matrix(model, place.path)
        if is_low_rank(module):
            moments = conditioning.of(place.matrix)
            made[f"{place.path}.up"], lost[path] = _project(module, place.layer, moments)
        else:
            made[place.path] = place.layer
    return made, lost, gone


def _project(module: LowRank, layer: Layer, moments: modulation.Moments) -> tuple[Layer, float]:
    device = devices.statistics_device(module.up.weight.device)
    if len(moments.sum) != module.down.in_features:
        raise UserError(
            f"--conditioning: is of {len(moments.sum)} inputs of a modulation that has "
            f"{module.down.in_features}: it is of another model"
        )
    spread = modulation.Spread.of(moments, device)
    down, a, b = (x.to(device).double() for x in (module.down.weight, layer.a, layer.b))
    root = spread.root(spread.rank)
    seen, wanted = down @ root, a @ root
    a_new = wanted @ torch.linalg.pinv(seen, rtol=1e-10)
    offset = b @ (a @ spread.mean - a_new @ (down @ spread.mean))
    if layer.bias is not None:
        offset = offset + layer.bias.to(device).double()
    missed = (b @ (wanted - a_new @ seen)).square().sum()
    power = (b @ wanted).square().sum() + (b @ (a @ spread.mean)).square().sum()
    share = float(missed / power) if power > 0 else 0.0
    return Layer(a_new.to(layer.a), layer.b, layer.scale, offset.to(layer.b)), share


def state(layers: Mapping[str, Layer], component: str) -> dict[str, Tensor]:
    """Tensors of a LoRA file for `load_lora_weights`; scales are multiplied into B and its bias."""
    tensors, biased = {}, any(layer.bias is not None for layer in layers.values())
    for path, layer in layers.items():
        tensors[f"{component}.{path}.lora_A.weight"] = layer.a
        tensors[f"{component}.{path}.lora_B.weight"] = layer.scale * layer.b
        if biased:  # in peft, all layers have a bias, or none
            bias = layer.bias if layer.bias is not None else layer.b.new_zeros(len(layer.b))
            tensors[f"{component}.{path}.lora_B.bias"] = layer.scale * bias
    return tensors
