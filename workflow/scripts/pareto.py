"""Sizes between: quality, size and speed of what each budget would get, without further training.

One process:        python workflow/scripts/pareto.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/pareto.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --sets results/digits/variants/sets.json \
    --width results/digits/width/measured.parquet --maps results/digits/width/maps.safetensors \
    --conditioning results/digits/activations/conditioning.safetensors \
    --selection results/digits/prune/selection.json \
    --start results/digits/prune/students.safetensors \
    --distill results/digits/distill/students.safetensors \
    --distill-unit-costs results/digits/distill/unit_costs.parquet \
    --subsets results/digits/subsets/students.safetensors \
    --subsets-unit-costs results/digits/subsets/unit_costs.parquet \
    --points results/digits/pareto/points.parquet

There are `pareto.budgets` sizes, evenly spaced from the smallest variant's to the teacher's. For
each, the cheapest set of closed forms and trained units goes into the teacher; what the config
requires is ignored. The stages that its units are from are chosen as in `choose`, on the same
calls, but no unit is tried singly. Velocity errors are measured on other held-out calls, shared out
over the processes; times, in rounds of all models in turn, in one process while the others wait.
Reads of the config: seed, device, teacher, pareto, choose, variants, what is forbidden (intervals,
width, modulation), and of evaluate velocity_rows, batch_size, bootstrap and latency_repeats.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.evaluation import budget_points, measuring
from ppcl.evaluation.metrics import TEACHER
from ppcl.export import variant_files, variants
from ppcl.export.variant_files import Files
from ppcl.pruning import constraints, selection_file
from ppcl.runtime import processes, stopping
from ppcl.search import choosing, offers, sets_file
from ppcl.settings import Variant
from ppcl.storage import schemas, tables
from ppcl.teacher import opening
from ppcl.training import prices
from ppcl.transformer import blocks, calls


def command_line() -> argparse.Namespace:
    """The options."""
    return program.parser(
        __doc__,
        "config",
        reads=("calls", "sets"),
        may_read=(*variant_files.MODEL_FILES, *variant_files.PRICE_FILES),
        writes=("points",),
    ).parse_args()


def variants_of(budgets: Iterable[float], train: bool) -> list[Variant]:
    """A variant of each budget, a share of the parameters."""
    return [
        # A little more, so that rounding does not leave the smallest budget out of reach.
        Variant(f"budget {number}", {"fraction": min(1.0, float(budget) + 1e-9)}, train, 0)
        for number, budget in enumerate(budgets)
    ]


def main() -> None:
    args = command_line()
    settings = config.load(args.config)
    context = opening.opened(settings, calls.Reader(args.calls))
    teacher, reader, device = context.transformer, context.reader, context.device
    selection = selection_file.read(args.selection) if args.selection else None
    files, written = Files.of(args), sets_file.read(args.sets)
    workshop = variants.Workshop(teacher, files, device=device)
    offer = offers.offered(settings, blocks.sizes(teacher), files.prices, selection, written.alone)
    offer = replace(offer, required=constraints.NOTHING)
    # The end point 1 is left out: it is the teacher.
    smallest = min(written.parameters.values()) / blocks.parameter_count(teacher)
    budgets = np.linspace(smallest, 1, settings.pareto.budgets, endpoint=False)
    every = variants_of(budgets, any(variant.train for variant in settings.pruned))
    asked = {one.name: (one, choosing.search(offer, one)) for one in every}
    options, seed = settings.choose, settings.seed
    by = reader.sample_heldout("select", options.rows, seed)
    judged = prices.Judged(context, by, options.batch_size)
    measure = variants.measuring(workshop, judged)
    if options.source == "measured":
        decided = choosing.decide(offer, asked, measure, flips=False)
    else:
        decided = choosing.as_last_trained(offer, asked, measure)
    chosen = {name: one.choice for name, one in decided.items()}
    # All are kept in memory, so that budgets share blocks instead of each holding its own copies.
    kept = [one.set for one in chosen.values()]
    made = {name: workshop.model(choice.set, kept)[0] for name, choice in chosen.items()}
    transformers = {TEACHER: teacher} | made

    timed = reader.draw(reader.heldout_rows("report"), settings.evaluate.batch_size, (seed,))
    measured = measuring.measure_transformers(
        transformers, reader, timed, settings, device, context.accelerator
    )
    stopping.ignore()
    if context.accelerator.is_main_process:
        rows = budget_points.rows(budgets, list(chosen.items()), measured)
        stamp = provenance.stamp(settings.given, budgets=len(rows))
        tables.write(args.points, pd.DataFrame(rows), schemas.POINTS, stamp)
    processes.finish(context.accelerator)


if __name__ == "__main__":
    program.run(main)
