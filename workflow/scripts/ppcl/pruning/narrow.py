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

This file needs nothing but torch and diffusers, for its text travels beside exported weights.
There it ends with lines that `module_text` adds, which define the class to load.
"""

import copy
import functools
import hashlib
import inspect
import json
import os
import pprint
import sys  # noqa: F401  the added lines use it
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

MODULE = "ppcl_narrow"  # how the file's name beside exported weights begins (`module_name`)
_END = "# ---- Added by the export"
_TEXT = Path(__file__).read_text(encoding="utf-8").split("\n" + _END)[0]
_CAPTURE = "ppcl_capture"


class Residual(nn.Module):
    """x + W x + b."""

    # Not a subclass of nn.Linear: quantizers put their own Linear in place of those.
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Borrowed(nn.Module):
    """Stands for a norm that also returns gates, shifts and scales: x + W x + b, and zeros."""

    def __init__(self, linear: nn.Linear, extras: int):
        super().__init__()
        self.linear, self.extras = linear, extras

    def forward(self, x: Tensor, *_args, **_kwargs) -> tuple[Tensor, ...]:
        mapped = x + self.linear(x)
        return (mapped, *[mapped.new_zeros(len(x), x.shape[-1])] * self.extras)


class Open(nn.Module):
    """Adds what is cut out of a modulation: zeros, which nothing reads any more, from `at` on."""

    def __init__(self, at: int, width: int):
        super().__init__()
        self.at, self.width = at, width

    def forward(self, kept: Tensor) -> Tensor:
        cut = kept.new_zeros(*kept.shape[:-1], self.width)
        return torch.cat([kept[..., : self.at], cut, kept[..., self.at :]], dim=-1)


class Shut(nn.Module):
    """Stands for a modulation: shift 0, scale 0, gate 0."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, temb: Tensor) -> Tensor:
        return temb.new_zeros(*temb.shape[:-1], self.width)


class LowRank(nn.Module):
    """Stands for a modulation's Linear: up(down(x)), with the bias on `up` alone."""

    def __init__(self, inputs: int, outputs: int, rank: int, like: Tensor):
        super().__init__()
        self.down = _zero_linear(inputs, rank, like, bias=False)
        self.up = _zero_linear(rank, outputs, like)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


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
    block.narrowed = {"linear_ffn": list(streams), "text": role}
    paths = {f"ffn/{s}": f"linear_ffn.{s}" for s in streams}
    if role in ("borrow", "close"):
        paths["text/input"] = f"{layout['text']['norm']}.linear"
    if role == "close":
        paths["text/output"] = "text_output.linear"
    block.map_paths = paths
    block.__class__ = _narrowed(type(block), role, tuple(streams), json.dumps(layout))
    if left := {path: rank for path, rank in before.get("ranks", {}).items() if held(block, path)}:
        block.narrowed["ranks"] = left
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
        block.narrowed = before | {"ranks": before.get("ranks", {}) | dict(ranks)}
    return block


def held(block: nn.Module, path: str) -> str:
    """Where a modulation matrix of the stock block is in a block that may be narrow: a Linear or a
    `LowRank`; empty if it is gone."""
    place = path
    try:
        found = block.get_submodule(path)
        if isinstance(found, nn.Sequential):  # with an `Open`, for a linear FFN
            place, found = f"{path}.0", found[0]
    except AttributeError:
        return ""
    maps_at = getattr(block, "map_paths", {}).values()
    known = isinstance(found, nn.Linear) or is_low_rank(found)
    return place if known and place not in maps_at else ""


def is_low_rank(module: nn.Module) -> bool:
    """Whether it is a `LowRank`, of this module or of one beside exported weights."""
    return type(module).__name__ == LowRank.__name__


def maps(block: nn.Module) -> dict[str, nn.Linear]:
    """The new linear maps of a block, none of a stock one; each holds W and b of x + W x + b.

    `ffn/<stream>`: post-attention stream -> the block's output. `text/input` (l^z): the source's
    attention input -> the block's own. `text/output` (l^h): the source's text output -> that of the
    run.
    """
    paths = getattr(block, "map_paths", {})
    return {name: block.get_submodule(path) for name, path in paths.items()}


def _drop_ffn(block: nn.Module, parts: dict) -> None:
    # Without an FFN the stock forward returns the stream after attention, which the map gets.
    width = width_of(block.get_submodule(parts["ffn"]))
    _drop(block, parts["norm"], _same)
    _drop(block, parts["ffn"], _nothing)
    if parts["after"]:
        _drop(block, parts["after"], _same)
    _cut_modulation(block, parts["modulation"], *(width * part for part in parts["parts"]))


