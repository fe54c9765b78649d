"""Stage 1.3: teaches every student its interval, from the teacher's own activations (Eq. 6).

One process:       python workflow/scripts/distill.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/distill.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --plan results/digits/prune/plan.json \
    --students results/digits/prune/students.safetensors --state results/digits/state/distill \
    --output results/digits/distill/students.safetensors \
    --log-table results/digits/distill/log.parquet --errors results/digits/distill/errors.parquet

Killed at any point, the same command resumes from the last checkpoint in --state and ends with the
same weights.
"""

import argparse
from pathlib import Path

import pandas as pd

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
)


def log_table(rows: list[dict]) -> pd.DataFrame:
    """The training log as one row per step, interval and stream."""
    return pd.DataFrame(
        {
            "step": row["step"],
            "interval": row["name"],
            "stream": stream,
            "loss_normalised": row[f"{stream}/normalised"],
            "loss_relative": row[f"{stream}/relative"],
            "loss": row["loss"],
            "lr": row["lr"],
            "seconds": row["seconds"],
        }
        for row in rows
        for stream in sorted(key.split("/")[0] for key in row if key.endswith("/normalised"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--students", type=Path, required=True, help="start weights")
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--output", type=Path, required=True, help="trained students to write")
    parser.add_argument("--log-table", type=Path, required=True, help="log.parquet to write")
    parser.add_argument("--errors", type=Path, required=True, help="errors.parquet to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    options, seed = settings["distill"], settings["seed"]

    accelerator = devices.accelerator(settings["device"], options["mixed_precision"])
    intervals, plan = students.read_plan(args.plan)
    reader = calls.Reader(args.calls)
    transformer = pipelines.load_transformer(settings["teacher"], accelerator.device)
    taught = students.load(args.students, transformer, intervals)
    for student in taught.values():
        student.train().to(accelerator.device)
    rows = training.train(
        {interval.name: student for interval, student in taught.items()},
        distillation.independent(transformer, taught, reader, options, seed, accelerator),
        training.Optimisation.from_settings(options),
        accelerator,
        args.state / "checkpoint.safetensors",
        training.identity(Path(__file__), settings, [args.calls, args.plan, args.students]),
    )
    costs = distillation.cost_table(transformer, taught, plan, reader, options, seed, accelerator)
    if accelerator.is_main_process:
        stamp = provenance.stamp(settings, rows=len(reader))
        students.save(args.output, taught, stamp)
        tables.write(args.log_table, log_table(rows), schemas.DISTILL_LOG, stamp)
        tables.write(args.errors, costs, schemas.STUDENT_ERRORS, stamp)
    devices.finish(accelerator)
    if accelerator.is_main_process:
        training.forget(args.state)


if __name__ == "__main__":
    errors.run(main)
