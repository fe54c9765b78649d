"""How large the files of a run become, uncompressed."""

import math
from dataclasses import replace

from ppcl.planning import weightless
from ppcl.planning.planner import Planner, bytes_of
from ppcl.pruning import quantisable
from ppcl.pruning.quantisation import GIB, METHODS
from ppcl.pruning.units import Unit, new_blocks_of
from ppcl.settings import Variant
from ppcl.training import shards
from ppcl.transformer import blocks
from ppcl.transformer.family import TEXT


def sizes(planner: Planner) -> dict[str, float | None]:
    """Bytes of every artifact that is large; path -> bytes, None where they can't be told."""
    settings = planner.settings
    sequence = blocks.block_sequence(planner.transformer)
    extract = settings.extract
    per_token = sum(
        channels * (1 + (block is sequence[0]))
        for block in sequence
        for channels in planner.channels(block).values()
    )
    tokens = 4 * extract.rows * extract.sample_tokens * per_token
    bytes_by_path: dict[str, float | None] = {
        "record/calls.parquet": _calls(planner),
        "activations/tokens.parquet": tokens,
        # While it runs: two checkpoints are there while one is replaced.
        "state/extract/": tokens + 2 * sum(planner.moments()),
        "activations/moments.safetensors": sum(planner.moments()),
    }
    if settings.compares:
        bytes_by_path["probes/probes.safetensors"] = sum(
            8 * (channels**2 + channels)
            for block in sequence
            for channels in planner.channels(block).values()
        )
    if planner.widens:
        bytes_by_path["width/maps.safetensors"] = bytes_by_path["state/width/"] = _maps(planner)
    if planner.trains:
        bytes_by_path |= _students(planner)
    by_name = {variant.name: variant for variant in settings.variants}
    for variant in settings.variants:
        parameters = _variant_parameters(planner, by_name[variant.parent or variant.name])
        if variant.finetune_steps:
            bytes_by_path[f"finetune/{variant.name}.safetensors"] = 4 * parameters
            options = settings.finetune
            kept = weightless.optimizer_bytes(parameters, options.optimizer, options.ema)
            bytes_by_path[f"state/finetune-{variant.name}/"] = 4 * parameters + kept
        bytes_by_path[f"models/{variant.name}/"] = _stored(planner, parameters, variant)
    return bytes_by_path


def _maps(planner: Planner) -> int:
    """Bytes of the maps of all linear FFNs and text runs, in the teacher's type."""
    size, longest = planner.dtype.itemsize, planner.settings.width.longest
    total = 0
    for block in blocks.block_sequence(planner.transformer):
        channels, width = planner.channels(block), block.width
        kinds = [*width.ffn, *([TEXT] * 2 * (longest - 1) if width.text else [])]
        total += sum(size * (channels[kind] ** 2 + channels[kind]) for kind in kinds)
    return total


def _students(planner: Planner) -> dict[str, float]:
    """Bytes of what the trainings of students leave and keep; path -> bytes."""
    settings, count, bytes_by_path = planner.settings, blocks.parameter_count, {}
    staged = settings.staged
    whole = sum(map(count, weightless.new_blocks(planner.transformer, planner.every).values()))
    first = whole
    if staged:
        first = sum(map(count, weightless.new_blocks(planner.transformer, planner.depth).values()))
    bytes_by_path["prune/students.safetensors"] = 4 * first
    trained = {"distill": first}
    trained |= {"narrow": whole} if staged else {}
    trained |= {"subsets": whole} if settings.subsets.steps else {}
    for stage, parameters in trained.items():
        options = getattr(settings, "distill" if stage == "narrow" else stage)
        kept = weightless.optimizer_bytes(parameters, options.optimizer, options.ema)
        bytes_by_path[f"{stage}/students.safetensors"] = 4 * parameters
        bytes_by_path[f"state/{stage}/"] = 4 * parameters + kept
    return bytes_by_path | _streams(planner, planner.depth if staged else planner.every)


def _variant_parameters(planner: Planner, variant: Variant) -> int:
    """The most parameters that a variant can have: as many as its budget allows, but no fewer than
    the smallest model has (`Planner.least`)."""
    total, least = blocks.parameter_count(planner.transformer), planner.least
    method = METHODS.get(variant.quantise or "")
    size = method.per_value if method else planner.dtype.itemsize
    allowed = [
        {
            "fraction": int(value * total),
            "parameters": int(value),
            "gib": int(value * GIB / size),
        }.get(kind, total)
        for kind, value in variant.budget.items()
    ]
    return max(least, min([*allowed, total]))


def _stored(planner: Planner, parameters: int, variant: Variant) -> int:
    """Bytes of a variant's transformer, at most: what goes is of its blocks, and what is stored
    there as in the teacher's, quantised or not."""
    if variant.quantise is None:
        size = planner.dtype.itemsize * parameters
    else:
        model = planner.transformer
        whole = quantisable.inventory(model, quantisable.names(model))
        matrices = replace(whole, kept=0).stored(variant.quantise)
        size = whole.kept + math.ceil(matrices * parameters / whole.parameters)
    return min(size, math.ceil(variant.budget.get("gib", size / GIB) * GIB))


def _calls(planner: Planner) -> float | None:
    """Bytes of calls.parquet."""
    rows, answer = planner.recorded(), planner.answer()
    if planner.example is None or rows is None or answer is None:
        return None
    return rows * (bytes_of(planner.example(1, planner.dtype)) + answer)


def _streams(planner: Planner, units: list[Unit]) -> dict[str, float]:
    """Bytes of the streams that jobs of distill keep while they run; path -> bytes."""
    caching, jobs = planner.caching(), planner.jobs(units)
    options = planner.settings.distill
    rows = caching.fill * options.steps * options.batch_size
    bytes_by_path = {}
    for number, job in enumerate(jobs):
        kept = planner.streams(shards.first_needed(new_blocks_of(job)))
        if shards.cached(job, caching) and kept is not None:
            name = "distill" if len(jobs) == 1 else f"distill-{number}"
            bytes_by_path[f"state/{name}/inputs/"] = rows * kept
    return bytes_by_path
