"""Stage 2, with width.schedule: staged: makes distilled blocks narrow, and teaches them again.

One process:       python workflow/scripts/narrow.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/narrow.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --selection results/digits/prune/selection.json \
    --students results/digits/distill/students.safetensors --state results/digits/state/narrow \
    --output results/digits/narrow/students.safetensors \
    --log-table results/digits/narrow/log.parquet \
    --unit-costs results/digits/narrow/unit_costs.parquet

Text streams and FFNs of the selection become linear maps, fitted by least squares, in the distilled
students and in kept blocks; then all of them learn L_width and L_linear. Killed at any point, the
same command resumes from the last checkpoint in --state and ends with the same weights.
"""

from ppcl import program
from ppcl.closed_forms import linear_map_fits
from ppcl.configuration import config
from ppcl.pruning import students
from ppcl.pruning.units import new_blocks_of
from ppcl.storage import schemas
from ppcl.training import distillation, student_stage
from ppcl.training.student_stage import StudentStage


def main() -> None:
    args = student_stage.parser(__doc__, "distill/students.safetensors").parse_args()
    settings = config.load(args.config)
    options = settings.narrowing
    stage = StudentStage.opened(args, settings, options, __file__)
    context = stage.context

    done = students.load(
        args.students, context.transformer, new_blocks_of(stage.selection.distilled)
    )
    new_blocks = new_blocks_of(stage.units)
    taught, uncut = linear_map_fits.narrowed(context, new_blocks, done, settings.width)
    for student in taught.values():
        student.train().to(context.device)
    rows = stage.train(
        {part.name: student for part, student in taught.items()},
        distillation.independent(context, taught, options, uncut=uncut),
        taught,
    )
    stage.finish(taught, distillation.log_table(rows), schemas.DISTILL_LOG)


if __name__ == "__main__":
    program.run(main)
