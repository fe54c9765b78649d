"""The rows of the tables that selection writes, each with the reason for or against it in words."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ppcl.pruning.pins import Ends, Ffn, Named, overlap, shown, within
from ppcl.pruning.plans import Matrix, Modulation
from ppcl.search.budgets import amounts
from ppcl.search.intervals import Interval
from ppcl.search.selection import Selection
from ppcl.transformer.families import TEXT


@dataclass(frozen=True)
class Width:
    """A row of width/measured.parquet; cost is its velocity error, NaN if nobody measured it."""

    kind: str
    first: int
    last: int
    stream: str
    fit_error: float
    cka: float
    saved: int
    cost: float
    path: str = ""
    rank: int = 0

    @property
    def ends(self) -> Ends:
        return self.first, self.last

    @property
    def ffn(self) -> Ffn:
        return self.first, self.stream

    @property
    def matrix(self) -> Matrix:
        return self.first, self.path


def usable_intervals(
    priced: Mapping[Ends, Interval], pinned: Named, limits: dict
) -> dict[Ends, float]:
    """The cost of every interval that selection may use; 0 for a pinned one without any.

    limits: keyword arguments of `interval_obstacle`, which does not hold for what is pinned.
    """
    return {
        ends: _counted(interval.cost)
        for ends, interval in priced.items()
        if ends in pinned.intervals or not interval_obstacle(interval, **limits)
    }


def usable_widths(
    widths: Iterable[Width], pinned: Named, limits: dict
) -> tuple[dict[Ends, float], dict[Ffn, float]]:
    """The same of text runs and of linear FFNs; limits: keyword arguments of `width_obstacle`."""
    runs, ffns = {}, {}
    for width in (one for one in widths if one.kind != "modulation"):
        text = width.kind == "text"
        wanted = width.ends in pinned.runs if text else width.ffn in pinned.ffns
        if wanted or not width_obstacle(width, **limits):
            costs, key = (runs, width.ends) if text else (ffns, width.ffn)
            costs[key] = _counted(width.cost)
    return runs, ffns


def usable_ranks(widths: Iterable[Width], forbidden: Named) -> dict[Matrix, dict[int, float]]:
    """Of each modulation matrix, the cost of every rank that selection may use."""
    found: dict[Matrix, dict[int, float]] = {}
    for width in widths:
        if width.kind == "modulation" and width.first not in forbidden.ranks:
            found.setdefault(width.matrix, {})[width.rank] = _counted(width.cost)
    return found


def _counted(cost: float) -> float:
    return 0.0 if math.isnan(cost) else cost


def interval_obstacle(
    interval: Interval, forbidden: Named, floor: float, kept: Collection[int]
) -> str | None:
    """Why an interval may not be used, or None. kept: protected blocks."""
    if (interval.first, interval.last) in forbidden.intervals:
        return "forbidden by intervals.forbid"
    if math.isnan(interval.cost):
        return "has no measured cost: longer than sensitivity.longest"
    if interval.cka < floor:
        return f"cka {interval.cka:.4f} is below intervals.cka_floor {floor:g}"
    return _protected(interval.blocks, kept)


def width_obstacle(
    width: Width, forbidden: Named, floor: float, kept: Collection[int]
) -> str | None:
    """Why a text run, a linear FFN or a rank may not be used, or None. Protected blocks keep all
    but their modulations."""
    if width.kind == "modulation":
        return "forbidden by modulation.forbid" if width.first in forbidden.ranks else None
    if width.kind == "text" and width.ends in forbidden.runs:
        return "forbidden by width.text.forbid"
    if width.kind == "ffn" and width.ffn in forbidden.ffns:
        return f"forbidden by width.ffn_{width.stream}.forbid"
    if width.kind == "text" and width.cka < floor:
        return f"text cka {width.cka:.4f} is below width.cka_floor {floor:g}"
    return _protected(range(width.first, width.last + 1), kept)


def _protected(blocks: Iterable[int], kept: Collection[int]) -> str | None:
    inside = [block for block in blocks if block in kept]
    if not inside:
        return None
    return (
        f"holds protected block {', '.join(map(str, inside))} "
        "(intervals.protect_first, protect_last)"
    )


def interval_rows(
    chain: Sequence[Interval],
    priced: Mapping[Ends, Interval],
    plan: Selection,
    needs: Mapping[str, float],
    tolerance: float,
    pinned: Named,
    limits: dict,
) -> list[dict]:
    """Rows of intervals.parquet, by depth: every interval of Eq. 5's chain (source "trend") and
    every selected one that is not in it (source "optimal"), each with the reason in words.

    Args:
        priced: all candidates and all pinned intervals.
        limits: keyword arguments of `interval_obstacle`.
    """
    found = {(it.first, it.last): it for it in chain}
    rows = []
    for ends in sorted({*found, *plan.intervals}):
        interval = priced.get(ends) or found[ends]
        if ends in plan.intervals:
            reason = _why(ends in pinned.intervals, "intervals", interval.cost, plan, needs)
            whole = next((it for it in chain if set(interval.blocks) < set(it.blocks)), None)
            reason += f"; part of the Eq. 5 run {whole}" if whole else ""
        else:
            reason = interval_obstacle(interval, **limits) or _beaten(ends, plan)
        rows.append(
            {
                "first": interval.first,
                "last": interval.last,
                "removed_blocks": interval.removed,
                "cka": interval.cka,
                "selected": ends in plan.intervals,
                "reason": reason,
                "source": "trend" if ends in found else "optimal",
                "cost": interval.cost,
                "tolerance": float(tolerance),
            }
        )
    return rows


def width_rows(
    widths: Iterable[Width],
    plan: Selection,
    needs: Mapping[str, float],
    pinned: Named,
    limits: dict,
    modulations: Mapping[Matrix, Modulation],
    unread: int | None,
) -> list[dict]:
    """Rows of width/candidates.parquet: every measured or pinned text run and linear FFN, and every
    measured rank of a modulation matrix.

    Args:
        limits: keyword arguments of `width_obstacle`.
        modulations: the matrices of which there are rows.
        unread: the block after which nothing reads the text stream, if there is one.
    """
    rows = []
    beaten = {
        "text": lambda width: _run_beaten(width, plan),
        "ffn": lambda width: _ffn_beaten(width, plan, unread),
        "modulation": lambda width: _rank_beaten(width, plan, modulations[width.matrix]),
    }
    for width in sorted(widths, key=lambda w: (w.kind, w.first, w.last, w.stream, w.path, w.rank)):
        selected, wanted, key = {
            "text": (width.ends in plan.runs, width.ends in pinned.runs, "width.text"),
            "ffn": (width.ffn in plan.ffns, width.ffn in pinned.ffns, f"width.ffn_{width.stream}"),
            "modulation": (
                plan.ranks.get(width.matrix) == width.rank,
                width.first in pinned.ranks,
                "modulation",
            ),
        }[width.kind]
        if selected:
            reason = _why(wanted, key, width.cost, plan, needs)
        else:
            reason = width_obstacle(width, **limits) or beaten[width.kind](width)
        rows.append(
            {
                "kind": width.kind,
                "first": width.first,
                "last": width.last,
                "stream": width.stream,
                "path": width.path,
                "rank": width.rank,
                "fit_error_heldout": width.fit_error,
                "cka": width.cka,
                "parameters_saved": width.saved,
                "velocity_error": width.cost,
                "selected": selected,
                "reason": reason,
            }
        )
    return rows


def _why(wanted: bool, key: str, cost: float, plan: Selection, needs: Mapping[str, float]) -> str:
    """Why something is selected."""
    if wanted:
        return f"pinned by {key}.pin" + ("; not measured, so it counts as free" * math.isnan(cost))
    return (
        f"in the cheapest set that saves {amounts(needs)} (it saves {amounts(plan.saved)}, "
        f"cost {plan.cost:.4g})"
    )


def _beaten(ends: Ends, plan: Selection) -> str:
    if rivals := [shown(it) for it in plan.intervals if overlap(it, ends)]:
        return f"costs more at this budget than {', '.join(rivals)} on its blocks"
    if cut := [shown(run) for run in plan.runs if overlap(run, ends) and not within(ends, run)]:
        return f"would be cut by the selected text run {cut[0]}"
    return "not needed for the budget: other choices cost less"


def _run_beaten(width: Width, plan: Selection) -> str:
    if rivals := [shown(run) for run in plan.runs if overlap(run, width.ends)]:
        return f"costs more at this budget than {', '.join(rivals)} on its blocks"
    for interval in plan.intervals:
        if overlap(interval, width.ends):
            if within(width.ends, interval):
                return f"inside the selected interval {shown(interval)}, it is one block"
            if not within(interval, width.ends):
                return f"would cut the selected interval {shown(interval)}"
    return "not needed for the budget: other choices cost less"


def _ffn_beaten(width: Width, plan: Selection, unread: int | None) -> str:
    text = width.stream == TEXT
    for first, last in plan.runs:
        if text and first == width.first and last == unread:
            return f"gone: nothing reads its text after the selected run [{first},{last}]"
    return _gone(width.first, text, plan) or "not needed for the budget: other choices cost less"


def _rank_beaten(width: Width, plan: Selection, modulation: Modulation) -> str:
    if width.matrix in plan.ranks:
        return f"rank {plan.ranks[width.matrix]} of it costs less at this budget"
    gone = _gone(width.first, modulation.text, plan)
    return gone or "not needed for the budget: other choices cost less"


def _gone(block: int, text: bool, plan: Selection) -> str:
    """Why a block has something no more; empty if it still has. text: of its text stream."""
    for first, last in plan.intervals:
        if first < block <= last:
            return f"goes with its block in the selected interval [{first},{last}]"
    for first, last in plan.runs:
        if text and first < block <= last:
            return f"gone: its text stream is borrowed in the selected run [{first},{last}]"
    return ""
