"""Stages 1.2 and 2 of PPCL (arXiv 2511.16156), step by step: `measurements` of earlier stages, the
`segmentation` of the depth by Eq. 5, the `cheapest` set for the smallest budgets, and its tables.

Matrices are float64 [first, last], as in ppcl.search.intervals.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Ends, Named
from ppcl.search import (
    budgets,
    candidates,
    interval_costs,
    intervals,
    measured,
    savings,
    selection,
    stored,
    verdicts,
)
from ppcl.search.candidates import Limits
from ppcl.search.interval_costs import CostInputs
from ppcl.search.intervals import Interval
from ppcl.search.measured import ClosedForm, ClosedForms
from ppcl.search.savings import Weights
from ppcl.search.selection import Choices, Selection
from ppcl.search.verdicts import Decision
from ppcl.settings import Settings
from ppcl.storage import schemas
from ppcl.transformer import block_facts
from ppcl.transformer.block_facts import BlockFacts

# Paths by the names of the program's options; None for a table that was not given.
Paths = Mapping[str, Any]


@dataclass(frozen=True)
class Measurements:
    """What earlier stages know of the teacher's blocks.

    Attributes:
        cka, costs: of every run of blocks [first, last]; NaN where nobody measured it.
        tolerance: rise of Delta that ends a search of Eq. 5.
        closed: the closed forms, with those required text runs that nobody measured.
        weights: what each candidate saves, by measure: parameters, blocks, and latency and bytes
            if limited.
        totals: of the whole teacher, as `budgets.needed` takes them.
    """

    teacher: BlockFacts
    cka: np.ndarray
    costs: np.ndarray
    tolerance: float
    closed: ClosedForms
    weights: Mapping[str, Weights]
    totals: Mapping[str, float]


@dataclass(frozen=True)
class Segmentation:
    """The intervals of Eq. 5's chain; and, by ends, all intervals that selection may choose."""

    chain: list[Interval]
    priced: dict[Ends, Interval]


def closed_kinds(settings: Settings) -> tuple[str, ...]:
    """The kinds of closed forms that the config asks for."""
    kinds = ("text", "ffn") if settings.width.enabled else ()
    return (*kinds, "modulation") if settings.modulation.enabled else kinds


def measurements(settings: Settings, paths: Paths, required: Named) -> Measurements:
    """Reads what earlier stages measured.

    Raises:
        UserError: a table is missing that the config asks for, or is of another teacher.
    """
    teacher = block_facts.read(paths["block_facts"])
    depth, kinds = len(teacher), closed_kinds(settings)
    cka = measured.cka(paths["cka"], settings.similarity.streams, depth)
    closed = measured.closed(paths["width"] if kinds else None, teacher.parameters, kinds)
    weights = {"blocks": savings.by_blocks(depth), "parameters": closed.weights}
    totals: dict[str, float] = {"blocks": depth}
    totals["transformer_parameters"] = teacher.transformer_parameters
    if settings.limited_latency:
        if paths["latency"] is None:
            raise UserError("variants: a budget is a latency: name the block times, --latency")
        weights["latency"], totals["transformer_seconds"] = measured.timing(paths["latency"], depth)
    stored_weights, stored_totals = stored.measures(
        settings, paths.get("sizes"), depth, closed.modulations, closed.weights.ranks.keys()
    )
    weights, totals = weights | stored_weights, totals | stored_totals
    closed = replace(closed, rows=closed.rows + unmeasured_runs(closed, required))
    costs = priced_intervals(settings, paths, cka)
    return Measurements(
        teacher, cka, costs, tolerance(settings, paths["cka"]), closed, weights, totals
    )


def unmeasured_runs(closed: ClosedForms, required: Named) -> list[ClosedForm]:
    """Required text runs that nobody measured (width.longest)."""
    measured_runs = {row.ends for row in closed.rows if row.kind == "text"}
    unknown = float("nan")
    return [
        ClosedForm(
            "text",
            *run,
            "text",
            unknown,
            unknown,
            int(savings.saved((), [run], (), closed.weights, closed.unread)),
            unknown,
        )
        for run in sorted(required.runs - measured_runs)
    ]


def priced_intervals(settings: Settings, paths: Paths, cka: np.ndarray) -> np.ndarray:
    """What each interval costs [first, last], as intervals.cost has it."""
    chosen, stream = settings.intervals, settings.similarity.streams
    trained = any(variant.train for variant in settings.pruned)
    leaves = chosen.training_leaves if trained else 1.0
    given = CostInputs(cka, stream, paths["sensitivity"], paths["probes"], leaves)
    return interval_costs.COSTS[chosen.cost](given)


