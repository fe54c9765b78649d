"""Narrow blocks: stock diffusers blocks with some submodules swapped (PPCL, arXiv 2511.16156).

A linear FFN (Eq. 9) is a residual linear map of the post-attention stream, which is what a stock
block returns if its FFN returns zeros. A text run (Eq. 8) is a
row of blocks of which the first, the `source`, has a text stream; the others `borrow` its input of
the attention, and the last may `close` the run by making the text stream that follows it. Where
nothing follows that would read one, the first block does nothing but `lend` that input. In
between, the text stream of the blocks is a carry: the source's text output and that attention
input, side by side along channels. The stock forwards compute all of it, and what is kept of a
block keeps its parameter names.

A modulation (AdaLN) matrix of low rank is a product, `up(down(x))`. The Linear of the model's last
AdaLN can be one, too; there the module that holds it counts as the block.

This file needs nothing but torch and diffusers, for its text travels beside exported weights, with
that of narrow_layers.py, block_class.py and pruned_class.py, which tells how.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppcl.pruning.block_class import CAPTURE, block_class
from ppcl.pruning.narrow_layers import (
    Borrowed,
    LowRank,
    Open,
    Residual,
    Shut,
    drop,
    is_low_rank,
    nothing,
    same,
    zero_linear,
)


class _Narrow(nn.Module):
    """What a narrow block has beside what its stock class says, for type checkers alone."""

    narrowed: dict[str, Any]
    map_paths: dict[str, str]
    linear_ffn: nn.ModuleDict
    text_output: Residual


def narrow(block: nn.Module, layout: dict, spec: dict) -> nn.Module:
    """Narrows a stock block in place and returns it. New maps start as identities; products of low
    rank start at zero.

    Args:
        layout: where the block's parts are (`family.BlockList.layout`).
        spec: `linear_ffn`, the streams whose FFN becomes linear; `text`, the block's role in a
            text run: own (none), source, lend, borrow or close; and `ranks` (see `lower`). Each may
            be missing. It stays with the block as `narrowed`.

    Raises:
        ValueError: a block of this class, or in this role, has no such part; or it is narrow, but
            for ranks.
    """
    role, streams = spec.get("text", "own"), spec.get("linear_ffn", ())
    ranks = spec.get("ranks", {})
    before = getattr(block, "narrowed", {})
    if set(before) - {"ranks"}:
        raise ValueError(f"the block is narrow already: {before}")
    roles, keys = ("own", "source", "lend", "borrow", "close"), {"text", "linear_ffn", "ranks"}
    listed = isinstance(streams, list | tuple) and all(isinstance(s, str) for s in streams)
    if role not in roles or set(spec) - keys or not isinstance(ranks, dict) or not listed:
        raise ValueError(f"{spec} is not what `narrow` can do; see there")
    if set(spec) == {"ranks"}:
        return lower(block, ranks)
    if missing := set(streams) - set(layout.get("ffn", ())):
        raise ValueError(f"blocks of this class have no {missing.pop()} FFN that could be linear")
    if role != "own" and not layout.get("text"):
        raise ValueError("blocks of this class have no text stream that could be borrowed")
    if role not in ("own", "source") and "text" in streams:
        raise ValueError("a text stream that is borrowed, or unread, has no FFN to be linear")
    if streams:
        ffns = {s: block.get_submodule(layout["ffn"][s]["ffn"]) for s in streams}
        block.linear_ffn = nn.ModuleDict({s: _in_place_of(ffn) for s, ffn in ffns.items()})
    for stream in streams:
        _drop_ffn(block, layout["ffn"][stream])
    if role != "own":
        _text_run(block, layout, role)
    made = cast(_Narrow, block)
    stock: type = type(block)
    made.narrowed = {"linear_ffn": list(streams), "text": role}
    paths = {f"ffn/{s}": f"linear_ffn.{s}" for s in streams}
    if role in ("borrow", "close"):
        paths["text/input"] = f"{layout['text']['norm']}.linear"
    if role == "close":
        paths["text/output"] = "text_output.linear"
    made.map_paths = paths
    block.__class__ = block_class(stock, role, tuple(streams), json.dumps(layout))
    if left := {path: rank for path, rank in before.get("ranks", {}).items() if held(block, path)}:
        made.narrowed["ranks"] = left
    return lower(block, ranks)


def lower(block: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Puts products of low rank in place of modulation matrices of a block, narrow or not, or of
    the module that holds the Linear of the last AdaLN. In place; they start at zero.

    Args:
        ranks: path of the Linear in the stock block -> rank. They stay in `narrowed`.

    Raises:
        ValueError: the block has no such matrix any more, or it is a product already.
    """
    for path, rank in ranks.items():
        place = held(block, path)
        linear = place and block.get_submodule(place)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{type(block).__name__}: {path} can't have rank {rank}")
        shape = linear.in_features, linear.out_features
        # Of a config that comes with weights; LoRAs widen a product beyond the matrix's own rank.
        if type(rank) is not int or not 1 <= rank <= sum(shape):
            raise ValueError(f"{type(block).__name__}: {path} can't have rank {rank}")
        block.set_submodule(place, LowRank(*shape, rank, linear.weight))
    if ranks:
        before = getattr(block, "narrowed", {})
        cast(_Narrow, block).narrowed = before | {"ranks": before.get("ranks", {}) | dict(ranks)}
    return block


