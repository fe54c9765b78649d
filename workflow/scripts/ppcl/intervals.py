"""Which runs of blocks one student block each shall replace: Eq. 5, and exact selection.

Eq. 5 finds where a run of probes stops to follow the teacher; it leaves no gap, so what it finds
are candidates. Selection then picks intervals that do not overlap, at the least total cost, such
that the model meets its budget. An interval is [first, last], inclusive, of at least two blocks;
one student replaces it, so last - first blocks go.

`cka`, `delta` and `costs` are float64 [first, last] as in ppcl.similarity: first = u + 1, last = k.
A cost is either 1 - cka or the measured velocity error with an untrained student. PPCL, arXiv
2511.16156, stage 1.2. Parameters are counted as the student having its first block's size.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ppcl.errors import UserError
from ppcl.similarity import differences


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


@dataclass(frozen=True)
class Plan:
    """Disjoint intervals in order of depth, their total cost, and the parameters they save."""

    cost: float
    saved: int
    intervals: tuple[Interval, ...]

    @property
    def removed(self) -> int:
        return sum(interval.removed for interval in self.intervals)


def spans(depth: int, seams: Iterable[int] = (), kept: Collection[int] = ()) -> list[range]:
    """Maximal runs of blocks in which an interval may lie.

    seams: first block of each block list; an interval cannot reach over one, since the lists' block
    classes differ. kept: blocks that no interval may touch.
    """
    runs, seams, first = [], set(seams), 0
    for block in range(depth + 1):
        if block == depth or block in seams or block in kept:
            if block > first:
                runs.append(range(first, block))
            first = block + 1 if block in kept else block
    return runs


def trend_end(delta: np.ndarray, first: int, stop: int, tolerance: float = 0.0) -> int:
    """v of Eq. 5 for a search whose first replaced block is `first` = u + 1; `stop` if none.

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
    """The paper's intervals, as (first, last): Eq. 5 from the first block of every run, each search
    after the last.

    A single block that is left over at the end of a run is no interval.
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

    "trend": the chain of Eq. 5 and every interval inside one of its own. A run that Eq. 5 calls
    continuous is continuous in its parts, so a part of it, or several disjoint ones, may be used
    when the whole removes too much. "optimal": every interval inside `runs`.
    """
    continuous = [range(first, last + 1) for first, last in chain]
    return all_within(continuous if segmentation == "trend" else runs)


def priced(ends: Iterable[tuple[int, int]], cka: np.ndarray, costs: np.ndarray) -> list[Interval]:
    """Intervals with their similarity and cost."""
    return [Interval(*at, float(cka[at]), float(costs[at])) for at in ends]


def plans(usable: Iterable[Interval], sizes: Sequence[int]) -> dict[tuple[int, int], Plan]:
    """The cheapest plan for every (removed blocks, saved parameters) that can be had, exactly.

    Dynamic programming over the depth: the best plans for blocks before i are those before i - 1,
    or a candidate that ends at i - 1 after the best plans before its first block. sizes: parameters
    per block. Blocks of a few distinct sizes, as models have, keep the table small: at most depth^2
    entries for two sizes.
    """
    offsets = [0, *np.cumsum(sizes).tolist()]
    ending: dict[int, list[Interval]] = {}
    for interval in usable:
        ending.setdefault(interval.last, []).append(interval)
    # Entries are (cost, last interval, entry it follows): plans share their beginnings.
    tables: list[dict] = [{(0, 0): (0.0, None, None)}]
    for block in range(len(sizes)):
        table = dict(tables[block])
        for interval in ending.get(block, []):
            saves = offsets[block + 1] - offsets[interval.first] - sizes[interval.first]
            for (removed, saved), entry in tables[interval.first].items():
                key, cost = (removed + interval.removed, saved + saves), entry[0] + interval.cost
                if key not in table or cost < table[key][0]:
                    table[key] = (cost, interval, entry)
        tables.append(table)
    return {key: Plan(entry[0], key[1], _unroll(entry)) for key, entry in tables[-1].items()}


def _unroll(entry: tuple) -> tuple[Interval, ...]:
    intervals = []
    while entry[1] is not None:
        intervals.append(entry[1])
        entry = entry[2]
    return tuple(reversed(intervals))


