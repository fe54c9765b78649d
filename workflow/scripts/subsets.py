"""Any-subset distillation: the students learn to stand each other's errors.

One process:        python workflow/scripts/subsets.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/subsets.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --selection results/digits/prune/selection.json \
    --students results/digits/distill/students.safetensors --state results/digits/state/subsets \
    --output results/digits/subsets/students.safetensors \
    --log-table results/digits/subsets/log.parquet \
    --unit-costs results/digits/subsets/unit_costs.parquet

Every step plugs a random subset of the students into the frozen teacher and trains them through the
whole model. Killed at any point, the same command resumes from the last checkpoint in --state and
ends with the same weights.
"""

import pandas as pd
from torch import nn

from ppcl import program
from ppcl.configuration import config
from ppcl.pruning import students
from ppcl.pruning.units import new_blocks_of
from ppcl.storage import schemas
from ppcl.training import distillation, student_stage
from ppcl.training.student_stage import StudentStage


def main() -> None:
    args = student_stage.parser(__doc__, "distill/students.safetensors, or of narrow/").parse_args()
    settings = config.load(args.config)
    options = settings.subsets
    stage = StudentStage.opened(args, settings, options, __file__)
    context = stage.context

    taught = students.load(args.students, context.transformer, new_blocks_of(stage.units))
    together = nn.ModuleDict({part.name: student for part, student in taught.items()})
    together.train().to(context.device)
    rows = stage.train(
        {"students": together},
        distillation.any_subset(context, stage.units, taught, options),
        taught,
        "students/{}.",
    )
    log = pd.DataFrame(rows, columns=schemas.VELOCITY_LOG.names)
    stage.finish(taught, log, schemas.VELOCITY_LOG)


if __name__ == "__main__":
    program.run(main)
