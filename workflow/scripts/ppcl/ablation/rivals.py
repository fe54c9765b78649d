"""Rival ways to choose the blocks that go: the rows of the ablation that PPCL is compared with.

Methods that delete blocks return their numbers, which `merged` turns into intervals: a deleted run
joins the kept block before it, whose weights its student starts with, so that before any training
the model is the teacher without those blocks. Methods that replace runs return intervals at once.
`start` makes students of intervals (`Starts`), to be trained like any others.

Shared arguments. removed: how many blocks go. runs: where intervals may lie, from
`intervals.spans`; none reaches over a seam, and each keeps a block. streams: those that count;
leave out what nothing reads after the last block (`Family.unread`) to judge the last ones fairly.
Scores are float64 [depth]; the blocks of lowest score go (`lowest`).
"""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from torch import nn

from ppcl.errors import UserError
from ppcl.extraction.token_table import TokenReader
from ppcl.pruning import students
from ppcl.pruning.constraints import Ends
from ppcl.pruning.units import NewBlock
from ppcl.search import probes
from ppcl.search.cka import linear_cka
from ppcl.training import prices
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context, State

# Interval -> the block whose weights its student starts with, or a way of `students.start_weights`.
Starts = dict[Ends, int | str]


def check(removed: int, possible: int) -> None:
    """Raises UserError unless 0 < removed <= possible."""
    if not 0 < removed <= possible:
        raise UserError(
            f"ablation: {removed} blocks can't be removed here (at least 1, at most {possible}); "
            "change how many it removes, or leave this method out"
        )


def places(removed: int, runs: Sequence[range]) -> list[Ends]:
    """All intervals that remove `removed` blocks. Raises UserError if there are none."""
    check(removed, max([len(run) - 1 for run in runs], default=0))
    return [(b, b + removed) for run in runs for b in run[: max(0, len(run) - removed)]]


def merged(gone: Collection[int], runs: Sequence[range]) -> Starts:
    """The intervals that delete these blocks: (first, last) -> its only kept block.

    What goes joins the kept block before it; at the start of a run, the one after it.
    Raises UserError if a run would keep no block, or a block lies in none.
    """
    if outside := set(gone) - {block for run in runs for block in run}:
        raise UserError(f"ablation: block {min(outside)} may not be pruned; choose others")
    starts: Starts = {}
    for run in runs:
        kept = [block for block in run if block not in gone]
        if not kept:
            raise UserError(f"ablation: blocks {run[0]}-{run[-1]} would all go; keep at least one")
        firsts = [run.start, *kept[1:], run.stop]
        for block, (first, after) in zip(kept, itertools.pairwise(firsts), strict=True):
            if after - first > 1:
                starts[first, after - 1] = block
    return starts


def start(transformer: nn.Module, starts: Starts) -> students.Students:
    """A student with its start weights for every interval, float32, on the CPU."""
    started = {}
    for ends, how in sorted(starts.items()):
        source, way = (ends, how) if isinstance(how, str) else ((how, how), "first")
        (started[NewBlock(*ends)],) = students.start(transformer, [NewBlock(*source)], way).values()
    return started


def lowest(scores: Sequence[float] | np.ndarray, removed: int, runs: Sequence[range]) -> list[int]:
    """The `removed` blocks of lowest score, though every run keeps its block of highest score.

    Raises UserError if there are fewer to remove, or a score is not finite.
    """
    check(removed, sum(len(run) - 1 for run in runs))
    if bad := [b for run in runs if len(run) > 1 for b in run if not math.isfinite(scores[b])]:
        raise UserError(f"ablation: the score of block {bad[0]} is {scores[bad[0]]}")
    best = [max(run, key=lambda block: (scores[block], block)) for run in runs]
    rest = [block for run in runs for block in run if block not in best]
    return sorted(sorted(rest, key=lambda block: scores[block])[:removed])


