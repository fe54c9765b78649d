"""A step of a job of distill that starts the teacher late, against one from the first block."""

from pathlib import Path

from benchmarks import material, measuring, teaching
from benchmarks.material import Size
from benchmarks.measuring import Ratio
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, Unit, new_blocks_of
from ppcl.training import distillation, input_cache, shards
from ppcl.training.input_cache import InputCache
from ppcl.transformer import calls
from ppcl.transformer.context import Context, State

NAME = "late start"
STEPS = 1000  # of the schedule; each row is drawn often, so filling is not what is measured


def run(size: Size, folder: Path) -> list[Ratio]:
    """Seconds of a step of the slower of two jobs, as they are shared out with and without."""
    path = material.record(folder / "calls.parquet", size, size.rows)
    teacher, reader = material.transformer(size), calls.Reader(path)
    options = teaching.OPTIONS.replace(batch_size=size.batch, steps=STEPS, cache_inputs="auto")
    units = [Unit((part,)) for part in second_half(size.blocks)]
    caching = input_cache.caching(reader, options, 0)
    slow, first = {}, {}
    for name, how in (("late", caching), ("whole", shards.NEVER)):
        job = max(shards.assign(units, 2, how), key=lambda job, how=how: shards.cost(job, how))
        taught = students.start(teacher, new_blocks_of(job), "first")
        steps = teaching.Steps(teacher, taught, reader, size.batch)
        if shards.cached(job, how):
            inputs = InputCache(
                Context(teacher, reader, 0, steps.accelerator),
                list(taught),
                options,
                State(folder / "inputs", ""),
            )
            steps.losses = distillation.independent(
                Context(teacher, reader, 0, steps.accelerator), taught, options, inputs=inputs
            )
        steps.step()  # fills the cache, and makes the moments
        slow[name], first[name] = steps, (shards.cost(job, how), len(taught))
    times = measuring.interleaved({n: s.step for n, s in slow.items()}, size.repeats)
    seconds = {name: measuring.least(values) for name, values in times.items()}
    (late, of_late), (whole, of_whole) = first["late"], first["whole"]
    note = (
        f"{of_late} and {of_whole} students; in block passes {late:.4g} / {whole:g}, which is "
        f"{late / whole:.3g}"
    )
    return [
        Ratio(NAME, "slower of 2 jobs, kept streams / without", *seconds.values(), "s", note=note)
    ]


def second_half(blocks_: int) -> list[NewBlock]:
    """Intervals of two blocks in the second half of the depth, where the teacher's way is long."""
    return [NewBlock(first, first + 1) for first in range(blocks_ // 2, blocks_ - 1, 2)]
