"""How long stages take.

Time is FLOPs over a sustained speed (forecast.tflops), and what no speed of arithmetic shortens.
The FLOPs are those of the planner's calls, and rather too many than too few: no variant is taken
for cheaper than the teacher, no student for cheaper than the block that it starts from, and as long
as nothing is selected, every block is taken to have a student. Limits are `SAFETY` times that.
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
from ppcl.transformer import blocks, example_calls
from ppcl.transformer.family import Pipeline

# TFLOP/s, if forecast.tflops names none. An A100's peak is 312 in bf16, of which large products
# leave a third; a CPU's is that of two cores in float32.
GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.02
# Of a GPU's speed in bf16, what TensorFloat-32 leaves, float32 (an A100's peaks are 312, 156 and
# 19.5), and float64 on one that is not made for it, or on a server's CPU, which does it where the
# GPU has no room; of a CPU's in float32, what float64 does.
TENSOR_FLOAT32, FLOAT32, GPU_FLOAT64, CPU_FLOAT64 = 1 / 2, 1 / 16, 1 / 200, 1 / 2
# A training step is a forward pass and a backward one of twice its FLOPs; checkpointing repeats the
# forward pass.
STEP, CHECKPOINTED = 3, 4
# Seconds: of starts and data for every pass over the model, and of text encoder and autoencoder for
# every picture, which no FLOPs here count.
PASS, PICTURE = 0.1, 2.0
# Bytes per second: of weights from a disk that many share; of blocks on their way to a GPU.
LOADING, STREAMING = 0.2e9, 10e9
# Of a limit: over the estimate; least and most minutes. Stages of more are submitted again at their
# limit and go on.
SAFETY, LEAST, MOST = 3, 10, 2880


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

    `distill` is always that of one job; those of shards are `distill/<number>` besides.
    """
    flops = planner.flops(planner.variants["teacher"][0])
    if not flops:
        return {}
    per_block, whole = flops
    settings = planner.settings
    sequence = blocks.block_sequence(planner.transformer)
    everything = [Unit((NewBlock(i, i),)) for i in range(len(sequence))]
    depth, every = (planner.depth, planner.every) if planner.every else (everything, everything)

    def forwards(rows: float, batch: int, **more) -> Work:
        return Work(rows * whole, math.ceil(rows / batch), **more)

    def trained(
        stage: str, step: float, units: list[Unit], options: TrainingSettings, **more
    ) -> Work:
        """step: FLOPs of one for one sample. Units are judged alone in the end."""
        judged = getattr(options, "heldout_rows", 0) * len(units)
        batch, steps = options.batch_size, options.steps
        devices = _devices(settings)
        return Work(
            steps * batch * step,
            steps * devices + math.ceil(judged / batch),
            trains=stage,
            float32=judged * whole,
            devices=devices,
            **more,
        )

    def times(stage: str) -> int:
        return CHECKPOINTED if getattr(settings, stage).gradient_checkpointing else STEP

    def distilled(units: list[Unit], options: DistillSettings = settings.distill) -> Work:
        """The teacher to the last block that is needed, and a step of every student."""
        teacher = sum(per_block[: max((u.last for u in units), default=-1) + 1])
        taught = sum(per_block[new_block.first] for new_block in new_blocks_of(units))
        return trained("distill", teacher + times("distill") * taught, units, options)

    record, evaluate = settings.record, settings.evaluate
    done = {}
    if planner.pipeline is not None:
        per_picture = steps_of(planner)
        renoised = branches_of(planner) * record.renoised_per_sample
        rows = record.samples * (per_picture + renoised)
        done["record"] = forwards(
            rows, record.batch_size, pictures=record.samples, devices=_devices(settings)
        )
    done["extract"] = forwards(settings.extract.rows, settings.extract.batch_size)
    if settings.compares:
        done["similarity"] = _similarity(planner)
    if settings.searches_by_cost:
        options = settings.sensitivity
        runs = intervals.spans(
            len(sequence),
            blocks.seams(planner.transformer),
            blocks.untouchable(planner.transformer),
        )
        tried = intervals.all_within(runs, options.longest)
        starts = [first for first, _ in tried]
        done["sensitivity"] = _prices(planner, flops, starts, options)
    if planner.widens or planner.matrices:
        done["width"] = _width(planner, flops)
    rounds, batch = evaluate.latency_repeats, evaluate.batch_size
    timed = (rounds + 1) * batch
    if settings.limited_latency:
        # Whole blocks, and each without one of its parts; some of each list.
        kinds = 1 + max((len(b.width.ffn) + bool(b.width.text) for b in sequence), default=0)
        lengths = Counter(block.list.attribute for block in sequence).values()
        some = sum(min(length, latencies.TIMED) for length in lengths) / len(sequence)
        every_round = some * kinds * batch
        done["latency"] = forwards(every_round * (latencies.ROUNDS * rounds + 1), batch)
    if settings.trains:
        staged = planner.widens and settings.width.schedule == "staged"
        units = depth if staged else every
        done["distill"] = distilled(units)
        jobs = planner.jobs(units) if planner.every else []
        if len(jobs) > 1:
            done |= {f"distill/{number}": distilled(job) for number, job in enumerate(jobs)}
        if staged:
            done["narrow"] = distilled(every, settings.narrowing)
        if settings.subsets.steps:
            step = times("subsets") * whole
            done["subsets"] = trained("subsets", step, every, settings.subsets, streams=False)
    # Every unit alone, and for every variant its units of one stage each, and one flipped by one.
    sets = len(every) * (1 + 3 * len(settings.variants)) if settings.trains else 0
    sets += len(settings.variants)
    done["choose"] = _prices(planner, flops, [0] * sets, settings.choose)
    longest = max(settings.variants, key=lambda variant: variant.finetune_steps)
    if longest.finetune_steps:
        tuning = settings.finetune.for_variant(longest)
        step = times("finetune") * whole
        done["finetune"] = trained("finetune", step, [], tuning, streams=False)
    sizes, judged = settings.pareto.budgets, settings.choose.rows
    done["pareto"] = forwards(
        (sizes + 1) * (evaluate.velocity_rows + timed),
        evaluate.batch_size,
        float32=(sizes + 1) * judged * whole,
    )
    if planner.pipeline is not None:
        models = len(settings.variants) + 1
        rows = models * (evaluate.samples * steps_of(planner) + evaluate.velocity_rows + timed)
        pictures = models * evaluate.samples
        done["evaluate"] = forwards(rows, evaluate.batch_size, models=models, pictures=pictures)
    return done


