"""What passes inside a stock block, between its parts."""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppcl.transformer import blocks
from ppcl.transformer.blocks import Block, Streams


class _Reached(Exception):
    """Ends a block early: what was wanted has been seen."""


@contextmanager
def taps(block: Block):
    """Shows what passes inside a stock block while it runs; yields a mapping that fills then.

    Keys: `text/input`, what its attention gets as text (z_p of Eq. 8), and `ffn/<stream>`, the
    stream after attention (what l_q of Eq. 9 maps).
    """
    seen: Streams = {}
    handles, width = [], block.width
    if text := width.text:

        def attend(module, args, kwargs, argument=text.argument):
            seen["text/input"] = blocks.signature_arguments(module, args, kwargs)[argument]

        attention = block.module.get_submodule(text.attention)
        handles.append(attention.register_forward_pre_hook(attend, with_kwargs=True))
    for stream, ffn in width.ffn.items():

        def normalise(_module, args, key=f"ffn/{stream}"):
            seen[key] = args[0]

        norm = block.module.get_submodule(ffn.norm)
        handles.append(norm.register_forward_pre_hook(normalise))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def text_input(block: Block, bound: dict[str, Any]) -> Tensor:
    """What a stock block's attention gets as text, z_p of Eq. 8; the block runs no further."""

    def stop(*_call) -> None:
        raise _Reached

    text = block.width.text
    if text is None:
        raise ValueError(f"block {block.index} has no text stream")
    with taps(block) as seen:
        attention = block.module.get_submodule(text.attention)
        handle = attention.register_forward_pre_hook(stop)
        try:
            block.module(**bound)
        except _Reached:
            pass
        finally:
            handle.remove()
    return seen["text/input"]
