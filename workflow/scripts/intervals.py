"""Stages 1.2 and 2: candidate intervals by Eq. 5, then what the smallest budgets take, exactly.

    intervals.py --config config/config.yaml --cka results/digits/similarity/cka.parquet \
        --block-facts results/digits/record/blocks.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --width results/digits/width/measured.parquet \
        --intervals results/digits/intervals/intervals.parquet \
        --candidates results/digits/width/candidates.parquet

Reads of the config: intervals, similarity.streams, width (enabled, cka_floor and the lists),
modulation (enabled and the lists), and variants for the smallest budgets of those that trained
students may be in: what is trained for them, larger ones use as well. Needs no torch.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Named
from ppcl.runtime import stopping
from ppcl.search import budgets, candidates, intervals, measured, savings, selection, verdicts
from ppcl.search.candidates import Limits
from ppcl.search.measured import ClosedForm, ClosedForms
from ppcl.search.selection import Choices
from ppcl.search.verdicts import Decision
from ppcl.storage import schemas, tables
from ppcl.transformer import block_facts


def with_required_runs(closed: ClosedForms, required: Named) -> list[ClosedForm]:
    """The measured closed forms, and required text runs that nobody measured (width.longest)."""
    measured_runs = {row.ends for row in closed.rows if row.kind == "text"}
    missing = sorted(required.runs - measured_runs)
    return closed.rows + [
        ClosedForm(
            "text",
            *run,
            "text",
            float("nan"),
            float("nan"),
            int(savings.saved((), [run], (), closed.weights, closed.unread)),
            float("nan"),
        )
        for run in missing
    ]


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        reads=("block_facts", "cka"),
        may_read=("sensitivity", "probes", "width", "latency"),
        writes=("intervals",),
        probes="probes/probes.parquet; with intervals.cost: influence",
    )
    parser.add_argument("--candidates", type=Path, help=f"output: {program.FILES['candidates']}")
    options = parser.parse_args()
    settings = config.load(options.config)
    chosen, stream = settings.intervals, settings.similarity.streams
    wide = settings.width.enabled
    kinds = ("text", "ffn") if wide else ()
    kinds += ("modulation",) if settings.modulation.enabled else ()
    if kinds and not (options.width and options.candidates):
        raise UserError(
            "width.enabled or modulation.enabled is true: name the tables --width and --candidates"
        )

    teacher = block_facts.read(options.block_facts)
    depth = len(teacher)
    facts = measured.facts(options.cka, "delta_noise", "bootstrap")
    cka = measured.cka(options.cka, stream, depth)
    costs = 1 - cka
    if chosen.cost == "velocity":
        trained = any(variant.train for variant in settings.variants)
        leaves = chosen.training_leaves if trained else 1
        costs = leaves * measured.costs(options.sensitivity, depth)
    elif chosen.cost == "influence":
        costs = intervals.by_influence(measured.influences(options.probes, stream, depth))
    noise = facts["delta_noise"][stream]
    if chosen.tolerance == "bootstrap" and not facts["bootstrap"]:
        raise UserError(
            f"intervals.tolerance: bootstrap is the noise that resamples show, but {options.cka} "
            "was made without; set a number, or similarity.bootstrap to 2 or more"
        )
    tolerance = noise if chosen.tolerance == "bootstrap" else chosen.tolerance
    closed = measured.closed(options.width if kinds else None, teacher.parameters, kinds)
    teachers = {"blocks": depth, "transformer_parameters": teacher.transformer_parameters}
    weights = {"blocks": savings.by_blocks(depth), "parameters": closed.weights}
    if settings.limited_latency:
        if options.latency is None:
            raise UserError("variants: a budget is a latency: name the block times, --latency")
        weights["latency"], whole = measured.timing(options.latency, depth)
        teachers["transformer_seconds"] = whole

    required, forbidden = constraints.of_config(settings, depth)
    # A block that the deciding stream does not pass has no CKA, so no interval may hold it.
    unknown = {block for block in range(depth) if np.isnan(cka[block, block])}
    untouchable = set(teacher.untouchable)
    modulated = {row.first for row in closed.rows if row.kind == "modulation"}
    text = closed.weights.text
    ffns = set(closed.weights.ffn)
    constraints.check(
        required, teacher.seams, untouchable, unknown, ffns, text, modulated, closed.unread
    )
    runs = intervals.spans(depth, teacher.seams, unknown | untouchable)
    chain = intervals.trend_chain(cka, runs, tolerance)
    found = {*intervals.candidates(runs, chosen.segmentation, chain), *required.intervals}
    priced = {(it.first, it.last): it for it in intervals.priced(sorted(found), cka, costs)}
    chain = intervals.priced(chain, cka, costs)
    closed = replace(closed, rows=with_required_runs(closed, required))

    protected = constraints.protected(settings, depth)
    interval_limits = Limits(forbidden, protected, chosen.cka_floor)
    closed_form_limits = Limits(forbidden, protected, settings.width.cka_floor)
    choices = Choices(
        candidates.usable_intervals(priced, required, interval_limits),
        *candidates.usable_linear_maps(closed.rows, required, closed_form_limits),
        candidates.usable_ranks(closed.rows, forbidden),
        modulations=closed.modulations,
        unread=closed.unread,
    )
    needs = budgets.targets(settings.variants, teachers)
    cheapest = selection.select(choices, weights, needs, required)
    print(
        f"selected {len(cheapest.intervals)} intervals, {len(cheapest.runs)} text runs, "
        f"{len(cheapest.ffns)} linear FFNs and {len(cheapest.ranks)} modulations of low rank: they "
        f"save {budgets.amounts(cheapest.saved)} at cost {cheapest.cost:.6g}; no set that is "
        f"enough costs less than {cheapest.bound:.6g}",
        flush=True,
    )
    stamp = provenance.stamp(
        settings.given,
        blocks=depth,
        removed_blocks=round(cheapest.saved["blocks"]),
        removed_parameters=round(cheapest.saved["parameters"]),
    )
    stopping.ignore()
    decision = Decision(cheapest, needs, required)
    rows = verdicts.interval_rows(chain, priced, decision, interval_limits, tolerance)
    table = pd.DataFrame(rows, columns=schemas.INTERVALS.names)
    if kinds:
        judged = verdicts.closed_form_rows(closed, decision, closed_form_limits)
        closed_table = pd.DataFrame(judged, columns=schemas.WIDTH_CANDIDATES.names)
        tables.write(options.candidates, closed_table, schemas.WIDTH_CANDIDATES, stamp)
    tables.write(options.intervals, table, schemas.INTERVALS, stamp)


if __name__ == "__main__":
    program.run(main)