def branches_of(planner: Planner) -> int:
    """Calls of a guided denoising step."""
    return 2 if example_calls.guided(_pipeline(planner), planner.settings.pipeline) else 1


def _pipeline(planner: Planner) -> Pipeline:
    assert planner.pipeline is not None, "asked for only where it is known"
    return planner.pipeline


def steps_of(planner: Planner) -> int:
    """Calls of the transformer for one picture."""
    steps = planner.settings.pipeline.get("num_inference_steps", _pipeline(planner).steps)
    return steps * branches_of(planner)


def _prices(
    planner: Planner,
    flops: tuple[list[int], int],
    starts: list[int],
    options: SensitivitySettings | WidthSettings | ChooseSettings,
) -> Work:
    """Changed models in float32, each from the block on where its change begins, and the teacher.

    starts: those blocks; the number of blocks for a change behind all of them.
    """
    per_block, whole = flops
    spent = 2 * whole + sum(whole - sum(per_block[:start]) for start in starts)
    passes = math.ceil(options.rows / options.batch_size) * (len(starts) + 2)
    return Work(0.0, passes, float32=options.rows * spent, devices=_devices(planner.settings))


def _width(planner: Planner, flops: tuple[list[int], int]) -> Work:
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
    """Of every stream and boundary, for CKA: half of the rows that are replayed."""
    return math.ceil(settings.extract.rows / 2) * settings.extract.sample_tokens


def _similarity(planner: Planner) -> Work:
    """Three products of n d^2 for every run of blocks of every stream, one for every two blocks."""
    tokens, flops = heldout_tokens(planner.settings), 0.0
    for depth, channels in streams_of(planner).values():
        pairs = depth * (depth + 1) / 2
        flops += 4 * pairs * 2 * tokens * channels**2
    return Work(flops, 0, models=0, streams=False, float64=True)


def streams_of(planner: Planner) -> dict[str, tuple[int, int]]:
    """Stream -> the blocks that it passes, and its channels."""
    streams: dict[str, tuple[int, int]] = {}
    for block in blocks.block_sequence(planner.transformer):
        for stream, channels in planner.channels(block).items():
            depth, widest = streams.get(stream, (0, 0))
            streams[stream] = depth + 1, max(widest, channels)
    return streams


def _devices(settings: Settings) -> int:
    """That a job's processes have; on a CPU they share what there is."""
    processes = settings.processes
    return 1 if processes == "auto" or settings.device == "cpu" else processes


def speed(settings: Settings, work: Work, float32: bool = False) -> float:
    """FLOP/s of one device, in the precision of a stage's work: the teacher's, unless it has its
    own; or of its passes in float32."""
    cpu = settings.device == "cpu"
    given = 1e12 * (settings.forecast.tflops or (CPU_TFLOPS if cpu else GPU_TFLOPS))
    if work.float64:
        return given * (CPU_FLOAT64 if cpu else GPU_FLOAT64)
    low = settings.teacher.dtype != "float32"
    if float32:
        return given * (1.0 if cpu else TENSOR_FLOAT32 if low else FLOAT32)
    if work.trains:
        low = getattr(settings, work.trains).mixed_precision != "no"
    return given * (1.0 if low or cpu else FLOAT32)


def seconds(work: Work, settings: Settings, weights: int) -> float:
    """What a stage is expected to take.

    Args:
        weights: bytes of the teacher's transformer.
    """
    spent = work.flops / work.devices / speed(settings, work)
    spent += work.float32 / work.devices / speed(settings, work, float32=True)
    spent += work.passes / work.devices * PASS + work.pictures * PICTURE
    if work.streams and settings.teacher.offload in ("stream", "auto"):
        spent += work.passes / work.devices * weights / STREAMING
    return spent + work.models * weights / LOADING


def minutes(seconds: float) -> int:
    """The time limit of a job that is expected to take so many seconds."""
    return min(MOST, max(LEAST, math.ceil(SAFETY * seconds / 60)))
