"""Sums up the inputs of modulation matrices over recorded calls and a dense grid of timesteps.

Recorded calls alone may hold ten timesteps. Maps fitted to these alone would be exact there, and
wrong for a user with another number of steps, another shift or another guidance.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.errors import UserError, warn_once
from ppcl.extraction.conditioning import Conditioning, Moments
from ppcl.pruning import narrow
from ppcl.pruning.units import Matrix
from ppcl.runtime import devices
from ppcl.settings import ModulationSettings
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context

# The highest timestep of diffusers' schedulers, unless their configs say otherwise.
TIMESTEPS = 1000
# The share of recorded calls in the total weight of recorded calls and grid.
RECORDED = 1 / 32


class Sums:
    """Sums up the inputs of matrices while a transformer runs.

    Matrices share an entry as long as their inputs are equal, bit by bit. Inputs are compared in
    every call, or in the first only if blocks are compiled. For each call: run the transformer
    within `watching`, `take`, synchronise the device, `settle`.

    Args:
        matrices: the matrices to watch (`units.Matrix`).
        device: where products are made; sums are in main memory.

    Attributes:
        sums: the sums so far.
    """

    def __init__(self, transformer: nn.Module, matrices: Iterable[Matrix], device: torch.device):
        self._device = devices.statistics_device(device)
        self._sequence = blocks.block_sequence(transformer)
        self._linears = {matrix: self._linear(transformer, matrix) for matrix in matrices}
        # A compiled block runs uncompiled while a hook is inside, so few should have one.
        kinds = [type(block.module) for block in self._sequence]
        self._compiled = kinds != [devices.uncompiled(block.module) for block in self._sequence]
        self.put(Conditioning([], {}))

    def _linear(self, transformer: nn.Module, matrix: Matrix) -> nn.Module:
        number, path = matrix
        last = number == len(self._sequence)
        block = transformer if last else self._sequence[number].module
        return block.get_submodule(narrow.held(block, path))

    @property
    def last(self) -> bool:
        """Whether one of the matrices comes after all blocks."""
        return any(block == len(self._sequence) for block, _ in self._linears)

    @property
    def leaders(self) -> dict[int, Matrix]:
        """Index of each entry -> the first matrix that has it."""
        leaders: dict[int, Matrix] = {}
        for matrix, place in self.sums.places.items():
            leaders.setdefault(place, matrix)
        return leaders

    def put(self, sums: Conditioning) -> None:
        """Replaces the sums by copies of these, to go on from a checkpoint."""
        # Copies, since tensors from a file may be unaligned, and sums then round in another way.
        self.sums = Conditioning([entry.weighted(1) for entry in sums.entries], sums.places)
        self._fresh = not sums.places
        if self._fresh and self._linears:  # one entry for all matrices, until their inputs differ
            self.sums = Conditioning([_nothing()], dict.fromkeys(self._linears, 0))
        self._waiting: list[list[Tensor]] = [[] for _ in self.sums.entries]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context the transformer may be called once."""
        self._seen: dict[Matrix, list[Tensor]] = {}
        handles = []
        few = self._compiled and not self._fresh
        for matrix in self.leaders.values() if few else self._linears:
            seen = self._seen[matrix] = []
            handles.append(
                self._linears[matrix].register_forward_pre_hook(
                    lambda _module, args, seen=seen: seen.append(args[0])
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, fit: np.ndarray) -> None:
        """Starts copying the call's inputs to main memory, without waiting for the device.

        Args:
            fit: bool [batch], whether each of the call's samples counts.

        Raises:
            UserError: the number of inputs is no multiple of the batch.
        """
        leaders = self.leaders
        self._fit = fit
        self._taken = {place: self._rows(self._seen[m]) for place, m in leaders.items()}
        same = [
            _same(seen, self._seen[leaders[self.sums.places[matrix]]])
            for matrix, seen in self._seen.items()
        ]
        self._alike = all(alike for alike in same if isinstance(alike, bool))
        asked = [alike for alike in same if isinstance(alike, Tensor)]
        self._flags = devices.to_main_memory(torch.stack(asked)) if asked else torch.ones(1)

    def settle(self) -> None:
        """Queues the inputs that `take` copies, and sums up queues that are long enough.

        Synchronise the device before: copies may still be under way.
        """
        if not (self._alike and self._flags.all()):
            self._part()
        for place, rows in self._taken.items():
            self._waiting[place] += [x for x in rows if len(x)]
        self._taken, self._seen, self._fresh = {}, {}, False
        self.sum_up()

    def _part(self) -> None:
        """Splits entries whose matrices had different inputs in this call."""
        together: dict[int, list[Matrix]] = {}
        for matrix in self._seen:
            together.setdefault(self.sums.places[matrix], []).append(matrix)
        while together:
            others: dict[int, list[Matrix]] = {}
            for place, (first, *rest) in together.items():
                apart = [m for m in rest if not _same(self._seen[m], self._seen[first])]
                if apart:
                    new = len(self.sums.entries)
                    self.sums.entries.append(self.sums.entries[place])
                    self.sums.places.update(dict.fromkeys(apart, new))
                    self._waiting.append(list(self._waiting[place]))
                    self._taken[new] = [x.cpu() for x in self._rows(self._seen[apart[0]])]
                    others[new] = apart
            together = others

    def _rows(self, seen: list[Tensor]) -> list[Tensor]:
        """A matrix's inputs in samples that count, [n, d] each, on their way to main memory."""
        taken = []
        for x in seen:
            # There may be several conditionings per sample: [repeats * batch, d].
            repeats, rest = divmod(len(x), len(self._fit))
            if rest:
                raise UserError(
                    f"extract: a modulation gets {len(x)} conditionings for {len(self._fit)} "
                    "samples, so whose they are is unclear; set modulation.enabled to false"
                )
            chosen = torch.from_numpy(np.flatnonzero(np.tile(self._fit, repeats)))
            # If every token or frame has its own conditioning, each counts as an input.
            rows = x[chosen.to(x.device, non_blocking=True)].flatten(0, -2)
            taken.append(devices.to_main_memory(rows))
        return taken

    def sum_up(self, everything: bool = False) -> None:
        """Adds queued inputs to the sums: of entries with at least d in the queue, so that there is
        one product [d, d] to copy to main memory per d inputs; or `everything`."""
        for place, waiting in enumerate(self._waiting):
            if waiting and (everything or sum(map(len, waiting)) >= waiting[0].shape[1]):
                x = torch.cat(waiting).to(self._device).double()  # MPS casts to no float64
                waiting.clear()
                more = Moments(float(len(x)), x.sum(0).cpu(), (x.T @ x).cpu())
                before = self.sums.entries[place]
                self.sums.entries[place] = before + more if before.count else more

    def result(self) -> Conditioning:
        """The sums, without matrices that had no input."""
        kept = [place for place, entry in enumerate(self.sums.entries) if entry.count]
        numbers = {place: number for number, place in enumerate(kept)}
        places = {m: numbers[p] for m, p in self.sums.places.items() if p in numbers}
        return Conditioning([self.sums.entries[place] for place in kept], places)


def _nothing() -> Moments:
    return Moments(0.0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64))