def spec_of(module: nn.Module) -> Mapping[str, Any]:
    """The spec of a narrow block, see `narrow`; empty for any other module."""
    return getattr(module, "narrowed", {})


def set_rank(block: nn.Module, path: str, rank: int) -> None:
    """Tells the spec of a block that a product of it has another rank now."""
    ranks = {"ranks": {**spec_of(block)["ranks"], path: rank}}
    cast(_Narrow, block).narrowed = {**spec_of(block), **ranks}


def held(block: nn.Module, path: str) -> str:
    """Where a modulation matrix of the stock block is in a block that may be narrow: a Linear or a
    `LowRank`; empty if it is gone."""
    place = path
    try:
        module = block.get_submodule(path)
        if isinstance(module, nn.Sequential):  # with an `Open`, for a linear FFN
            place, module = f"{path}.0", module[0]
    except AttributeError:
        return ""
    maps_at = getattr(block, "map_paths", {}).values()
    known = isinstance(module, nn.Linear) or is_low_rank(module)
    return place if known and place not in maps_at else ""


def maps(block: nn.Module) -> dict[str, nn.Linear]:
    """The new linear maps of a block, none of a stock one; each holds W and b of x + W x + b.

    `ffn/<stream>`: post-attention stream -> the block's output. `text/input` (l^z): the source's
    attention input -> the block's own. `text/output` (l^h): the source's text output -> that of the
    run.
    """
    paths = getattr(block, "map_paths", {})
    return {name: linear_at(block, path) for name, path in paths.items()}


def matrix(block: nn.Module, place: str) -> nn.Linear | LowRank:
    """A modulation matrix of a block, or the product in its place, from where it is `held`."""
    module = block.get_submodule(place)
    return module if is_low_rank(module) else linear_at(block, place)


def linear_at(block: nn.Module, path: str) -> nn.Linear:
    """A Linear of a block. Raises ValueError if there is something else."""
    module = block.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{type(block).__name__}: {path} is no Linear")
    return module


def _drop_ffn(block: nn.Module, parts: dict) -> None:
    # Without an FFN the stock forward returns the stream after attention, which the map gets.
    width = width_of(block.get_submodule(parts["ffn"]))
    drop(block, parts["norm"], same)
    drop(block, parts["ffn"], nothing)
    if parts["after"]:
        drop(block, parts["after"], same)
    _cut_modulation(block, parts["modulation"], *(width * part for part in parts["parts"]))


def _cut_modulation(block: nn.Module, path: str | None, first: int, end: int) -> None:
    """Cuts out what a modulation gives from output `first` on and before `end`."""
    if path is None:
        return  # shared by all blocks
    modulation = matrix(block, path)
    rows = modulation.up if is_low_rank(modulation) else modulation
    for name, whole in list(rows.named_parameters()):
        kept = torch.cat([whole.detach()[:first], whole.detach()[end:]])
        setattr(rows, name, nn.Parameter(kept, requires_grad=whole.requires_grad))
    rows.out_features -= end - first
    parent, _, name = path.rpartition(".")
    holder, opened = block.get_submodule(parent), Open(first, end - first)
    if isinstance(holder, nn.Sequential):
        holder.append(opened)
    else:
        setattr(holder, name, nn.Sequential(modulation, opened))