def _cut_modulation(block: nn.Module, path: str | None, first: int, end: int) -> None:
    """Cuts out what a modulation gives from output `first` on and before `end`."""
    if path is None:
        return  # shared by all blocks
    modulation = block.get_submodule(path)
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
    _drop(block, projection, _nothing)
    if getattr(block.get_submodule(text["attention"]), norm.rpartition(".")[2]) is not None:
        _drop(block, norm, _same)
    if role == "lend":
        _drop_ffn(block, ffn | {"parts": (2, 6)})  # the attention's gate goes, too
        _drop(block, text["output"], _nothing)
        return
    output = block.get_submodule(text["output"])
    width, like = output.out_features, output.weight
    if text["modulation"]:
        block.set_submodule(text["modulation"], Shut(6 * width))
    for path in (ffn["norm"], ffn["ffn"], text["output"]):
        _drop(block, path, _same)
    linear = _zero_linear(width, width, like)
    made = Borrowed(linear, text["extras"]) if text["extras"] else Residual(linear)
    block.set_submodule(text["norm"], made)
    if role == "close":
        block.text_output = Residual(_zero_linear(width, width, like))


def _drop(block: nn.Module, path: str, instead: Callable) -> None:
    # A function and no module, which adapters (LoRA) made for stock blocks would find and wrap.
    parent, _, name = path.rpartition(".")
    delattr(block.get_submodule(parent), name)
    setattr(block.get_submodule(parent), name, instead)


def _same(x: Tensor, *_args, **_kwargs) -> Tensor:
    return x


def _nothing(x: Tensor, *_args, **_kwargs) -> Tensor:
    return torch.zeros_like(x)


def _in_place_of(ffn: nn.Module) -> nn.Linear:
    """A zero map between an FFN's channels."""
    width = width_of(ffn)
    return _zero_linear(width, width, next(p for p in ffn.parameters() if p.ndim > 1))


def width_of(ffn: nn.Module) -> int:
    """Channels of an FFN's stream: the shorter side of its matrices, as it widens."""
    return min(next(p for p in ffn.parameters() if p.ndim > 1).shape[:2])


def _zero_linear(inputs: int, outputs: int, like: Tensor, bias: bool = True) -> nn.Linear:
    # An initialisation would draw from the global generator, and be overwritten.
    kind = {"bias": bias, "device": like.device, "dtype": like.dtype}
    made = nn.utils.skip_init(nn.Linear, inputs, outputs, **kind)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


def _capture(argument: str, _attention: nn.Module, args: tuple, kwargs: dict):
    taken = kwargs.pop(_CAPTURE)
    taken.append(kwargs[argument])
    return args, kwargs


def _ignore(_module: nn.Module, args: tuple, kwargs: dict):
    kwargs.pop(_CAPTURE, None)
    return args, kwargs


@functools.cache
def _narrowed(base: type, role: str, linear: tuple[str, ...], layout: str) -> type:
    """A subclass, by the same name, of a block's class: adds its linear FFNs' maps; in a text run,
    its text stream is a carry.

    A subclass, since hooks on the block should see what passes between blocks; by the same name,
    since diffusers finds the blocks to compile and not to split by name.
    """
    stock, where = base.forward, json.loads(layout)
    names = list(inspect.signature(stock).parameters)[1:]
    streams, text = where["outputs"], where["text"]

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs  # checkpointing gives positions
        taken: list[Tensor] = []  # local, so that recomputed and compiled calls have their own
        if role in ("source", "lend"):
            keywords = text["keywords"]
            given[keywords] = (given.get(keywords) or {}) | {_CAPTURE: taken}
        elif role != "own":
            carry = given[text["stream"]]
            own, attended = carry.chunk(2, dim=-1)
            given |= {text["stream"]: attended}
        returned = stock(self, **given)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        for stream in linear:
            place = streams.index(stream)
            outputs[place] = outputs[place] + self.linear_ffn[stream](outputs[place])
        if role in ("source", "lend"):
            place = streams.index("text")
            outputs[place] = torch.cat([outputs[place], taken[0]], dim=-1)
        elif role != "own":
            outputs[streams.index("text")] = self.text_output(own) if role == "close" else carry
        return tuple(outputs) if isinstance(returned, tuple) else outputs[0]

    body = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), body)


