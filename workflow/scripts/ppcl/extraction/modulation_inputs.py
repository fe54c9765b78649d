"""Sums up what modulation matrices get: of recorded calls, and of a dense grid of timesteps.

Recorded calls alone may hold ten timesteps. Maps fitted on them would be exact there and wrong for
a user with another number of steps, another shift or another guidance.
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

# What schedulers of diffusers count up to, unless their configs say otherwise.
TIMESTEPS = 1000
# The weight of recorded calls beside the grid.
RECORDED = 1 / 32


class Sums:
    """Sums up what matrices get while a transformer runs.

    Matrices share an entry for as long as they get the same in every call, to the bit; that is
    found by comparing. Memory does not depend on the number of calls.

    Args:
        matrices: block, or the number of blocks for the last AdaLN, and path.
        device: where products are made; sums are in main memory.

    Attributes:
        sums: those so far.
    """

    def __init__(self, transformer: nn.Module, matrices: Iterable[Matrix], device: torch.device):
        self._device = devices.statistics_device(device)
        self._sequence = blocks.block_sequence(transformer)
        self._linears = {matrix: self._linear(transformer, matrix) for matrix in matrices}
        # A compiled block with a hook inside runs as it was written.
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
        """Of every entry, the first of its matrices."""
        leaders: dict[int, Matrix] = {}
        for matrix, place in self.sums.places.items():
            leaders.setdefault(place, matrix)
        return leaders

    def put(self, sums: Conditioning) -> None:
        """Starts from these sums."""
        # Copies: what was read from a file may lie at any address, and then rounds in another way.
        self.sums = Conditioning([entry.weighted(1) for entry in sums.entries], sums.places)
        self._fresh = not sums.places
        if self._fresh and self._linears:  # all get the same until they are seen to differ
            self.sums = Conditioning([_nothing()], dict.fromkeys(self._linears, 0))
        self._waiting: list[list[Tensor]] = [[] for _ in self.sums.entries]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within, the transformer may be called once; then come `take` and `settle`."""
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
        """Sends for what the call gave, without waiting for the device.

        fit: which of the call's samples [batch] count.
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
        """Adds what `take` sent for, and sums up where enough waits.

        The device must have done what it was asked for.
        """
        if not (self._alike and self._flags.all()):
            self._part()
        for place, rows in self._taken.items():
            self._waiting[place] += [x for x in rows if len(x)]
        self._taken, self._seen, self._fresh = {}, {}, False
        self.sum_up()

    def _part(self) -> None:
        """Gives matrices that got something else than the first of their entry another one."""
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
        """What a matrix got for samples to fit on, [n, d] each, on its way to main memory."""
        taken = []
        for x in seen:
            # A transformer may have several conditionings a sample, one after the other.
            repeats, rest = divmod(len(x), len(self._fit))
            if rest:
                raise UserError(
                    f"extract: a modulation gets {len(x)} conditionings for {len(self._fit)} "
                    "samples, so whose they are is unclear; set modulation.enabled to false"
                )
            chosen = torch.from_numpy(np.flatnonzero(np.tile(self._fit, repeats)))
            # A conditioning of every token, or frame, is as many samples.
            rows = x[chosen.to(x.device, non_blocking=True)].flatten(0, -2)
            taken.append(devices.to_main_memory(rows))
        return taken

    def sum_up(self, everything: bool = False) -> None:
        """Sums up what waits: of entries with d samples, as a product [d, d] has a long way to main
        memory; or `everything`."""
        for place, waiting in enumerate(self._waiting):
            if waiting and (everything or sum(map(len, waiting)) >= waiting[0].shape[1]):
                x = torch.cat(waiting).to(self._device).double()  # MPS casts to no float64
                waiting.clear()
                more = Moments(float(len(x)), x.sum(0).cpu(), (x.T @ x).cpu())
                before = self.sums.entries[place]
                self.sums.entries[place] = before + more if before.count else more

    def result(self) -> Conditioning:
        """The sums, without matrices that got nothing."""
        kept = [place for place, entry in enumerate(self.sums.entries) if entry.count]
        numbers = {place: number for number, place in enumerate(kept)}
        places = {m: numbers[p] for m, p in self.sums.places.items() if p in numbers}
        return Conditioning([self.sums.entries[place] for place in kept], places)


def _nothing() -> Moments:
    return Moments(0.0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64))


def _same(one: list[Tensor], other: list[Tensor]) -> Tensor | bool:
    """Whether two matrices got the same; a boolean on the device where it had to look."""
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
    """Sums of recorded calls, and of a grid: timesteps evenly spaced over the scheduler's whole
    range, each with the text of a recorded call and, where the transformer gets guidance as a
    number, with one of evenly spaced guidances.

    Recorded calls weigh RECORDED of both, however many they are. By their numbers, thousands of
    calls at ten timesteps would drown the grid, and even at equal weights a map spends its rank on
    these ten: with the embedded teacher's 10 steps and rank 8, maps were 4.5 times as wrong at 50
    steps and a shift of 3. The grid does not drown them: it has their texts, and a timestep close
    to each of theirs; their own weight stands for whatever else a pipeline does.

    Args:
        rows: calls whose texts are taken.
        settings: the config's `modulation`.
        size: samples in a call.

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
    """What a pipeline makes of the scheduler's timestep for the transformer, slope and offset, and
    the highest timestep, all from recorded calls; None if it makes something else of it.

    Some pass it as it is, others divide it by the highest, and some count the other way round.
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
    """An argument with these values of the samples: of the first, where samples share one."""
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