def _same(one: list[Tensor], other: list[Tensor]) -> Tensor | bool:
    """Whether two matrices had equal inputs. A bool if that is known without comparing values, else
    a boolean tensor on the device."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return False
    pairs = [(x, y) for x, y in zip(one, other, strict=True) if x is not y]
    return torch.stack([(x == y).all() for x, y in pairs]).all() if pairs else True


# ---- the whole time axis


@torch.no_grad()
def with_grid(
    context: Context,
    recorded: Conditioning,
    rows: np.ndarray,
    settings: ModulationSettings,
    size: int,
) -> Conditioning:
    """Weighted sums over recorded calls and over a grid of calls. The grid's timesteps are evenly
    spaced over the scheduler's whole range. Each comes with the text of a recorded call and, if the
    transformer takes guidance as an argument, with one of evenly spaced guidances.

    Recorded calls have the share RECORDED of the total weight, whatever their number. If all calls
    counted alike, thousands of them at ten timesteps would outweigh the grid. Even with half of the
    weight, they make a map spend its rank on these ten: with the embedded teacher's 10 steps and
    rank 8, errors at 50 steps and a shift of 3 were 4.5 times as large. A small share is enough,
    since the grid has the texts of recorded calls and a timestep close to each of theirs. The share
    covers whatever else a pipeline does.

    Without a grid in the config, or if `time_map` gives None, `recorded` is returned.

    Args:
        recorded: the sums over recorded calls.
        rows: numbers of the calls whose texts the grid gets.
        settings: the config's `modulation`.
        size: batch size.

    Raises:
        UserError: as `Sums`.
    """
    transformer, reader, device = context.transformer, context.reader, context.device
    family, count = blocks.family(transformer), settings.timesteps
    if not recorded.entries or not count:
        return recorded
    place = time_map(reader, rows, family.time)
    if place is None:
        return recorded
    (slope, offset), highest = place
    rng = np.random.default_rng(context.seed)
    times = rng.permutation(np.linspace(0, highest, count)) * slope + offset
    guidances = rng.permutation(np.linspace(*settings.guidance, count)) * family.guidance
    leaders: dict[int, Matrix] = {}
    for matrix, entry in recorded.places.items():
        leaders.setdefault(entry, matrix)
    last = max(block for block, _ in leaders.values())
    short = blocks.emptied(transformer, {block for block, _ in leaders.values()})
    sequence = blocks.block_sequence(short)
    grid = Sums(transformer, leaders.values(), device)
    done = 0
    chosen = np.sort(np.resize(rng.permutation(rows), count))  # neighbours are read at once
    for batch in reader.batches(chosen, size, device):
        batch, here = batch.to(device), slice(done, done := done + len(batch))
        arguments = batch.arguments
        arguments[family.time] = _filled(arguments[family.time], times[here])
        guidance = arguments.get("guidance")
        if isinstance(guidance, Tensor):
            arguments["guidance"] = _filled(guidance, guidances[here])
        with grid.watching(), blocks.watch(sequence, stop_after=last) as run:
            run(short, arguments)
        grid.take(np.ones(len(batch), bool))
        devices.synchronise(device)
        grid.settle()
    grid.sum_up(everything=True)
    grid_sums = grid.result()
    grid_share = 1 - RECORDED
    entries = []
    for entry, once in enumerate(recorded.entries):
        more = grid_sums.of(leaders[entry])
        entries.append(
            once.weighted(RECORDED / once.count) + more.weighted(grid_share / more.count)
        )
    return Conditioning(entries, recorded.places)


def time_map(
    reader: calls.Reader, rows: np.ndarray, argument: str
) -> tuple[tuple[float, float], float] | None:
    """How a pipeline maps the scheduler's timestep t to the transformer's argument, slope * t +
    offset, told from recorded calls.

    Some pipelines pass t as it is, others divide it by the highest timestep, and some count the
    other way round.

    Args:
        rows: numbers of recorded calls.
        argument: the transformer's argument with the timestep.

    Returns:
        ((slope, offset), highest timestep); None, with a warning, if it is none of these maps.
    """
    rows = rows[np.isfinite(reader.index["timestep"][rows])]
    if not len(rows):
        _unknown(reader)
        return None
    timesteps, sigmas = (reader.index[name][rows] for name in ("timestep", "sigma"))
    flow = np.isfinite(sigmas) & (sigmas > 0)
    ratios = timesteps[flow] / sigmas[flow]
    highest = float(TIMESTEPS)  # of schedulers that are no flows
    if len(ratios) and np.ptp(ratios) < 0.01 * np.max(ratios):
        highest = float(np.round(np.median(ratios)))
    order = np.argsort(timesteps, kind="stable")
    few = order[np.unique(np.linspace(0, len(order) - 1, 8).astype(int))]
    asked = [reader.batch(rows[[n]]).arguments.get(argument) for n in few]
    times = [time for time in asked if isinstance(time, Tensor)]
    if len(times) < len(asked):
        _unknown(reader)
        return None
    given = np.array([time.double().mean() for time in times])
    for slope, offset in (
        (1.0, 0.0),
        (1 / highest, 0.0),
        (-1.0, highest),
        (-1 / highest, 1.0),
    ):
        # In bfloat16, timesteps are off by up to 0.4 %.
        off = np.abs(slope * timesteps[few] + offset - given)
        if (off <= 0.01 * abs(slope) * highest).all():
            return (slope, offset), highest
    _unknown(reader)
    return None


def _unknown(reader: calls.Reader) -> None:
    warn_once(
        f"{reader.path}: what this pipeline makes of the scheduler's timesteps for the transformer "
        "can't be told, so low-rank modulations are fitted on recorded timesteps alone: record "
        "as many steps as will be used (pipeline.num_inference_steps), or set modulation.enabled "
        "to false"
    )


def _filled(like: Tensor, values: np.ndarray) -> Tensor:
    """An argument of the shape, dtype and device of `like`, with a value per sample, or the first
    value if samples share one."""
    argument = torch.from_numpy(values)
    if not like.ndim or len(like) != len(argument):
        argument = argument[:1]
    if not like.is_floating_point():
        argument = argument.round()
    argument = argument.to(like.dtype).to(like.device)
    return (
        argument.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)
        if like.ndim
        else argument[0]
    )
