"""Any-subset distillation: the students learn to stand each other's errors.

One process:        python workflow/scripts/subsets.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/subsets.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --plan results/digits/prune/plan.json \
    --students results/digits/distill/students.safetensors --state results/digits/state/subsets \
    --output results/digits/subsets/students.safetensors \
    --log-table results/digits/subsets/log.parquet --errors results/digits/subsets/errors.parquet

Every step plugs a random subset of the students into the frozen teacher and trains them through the
whole model. Killed at any point, the same command resumes from the last checkpoint in --state and
ends with the same weights.
"""

import argparse
from pathlib import Path

import pandas as pd
from torch import nn

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--students", type=Path, required=True, help="students so far")
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--output", type=Path, required=True, help="trained students to write")
    parser.add_argument("--log-table", type=Path, required=True, help="log.parquet to write")
    parser.add_argument("--errors", type=Path, required=True, help="errors.parquet to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    options, seed = settings["subsets"], settings["seed"]

    accelerator = devices.accelerator(settings["device"], options["mixed_precision"])
    plan = students.read_plan(args.plan)
    reader = calls.Reader(args.calls)
    transformer = pipelines.load_transformer(settings["teacher"], accelerator.device)
    taught = students.load(args.students, transformer, students.parts_of(plan.units))
    together = nn.ModuleDict({part.name: student for part, student in taught.items()})
    together.train().to(accelerator.device)
    rows = training.train(
        {"students": together},
        distillation.any_subset(
            transformer, plan.units, taught, reader, options, seed, accelerator
        ),
        training.Optimisation.from_settings(options),
        accelerator,
        args.state / "checkpoint.safetensors",
        training.identity(Path(__file__), settings, [args.calls, args.plan, args.students]),
        distillation.lr_scales(taught, settings["width"]["lr_scale"], "students/{}."),
    )
    costs = distillation.cost_table(
        transformer, plan.units, taught, plan.facts["units"], reader, options, seed, accelerator
    )
    if accelerator.is_main_process:
        stamp = provenance.stamp(settings, rows=len(reader))
        students.save(args.output, taught, stamp)
        log = pd.DataFrame(rows)[schemas.VELOCITY_LOG.names]
        tables.write(args.log_table, log, schemas.VELOCITY_LOG, stamp)
        tables.write(args.errors, costs, schemas.UNIT_ERRORS, stamp)
    devices.finish(accelerator)
    if accelerator.is_main_process:
        training.forget(args.state)


if __name__ == "__main__":
    errors.run(main)
