"""Stage 2, with width.schedule: staged: makes distilled blocks narrow, and teaches them again.

One process:       python workflow/scripts/narrow.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/narrow.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --plan results/digits/prune/plan.json \
    --students results/digits/distill/students.safetensors --state results/digits/state/narrow \
    --output results/digits/narrow/students.safetensors \
    --log-table results/digits/narrow/log.parquet --errors results/digits/narrow/errors.parquet

Text streams and FFNs of the selection become linear maps, fitted by least squares, in the distilled
students and in kept blocks; then all of them learn L_width and L_linear. Killed at any point, the
same command resumes from the last checkpoint in --state and ends with the same weights.
"""

import argparse
from pathlib import Path

from ppcl import (
    calls,
    config,
    devices,
    distillation,
    errors,
    pipelines,
    provenance,
    schemas,
    students,
    tables,
    training,
    width,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--students", type=Path, required=True, help="students of distill")
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--output", type=Path, required=True, help="trained students to write")
    parser.add_argument("--log-table", type=Path, required=True, help="log.parquet to write")
    parser.add_argument("--errors", type=Path, required=True, help="errors.parquet to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    width_options = settings["width"]
    changed = {key: width_options[key] for key in ("steps", "linear_weight")}
    options = settings["distill"] | changed
    seed = settings["seed"]

    accelerator = devices.accelerator(settings["device"], options["mixed_precision"])
    plan = students.read_plan(args.plan)
    reader = calls.Reader(args.calls)
    transformer = pipelines.load_transformer(settings["teacher"], accelerator.device)
    done = students.load(args.students, transformer, students.parts_of(plan.distilled))
    whole = students.whole(transformer, students.parts_of(plan.units), done)
    taught = width.start(transformer, whole, reader, width_options, seed, accelerator.device)
    for student in taught.values():
        student.train().to(accelerator.device)
    rows = training.train(
        {part.name: student for part, student in taught.items()},
        distillation.independent(transformer, taught, reader, options, seed, accelerator),
        training.Optimisation.from_settings(options),
        accelerator,
        args.state / "checkpoint.safetensors",
        training.identity(Path(__file__), settings, [args.calls, args.plan, args.students]),
        distillation.lr_scales(taught, settings["width"]["lr_scale"]),
    )
    costs = distillation.cost_table(
        transformer, plan.units, taught, plan.facts["units"], reader, options, seed, accelerator
    )
    if accelerator.is_main_process:
        stamp = provenance.stamp(settings, rows=len(reader))
        students.save(args.output, taught, stamp)
        log = distillation.log_table(rows)
        tables.write(args.log_table, log, schemas.DISTILL_LOG, stamp)
        tables.write(args.errors, costs, schemas.UNIT_ERRORS, stamp)
    devices.finish(accelerator)
    if accelerator.is_main_process:
        training.forget(args.state)


if __name__ == "__main__":
    errors.run(main)
