"""Narrow blocks: stock diffusers blocks with some submodules swapped (PPCL, arXiv 2511.16156).

A linear FFN (Eq. 9) is a residual linear map of the post-attention stream. A text run (Eq. 8) is a
row of blocks of which the first, the `source`, has a text stream; the others `borrow` its input of
the attention, and the last may `close` the run by making the text stream that follows it. In
between, the text stream of the blocks is a carry: the source's text output and that attention
input, side by side along channels. The stock forwards compute all of it, and what is kept of a
block keeps its parameter names.

This file needs nothing but torch and diffusers, for its text travels beside exported weights.
There it ends with lines that `module_text` adds, which define the class to load.
"""

import copy
import functools
import inspect
import os
import pprint
import sys  # noqa: F401  the added lines use it
from pathlib import Path

import torch
from torch import Tensor, nn

MODULE = "ppcl_narrow"  # the file's name beside exported weights, which model_index.json gives
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


class Open(nn.Module):
    """Adds the second half of a modulation [..., 3d]: shift 0, scale 0, gate 1."""

    def forward(self, first_half: Tensor) -> Tensor:
        *batch, width = first_half.shape
        nothing = first_half.new_zeros(*batch, 2 * width // 3)
        return torch.cat([first_half, nothing, first_half.new_ones(*batch, width // 3)], dim=-1)


class Shut(nn.Module):
    """Stands for a modulation: shift 0, scale 0, gate 0."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, temb: Tensor) -> Tensor:
        return temb.new_zeros(*temb.shape[:-1], self.width)


def narrow(block: nn.Module, layout: dict, spec: dict) -> nn.Module:
    """Narrows a stock block in place and returns it. New maps start as identities.

    Args:
        layout: where the block's parts are (`families.BlockList.layout`).
        spec: `linear_ffn`, the streams whose FFN becomes linear; and `text`, the block's role in a
            text run: own (none), source, borrow or close. Both may be missing. It stays with the
            block as `narrowed`.

    Raises:
        ValueError: a block of this class, or in this role, has no such part; or it is narrow.
    """
    role, streams = spec.get("text", "own"), spec.get("linear_ffn", ())
    if hasattr(block, "narrowed"):
        raise ValueError(f"the block is narrow already: {block.narrowed}")
    if role not in ("own", "source", "borrow", "close") or set(spec) - {"text", "linear_ffn"}:
        raise ValueError(f"{spec} is not what `narrow` can do; see there")
    if missing := set(streams) - set(layout["ffn"]):
        raise ValueError(f"blocks of this class have no {missing.pop()} FFN that could be linear")
    if role != "own" and not layout["text"]:
        raise ValueError("blocks of this class have no text stream that could be borrowed")
    if role in ("borrow", "close") and "text" in streams:
        raise ValueError("a borrowed text stream has no FFN that could be linear")
    for stream in streams:
        _linear_ffn(block, layout["ffn"][stream])
    if role != "own":
        _text_run(block, layout, role)
    block.narrowed = {"linear_ffn": list(streams), "text": role}
    paths = {f"ffn/{s}": layout["ffn"][s]["ffn"] for s in streams}
    if role in ("borrow", "close"):
        paths["text/input"] = f"{layout['text']['norm']}.linear"
    if role == "close":
        paths["text/output"] = "text_output.linear"
    block.map_paths = paths
    return block


def maps(block: nn.Module) -> dict[str, nn.Linear]:
    """The new linear maps of a block, none of a stock one; each holds W and b of x + W x + b.

    `ffn/<stream>`: post-attention stream -> the block's output. `text/input` (l^z): the source's
    attention input -> the block's own. `text/output` (l^h): the source's text output -> that of the
    run.
    """
    paths = getattr(block, "map_paths", {})
    return {name: block.get_submodule(path) for name, path in paths.items()}


def _linear_ffn(block: nn.Module, parts: dict) -> None:
    modulation = block.get_submodule(parts["modulation"])
    width = modulation.out_features // 6
    for name, whole in list(modulation.named_parameters()):
        half = whole.detach()[: 3 * width].clone()
        setattr(modulation, name, nn.Parameter(half, requires_grad=whole.requires_grad))
    modulation.out_features = 3 * width
    block.get_submodule(parts["modulation"].rpartition(".")[0]).append(Open())
    _drop(block, parts["norm"])
    block.set_submodule(parts["ffn"], _zero_linear(width, modulation.weight))


def _text_run(block: nn.Module, layout: dict, role: str) -> None:
    text, ffn = layout["text"], layout["ffn"]["text"]
    if role == "source":
        hook = functools.partial(_capture, text["argument"])
        block.get_submodule(text["attention"]).register_forward_pre_hook(hook, with_kwargs=True)
    else:
        modulation = block.get_submodule(ffn["modulation"])
        width = modulation.out_features // 6
        block.set_submodule(text["modulation"], Shut(6 * width))
        for path in (ffn["norm"], ffn["ffn"], text["output"]):
            _drop(block, path)
        block.set_submodule(text["norm"], Residual(_zero_linear(width, modulation.weight)))
        if role == "close":
            block.text_output = Residual(_zero_linear(width, modulation.weight))
    names = (text["stream"], text["position"], text["keywords"])
    block.__class__ = _carrier(type(block), role, *names)


def _drop(block: nn.Module, path: str) -> None:
    # A function and no module, which adapters (LoRA) made for stock blocks would find and wrap.
    parent, _, name = path.rpartition(".")
    delattr(block.get_submodule(parent), name)
    setattr(block.get_submodule(parent), name, _same)


def _same(x: Tensor) -> Tensor:
    return x


def _zero_linear(width: int, like: Tensor) -> nn.Linear:
    # An initialisation would draw from the global generator, and be overwritten.
    made = nn.utils.skip_init(nn.Linear, width, width, device=like.device, dtype=like.dtype)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def _capture(argument: str, _attention: nn.Module, args: tuple, kwargs: dict):
    taken = kwargs.pop(_CAPTURE)
    taken.append(kwargs[argument])
    return args, kwargs


@functools.cache
def _carrier(base: type, role: str, stream: str, position: int, keywords: str) -> type:
    """A subclass, by the same name, of a block's class: its text stream is a carry.

    A subclass, since hooks on the block should see what passes between blocks; by the same name,
    since diffusers finds the blocks to compile and not to split by name.
    """
    stock = base.forward
    names = list(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs  # checkpointing gives positions
        if role == "source":
            taken: list[Tensor] = []  # local, so that recomputed and compiled calls have their own
            given[keywords] = (given.get(keywords) or {}) | {_CAPTURE: taken}
            outputs = list(stock(self, **given))
            outputs[position] = torch.cat([outputs[position], taken[0]], dim=-1)
        else:
            carry = given[stream]
            text, attended = carry.chunk(2, dim=-1)
            outputs = list(stock(self, **given | {stream: attended}))
            outputs[position] = self.text_output(text) if role == "close" else carry
        return tuple(outputs)

    body = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), body)


def specs(transformer: nn.Module) -> dict[str, dict]:
    """Path of every narrow block in a transformer -> its spec."""
    modules = transformer.named_modules()
    return {path: module.narrowed for path, module in modules if hasattr(module, "narrowed")}


def pruned(base: type, layouts: dict[str, dict]) -> type:
    """The class of a transformer with narrow blocks; its config has one key more than `base`.

    `narrow_blocks` maps the path of a block to its spec (see `narrow`). A saved folder gets the
    module that loads it, also from `save_pretrained` of a pipeline.

    Args:
        base: a class of diffusers.
        layouts: name of each list of blocks -> the layout of its blocks.
    """

    @functools.wraps(base.__init__)
    def init(self, *args, narrow_blocks: dict[str, dict] | None = None, **kwargs):
        base.__init__(self, *args, **kwargs)
        self.register_to_config(narrow_blocks=narrow_blocks or {})
        for path, spec in self.config.narrow_blocks.items():
            narrow(self.get_submodule(path), layouts[path.rpartition(".")[0]], spec)

    # diffusers takes from this signature which keys of a config are the class's own.
    stock = inspect.signature(base.__init__)
    key = inspect.Parameter("narrow_blocks", inspect.Parameter.KEYWORD_ONLY, default=None)
    init.__signature__ = stock.replace(parameters=[*stock.parameters.values(), key])

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        os.makedirs(save_directory, exist_ok=True)
        file = Path(save_directory, f"{MODULE}.py")
        file.write_text(module_text(base, layouts), encoding="utf-8")
        base.save_config(self, save_directory, *args, **kwargs)

    name = f"Pruned{base.__name__}"
    body = {
        "__doc__": f"A {base.__name__} with narrow blocks.",
        "__init__": init,
        "__module__": MODULE,  # pipelines write it to model_index.json, as the name of the file
        "_tp_plan": None,  # the stock plan of tensor parallelism names layers that may be gone
        "save_config": save_config,
        "stock": base,
    }
    return type(name, (base,), body)


def from_stock(transformer: nn.Module, layouts: dict[str, dict]) -> nn.Module:
    """A transformer that holds narrow blocks, as one of the class `pruned`; shares all modules."""
    made = copy.copy(transformer)
    made._modules = dict(transformer._modules)  # a shallow copy would share this mapping
    made.__class__ = pruned(getattr(type(transformer), "stock", type(transformer)), layouts)
    made.register_to_config(narrow_blocks=specs(transformer))
    return made


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
sys.modules[MODULE] = sys.modules[__name__]
"""
