"""What a change of the teacher costs: the velocity error with it alone, on recorded calls.

The teacher's streams are known up to the block where a change begins, so a changed model runs from
there on, and the last AdaLN's costs next to nothing. All of it is in float32, whatever the
teacher's dtype: in bfloat16 the rounding of two models differs by about 2e-5, which is more than
most changes cost, and such floors would add up in a search.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ppcl import blocks, calls, devices, entrance, processes, stopping, texts
from ppcl.errors import UserError
from ppcl.students import Students, plugged

# Of streams in main memory; batches beyond it run from the first block on.
KEPT_BYTES = 8 << 30


@dataclass(frozen=True)
class Change:
    """A change of the teacher.

    Attributes:
        first: the block with which it begins; the number of blocks, if it is behind all of them.
        model: makes the changed transformer, when its turn comes.
    """

    first: int
    model: Callable[[], nn.Module]


def of_students(
    transformer: nn.Module, students_of: Mapping[str, tuple[int, Callable[[], Students]]]
) -> dict[str, Change]:
    """The changes that sets of students make.

    Args:
        students_of: by name, the first block of a set and what makes it.
    """
    return {
        name: Change(first, lambda make=make: plugged(transformer, make())[0])
        for name, (first, make) in students_of.items()
    }


class Judged:
    """The teacher's answers to some recorded calls, in float32, and its streams before a block.

    It runs when a first error is asked for: a stage that goes on may have all of them.

    Args:
        reader, rows, batch_size: which calls.
    """

    def __init__(
        self,
        transformer: nn.Module,
        reader: calls.Reader,
        rows: np.ndarray,
        batch_size: int,
        device: torch.device,
    ):
        self._teacher, self._device = transformer, device
        self._calls = reader, rows, batch_size
        self._batches: list[calls.Batch] = []
        self._first, self._power = 0, 0.0
        self._streams: list[blocks.Streams] = []

    def _answer(self) -> None:
        """Has the teacher's own answers, once."""
        reader, rows, batch_size = self._calls
        found = [b.to_float32() for b in reader.batches(rows, batch_size, self._device)]
        calls.refuse_zeros(sum(float(b.output.square().sum()) for b in found))
        with devices.in_float32(self._teacher, _modules(self._teacher)):
            for batch in found:
                batch.output = blocks.answer(self._teacher, batch.to(self._device).arguments)
        self._power = sum(float(self._double(b.output).square().sum()) for b in found)
        self._batches, self._streams = found, [{} for _ in found]

    @torch.no_grad()
    def error(self, model: nn.Module, first: int) -> float:
        """Relative velocity error of a model that is the teacher up to block `first`.

        Raises:
            UserError: all recorded answers are zero.
        """
        if not self._batches:
            self._answer()
        self._go_to(first)
        late = entrance.Entrance(model, first) if first else None
        wrong = torch.zeros((), dtype=torch.float64, device=self._double(torch.zeros(1)).device)
        with devices.in_float32(model, _modules(model)):
            for batch, streams in zip(self._batches, self._streams, strict=True):
                running = late.model(streams) if streams else model
                output = blocks.answer(running, batch.to(self._device).arguments)
                # On the device, which need not be waited for.
                wrong += (self._double(output) - self._double(batch.output)).square().sum()
        return float(wrong) / self._power

    def _go_to(self, first: int) -> None:
        """Puts the streams before that block in place of those before another one."""
        if first == self._first:
            return
        ahead = 0 < self._first < first
        late = entrance.Entrance(self._teacher, self._first) if ahead else None
        size = 0
        with devices.in_float32(self._teacher, _modules(self._teacher)):
            for number, batch in enumerate(self._batches):
                before, self._streams[number] = self._streams[number], {}
                if first == 0 or size > KEPT_BYTES:
                    continue
                running = late.model(before) if late and before else None
                arguments = batch.to(self._device).arguments
                found = entrance.streams_before(self._teacher, first, arguments, running)
                self._streams[number] = {name: value.cpu() for name, value in found.items()}
                size += sum(value.nbytes for value in found.values())
        self._first = first

    def _double(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(devices.statistics_device(self._device)).double()


def error(
    transformer: nn.Module,
    students: Students,
    reader: calls.Reader,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> float:
    """Relative velocity error of the teacher with these students plugged in, on recorded calls.

    Raises:
        UserError: all of the teacher's answers are zero.
    """
    judged = Judged(transformer, reader, rows, batch_size, device)
    first = min((part.first for part in students), default=0)
    return judged.error(plugged(transformer, students)[0], first)


def _modules(transformer: nn.Module) -> list[nn.Module]:
    return [block.module for block in blocks.block_sequence(transformer)]


def measure(
    judged: Judged,
    changes: Mapping[str, Change],
    accelerator: Accelerator,
    state: Path | None = None,
    identity: str = "",
) -> list[float]:
    """The error of each of several changes, shared out over the processes.

    Every process gets all errors back, in the order of `changes`.

    Args:
        changes: by name.
        state: folder in which finished errors wait for a killed run to go on, one file per process.
        identity: digest of what decides the errors; files with another one are not used.

    Raises:
        UserError: an error is NaN or infinite.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    done = _finished(state, identity) if state else {}
    names = list(changes)
    known = torch.tensor([done.get(name, math.nan) for name in names], dtype=torch.float64)
    known = processes.of_main(accelerator, known)  # all must share out the same rest
    rest = known.isnan().nonzero()[:, 0].tolist()
    rest.sort(key=lambda number: changes[names[number]].first)  # the teacher goes on with them
    # The sum over processes counts an error once.
    found = known.nan_to_num(0.0) if rank == 0 else torch.zeros_like(known)
    for number in tqdm(rest[rank::count], desc="plugging", unit="set", disable=rank > 0):
        name = names[number]
        # Not a part that a warned program finishes: at full size it takes longer than schedulers
        # wait, and what it would lose is one error.
        change = changes[name]
        cost = judged.error(change.model(), change.first)
        found[number] = cost
        if state and math.isfinite(cost):
            done[name] = cost
            with stopping.part():
                texts.write_sealed(state / f"{rank}.json", {"identity": identity, "errors": done})
    if count > 1:
        found = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu()
    for name, cost in zip(names, found.tolist(), strict=True):
        if not math.isfinite(cost):
            raise UserError(
                f"velocity error with {name} changed is {cost}; weights or activations overflow: "
                "set teacher.dtype: float32 or bfloat16"
            )
    return found.tolist()


def _finished(state: Path, identity: str) -> dict[str, float]:
    """Errors by name that earlier runs of the same identity left, of whatever process."""
    found = {}
    for path in sorted(state.glob("*.json")):
        kept = texts.read_sealed(path)
        if kept["identity"] == identity:
            found |= kept["errors"]
    return found
