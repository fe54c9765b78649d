"""Every budget that one training serves: quality, size and speed of the best set of units for each.

    python workflow/scripts/pareto.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet --plan results/digits/prune/plan.json \
        --students results/digits/subsets/students.safetensors \
        --errors results/digits/subsets/errors.parquet \
        --points results/digits/pareto/points.parquet

Nothing is trained: for `pareto.budgets` sizes, evenly spaced from all units plugged in to none, the
cheapest set by measured errors, pins aside, goes into the teacher. Velocity errors are of held-out
calls that chose nothing; times are measured in rounds, all models in turn. Reads of the config:
seed, device, teacher, pareto, and of evaluate velocity_rows, batch_size, bootstrap and
latency_repeats.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from ppcl import (
    assembly,
    blocks,
    calls,
    config,
    devices,
    errors,
    evaluation,
    pipelines,
    provenance,
    schemas,
    stopping,
    students,
    tables,
    teacher_identity,
)
from ppcl.metrics import TEACHER


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--students", type=Path, required=True, help="trained students")
    parser.add_argument("--errors", type=Path, required=True, help="their errors.parquet")
    parser.add_argument("--points", type=Path, required=True, help="points.parquet to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    seed = settings["seed"]

    device = devices.choose(settings["device"])
    reader = calls.Reader(args.calls)
    source = teacher_identity.recorded(settings["teacher"], reader.provenance)
    teacher = pipelines.load_transformer(source, device)
    plan = students.read_plan(args.plan)
    trained = students.load(args.students, teacher, students.parts_of(plan.units))
    for part, student in trained.items():
        # At once, or each budget would hold copies of its own.
        students.as_teacher(teacher, part, student).requires_grad_(False).eval().to(device)
    table = tables.read(args.errors, schemas.UNIT_ERRORS).to_pandas().set_index("unit")
    whole = blocks.parameter_count(teacher)
    smallest = 1 - table["saved_parameters"].sum() / whole
    transformers, chosen = {TEACHER: teacher}, {}
    # Without 1 itself, which is the teacher.
    budgets = np.linspace(smallest, 1, settings["pareto"]["budgets"], endpoint=False)
    for number, budget in enumerate(budgets):
        name = f"budget {number}"
        # Upwards, so that rounding does not leave the smallest budget out of reach.
        wanted = {"name": name, "budget": min(1.0, float(budget) + 1e-9)}
        chosen[name] = plan.named(assembly.choose(args.errors, plan.facts, wanted))
        plugged = {part: trained[part] for unit in chosen[name] for part in unit.parts}
        transformers[name], _, _ = students.plugged(teacher, plugged)

    timed = reader.draw(reader.heldout_rows("report"), settings["evaluate"]["batch_size"], (seed,))
    found = evaluation.measure_transformers(transformers, reader, timed, settings, device)
    rows = []
    for budget, (name, picked) in zip(budgets, chosen.items(), strict=True):
        names = [unit.name for unit in picked]
        row = {"budget": float(budget), "units": json.dumps(names)}
        row["predicted_error"] = float(table.loc[names, "velocity_error"].sum())
        for metric in ("parameters", "parameter_fraction", "latency_seconds"):
            row[metric] = found[name][metric].value
        for metric in ("velocity_error", "latency_ratio"):
            value = found[name][metric]
            row |= {metric: value.value, f"{metric}_low": value.low, f"{metric}_high": value.high}
        rows.append(row)
    stamp = provenance.stamp(settings, budgets=len(rows))
    stopping.ignore()
    tables.write(args.points, pd.DataFrame(rows), schemas.POINTS, stamp)


if __name__ == "__main__":
    errors.run(main)