def tolerance(settings: Settings, cka_table: Path) -> float:
    """The rise of Delta that ends a search of Eq. 5.

    Raises:
        UserError: intervals.tolerance is bootstrap, but CKA was computed without resamples.
    """
    wanted = settings.intervals.tolerance
    facts = measured.facts(cka_table, "delta_noise", "bootstrap")
    noise = facts["delta_noise"][settings.similarity.streams]
    if wanted == "bootstrap" and not facts["bootstrap"]:
        raise UserError(
            f"intervals.tolerance: bootstrap is the noise that resamples show, but {cka_table} "
            "was made without; set a number, or similarity.bootstrap to 2 or more"
        )
    return noise if wanted == "bootstrap" else wanted


def segmentation(settings: Settings, known: Measurements, required: Named) -> Segmentation:
    """The depth in intervals, by Eq. 5.

    Raises:
        UserError: something is required that this teacher does not allow.
    """
    teacher, closed, cka = known.teacher, known.closed, known.cka
    # A block that the deciding stream does not pass has no CKA, so no interval may hold it.
    unknown = {block for block in range(len(teacher)) if np.isnan(cka[block, block])}
    untouchable = set(teacher.untouchable)
    modulated = {row.first for row in closed.rows if row.kind == "modulation"}
    text, ffns = closed.weights.text, set(closed.weights.ffn)
    prunable = constraints.Prunable(
        teacher.seams, untouchable, unknown, ffns, text, modulated, closed.unread
    )
    constraints.check(required, prunable)
    runs = intervals.spans(len(teacher), teacher.seams, unknown | untouchable)
    chain = intervals.trend_chain(cka, runs, known.tolerance)
    eligible = intervals.candidates(runs, settings.intervals.segmentation, chain)
    ends = sorted({*eligible, *required.intervals})
    return Segmentation(
        intervals.priced(chain, cka, known.costs),
        {(it.first, it.last): it for it in intervals.priced(ends, cka, known.costs)},
    )


def limits(settings: Settings, depth: int) -> tuple[Limits, Limits]:
    """What the config rules out: among intervals, and among closed forms."""
    _, forbidden = constraints.of_config(settings, depth)
    protected = constraints.protected(settings, depth)
    floors = settings.intervals.cka_floor, settings.width.cka_floor
    intervals_limits, closed_limits = (Limits(forbidden, protected, floor) for floor in floors)
    return intervals_limits, closed_limits


def cheapest(
    settings: Settings, known: Measurements, segmented: Segmentation, required: Named
) -> Decision:
    """The set of least cost that is enough for the smallest budgets, exactly."""
    of_intervals, of_closed = limits(settings, len(known.teacher))
    closed = known.closed
    choices = Choices(
        candidates.usable_intervals(segmented.priced, required, of_intervals),
        *candidates.usable_linear_maps(closed.rows, required, of_closed),
        candidates.usable_ranks(closed.rows, of_closed.forbidden),
        modulations=closed.modulations,
        unread=closed.unread,
    )
    needs = budgets.targets(settings.pruned, known.totals)
    return Decision(selection.select(choices, known.weights, needs, required), needs, required)


def in_words(chosen: Selection) -> str:
    """What was selected, what it saves and costs, for people."""
    return (
        f"selected {len(chosen.intervals)} intervals, {len(chosen.runs)} text runs, "
        f"{len(chosen.ffns)} linear FFNs and {len(chosen.ranks)} modulations of low rank: they "
        f"save {budgets.amounts(chosen.saved)} at cost {chosen.cost:.6g}; no set that is "
        f"enough costs less than {chosen.bound:.6g}"
    )


def interval_table(
    settings: Settings, known: Measurements, segmented: Segmentation, decision: Decision
) -> pd.DataFrame:
    """intervals/intervals.parquet, as schemas.INTERVALS: each interval with its verdict."""
    of_intervals, _ = limits(settings, len(known.teacher))
    chain, priced = segmented.chain, segmented.priced
    rows = verdicts.interval_rows(chain, priced, decision, of_intervals, known.tolerance)
    return pd.DataFrame(rows, columns=schemas.INTERVALS.names)


def closed_form_table(settings: Settings, known: Measurements, decision: Decision) -> pd.DataFrame:
    """width/candidates.parquet, as schemas.WIDTH_CANDIDATES: each closed form with its verdict."""
    _, of_closed = limits(settings, len(known.teacher))
    rows = verdicts.closed_form_rows(known.closed, decision, of_closed)
    return pd.DataFrame(rows, columns=schemas.WIDTH_CANDIDATES.names)
