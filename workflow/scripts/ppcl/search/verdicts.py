"""Why each candidate was selected or not: a verdict, of `schemas.Verdict`, for programs, and a
sentence for people; and with these, the rows of the tables that selection writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppcl.pruning.constraints import Ends, Named, overlap, shown, within
from ppcl.pruning.units import Modulation
from ppcl.search.budgets import amounts
from ppcl.search.candidates import Limits, closed_form_obstacle, interval_obstacle
from ppcl.search.intervals import Interval
from ppcl.search.measured import ClosedForm, ClosedForms
from ppcl.search.selection import Selection
from ppcl.storage.schemas import Verdict
from ppcl.transformer.family import TEXT

Judged = tuple[Verdict, str]  # and the sentence that explains the verdict

_NOT_NEEDED = Verdict.NOT_NEEDED, "not needed for the budget: other choices cost less"


@dataclass(frozen=True)
class Decision:
    """What was selected, for which needs (measure -> how much has to go), and what was required."""

    selection: Selection
    needs: Mapping[str, float]
    required: Named


def interval_rows(
    chain: Sequence[Interval],
    priced: Mapping[Ends, Interval],
    decision: Decision,
    limits: Limits,
    tolerance: float,
) -> list[dict[str, Any]]:
    """Rows of intervals.parquet, by depth: every interval of Eq. 5's chain (source "trend") and
    every selected one that is not in it (source "optimal"), each with its verdict.

    Args:
        priced: all candidates and all required intervals.
        tolerance: rise of Delta that ended the search.
    """
    searched = {(it.first, it.last): it for it in chain}
    selection, required = decision.selection, decision.required
    rows = []
    for ends in sorted({*searched, *selection.intervals}):
        interval = priced.get(ends) or searched[ends]
        if ends in selection.intervals:
            wanted = ends in required.intervals
            verdict, reason = _selected(wanted, "intervals", interval.cost, decision)
            whole = next((it for it in chain if set(interval.blocks) < set(it.blocks)), None)
            reason += f"; part of the Eq. 5 run {whole}" if whole else ""
        else:
            verdict, reason = interval_obstacle(interval, limits) or _interval_left(ends, selection)
        rows.append(
            {
                "first": interval.first,
                "last": interval.last,
                "removed_blocks": interval.removed,
                "cka": interval.cka,
                "selected": ends in selection.intervals,
                "verdict": verdict,
                "reason": reason,
                "source": "trend" if ends in searched else "optimal",
                "cost": interval.cost,
                "tolerance": float(tolerance),
            }
        )
    return rows


def closed_form_rows(
    closed: ClosedForms, decision: Decision, limits: Limits
) -> list[dict[str, Any]]:
    """Rows of width/candidates.parquet: every measured or required text run and linear FFN, and
    every measured rank of a modulation matrix, each with its verdict."""
    selection, required = decision.selection, decision.required
    rows = []
    for row in sorted(
        closed.rows, key=lambda r: (r.kind, r.first, r.last, r.stream, r.path, r.rank)
    ):
        selected, wanted, key = {
            "text": (row.ends in selection.runs, row.ends in required.runs, "width.text"),
            "ffn": (row.ffn in selection.ffns, row.ffn in required.ffns, f"width.ffn_{row.stream}"),
            "modulation": (
                selection.ranks.get(row.matrix) == row.rank,
                row.first in required.ranks,
                "modulation",
            ),
        }[row.kind]
        if selected:
            verdict, reason = _selected(wanted, key, row.cost, decision)
        else:
            verdict, reason = closed_form_obstacle(row, limits) or _left(row, selection, closed)
        rows.append(
            {
                "kind": row.kind,
                "first": row.first,
                "last": row.last,
                "stream": row.stream,
                "path": row.path,
                "rank": row.rank,
                "fit_error_heldout": row.fit_error,
                "cka": row.cka,
                "parameters_saved": row.saved,
                "velocity_error": row.cost,
                "selected": selected,
                "verdict": verdict,
                "reason": reason,
            }
        )
    return rows


def _selected(wanted: bool, key: str, cost: float, decision: Decision) -> Judged:
    """On a selected candidate. wanted: whether the list `require` of this key names it."""
    if wanted:
        free = "; not measured, so it counts as free" * math.isnan(cost)
        return Verdict.REQUIRED, f"required by {key}.require" + free
    selection = decision.selection
    return Verdict.CHEAPEST, (
        f"in the cheapest set that saves {amounts(decision.needs)} (it saves "
        f"{amounts(selection.saved)}, cost {selection.cost:.4g})"
    )


def _interval_left(ends: Ends, selection: Selection) -> Judged:
    """On an interval that may be used, but was not selected."""
    if rivals := [shown(it) for it in selection.intervals if overlap(it, ends)]:
        return _costlier(rivals)
    if cut := [
        shown(run) for run in selection.runs if overlap(run, ends) and not within(ends, run)
    ]:
        return Verdict.CONFLICT, f"would be cut by the selected text run {cut[0]}"
    return _NOT_NEEDED


def _left(row: ClosedForm, selection: Selection, closed: ClosedForms) -> Judged:
    """On a closed form that may be used, but was not selected."""
    if row.kind == "text":
        return _run_left(row, selection)
    if row.kind == "ffn":
        return _ffn_left(row, selection, closed.unread)
    return _rank_left(row, selection, closed.modulations[row.matrix])


def _run_left(row: ClosedForm, selection: Selection) -> Judged:
    if rivals := [shown(run) for run in selection.runs if overlap(run, row.ends)]:
        return _costlier(rivals)
    for interval in selection.intervals:
        if overlap(interval, row.ends):
            if within(row.ends, interval):
                reason = f"inside the selected interval {shown(interval)}, it is one block"
                return Verdict.GONE, reason
            if not within(interval, row.ends):
                return Verdict.CONFLICT, f"would cut the selected interval {shown(interval)}"
    return _NOT_NEEDED


def _ffn_left(row: ClosedForm, selection: Selection, unread: int | None) -> Judged:
    text = row.stream == TEXT
    for first, last in selection.runs:
        if text and first == row.first and last == unread:
            reason = f"gone: nothing reads its text after the selected run [{first},{last}]"
            return Verdict.GONE, reason
    return _gone(row.first, text, selection) or _NOT_NEEDED


def _rank_left(row: ClosedForm, selection: Selection, modulation: Modulation) -> Judged:
    if row.matrix in selection.ranks:
        reason = f"rank {selection.ranks[row.matrix]} of it costs less at this budget"
        return Verdict.COSTLIER, reason
    return _gone(row.first, modulation.text, selection) or _NOT_NEEDED


def _costlier(rivals: Sequence[str]) -> Judged:
    reason = f"costs more at this budget than {', '.join(rivals)} on its blocks"
    return Verdict.COSTLIER, reason


def _gone(block: int, text: bool, selection: Selection) -> Judged | None:
    """On a part of a block that is gone with the block or, if `text`, with its text stream; None if
    the part is still there."""
    for first, last in selection.intervals:
        if first < block <= last:
            reason = f"goes with its block in the selected interval [{first},{last}]"
            return Verdict.GONE, reason
    for first, last in selection.runs:
        if text and first < block <= last:
            reason = f"gone: its text stream is borrowed in the selected run [{first},{last}]"
            return Verdict.GONE, reason
    return None