def every_nth(removed: int, runs: Sequence[range]) -> list[int]:
    """Evenly spread blocks, each in the middle of its share of the depth."""
    check(removed, sum(len(run) - 1 for run in runs))
    offered = [block for run in runs for block in run[1:]]
    return [offered[(2 * i + 1) * len(offered) // (2 * removed)] for i in range(removed)]


def random_blocks(removed: int, runs: Sequence[range], seed: int) -> list[int]:
    """Blocks drawn without replacement."""
    depth = max((run.stop for run in runs), default=0)
    return lowest(np.random.default_rng(seed).permutation(depth), removed, runs)


def random_run(removed: int, runs: Sequence[range], seed: int) -> Starts:
    """One run of blocks, replaced by its first; every place is equally likely."""
    every = places(removed, runs)
    ends = every[np.random.default_rng(seed).integers(len(every))]
    return {ends: ends[0]}


def cosine(tokens: TokenReader, streams: Sequence[str], first: int, last: int) -> float:
    """Mean over tokens, then streams, of the cosine of input and output of blocks first..last."""
    cosines = []
    for stream in streams:
        ends = (tokens.values(boundary, stream) for boundary in (first, last + 1))
        cosines.append(probes.cosines(*ends).mean())
    return float(np.mean(cosines))


def block_influence(tokens: TokenReader, streams: Sequence[str]) -> np.ndarray:
    """ShortGPT (arXiv 2403.03853): scores BI_i = 1 - mean cos(x_i, x_{i+1}).

    Taken: the score. Ours: each stream counts alike, since language models have but one.
    """
    return np.array([1 - cosine(tokens, streams, b, b) for b in range(tokens.boundaries - 1)])


def cka_change(tokens: TokenReader, streams: Sequence[str], estimator: str) -> np.ndarray:
    """CKA sensitivity, the first rung of PPCL's ladder (arXiv 2511.16156), without probes.

    Ours, since the paper does not define it further: scores 1 - CKA of a block's input and output,
    mean of streams.
    """

    def similar(stream: str, block: int) -> float:
        ends = block, block + 1
        before, after = (tokens.values(boundary, stream) for boundary in ends)
        one, other = (f"stream {stream!r}, boundary {boundary}" for boundary in ends)
        return linear_cka(before, after, estimator, (one, other))

    depth = range(tokens.boundaries - 1)
    return np.array([1 - np.mean([similar(s, b) for s in streams]) for b in depth])


def streamline(
    tokens: TokenReader, streams: Sequence[str], removed: int, runs: Sequence[range]
) -> Starts:
    """LLM-Streamline (arXiv 2403.19135): one run of blocks, replaced by one small network.

    Taken: the run whose input and output have the highest cosine. Its network is one block here,
    started as the run's first, so the run has removed + 1 blocks.
    """
    best = max(places(removed, runs), key=lambda ends: cosine(tokens, streams, *ends))
    return {best: best[0]}


def grown(cka: np.ndarray, threshold: float, runs: Iterable[range]) -> dict[int, int]:
    """First -> last of intervals that grow, from the first block on, while cka >= threshold."""
    intervals = {}
    for run in runs:
        first = None
        for block in run:
            if first is None or not cka[first, block] >= threshold:
                first = block if cka[block, block] >= threshold else None
            else:
                intervals[first] = block
    return intervals


def cka_threshold(cka: np.ndarray, removed: int, runs: Sequence[range]) -> Starts:
    """PPCL's own ablation (arXiv 2511.16156): a floor on cka(u, k) in place of Eq. 4 and 5.

    The threshold is the highest at which at least `removed` blocks go. The surplus is given back
    block by block, each time from the end of the interval whose cka [first, last] is lowest.

    Raises:
        UserError: no threshold removes enough.
    """
    check(removed, sum(len(run) - 1 for run in runs))
    # A longer run shifts where the next begins, so that fewer blocks may go at a lower threshold:
    # bisection could miss the highest one, and there are few enough to try them all.
    values = np.unique(np.concatenate([cka[run.start : run.stop, run].ravel() for run in runs]))
    for threshold in values[np.isfinite(values)][::-1]:
        intervals = grown(cka, threshold, runs)
        spare = sum(last - first for first, last in intervals.items()) - removed
        if spare >= 0:
            break
    else:
        raise UserError(f"ablation: the probes' CKA allows no {removed} blocks to be removed")
    for _ in range(spare):
        worst = min(intervals, key=lambda first: cka[first, intervals[first]])
        intervals[worst] -= 1
        intervals = {first: last for first, last in intervals.items() if last > first}
    return {ends: ends[0] for ends in intervals.items()}


def skip_errors(
    context: Context,
    runs: Sequence[range],
    groups: Sequence[np.ndarray],
    batch_size: int,
    state: State | None = None,
) -> np.ndarray:
    """Relative velocity error with each block skipped, on each group of rows: [groups, depth].

    With one group: one-block-out scores, in the style of FLUX.1 Lite (Freepik, 2024); the measure
    is ours. NaN for blocks that may not go. state: see `prices.measure`.
    """
    sequence = blocks.block_sequence(context.transformer)
    errors, skipped = np.full((len(groups), len(sequence)), np.nan), {}
    for run in runs:
        for block in run if len(run) > 1 else ():
            ((ends, only),) = merged({block}, [run]).items()
            skipped[block] = {NewBlock(*ends): sequence[int(only)].module}
    sets = {
        f"without {b:02d}": (
            min(new_block.first for new_block in made),
            max(new_block.last for new_block in made),
            lambda made=made: made,
        )
        for b, made in skipped.items()
    }
    changes = prices.of_students(context.transformer, sets)
    for number, rows in enumerate(groups):
        judged = prices.Judged(context, rows, batch_size)
        kept = state and state.within(str(number))
        errors[number, list(skipped)] = prices.measure(judged, changes, kept)
    return errors


def timestep_groups(reader: calls.Reader, rows: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows in groups of neighbouring timesteps, low to high, with equally many timesteps each.

    Raises UserError if there are fewer timesteps than groups, or a call has one for each frame.
    """
    timesteps = reader.index["timestep"][rows]
    if np.isnan(timesteps).any():
        raise UserError("ablation: the calls' frames have a timestep each, which makes no groups")
    if len(levels := np.unique(timesteps)) < count:
        raise UserError(f"ablation: {count} groups of {len(levels)} timesteps; ask for fewer")
    return [rows[np.isin(timesteps, part)] for part in np.array_split(levels, count)]


def over_timesteps(errors: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Amber-Image (arXiv 2602.17047): scores [depth] from one-block-out errors by timestep.

    Taken: that errors are measured by timestep, and local weight averaging (start `average` on the
    intervals of `merged`). Assumed: the score is the mean of the errors over the groups, weighted
    equally by default. An error is relative to the velocities of its own group, so that no group
    counts more because its velocities are large.

    Args:
        errors: [groups, depth], from `skip_errors` on `timestep_groups`.
        weights: of the groups.
    """
    return np.average(errors, axis=0, weights=weights)
