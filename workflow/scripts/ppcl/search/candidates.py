"""Which candidates selection may use, at which cost, and what rules out the others."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ppcl.pruning.constraints import Ends, Ffn, Named
from ppcl.pruning.units import Matrix
from ppcl.search.intervals import Interval
from ppcl.search.measured import ClosedForm
from ppcl.storage.schemas import Verdict


@dataclass(frozen=True)
class Limits:
    """What the config rules out among candidates of one kind.

    Attributes:
        forbidden: what its `forbid` lists name.
        protected: blocks that stay as they are.
        cka_floor: CKA below which nothing is used: intervals.cka_floor or width.cka_floor.
    """

    forbidden: Named
    protected: Collection[int]
    cka_floor: float


class Obstacle(NamedTuple):
    """What rules a candidate out: the verdict, and the sentence that explains it."""

    verdict: Verdict
    reason: str


def usable_intervals(
    priced: Mapping[Ends, Interval], required: Named, limits: Limits
) -> dict[Ends, float]:
    """The cost of every interval that selection may use; 0 for a required one without a cost (NaN).

    The limits do not hold for what is required.
    """
    return {
        ends: _counted(interval.cost)
        for ends, interval in priced.items()
        if ends in required.intervals or not interval_obstacle(interval, limits)
    }


def usable_linear_maps(
    rows: Iterable[ClosedForm], required: Named, limits: Limits
) -> tuple[dict[Ends, float], dict[Ffn, float]]:
    """As `usable_intervals`: costs of text runs, and of linear FFNs."""
    runs: dict[Ends, float] = {}
    ffns: dict[Ffn, float] = {}
    for row in rows:
        if row.kind == "text" and (
            row.ends in required.runs or not closed_form_obstacle(row, limits)
        ):
            runs[row.ends] = _counted(row.cost)
        if row.kind == "ffn" and (
            row.ffn in required.ffns or not closed_form_obstacle(row, limits)
        ):
            ffns[row.ffn] = _counted(row.cost)
    return runs, ffns


def usable_ranks(rows: Iterable[ClosedForm], forbidden: Named) -> dict[Matrix, dict[int, float]]:
    """Of each modulation matrix, the cost of every rank that selection may use."""
    ranks: dict[Matrix, dict[int, float]] = {}
    for row in rows:
        if row.kind == "modulation" and row.first not in forbidden.ranks:
            ranks.setdefault(row.matrix, {})[row.rank] = _counted(row.cost)
    return ranks


def _counted(cost: float) -> float:
    return 0.0 if math.isnan(cost) else cost


def interval_obstacle(interval: Interval, limits: Limits) -> Obstacle | None:
    """What rules an interval out, or None."""
    if (interval.first, interval.last) in limits.forbidden.intervals:
        return Obstacle(Verdict.FORBIDDEN, "forbidden by intervals.forbid")
    if math.isnan(interval.cost):
        reason = "has no measured cost: longer than sensitivity.longest"
        return Obstacle(Verdict.UNMEASURED, reason)
    if interval.cka < limits.cka_floor:
        reason = f"cka {interval.cka:.4f} is below intervals.cka_floor {limits.cka_floor:g}"
        return Obstacle(Verdict.LOW_CKA, reason)
    return _protected(interval.blocks, limits)


def closed_form_obstacle(row: ClosedForm, limits: Limits) -> Obstacle | None:
    """What rules out a text run, a linear FFN or a rank, or None. Of protected blocks, only the
    modulations may be pruned."""
    forbidden = limits.forbidden
    if row.kind == "modulation":
        if row.first in forbidden.ranks:
            return Obstacle(Verdict.FORBIDDEN, "forbidden by modulation.forbid")
        return None
    if row.kind == "text" and row.ends in forbidden.runs:
        return Obstacle(Verdict.FORBIDDEN, "forbidden by width.text.forbid")
    if row.kind == "ffn" and row.ffn in forbidden.ffns:
        return Obstacle(Verdict.FORBIDDEN, f"forbidden by width.ffn_{row.stream}.forbid")
    if row.kind == "text" and row.cka < limits.cka_floor:
        reason = f"text cka {row.cka:.4f} is below width.cka_floor {limits.cka_floor:g}"
        return Obstacle(Verdict.LOW_CKA, reason)
    return _protected(range(row.first, row.last + 1), limits)


def _protected(blocks: Iterable[int], limits: Limits) -> Obstacle | None:
    inside = [block for block in blocks if block in limits.protected]
    if not inside:
        return None
    return Obstacle(
        Verdict.PROTECTED,
        f"holds protected block {', '.join(map(str, inside))} "
        "(intervals.protect_first, protect_last)",
    )
