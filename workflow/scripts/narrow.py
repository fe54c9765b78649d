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

from pathlib import Path

from ppcl import program
from ppcl.closed_forms import linear_map_fits
from ppcl.configuration import config
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import new_blocks_of
from ppcl.runtime import processes
from ppcl.storage import schemas
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import distillation, loop, student_stage
from ppcl.transformer import calls


def main() -> None:
    args = student_stage.parser(__doc__, "distill/students.safetensors").parse_args()
    settings = config.load(args.config)
    options, seed = settings.narrowing, settings.seed

    accelerator = processes.accelerator(settings.device, options.mixed_precision)
    plan = selection_file.read(args.plan)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, compiled=True)
    done = students.load(args.students, transformer, new_blocks_of(plan.distilled))
    whole = students.whole(transformer, new_blocks_of(plan.units), done)
    uncut = students.uncut(whole)
    taught = linear_map_fits.start(
        transformer, whole, reader, settings.width, seed, accelerator.device
    )
    for student in taught.values():
        student.train().to(accelerator.device)
    for block in uncut.values():
        block.to(accelerator.device)
    identity = loop.identity(Path(__file__), settings, [args.calls, args.plan, args.students])
    rows = loop.train(
        {new_block.name: student for new_block, student in taught.items()},
        distillation.independent(
            transformer, taught, reader, options, seed, accelerator, uncut=uncut
        ),
        loop.Optimisation.from_settings(options),
        accelerator,
        args.state / "checkpoint.safetensors",
        identity,
        distillation.lr_scales(taught, settings.width.lr_scale),
    )
    student_stage.finish(
        args,
        settings,
        options,
        transformer,
        plan.units,
        plan.facts["units"],
        taught,
        distillation.log_table(rows),
        schemas.DISTILL_LOG,
        reader,
        accelerator,
        identity,
    )


if __name__ == "__main__":
    program.run(main)
