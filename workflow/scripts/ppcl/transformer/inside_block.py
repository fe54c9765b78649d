"""The tensors inside a stock block that linear maps replace, seen while the block runs."""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppcl.transformer import blocks
from ppcl.transformer.blocks import Block, Streams


class _Reached(Exception):
    """Ends a block's forward early, once the wanted tensor has been seen."""


@contextmanager
def taps(block: Block):
    """Yields a mapping that is filled whenever the stock block runs within the context.

    Keys: `text/input`, the text input of its attention (z_p of Eq. 8), and `ffn/<stream>`, the
    stream after attention (the input of l_q in Eq. 9); each [batch, tokens, channels].
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
    """The text input of a stock block's attention, z_p of Eq. 8, [batch, tokens, channels]. The
    block runs no further than that.

    Args:
        bound: the block's arguments, by name.

    Raises:
        ValueError: the block has no text stream.
    """

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
