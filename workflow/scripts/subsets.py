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

from pathlib import Path

import pandas as pd
from torch import nn

from ppcl import program
from ppcl.configuration import config
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import new_blocks_of
from ppcl.runtime import processes
from ppcl.storage import schemas
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import distillation, loop, student_stage
from ppcl.transformer import calls


def main() -> None:
    args = student_stage.parser(__doc__, "distill/students.safetensors, or of narrow/").parse_args()
    settings = config.load(args.config)
    options, seed = settings.subsets, settings.seed

    accelerator = processes.accelerator(settings.device, options.mixed_precision)
    plan = selection_file.read(args.plan)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(
        teacher, accelerator.device, gradients=True, compiled=True
    )
    taught = students.load(args.students, transformer, new_blocks_of(plan.units))
    together = nn.ModuleDict({new_block.name: student for new_block, student in taught.items()})
    together.train().to(accelerator.device)
    identity = loop.identity(Path(__file__), settings, [args.calls, args.plan, args.students])
    rows = loop.train(
        {"students": together},
        distillation.any_subset(
            transformer, plan.units, taught, reader, options, seed, accelerator
        ),
        loop.Optimisation.from_settings(options),
        accelerator,
        args.state / "checkpoint.safetensors",
        identity,
        distillation.lr_scales(taught, settings.width.lr_scale, "students/{}."),
    )
    student_stage.finish(
        args,
        settings,
        options,
        transformer,
        plan.units,
        plan.facts["units"],
        taught,
        pd.DataFrame(rows, columns=schemas.VELOCITY_LOG.names),
        schemas.VELOCITY_LOG,
        reader,
        accelerator,
        identity,
    )


if __name__ == "__main__":
    program.run(main)
