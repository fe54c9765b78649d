"""Which runs of blocks one student block each may replace: Eq. 5.

Eq. 5 finds where a run of probes stops following the teacher. Its intervals leave no gap, so they
are only candidates, of which ppcl.search.selection picks. An interval is [first, last], inclusive,
of at least two blocks; one student replaces it, so last - first blocks go.

`cka`, `delta` and `costs` are float64 [first, last] as in ppcl.search.similarity: first = u + 1,
last = k. A cost is the measured velocity error with an untrained student, 1 - cka, or the influence
of the blocks that go. PPCL, arXiv 2511.16156, stage 1.2.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ppcl.search.cka_draws import differences


@dataclass(frozen=True)
class Interval:
    """Blocks first..last, inclusive, for one student; cka is cka(first - 1, last).

    cost is the fidelity that selection expects to lose; NaN if nobody measured it.
    """

    first: int
    last: int
    cka: float
    cost: float

    @property
    def removed(self) -> int:
        return self.last - self.first

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return f"[{self.first},{self.last}]"


def spans(depth: int, seams: Iterable[int] = (), kept: Collection[int] = ()) -> list[range]:
    """Maximal runs of blocks in which an interval may lie.

    Args:
        seams: first block of each run of like blocks. No interval reaches over one, since one block
            can't stand for blocks of two classes.
        kept: blocks that no interval may touch.
    """
    runs, seams, first = [], set(seams), 0
    for block in range(depth + 1):
        if block == depth or block in seams or block in kept:
            if block > first:
                runs.append(range(first, block))
            first = block + 1 if block in kept else block
    return runs


def trend_end(delta: np.ndarray, first: int, stop: int, tolerance: float = 0.0) -> int:
    """v of Eq. 5 for a search from block `first` = u + 1 on; `stop` if Delta never rises.

        v = min { k-1 in [u+2, stop] : Delta(u, k) > Delta(u, k-1) + tolerance }

    delta [first, last]; stop: last block that the search may replace, so k <= stop. The paper's
    equation has tolerance 0.
    """
    for k in range(first + 2, stop + 1):
        if delta[first, k] > delta[first, k - 1] + tolerance:
            return k - 1
    return stop


def trend_chain(
    cka: np.ndarray, runs: Iterable[range], tolerance: float = 0.0
) -> list[tuple[int, int]]:
    """The paper's intervals, as (first, last), by Eq. 5.

    The first search starts at the first block of a run, each further one after the interval before.
    A single block that is left over at the end of a run is no interval. cka: [first, last].
    """
    delta, chain = differences(cka), []
    for run in runs:
        first = run.start
        while first < run.stop - 1:
            last = trend_end(delta, first, run.stop - 1, tolerance)
            chain.append((first, last))
            first = last + 1
    return chain


def all_within(runs: Iterable[range], longest: int | None = None) -> list[tuple[int, int]]:
    """(first, last) of every interval inside the given runs, of `longest` blocks at most."""
    return [
        (first, last)
        for run in runs
        for first in run
        for last in range(first + 1, min(run.stop, first + (longest or len(run))))
    ]


def candidates(
    runs: Sequence[range], segmentation: str, chain: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What selection may choose from.

    "trend": the intervals of Eq. 5's chain and all intervals inside them. A run that Eq. 5 calls
    continuous is continuous in its parts, so a part of it, or several disjoint ones, may be used
    when the whole removes too much. "optimal": every interval inside `runs`.
    """
    continuous = [range(first, last + 1) for first, last in chain]
    return all_within(continuous if segmentation == "trend" else runs)


def by_influence(influences: np.ndarray) -> np.ndarray:
    """Costs [first, last] from the influence of every block [depth]: its sum over first + 1..last.

    ShortGPT (arXiv 2403.03853) removes the blocks of least influence; here the student stands for
    block `first` as well, whose influence does not count.
    """
    depth = len(influences)
    costs = np.full((depth, depth), np.nan)
    for first in range(depth):
        costs[first, first:] = np.cumsum(np.append(0.0, influences[first + 1 :]))
    return costs


def priced(ends: Iterable[tuple[int, int]], cka: np.ndarray, costs: np.ndarray) -> list[Interval]:
    """Intervals with their similarity and cost."""
    return [Interval(*at, float(cka[at]), float(costs[at])) for at in ends]
