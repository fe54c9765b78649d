"""Stage 1.3: teaches every student its blocks, from the teacher's own activations (Eq. 6).

One process:       python workflow/scripts/distill.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/distill.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --plan results/digits/prune/plan.json \
    --students results/digits/prune/students.safetensors --state results/digits/state/distill \
    --output results/digits/distill/students.safetensors \
    --log-table results/digits/distill/log.parquet --errors results/digits/distill/errors.parquet

Killed at any point, the same command resumes from the last checkpoint in --state and ends with the
same weights. With --shards and --shard it teaches some of the students alone, and they end as they
would beside the others; join.py puts the shards' files together.
"""

from pathlib import Path

from ppcl import program
from ppcl.configuration import config
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import new_blocks_of
from ppcl.runtime import processes
from ppcl.storage import schemas
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import distillation, entrance, loop, shards, student_stage
from ppcl.transformer import calls


def main() -> None:
    parser = student_stage.parser(__doc__, "prune/students.safetensors")
    parser.add_argument("--shards", type=Path, help="input, optional: distill/shards/shards.json")
    parser.add_argument("--shard", type=int, default=0, help="which of the shards it is")
    args = parser.parse_args()
    settings = config.load(args.config)
    options, seed = settings.distill, settings.seed

    accelerator = processes.accelerator(settings.device, options.mixed_precision)
    plan = selection_file.read(args.plan)
    pairs = list(zip(plan.distilled, plan.facts["distilled"], strict=True))
    inputs = [args.calls, args.plan, args.students]
    if args.shards:
        mine = shards.read(args.shards)[args.shard]
        pairs = [(unit, entry) for unit, entry in pairs if unit.name in mine]
        inputs.append(args.shards)
    units, entries = [unit for unit, _ in pairs], [entry for _, entry in pairs]
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, compiled=True)
    taught = students.load(args.students, transformer, new_blocks_of(units))
    for student in taught.values():
        student.train().to(accelerator.device)
    start = plan.facts["start"]
    # Of a block of its own, the teacher shows it.
    same = start in ("first", "solved")  # up to the attention
    borrowing = [] if same else [new_block for new_block in taught if new_block.borrows]
    uncut = students.uncut(students.start(transformer, borrowing, start))
    for block in uncut.values():
        block.to(accelerator.device)
    identity = loop.identity(Path(__file__), settings, inputs)
    caching, inputs = entrance.caching(reader, options, seed), None
    if shards.cached(units, caching):
        # Two checkpoints, each of weights, two moments and the average, are there while one is
        # replaced.
        tensors = 4 if options.ema else 3
        checkpoint = tensors * sum(p.nbytes for s in taught.values() for p in s.parameters())
        inputs = entrance.Inputs(
            transformer,
            list(taught),
            reader,
            options,
            seed,
            accelerator,
            args.state / "inputs",
            identity,
            reserve=2 * checkpoint,
        )
    if accelerator.is_main_process and units:
        print(shards.explain(units, caching), flush=True)
    rows = loop.train(
        {new_block.name: student for new_block, student in taught.items()},
        distillation.independent(
            transformer, taught, reader, options, seed, accelerator, inputs=inputs, uncut=uncut
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
        units,
        entries,
        taught,
        distillation.log_table(rows),
        schemas.DISTILL_LOG,
        reader,
        accelerator,
        identity,
    )


if __name__ == "__main__":
    program.run(main)
