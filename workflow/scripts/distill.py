"""Stage 1.3: teaches every student its blocks, from the teacher's own activations (Eq. 6).

One process:       python workflow/scripts/distill.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/distill.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --selection results/digits/prune/selection.json \
    --students results/digits/prune/students.safetensors --state results/digits/state/distill \
    --output results/digits/distill/students.safetensors \
    --log-table results/digits/distill/log.parquet \
    --unit-costs results/digits/distill/unit_costs.parquet

Killed at any point, the same command resumes from the last checkpoint in --state and ends with the
same weights. With --shards and --shard it teaches some of the students alone, and they end as they
would beside the others; join_shards.py puts the shards' files together.
"""

from pathlib import Path

from ppcl import program
from ppcl.configuration import config
from ppcl.pruning import students
from ppcl.pruning.units import new_blocks_of
from ppcl.storage import schemas
from ppcl.training import distillation, input_cache, student_stage
from ppcl.training.student_stage import StudentStage


def main() -> None:
    parser = student_stage.parser(__doc__, "prune/students.safetensors")
    parser.add_argument("--shards", type=Path, help="input, optional: distill/shards/shards.json")
    parser.add_argument("--shard", type=int, default=0, help="which of the shards it is")
    args = parser.parse_args()
    settings = config.load(args.config)
    options = settings.distill
    stage = StudentStage.opened(args, settings, options, __file__, "distilled")
    context, device = stage.context, stage.context.device

    taught = students.load(args.students, context.transformer, new_blocks_of(stage.units))
    for student in taught.values():
        student.train().to(device)
    start = stage.selection.facts["start"]
    # A borrowing student's map learns the text that the attention of its whole start block gets.
    # The teacher shows it where this block is the teacher's own; else a frozen copy does.
    same = start in ("first", "solved")  # `solved` changes nothing before the attention
    borrowing = [] if same else [part for part in taught if part.borrows]
    uncut = students.uncut(students.start(context.transformer, borrowing, start))
    for block in uncut.values():
        block.to(device)
    inputs = input_cache.of_job(context, stage.units, taught, options, stage.state)
    rows = stage.train(
        {part.name: student for part, student in taught.items()},
        distillation.independent(context, taught, options, inputs=inputs, uncut=uncut),
        taught,
    )
    stage.finish(taught, distillation.log_table(rows), schemas.DISTILL_LOG)


if __name__ == "__main__":
    program.run(main)
