"""The teacher's streams before some of its blocks, kept while changed models run on from there."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from ppcl.training.tail import Tail, streams_before
from ppcl.transformer import blocks, calls

# Most bytes of streams in main memory; batches without room there run from the first block on.
KEPT_BYTES = 8 << 30


class TeacherStreams:
    """The streams that some blocks of the teacher get, for each of some batches.

    Args:
        in_float32: makes a context in which the teacher computes in float32.
    """

    def __init__(
        self,
        teacher: nn.Module,
        batches: Sequence[calls.Batch],
        device: torch.device,
        in_float32: Callable[[], AbstractContextManager[None]],
    ):
        self._teacher, self._batches, self._device = teacher, batches, device
        self._in_float32 = in_float32
        # Block -> each batch's streams before it; the first block needs none.
        self._streams: dict[int, list[blocks.Streams]] = {}
        # Blocks whose streams stay after those of deeper blocks were computed from them.
        self._wanted: set[int] = set()

    def keep_only(self, wanted: Collection[int]) -> None:
        """Drops all streams but those before these blocks, and those that missing ones of these are
        to be computed from."""
        self._wanted = set(wanted) - {0}
        missing = min(self._wanted - self._streams.keys(), default=0)
        start = max((first for first in self._streams if first < missing), default=0)
        kept = self._wanted | {start}
        self._streams = {first: every for first, every in self._streams.items() if first in kept}

    def held(self, firsts: Iterable[int]) -> list[blocks.Streams]:
        """The streams that are kept before these blocks, of all batches."""
        return [*itertools.chain(*(self._streams.get(first, ()) for first in firsts))]

    @torch.no_grad()
    def before(self, first: int) -> list[blocks.Streams]:
        """Each batch's streams before block `first`, on the CPU. Empty for a batch that has to run
        from the first block on: there is no room for its streams."""
        if first == 0:
            return [{} for _ in self._batches]
        if first in self._streams:
            return self._streams[first]
        start = max((other for other in self._streams if other < first), default=0)
        late = Tail(self._teacher, start) if start else None
        given = self.before(start)
        made: list[blocks.Streams] = []
        size = sum(map(size_of, itertools.chain(*self._streams.values())))
        with self._in_float32():
            for number, (batch, before) in enumerate(zip(self._batches, given, strict=True)):
                if start not in self._wanted:  # makes room as it goes
                    given[number] = {}
                    size -= size_of(before)
                made.append({})
                if size > KEPT_BYTES:
                    continue
                running = late.model(before) if late and before else None
                arguments = batch.to(self._device).arguments
                streams = streams_before(self._teacher, first, arguments, running)
                made[-1] = {name: value.cpu() for name, value in streams.items()}
                size += size_of(made[-1])
        if start not in self._wanted:
            self._streams.pop(start, None)
        self._streams[first] = made
        return made


def size_of(streams: blocks.Streams) -> int:
    """Bytes."""
    return sum(value.nbytes for value in streams.values())
