"""What every stage has to do, in FLOPs and passes over the model.

They follow from the planner's example call, and are rather too many than too few: a variant counts
as much as the teacher, a student as much as the block that it starts from, and as long as nothing
is selected, every block counts as having a student.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from ppcl.closed_forms import linear_map_candidates
from ppcl.closed_forms.linear_map_fits import SUMS_BYTES
from ppcl.evaluation import latencies
from ppcl.planning.planner import Planner
from ppcl.pruning.units import NewBlock, Unit, new_blocks_of
from ppcl.search import intervals
from ppcl.settings import (
    ChooseSettings,
    DistillSettings,
    SensitivitySettings,
    Settings,
    TrainingSettings,
    WidthSettings,
)
from ppcl.teacher import arguments
from ppcl.transformer import blocks, example_calls
from ppcl.transformer.family import Pipeline

# A training step is a forward pass and a backward one of twice its FLOPs; checkpointing repeats the
# forward pass.
STEP, CHECKPOINTED = 3, 4
# FLOPs of a call for one sample: of each block, of the whole transformer.
Flops = tuple[list[int], int]


@dataclass(frozen=True)
class Work:
    """What a stage has to do.

    Attributes:
        flops: of all its passes, on all devices.
        passes: how often it goes over the model, a batch at a time, on all devices.
        trains: the section of the config whose mixed_precision it computes in; empty if it computes
            in the teacher's type.
        models: how many models it loads, one after the other.
        pictures: how many it makes.
        float32: further FLOPs, of passes in float32, whatever the teacher's type
            (`devices.in_float32`).
        devices: how many share flops and passes.
        streams: whether the teacher comes to the device a block at a time, if teacher.offload
            says so.
        float64: whether it computes in that, and loads no model.
    """

    flops: float
    passes: float
    trains: str = ""
    float32: float = 0.0
    models: int = 1
    pictures: int = 0
    devices: int = 1
    streams: bool = True
    float64: bool = False


def works(planner: Planner) -> dict[str, Work]:
    """What every stage that takes long has to do; nothing without an example call.

    `distill` is the work of a single job for all units. If jobs share the units out, there is also
    the work of each, `distill/<number>`.
    """
    flops = planner.flops(planner.variants["teacher"][0])
    if not flops:
        return {}
    return {
        **_recording(planner, flops),
        **_judging_blocks(planner, flops),
        **(_training_new_blocks(planner, flops) if planner.settings.trains else {}),
        "choose": _choosing(planner, flops),
        **_finetuning(planner, flops),
        **_evaluating(planner, flops),
    }


def _forwards(flops: Flops, rows: float, batch: int, **more) -> Work:
    """Forward passes of the whole model over `rows` samples, in batches of `batch`."""
    return Work(rows * flops[1], math.ceil(rows / batch), **more)


def _recording(planner: Planner, flops: Flops) -> dict[str, Work]:
    settings = planner.settings
    record, extract, done = settings.record, settings.extract, {}
    if planner.pipeline is not None:
        renoised = branches_of(planner) * record.renoised_per_sample
        rows = record.samples * (steps_of(planner) + renoised)
        done["record"] = _forwards(
            flops, rows, record.batch_size, pictures=record.samples, devices=_devices(settings)
        )
    return done | {"extract": _forwards(flops, extract.rows, extract.batch_size)}


def _judging_blocks(planner: Planner, flops: Flops) -> dict[str, Work]:
    """What tells which blocks can go: similarity, prices of closed forms, latencies."""
    settings, done = planner.settings, {}
    sequence = blocks.block_sequence(planner.transformer)
    if settings.compares:
        done["similarity"] = _similarity(planner)
    if settings.searches_by_cost:
        options = settings.sensitivity
        runs = intervals.spans(
            len(sequence),
            blocks.seams(planner.transformer),
            blocks.untouchable(planner.transformer),
        )
        starts = [first for first, _ in intervals.all_within(runs, options.longest)]
        done["sensitivity"] = _prices(planner, flops, starts, options)
    if planner.widens or planner.matrices:
        done["width"] = _width(planner, flops)
    if settings.limited_latency:
        rounds, batch = settings.evaluate.latency_repeats, settings.evaluate.batch_size
        # Blocks are timed whole, and without each of their parts; of each list, only some.
        kinds = 1 + max((len(b.width.ffn) + bool(b.width.text) for b in sequence), default=0)
        lengths = Counter(block.list.attribute for block in sequence).values()
        some = sum(min(length, latencies.TIMED) for length in lengths) / len(sequence)
        rows = some * kinds * batch * (latencies.ROUNDS * rounds + 1)
        done["latency"] = _forwards(flops, rows, batch)
    return done


def _training_new_blocks(planner: Planner, flops: Flops) -> dict[str, Work]:
    """distill, also by its jobs, narrow and subsets."""
    settings, (per_block, whole) = planner.settings, flops
    everything = [Unit((NewBlock(i, i),)) for i in range(len(per_block))]
    depth, every = (planner.depth, planner.every) if planner.every else (everything, everything)

    def distilled(units: list[Unit], options: DistillSettings = settings.distill) -> Work:
        """The teacher to the last block that is needed, and a step of every student."""
        teacher = sum(per_block[: max((u.last for u in units), default=-1) + 1])
        taught = sum(per_block[new_block.first] for new_block in new_blocks_of(units))
        step = teacher + _times(settings, "distill") * taught
        return _trained(settings, whole, "distill", step, units, options)

    staged = planner.widens and settings.width.schedule == "staged"
    units = depth if staged else every
    done = {"distill": distilled(units)}
    jobs = planner.jobs(units) if planner.every else []
    if len(jobs) > 1:
        done |= {f"distill/{number}": distilled(job) for number, job in enumerate(jobs)}
    if staged:
        done["narrow"] = distilled(every, settings.narrowing)
    if settings.subsets.steps:
        step, options = _times(settings, "subsets") * whole, settings.subsets
        done["subsets"] = replace(
            _trained(settings, whole, "subsets", step, every, options), streams=False
        )
    return done


def _choosing(planner: Planner, flops: Flops) -> Work:
    """Prices of every unit alone, and for every variant those of its set, and of the set with each
    unit from up to three other stages."""
    settings = planner.settings
    units = len(planner.every or flops[0]) if settings.trains else 0
    sets = units * (1 + 3 * len(settings.pruned)) + len(settings.pruned)
    return _prices(planner, flops, [0] * sets, settings.choose)


def _finetuning(planner: Planner, flops: Flops) -> dict[str, Work]:
    """Fine-tuning of the variant with most steps; nothing if none is fine-tuned."""
    settings = planner.settings
    longest = max(settings.variants, key=lambda variant: variant.finetune_steps)
    if not longest.finetune_steps:
        return {}
    options = settings.finetune.for_variant(longest)
    weights = options.weights
    # With own pictures a second batch, through a graph of its own, after the first.
    graphs = bool(weights.distillation) + bool(weights.pictures) if options.data else 1
    step = graphs * _times(settings, "finetune") * flops[1]
    work = _trained(settings, flops[1], "finetune", step, [], options)
    return {"finetune": replace(work, streams=False)}


def _times(settings: Settings, stage: str) -> int:
    """Forward passes that a training step of a stage is worth."""
    return CHECKPOINTED if getattr(settings, stage).gradient_checkpointing else STEP


def _trained(
    settings: Settings,
    whole: int,
    stage: str,
    step: float,
    units: list[Unit],
    options: TrainingSettings,
) -> Work:
    """A training, and the prices of its units at its end, each plugged in alone.

    Args:
        whole: FLOPs of a call of the transformer for one sample.
        step: FLOPs of a training step for one sample.
    """
    judged = getattr(options, "heldout_rows", 0) * len(units)
    devices = _devices(settings)
    return Work(
        options.steps * options.batch_size * step,
        options.steps * devices + math.ceil(judged / options.batch_size),
        trains=stage,
        float32=judged * whole,
        devices=devices,
    )


def _evaluating(planner: Planner, flops: Flops) -> dict[str, Work]:
    """pareto and evaluate."""
    settings = planner.settings
    evaluate, sizes = settings.evaluate, settings.pareto.budgets
    timed = (evaluate.latency_repeats + 1) * evaluate.batch_size
    done = {
        "pareto": _forwards(
            flops,
            (sizes + 1) * (evaluate.velocity_rows + timed),
            evaluate.batch_size,
            float32=(sizes + 1) * settings.choose.rows * flops[1],
        )
    }
    if planner.pipeline is not None:
        models = len(settings.variants) + 1
        pictures = models * evaluate.samples
        rows = pictures * steps_of(planner) + models * (evaluate.velocity_rows + timed)
        done["evaluate"] = _forwards(
            flops, rows, evaluate.batch_size, models=models, pictures=pictures
        )
    return done


def branches_of(planner: Planner) -> int:
    """Calls of the transformer in a denoising step, one per branch of guidance."""
    return 2 if example_calls.guided(_pipeline(planner), planner.settings.pipeline) else 1


def _pipeline(planner: Planner) -> Pipeline:
    assert planner.pipeline is not None, "asked for only where it is known"
    return planner.pipeline


def steps_of(planner: Planner) -> int:
    """Calls of the transformer for one picture."""
    steps = arguments.steps_asked(planner.settings.pipeline, _pipeline(planner).steps)
    return steps * branches_of(planner)


def _prices(
    planner: Planner,
    flops: Flops,
    starts: list[int],
    options: SensitivitySettings | WidthSettings | ChooseSettings,
) -> Work:
    """Prices of changed models in float32: each runs from the block where its change begins. And
    the teacher's own runs for them.

    starts: the blocks where changes begin; the number of blocks for a change behind all of them.
    """
    per_block, whole = flops
    spent = 2 * whole + sum(whole - sum(per_block[:start]) for start in starts)
    passes = math.ceil(options.rows / options.batch_size) * (len(starts) + 2)
    return Work(0.0, passes, float32=options.rows * spent, devices=_devices(planner.settings))


def _width(planner: Planner, flops: Flops) -> Work:
    """Fits, in as many passes as their sums need, and every closed form priced alone."""
    options, sequence = planner.settings.width, blocks.block_sequence(planner.transformer)
    starts, rows = [], 0
    if planner.widens:
        starts += [unit.first for unit in linear_map_candidates.ffn_candidates(planner.transformer)]
        texts = [block.index for block in sequence if block.width.text]
        texts *= options.longest - 1
        channels = max(max(planner.channels(block).values()) for block in sequence)
        sums = 4 * 8 * channels**2 * (len(starts) + 2 * len(texts))
        passes = math.ceil(sums / SUMS_BYTES)
        # A quarter more to judge the maps on; and a pass also runs the blocks that the maps stand
        # for once more.
        rows = 2 * passes * math.ceil(1.25 * options.fit_rows)
        starts += texts
    starts += [block for (block, _), ranks in planner.matrices.items() for _ in ranks]
    work = _prices(planner, flops, starts, options)
    fits = math.ceil(rows / options.batch_size)
    return replace(work, flops=rows * flops[1], passes=work.passes + fits)


def heldout_tokens(settings: Settings) -> int:
    """Held-out tokens of every stream and boundary, for CKA: half of the replayed rows are held
    out."""
    return math.ceil(settings.extract.rows / 2) * settings.extract.sample_tokens


def _similarity(planner: Planner) -> Work:
    """CKA of every stream: three matrix products of n d^2 multiply-adds for every run of blocks,
    and one for every pair of blocks."""
    tokens, flops = heldout_tokens(planner.settings), 0.0
    for depth, channels in streams_of(planner).values():
        pairs = depth * (depth + 1) / 2
        flops += 4 * pairs * 2 * tokens * channels**2
    return Work(flops, 0, models=0, streams=False, float64=True)


def streams_of(planner: Planner) -> dict[str, tuple[int, int]]:
    """Stream -> the number of blocks that it passes, and the most channels that it has."""
    streams: dict[str, tuple[int, int]] = {}
    for block in blocks.block_sequence(planner.transformer):
        for stream, channels in planner.channels(block).items():
            depth, widest = streams.get(stream, (0, 0))
            streams[stream] = depth + 1, max(widest, channels)
    return streams


def _devices(settings: Settings) -> int:
    """How many devices a job has: one per process, but one in all on a CPU."""
    processes = settings.processes
    return 1 if processes == "auto" or settings.device == "cpu" else processes
