"""LoRAs of the teacher, put into a pruned model.

Blocks are renumbered by the block map, and one that stands for several takes the first one's.

On a modulation, a LoRA adds s B A to a matrix W, with A [p, d] and B [out, p]. Where the pruned
model has a product up (down x) + bias of rank r in place of W, there are two ways to add it.

`merge` makes a product of rank r + p. The LoRA's change stays exact, since A sees x itself:

    up' = [up, s B],   down' = [down; A]

`projected` keeps the rank and makes a LoRA of `up` alone, which sees only down x [r]. With mean m
and covariance C [d, d] of the inputs x, A' fits A x by least squares from down x, and a bias of B
corrects the mean:

    A' = A C down^T (down C down^T)^+,   bias of B: s B (A m - A' down m)

With magnitudes (DoRA) the rows of W + s B A are made as long as these say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.export.lora_layers import Layer
from ppcl.pruning import narrow
from ppcl.pruning.narrow_layers import LowRank, Open, is_low_rank
from ppcl.pruning.units import Matrix
from ppcl.runtime import devices
from ppcl.transformer import blocks

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
) -> tuple[dict[str, Place], dict[str, str]]:
    """By path in the teacher, the places of layers; and of those that have none, why.

    A block that stands for several has the place of the first of them.

    Raises:
        UserError: a layer has another shape than its Linear, or a bias that this has not.
    """
    placed, gone = {}, {}
    for path, layer in layers.items():
        holder, prefix, matrix = _holder(model, block_map, path)
        if holder is None:
            gone[path] = prefix
            continue
        inside = _place(holder, matrix[1])
        if not inside:
            cut = narrow.spec_of(holder)
            gone[path] = (
                "was cut out of this block"
                if cut
                else f"is no linear layer of a {type(model).__name__}"
            )
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
    """The block that a path of the teacher leads into, or else the model; what its own path begins
    with; and the number of the teacher's block, and the path in there. None, and why, where no
    block has a place for it."""
    attribute, _, rest = path.partition(".")
    members = [b for b in blocks.block_sequence(model) if b.list.attribute == attribute]
    if not members:
        return model, "", (block_map[-1][-1] + 1, path)
    number, _, inside = rest.partition(".")
    mine = {old for block in members for old in block_map[block.index]}
    old = min(mine) + int(number) if number.isascii() and number.isdecimal() else -1
    if old not in mine:
        return None, f"names a block that the teacher's {attribute} do not have", (old, inside)
    block = next(b for b in members if old in block_map[b.index])
    stands_for = block_map[block.index]
    if stands_for[0] != old:
        start = min(mine)
        why = (
            f"is of a block that is no more: {attribute}.{block.index - members[0].index} stands "
            f"for {stands_for[0] - start} to {stands_for[-1] - start} and begins as the first one"
        )
        return None, why, (old, inside)
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
def merge(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Adds a LoRA to a model's weights, in place; products of low rank become wider by its rank.

    layers: by their path in the model, as of `places`.
    """
    for path, layer in layers.items():
        module = narrow.matrix(model, path)
        if is_low_rank(module):
            module = _widen(model, path, module, layer)
            rows, weight = module.up, module.up.weight.double() @ module.down.weight.double()
        else:
            rows = module
            added = layer.scale * (layer.b.double() @ layer.a.double())
            weight = module.weight.double() + added.to(module.weight.device)
            module.weight.copy_(weight)
        if layer.magnitude is not None:
            longer = layer.magnitude.to(weight) / weight.norm(dim=1)
            rows.weight.copy_(rows.weight.double() * longer[:, None])
        if layer.bias is not None:
            rows.bias.add_((layer.scale * layer.bias).to(rows.bias))


def _widen(model: nn.Module, place: str, before: LowRank, layer: Layer) -> LowRank:
    like, (inputs, outputs) = before.up.weight, _shape(before)
    wide = LowRank(inputs, outputs, before.up.in_features + len(layer.a), like)
    wide.up.weight.copy_(torch.cat([like, (layer.scale * layer.b).to(like)], dim=1))
    wide.down.weight.copy_(torch.cat([before.down.weight, layer.a.to(like)]))
    wide.up.bias.copy_(before.up.bias)
    model.set_submodule(place, wide)
    for path, module in model.named_modules():  # whose spec tells its rank, for the config
        for inside in narrow.spec_of(module).get("ranks", {}):
            if f"{path}.{narrow.held(module, inside)}" == place:
                narrow.set_rank(module, inside, wide.up.in_features)
    return wide


# ---- for the rank as it is


@torch.no_grad()
def projected(
    model: nn.Module,
    placed: Mapping[str, Place],
    conditioning: modulation.Conditioning | None,
) -> tuple[dict[str, Layer], dict[str, float]]:
    """A LoRA for the model as it is: of `up` alone where the modulation is a product.

    Returns:
        Layers by path in the model; and by path in the teacher, the share of the mean square of a
        projected layer's outputs that is lost.

    Raises:
        UserError: a modulation's layer needs the moments of the inputs, and there are none; or it
            has magnitudes, which a layer of `up` can't have.
    """
    made, lost = {}, {}
    for path, place in placed.items():
        module = narrow.matrix(model, place.path)
        if not is_low_rank(module):
            made[place.path] = place.layer
            continue
        if place.layer.magnitude is not None or conditioning is None:
            what = "--conditioning (activations/conditioning.safetensors of the run)"
            if place.layer.magnitude is not None:
                what = "another LoRA: magnitudes (DoRA) can't be projected"
            raise UserError(
                f"--lora: {path} is of a modulation that has a low rank here, which needs {what}; "
                "or use --merge, which loses nothing"
            )
        moments = conditioning.of(place.matrix)
        made[f"{place.path}.up"], lost[path] = _project(module, place.layer, moments)
    return made, lost


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