def select(
    choices: Iterable[Interval],
    sizes: Sequence[int],
    needed: int,
    floor: float = 0.0,
    protected: Collection[int] = (),
) -> Plan:
    """The cheapest of the `choices` that saves `needed` parameters, and no whole block more.

    Intervals with cka below `floor` or with a protected block are not used. Among plans that exceed
    `needed` by less than the smallest block, the cheapest wins; with blocks of one size these are
    the plans that remove exactly ceil(needed / size) blocks. Where no plan is that close, the
    closest one above is taken. sizes: parameters per block.

    Raises UserError, with what can be reached and the keys to relax, if nothing saves enough.
    """
    usable = [it for it in choices if _obstacle(it, floor, protected) is None]
    table = plans(usable, sizes)
    enough = {key: plan for key, plan in table.items() if plan.saved >= needed}
    if not enough:
        most = max(table.values(), key=lambda plan: plan.saved)
        raise UserError(
            f"intervals: the smallest budget in variants needs {needed:,} parameters removed; the "
            f"usable intervals remove at most {most.saved:,} ({most.removed} of {len(sizes)} "
            f"blocks). Lower intervals.cka_floor (now {floor:g}), intervals.protect_first or "
            f"intervals.protect_last, raise that budget or, with measured costs, "
            f"sensitivity.longest, or set intervals.segmentation to optimal."
        )
    closest = min(plan.saved for plan in enough.values())
    limit = max(closest, needed + min(sizes) - 1)
    return min(
        (plan for plan in enough.values() if plan.saved <= limit),
        key=lambda plan: (plan.cost, plan.saved, plan.removed),
    )


def parameters_needed(total: int, budget: float) -> int:
    """Parameters that must go so that at most budget * total stay."""
    # The small addend keeps 0.55 * 20 = 11.000000000000002 or 10.999999999999998 at 11.
    return max(0, total - math.floor(budget * total + 1e-6))


def rows(
    chain: Sequence[Interval],
    plan: Plan,
    needed: int,
    tolerance: float,
    floor: float = 0.0,
    protected: Collection[int] = (),
) -> list[dict]:
    """Rows of intervals.parquet, by depth: every interval of Eq. 5's chain (source "trend") and
    every selected one that is not in it (source "optimal"), each with the reason in words."""
    found = {(it.first, it.last): it for it in chain}
    chosen = {(it.first, it.last): it for it in plan.intervals}
    result = []
    for key, interval in sorted({**chosen, **found}.items()):
        if key in chosen:
            reason = (
                f"in the cheapest set that saves {needed:,} parameters "
                f"({plan.removed} blocks, {plan.saved:,} parameters, cost {plan.cost:.4g})"
            )
            run = next((it for it in chain if set(interval.blocks) < set(it.blocks)), None)
            reason += f"; part of the Eq. 5 run {run}" if run else ""
        else:
            reason = _obstacle(interval, floor, protected) or _beaten(interval, plan)
        result.append(
            {
                "first": interval.first,
                "last": interval.last,
                "removed_blocks": interval.removed,
                "cka": interval.cka,
                "selected": key in chosen,
                "reason": reason,
                "source": "trend" if key in found else "optimal",
                "cost": interval.cost,
                "tolerance": float(tolerance),
            }
        )
    return result


def _obstacle(interval: Interval, floor: float, protected: Collection[int]) -> str | None:
    """Why an interval may not be used, or None."""
    if math.isnan(interval.cost):
        return "has no measured cost: longer than sensitivity.longest"
    if interval.cka < floor:
        return f"cka {interval.cka:.4f} is below intervals.cka_floor {floor:g}"
    inside = [block for block in interval.blocks if block in protected]
    if inside:
        named = ", ".join(map(str, inside))
        return f"holds protected block {named} (intervals.protect_first, protect_last)"
    return None


def _beaten(interval: Interval, plan: Plan) -> str:
    rivals = [str(it) for it in plan.intervals if set(it.blocks) & set(interval.blocks)]
    if rivals:
        return f"costs more at this budget than {', '.join(rivals)} on its blocks"
    return "not needed for the budget: other blocks cost less"
