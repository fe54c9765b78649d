"""The class of a narrow block: its stock class, with what is new around the stock forward.

diffusers knows it as it knows the stock class: its caches and layer skip find it in the registry of
blocks, and it can be copied and pickled. As narrow_layers.py tells, this file travels beside
exported weights.
"""

import dataclasses
import functools
import importlib
import inspect
import json
from typing import Any, cast

import torch
from torch import Tensor, nn

CAPTURE = "ppcl_capture"
_DOUBLED = ("source", "lend")  # roles that make a carry of the text stream


def empty(module: str, maker: str, *of) -> Any:
    """An instance, without its state, of the class that a function of a module makes."""
    kind = getattr(importlib.import_module(module), maker)(*of)
    return kind.__new__(kind)


def reduced(instance: nn.Module, maker: Any, *of) -> tuple:
    """What `__reduce_ex__` returns for an instance of a class that a function makes.

    Pickle finds functions by name, but classes that are made here only by what made them.
    """
    state = cast(Any, instance).__getstate__()
    return empty, (maker.__module__, maker.__name__, *of), state


@functools.cache
def block_class(
    base: type, role: str, linear: tuple[str, ...], layout: str, last_text: str = ""
) -> type:
    """A subclass, by the same name, of a block's class: adds its linear FFNs' maps; in a text run,
    its text stream is a carry.

    A subclass, since hooks on the block should see what passes between blocks; by the same name,
    since diffusers finds the blocks to compile and not to split by name.

    Args:
        role: in a text run; see `narrow.narrow`.
        linear: streams whose FFN is linear.
        layout: as JSON, that of the block's list.
        last_text: `half` or `double`: how wide the text stream behind the model's last block should
            be, which nothing reads (`match_ends`).
    """
    kind: type[nn.Module] = base  # as its cache would not take it
    stock, where = kind.forward, json.loads(layout)
    names = list(inspect.signature(stock).parameters)[1:]
    streams, text = where["outputs"], where["text"]

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs  # checkpointing gives positions
        taken: list[Tensor] = []  # local, so that recomputed and compiled calls have their own
        if role in _DOUBLED:
            keywords = text["keywords"]
            given[keywords] = (given.get(keywords) or {}) | {CAPTURE: taken}
        elif role != "own":
            carry = given[text["stream"]]
            own, attended = carry.chunk(2, dim=-1)
            given |= {text["stream"]: attended}
        returned = stock(self, **given)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        for stream in linear:
            place = streams.index(stream)
            outputs[place] = outputs[place] + self.linear_ffn[stream](outputs[place])
        if role in _DOUBLED:
            place = streams.index("text")
            outputs[place] = torch.cat([outputs[place], taken[0]], dim=-1)
        elif role != "own":
            outputs[streams.index("text")] = self.text_output(own) if role == "close" else carry
        if last_text:
            place = streams.index("text")
            whole = outputs[place]
            doubled = torch.cat([whole, whole], dim=-1)
            outputs[place] = whole.chunk(2, dim=-1)[0] if last_text == "half" else doubled
        return tuple(outputs) if isinstance(returned, tuple) else outputs[0]

    made_of = (base, role, linear, layout, last_text)
    body = {
        "forward": forward,
        "made_of": made_of,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": lambda self, _protocol: reduced(self, block_class, *made_of),
    }
    made = type(base.__name__, (base,), body)
    _register(made, base, role, text and text["stream"])
    return made


def match_ends(first: nn.Module, last: nn.Module, layout: dict) -> None:
    """Makes the text stream as wide behind a model's last block as behind its first, where one of
    them is a carry: diffusers' FirstBlockCache subtracts the one from the other.

    Args:
        layout: of the last block's list.
    """

    def carries(block: nn.Module, roles: tuple[str, ...]) -> bool:
        return getattr(block, "narrowed", {}).get("text", "own") in roles

    wide, made_of = carries(first, _DOUBLED), getattr(last, "made_of", None)
    if made_of and made_of[-1]:
        return
    if wide == carries(last, (*_DOUBLED, "borrow")):
        return
    # A run that never closes is read by nothing; else it is the family that says so.
    if wide and not layout.get("text_unread"):
        return
    of = made_of or (type(last), "own", (), json.dumps(layout), "")
    last.__class__ = block_class(*of[:-1], "double" if wide else "half")


def _register(made: type, base: type, role: str, stream: str | None) -> None:
    """Tells diffusers' registry of blocks what it knows of the stock class."""
    try:
        # Here, since programs that make no block should not wait for diffusers.
        from diffusers.hooks import _helpers as hooks

        known = hooks.TransformerBlockRegistry.get(base)
        fields = {f.name: getattr(known, f.name) for f in dataclasses.fields(known)}
    except (ImportError, AttributeError, TypeError, ValueError):
        # It does not know the stock class; or this diffusers has no such registry, and all but its
        # caches and layer skip works.
        return
    if role in ("own", "borrow"):
        made_for = type(known)
    else:
        made_for = _skipped(type(known), role, stream)
    public = {name: value for name, value in fields.items() if not name.startswith("_")}
    hooks.TransformerBlockRegistry.register(made, made_for(**public))


def _skipped(metadata: Any, role: str, stream: str | None) -> type:
    """The registry's entry of a block that begins or ends a text run.

    diffusers hands on what it finds as the inputs of a block that is skipped. The text stream is
    no carry before a source, and the blocks after it want one: the stream, and its norm, which is
    the attention's input without this block's shift and scale. After the end it is none any more.
    """

    def asked(self, identifier, args=(), kwargs=None):
        value = metadata._get_parameter_from_args_kwargs(self, identifier, args, kwargs)
        if identifier != stream or not isinstance(value, Tensor):
            return value
        if role == "close":
            return value.chunk(2, dim=-1)[0]
        return torch.cat([value, nn.functional.layer_norm(value, value.shape[-1:])], dim=-1)

    return type(metadata.__name__, (metadata,), {"_get_parameter_from_args_kwargs": asked})
