"""A transformer that starts late: at a block whose streams are known."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppcl.transformer import blocks

Given = Mapping[str, Sequence[Tensor] | Tensor]  # stream -> [tokens, channels] of every sample


class InjectingBlock(nn.Module):
    """A block that runs on streams `given` from outside: stream -> per sample [tokens, channels].

    All its other arguments are those with which the transformer calls it.
    """

    def __init__(self, block: blocks.Block):
        super().__init__()
        self.block, self.module = block, block.module
        self.signature = inspect.signature(block.module.forward)
        self.given: Given = {}

    def forward(self, *args, **kwargs) -> Any:
        call = self.signature.bind(*args, **kwargs)
        for stream, values in self.given.items():
            argument = self.block.list.inputs[stream]
            call.arguments[argument] = fitted(values, call.arguments[argument])
        return self.module(*call.args, **call.kwargs)


def fitted(values: Sequence[Tensor] | Tensor, like: Tensor) -> Tensor:
    """Samples' streams as one batch with as many tokens as `like` [batch, tokens, channels].

    Some families pad up to the longest text of a batch. The padding is at the end, so only padding
    is cut off there, or added (zeros).
    """
    tokens = like.shape[1]
    return torch.stack(
        [
            value[:tokens]
            if len(value) >= tokens
            else functional.pad(value, (0, 0, 0, tokens - len(value)))
            for value in values
        ]
    ).to(like.device)


class Tail:
    """The tail of a transformer, from block `first` on; blocks before it pass on what they get.

    Embeddings, modulation and rotary embeddings are still computed by the transformer. Blocks from
    `first` on are the transformer's own modules, so hooks on them also see their calls here. If
    `first` is the number of blocks, the tail starts behind the last one.
    """

    def __init__(self, transformer: nn.Module, first: int):
        sequence = blocks.block_sequence(transformer)
        instead: dict[tuple[int, int], nn.Module] = {
            (b.index, b.index): blocks.PassThroughBlock(b) for b in sequence[:first]
        }
        at = min(first, len(sequence) - 1)
        self._injecting = InjectingBlock(sequence[at])
        if first > at:
            self._injecting.module = instead[at, at]
        self._model, _ = blocks.assembled(transformer, instead | {(at, at): self._injecting})

    def model(self, streams: Given) -> nn.Module:
        """The model; its next call runs on these streams (`InjectingBlock.given`)."""
        self._injecting.given = streams
        return self._model


@torch.no_grad()
def streams_before(
    transformer: nn.Module,
    first: int,
    arguments: dict[str, Any],
    running: nn.Module | None = None,
) -> blocks.Streams:
    """The streams that block `first` gets when the transformer runs, each [batch, tokens, ...]. If
    `first` is the number of blocks, those that the last block returns.

    running: a model that runs in the transformer's place and has its blocks from there on
        (`Tail.model`).
    """
    received: blocks.Streams = {}
    sequence = blocks.block_sequence(transformer)

    def returned(_block: blocks.Block, streams: blocks.Streams) -> None:
        received.update(streams)

    def given(block: blocks.Block, bound: dict[str, Any]) -> None:
        received.update(block.inputs(bound))

    if first == len(sequence):
        watching = blocks.watch([sequence[-1]], after=returned, stop_after=first - 1)
    else:
        watching = blocks.watch([sequence[first]], before=given, stop_before=first)
    with watching as run:
        run(transformer if running is None else running, arguments)
    return received