def _text_run(block: nn.Module, layout: dict, role: str) -> None:
    text, ffn = layout["text"], layout["ffn"]["text"]
    if role in ("source", "lend"):
        attention = block.get_submodule(text["attention"])
        hook = functools.partial(_capture, text["argument"])
        attention.register_forward_pre_hook(hook, with_kwargs=True)
        for path in text["others"]:
            if getattr(block, path, None) is not None:
                block.get_submodule(path).register_forward_pre_hook(_ignore, with_kwargs=True)
    if role == "source":
        return
    # Text queries have their effect on the text output alone, which nothing reads. Zeros are
    # finite in every dtype, so no gradient through the attention is spoilt by them.
    projection, norm = text["query"]
    drop(block, projection, nothing)
    if getattr(block.get_submodule(text["attention"]), norm.rpartition(".")[2]) is not None:
        drop(block, norm, same)
    if role == "lend":
        _drop_ffn(block, ffn | {"parts": (2, 6)})  # the attention's gate goes, too
        drop(block, text["output"], nothing)
        return
    output = linear_at(block, text["output"])
    width, like = output.out_features, output.weight
    if text["modulation"]:
        block.set_submodule(text["modulation"], Shut(6 * width))
    for path in (ffn["norm"], ffn["ffn"], text["output"]):
        drop(block, path, same)
    linear = zero_linear(width, width, like)
    made = Borrowed(linear, text["extras"]) if text["extras"] else Residual(linear)
    block.set_submodule(text["norm"], made)
    if role == "close":
        cast(_Narrow, block).text_output = Residual(zero_linear(width, width, like))


def _in_place_of(ffn: nn.Module) -> nn.Linear:
    """A zero map between an FFN's channels."""
    width = width_of(ffn)
    return zero_linear(width, width, next(p for p in ffn.parameters() if p.ndim > 1))


def width_of(ffn: nn.Module) -> int:
    """Channels of an FFN's stream: the shorter side of its matrices, as it widens."""
    return min(next(p for p in ffn.parameters() if p.ndim > 1).shape[:2])


def _capture(argument: str, _attention: nn.Module, args: tuple, kwargs: dict):
    taken = kwargs.pop(CAPTURE)
    taken.append(kwargs[argument])
    return args, kwargs


def _ignore(_module: nn.Module, args: tuple, kwargs: dict):
    kwargs.pop(CAPTURE, None)
    return args, kwargs


def specs(transformer: nn.Module) -> dict[str, dict]:
    """Path of every narrow block in a transformer -> its spec."""
    modules = transformer.named_modules()
    return {path: module.narrowed for path, module in modules if hasattr(module, "narrowed")}


def stock_state(block: nn.Module) -> dict[str, Tensor]:
    """The weights of a block that its stock class has, too, in the shapes that they have there.

    Products of low rank are multiplied out. What is cut out of a modulation is zeros: with its gate
    shut, an FFN that is a linear map here does nothing there. Maps have no place there.
    """
    if not spec_of(block):
        return block.state_dict()
    made_of: Any = getattr(block, "made_of", None)  # of `block_class`
    layout = json.loads(made_of[3]) if made_of else {"ffn": {}}
    ffns = [parts["modulation"] for parts in layout["ffn"].values() if parts["modulation"]]
    new = ("linear_ffn.", *(f"{path}." for path in getattr(block, "map_paths", {}).values()))
    state = {key: x for key, x in block.state_dict().items() if not key.startswith(new)}
    for path in dict.fromkeys([*ffns, *spec_of(block).get("ranks", {})]):
        place = held(block, path)
        if not place:
            continue
        rows = matrix(block, place)
        whole = {"weight": rows.up.weight @ rows.down.weight if is_low_rank(rows) else rows.weight}
        bias = rows.up.bias if is_low_rank(rows) else rows.bias
        whole |= {} if bias is None else {"bias": bias}
        state = {key: x for key, x in state.items() if not key.startswith(f"{place}.")}
        holder = block.get_submodule(place.rpartition(".")[0])
        opened: list[Any] = [m for m in holder.children() if type(m).__name__ == Open.__name__]
        for name, x in whole.items():
            for cut in opened if isinstance(holder, nn.Sequential) else ():
                zeros = x.new_zeros(cut.width, *x.shape[1:])
                x = torch.cat([x[: cut.at], zeros, x[cut.at :]])
            state[f"{path}.{name}"] = x.detach()
    return state


def stock_shapes(blocks: nn.ModuleList, state: dict, prefix: str, _metadata: dict) -> None:
    """A hook: the state of a list of blocks alone is that of stock ones, as `from_transformer` of
    ControlNets reads it; as part of a model's it is the blocks' own."""
    if prefix:
        return
    state.clear()
    for number, block in enumerate(blocks):
        state.update({f"{number}.{key}": x for key, x in stock_state(block).items()})
