"""What a change of the teacher costs: the velocity error with it alone, on recorded calls.

A changed model runs only from the block where the change begins, on the teacher's streams before
it; so a change of the last AdaLN takes next to no time. Behind a change's last block the model is
the teacher again, and changes with the same last block run on in one batch: recorded calls come in
many shapes, few calls of each are judged, and a small batch takes about as long as a large one.
All of it is in float32, whatever the teacher's dtype: in bfloat16 the velocity errors of rounding
alone are about 2e-5, which is more than most changes cost, and they would add up in a search.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ppcl.errors import UserError
from ppcl.pruning.students import Students, plugged
from ppcl.pruning.units import NewBlock, Unit
from ppcl.runtime import devices, processes, stopping
from ppcl.storage import texts
from ppcl.training import teacher_streams
from ppcl.training.tail import Tail, streams_before
from ppcl.training.teacher_streams import TeacherStreams, size_of
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context, State


@dataclass(frozen=True)
class Change:
    """A change of the teacher.

    Attributes:
        first: the block with which it begins; the number of blocks, if it is behind all of them.
        model: makes the changed transformer, when its turn comes.
        last: the teacher's block behind which the model is the teacher again, though its blocks
            have other numbers; None if the model differs up to its output.
    """

    first: int
    model: Callable[[], nn.Module]
    last: int | None = None


def of_students(
    transformer: nn.Module, students_of: Mapping[str, tuple[int, int, Callable[[], Students]]]
) -> dict[str, Change]:
    """The changes that sets of students make.

    Args:
        students_of: name of a set -> its first block, its last, and a function that makes it.
    """

    def model(make: Callable[[], Students]) -> nn.Module:
        return plugged(transformer, make())[0]

    return {
        name: Change(first, partial(model, make), last)
        for name, (first, last, make) in students_of.items()
    }


def _own(new_blocks: Iterable[NewBlock], taught: Students) -> Students:
    return {new_block: taught[new_block] for new_block in new_blocks}


def of_units(transformer: nn.Module, units: Iterable[Unit], taught: Students) -> dict[str, Change]:
    """The changes that trained units make, each plugged in alone.

    taught: the students of all their new blocks.
    """
    sets = {
        unit.name: (unit.first, unit.last, partial(_own, unit.new_blocks, taught)) for unit in units
    }
    return of_students(transformer, sets)


class Judged:
    """The teacher's answers to some recorded calls, in float32, and its streams before some blocks.

    The teacher runs when the first error is asked for: a resumed stage may have all errors already.

    Args:
        rows: numbers of the calls.

    Attributes:
        context: as given.
        together: how many changes share a batch behind their last block, on average; 1 if one
            change's batches are full already.
    """

    def __init__(self, context: Context, rows: np.ndarray, batch_size: int):
        self.context = context
        self._teacher, self._device = context.transformer, context.device
        self._lifts = devices.of_16_bits(self._teacher)
        self._depth = len(blocks.block_sequence(self._teacher))
        self._rows, self._batch_size = rows, batch_size
        batches = context.reader.in_batches(rows, batch_size)
        self.together = max(1, batch_size * len(batches) // max(1, len(rows)))
        self._batches: list[calls.Batch] = []
        self._power = 0.0
        self._streams: TeacherStreams | None = None

    def _answer(self) -> TeacherStreams:
        """Runs the teacher for its own answers, the first time; returns its streams."""
        if self._streams is None:
            recorded = self.context.reader.batches(self._rows, self._batch_size, self._device)
            batches = [batch.to_float32() for batch in recorded]
            calls.refuse_zeros(sum(float(b.output.square().sum()) for b in batches))
            with self._in_float32(self._teacher):
                for batch in batches:
                    batch.output = blocks.answer(self._teacher, batch.to(self._device).arguments)
            self._power = sum(float(self._double(b.output).square().sum()) for b in batches)
            self._batches = batches
            in_float32 = partial(self._in_float32, self._teacher)
            self._streams = TeacherStreams(self._teacher, batches, self._device, in_float32)
        return self._streams

    @torch.no_grad()
    def error(self, model: nn.Module, first: int) -> float:
        """Relative velocity error over all calls, of a model that is the teacher before block
        `first`: || its answers - the teacher's ||^2 / || the teacher's ||^2.

        Raises:
            UserError: all recorded answers are zero.
        """
        known = self._answer()
        known.keep_only([first])
        late = Tail(model, first) if first else None
        wrong = self._no_error()
        every = known.before(first)
        with self._in_float32(model):
            for batch, streams in zip(self._batches, every, strict=True):
                running = late.model(streams) if late and streams else model
                output = blocks.answer(running, batch.to(self._device).arguments)
                # On the device, which need not be waited for.
                wrong += self._distance(output, batch)
        return float(wrong) / self._power

    @torch.no_grad()
    def errors(self, changes: Sequence[Change]) -> list[float]:
        """The errors of changes with the same `last`; each is that of `error`, up to rounding.

        Every model is made once and runs alone up to its `last` block. From there on, as many as
        fit in a batch of `batch_size` calls, and in memory, run together. Meant for up to
        `together` changes.

        Raises:
            UserError: all recorded answers are zero.
            ValueError: `last` is None.
        """
        known = self._answer()
        (last,) = {change.last for change in changes}
        if last is None:
            raise ValueError("changes up to the output have no tail that they could share")
        known.keep_only([change.first for change in changes])
        wrong = [self._no_error() for _ in changes]
        # Per batch: (place of a change, its streams after `last`), until there are enough.
        waiting: list[list[tuple[int, blocks.Streams]]] = [[] for _ in self._batches]
        begun: set[int] = set()
        for place, change in enumerate(changes):
            begun.add(change.first)
            every, model = known.before(change.first), change.model()
            late = Tail(model, change.first) if change.first else None
            again = len(blocks.block_sequence(model)) - (self._depth - 1 - last)
            with self._in_float32(model):
                for number, (batch, streams) in enumerate(zip(self._batches, every, strict=True)):
                    running = late.model(streams) if late and streams else None
                    arguments = batch.to(self._device).arguments
                    left = streams_before(model, again, arguments, running)
                    left = {name: value.cpu() for name, value in left.items()}
                    waiting[number].append((place, left))
            del model, late  # before the next is made: at full size there is no room for two
            # Only these changes' streams count: which others are in memory depends on what this
            # process did before, and in another batch an error is rounded in another way.
            held = known.held(begun)
            held += [left for some in waiting for _, left in some]
            over = place == len(changes) - 1 or sum(map(size_of, held)) > teacher_streams.KEPT_BYTES
            for number, some in enumerate(waiting):
                if some and (
                    over or (len(some) + 1) * len(self._batches[number]) > self._batch_size
                ):
                    for alike in _of_one_shape(some):
                        self._go_on(number, last + 1, alike, wrong)
                    some.clear()
        return [float(one) / self._power for one in wrong]

    def _go_on(
        self,
        number: int,
        first: int,
        some: Sequence[tuple[int, blocks.Streams]],
        wrong: Sequence[torch.Tensor],
    ) -> None:
        """Runs the teacher from block `first` on, on changed streams of one batch.

        some: (place in `wrong`, streams before the block); their squared error is added there.
        """
        batch, reader = self._batches[number], self.context.reader
        streams = {name: torch.cat([left[name] for _, left in some]) for name in some[0][1]}
        again = reader.batch(np.tile(batch.numbers, len(some))).to_float32().to(self._device)
        running = Tail(self._teacher, first).model(streams)
        with self._in_float32(self._teacher):
            outputs = blocks.answer(running, again.arguments)
        for (place, _), output in zip(some, outputs.split(len(batch)), strict=True):
            wrong[place] += self._distance(output, batch)

    def _in_float32(self, model: nn.Module) -> AbstractContextManager[None]:
        # A changed model has the teacher's dtypes. To look for them in all weights of every model,
        # batch by batch, would take longer than a small model's call.
        return devices.in_float32(model, _modules(model)) if self._lifts else nullcontext()

    def _no_error(self) -> torch.Tensor:
        return self._double(torch.zeros(()))

    def _distance(self, output: torch.Tensor, batch: calls.Batch) -> torch.Tensor:
        return (self._double(output) - self._double(batch.output)).square().sum()

    def _double(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(devices.statistics_device(self._device)).double()


def _of_one_shape(
    some: Sequence[tuple[int, blocks.Streams]],
) -> Iterable[list[tuple[int, blocks.Streams]]]:
    """Groups of streams with the same shapes, which fit in one batch. Shapes can differ: a text run
    after which nothing reads text leaves the carry as text, which has twice the channels."""
    by_shape: dict[tuple, list[tuple[int, blocks.Streams]]] = {}
    for place, streams in some:
        shapes = tuple((name, value.shape[1:]) for name, value in streams.items())
        by_shape.setdefault(shapes, []).append((place, streams))
    return by_shape.values()


def error(context: Context, students: Students, rows: np.ndarray, batch_size: int) -> float:
    """Relative velocity error of the teacher with these students plugged in, on recorded calls.

    Raises:
        UserError: all of the teacher's answers are zero.
    """
    judged = Judged(context, rows, batch_size)
    first = min((new_block.first for new_block in students), default=0)
    return judged.error(plugged(context.transformer, students)[0], first)


def _modules(transformer: nn.Module) -> list[nn.Module]:
    return [block.module for block in blocks.block_sequence(transformer)]


def measure(
    judged: Judged, changes: Mapping[str, Change], state: State | None = None
) -> list[float]:
    """The velocity errors of changes, measured by all processes together.

    Every process gets all errors back, in the order of `changes`.

    Args:
        changes: by name.
        state: where finished errors are kept for a killed run to go on from, a file per process.

    Raises:
        UserError: an error is NaN or infinite.
    """
    accelerator = judged.context.accelerator
    rank, count = accelerator.process_index, accelerator.num_processes
    done = _finished(state) if state else {}
    names = list(changes)
    known = torch.tensor([done.get(name, math.nan) for name in names], dtype=torch.float64)
    known = processes.of_main(accelerator, known)  # all must share out the same rest
    left = {name for name, cost in zip(names, known.tolist(), strict=True) if math.isnan(cost)}
    # A group that lacks an error is measured whole: in another batch, errors are rounded otherwise.
    groups = _groups(changes, judged.together)
    rest = [group for group in groups if not left.isdisjoint(group)]
    again = {name for group in rest for name in group}
    place = {name: number for number, name in enumerate(names)}
    known[[place[name] for name in again]] = 0.0
    # One process holds the known errors, since the sum over processes is taken below.
    errors = known if rank == 0 else torch.zeros_like(known)
    turns: Iterable[int] = range(rank, len(rest), count)
    if state and rest:
        state.folder.mkdir(parents=True, exist_ok=True)
        turns = processes.in_turns(accelerator, len(rest), state.folder)
    ends = [0, *itertools.accumulate(map(len, rest))]
    with tqdm(total=ends[-1], desc="plugging", unit="set", disable=rank > 0) as bar:
        for turn in turns:
            group = rest[turn]
            bar.update(ends[turn] - bar.n)  # other processes took the turns that were skipped
            # Not within `stopping.part`: at full size this takes longer than schedulers wait after
            # SIGTERM, and only one group's errors are lost: one error, where batches are full.
            some = [changes[name] for name in group]
            if len(some) == 1:
                costs = [judged.error(some[0].model(), some[0].first)]
            else:
                costs = judged.errors(some)
            errors[[place[name] for name in group]] = torch.tensor(costs, dtype=torch.float64)
            if state and all(map(math.isfinite, costs)):
                done |= dict(zip(group, costs, strict=True))
                with stopping.part():
                    kept = {"identity": state.identity, "errors": done}
                    texts.write_sealed(state.folder / f"{rank}.json", kept)
        bar.update(ends[-1] - bar.n)
    if count > 1:
        errors = accelerator.reduce(errors.to(accelerator.device), reduction="sum").cpu()
    for name, cost in zip(names, errors.tolist(), strict=True):
        if not math.isfinite(cost):
            raise UserError(
                f"velocity error with {name} changed is {cost}; weights or activations overflow: "
                "set teacher.dtype: float32 or bfloat16"
            )
    return errors.tolist()


def _groups(changes: Mapping[str, Change], size: int) -> list[list[str]]:
    """Names of changes that are measured together: up to `size` with the same last block. In order
    of first blocks, since the teacher's streams there are computed from block to block."""
    order = sorted(changes, key=lambda name: changes[name].first)
    if size == 1:
        return [[name] for name in order]
    ending: dict[int | str, list[str]] = {}  # a change without `last` is alone
    for name in order:
        last = changes[name].last
        ending.setdefault(name if last is None else last, []).append(name)
    groups = [every[i : i + size] for every in ending.values() for i in range(0, len(every), size)]
    return sorted(groups, key=lambda group: (changes[group[-1]].first, changes[group[0]].first))


def _finished(state: State) -> dict[str, float]:
    """Errors by name that any process of an earlier run of the same identity left."""
    errors: dict[str, float] = {}
    for path in sorted(state.folder.glob("*.json")):
        kept = texts.read_sealed(path)
        if kept["identity"] == state.identity:
            errors |= kept["errors"]
    return errors