def specs(transformer: nn.Module) -> dict[str, dict]:
    """Path of every narrow block in a transformer -> its spec."""
    modules = transformer.named_modules()
    return {path: module.narrowed for path, module in modules if hasattr(module, "narrowed")}


def pruned(base: type, layouts: dict[str, dict]) -> type:
    """The class of a transformer with narrow blocks; its config has one key more than `base`.

    `narrow_blocks` maps the path of a block, or of what holds the Linear of the last AdaLN, to its
    spec (see `narrow`). A saved folder gets the
    module that loads it, also from `save_pretrained` of a pipeline.

    Args:
        base: a class of diffusers.
        layouts: name of each list of blocks -> the layout of its blocks.
    """

    @functools.wraps(base.__init__)
    def init(self, *args, narrow_blocks: dict[str, dict] | None = None, **kwargs):
        base.__init__(self, *args, **kwargs)
        narrow_blocks = {} if narrow_blocks is None else narrow_blocks
        if not isinstance(narrow_blocks, dict) or not all(
            isinstance(spec, dict) for spec in narrow_blocks.values()
        ):
            raise ValueError(
                "config.json: narrow_blocks should map the path of each narrow block to its spec"
            )
        self.register_to_config(narrow_blocks=narrow_blocks)
        for path, spec in self.config.narrow_blocks.items():
            narrow(self.get_submodule(path), layouts.get(path.rpartition(".")[0], {}), spec)

    # diffusers takes from this signature which keys of a config are the class's own.
    stock = inspect.signature(base.__init__)
    key = inspect.Parameter("narrow_blocks", inspect.Parameter.KEYWORD_ONLY, default=None)
    init.__signature__ = stock.replace(parameters=[*stock.parameters.values(), key])

    name, module = f"Pruned{base.__name__}", module_name(base, layouts)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        os.makedirs(save_directory, exist_ok=True)
        file = Path(save_directory, f"{module}.py")
        file.write_text(module_text(base, layouts), encoding="utf-8")
        base.save_config(self, save_directory, *args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        # The stock class reads the weights of text queries, also of blocks that have none.
        without = [m for m in self.modules() if getattr(m, "add_q_proj", None) is _nothing]
        for attention in without:
            key = attention.add_k_proj
            shape = key.in_features, key.out_features
            attention.add_q_proj = _zero_linear(*shape, key.weight, key.bias is not None)
        try:
            base.fuse_qkv_projections(self)
        finally:
            for attention in without:
                _drop(attention, "add_q_proj", _nothing)

    body = {
        "__doc__": f"A {base.__name__} with narrow blocks.",
        "__init__": init,
        "__module__": module,  # pipelines write it to model_index.json, as the name of the file
        "_tp_plan": None,  # the stock plan of tensor parallelism names layers that may be gone
        "fuse_qkv_projections": fuse_qkv_projections,
        "save_config": save_config,
        "stock": base,
    }
    return type(name, (base,), body)


def from_stock(transformer: nn.Module, layouts: dict[str, dict]) -> nn.Module:
    """A transformer that holds narrow blocks, as one of the class `pruned`; shares all modules."""
    made = copy.copy(transformer)
    made.__dict__.pop("forward", None)  # an offloading hook's, which runs the original
    made._modules = dict(transformer._modules)  # a shallow copy would share this mapping
    made.__class__ = pruned(getattr(type(transformer), "stock", type(transformer)), layouts)
    made.register_to_config(narrow_blocks=specs(transformer))
    return made


def module_name(base: type, layouts: dict[str, dict]) -> str:
    """Name of the module beside exported weights, which model_index.json gives: another one for
    every content, since diffusers keeps code of all folders in one place by its name."""
    content = hashlib.sha256(module_text(base, layouts).encode())
    return f"{MODULE}_{content.hexdigest()[:16]}"


def module_text(base: type, layouts: dict[str, dict]) -> str:
    """The module beside exported weights: this file, and the class that model_index.json names."""
    name, where = base.__name__, pprint.pformat(layouts, width=96, sort_dicts=False)
    return f"""{_TEXT}
{_END}, for the weights beside this file.
from diffusers import ModelMixin, {name}  # noqa: E402, F401

Pruned{name} = pruned(
    {name},
    {where.replace(chr(10), chr(10) + "    ")},
)
# Here pipelines look the class and ModelMixin up when they are given the transformer.
sys.modules[Pruned{name}.__module__] = sys.modules[__name__]
"""
