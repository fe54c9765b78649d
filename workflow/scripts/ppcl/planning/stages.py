"""What every stage that runs the teacher's transformer needs on a device."""

import math
from collections.abc import Iterator

import torch

from ppcl.closed_forms import linear_map_candidates, linear_maps, modulation
from ppcl.closed_forms.linear_map_fits import SUMS_BYTES
from ppcl.planning import footprint, trainings
from ppcl.planning.device_memory import Stage, of_parts
from ppcl.planning.planner import Planner, bytes_of
from ppcl.pruning.units import NewBlock
from ppcl.training import teaching
from ppcl.transformer import blocks, example_calls


def every(planner: Planner) -> Iterator[Stage]:
    """All of them, in the order in which they run."""
    settings = planner.settings
    pipeline = planner.pipeline
    joined = pipeline is not None and pipeline.joined
    guided = pipeline is not None and example_calls.guided(pipeline, settings.pipeline)
    doubled = 2 if joined and guided else 1
    alone = "transformer alone: text encoder and autoencoder come on top"
    yield _still(planner, "record", settings.record.batch_size * doubled, note=alone)
    yield _extract(planner)
    if settings.searches_by_cost:
        yield _priced(planner, "sensitivity", settings.sensitivity.batch_size)
    if planner.widens or planner.matrices:
        yield _width(planner, settings.width.batch_size)
    if planner.trains:
        staged = planner.widens and settings.width.schedule == "staged"
        yield from trainings.distillations(planner, planner.depth if staged else planner.every)
        if staged:
            yield trainings.distill(planner, "narrow", planner.every)
        if settings.subsets.steps:
            yield trainings.subsets(planner)
    yield _priced(planner, "choose", settings.choose.batch_size)
    if any(variant.finetune_steps for variant in settings.variants):
        yield trainings.finetune(planner)
    yield _still(planner, "evaluate", settings.evaluate.batch_size * doubled, note=alone)


def _extract(planner: Planner) -> Stage:
    """With a GPU, sums and the tokens that wait to be added are in main memory, and those of one
    block at a time come to the device (activations.Moments). There are sums only where blocks are
    compared; those of modulations' inputs are small, and not counted."""
    options, sums = planner.settings.extract, sum(planner.moments())
    if not sums:
        return _still(planner, "extract", options.batch_size)
    if planner.settings.device == "cpu":
        return _still(planner, "extract", options.batch_size, statistics=sums)
    added = options.batch_size * options.moment_tokens
    widths = [
        channels
        for block in blocks.block_sequence(planner.transformer)
        for channels in planner.channels(block).values()
    ]
    at_once = max(8 * (3 * (d + added) * d + d * d) for d in widths)
    stage = _still(planner, "extract", options.batch_size, statistics=at_once)
    waiting = sum(
        2 * math.ceil((d + added) / added) * _pinned(added * d * planner.dtype.itemsize)
        for d in widths
    )
    stage.parts["main memory"] = sums + waiting
    return stage


def _priced(
    planner: Planner, name: str, batch: int, fit: int | None = 0, statistics: int = 0
) -> Stage:
    """A stage that measures changed models in float32 (prices.measure): weights of one block at
    a time, and of all that is no block.

    Args:
        fit: peak bytes before the models are measured, while closed forms are fitted; None if
            unknown.
        statistics: bytes of the sums among them.
    """
    sizes = [blocks.parameter_count(b.module) for b in blocks.block_sequence(planner.transformer)]
    rest = blocks.parameter_count(planner.transformer) - sum(sizes)
    # A student in the teacher's dtype; and if that is not float32, a block and the rest lifted.
    lifted = max(sizes) + rest if planner.dtype != torch.float32 else 0
    held = max(sizes) * planner.dtype.itemsize + 4 * lifted
    activations = planner.inference(batch, torch.float32)
    beside = None
    if activations is not None and fit is not None:
        beside = max(held + activations, fit)
    parts = {"students": held, "statistics": statistics, "activations": activations}
    return of_parts(planner, name, parts, beside, note=f"batch {batch}, prices in float32")


def _still(planner: Planner, name: str, batch: int, note: str = "", statistics: int = 0) -> Stage:
    """A stage that trains nothing."""
    activations = planner.inference(batch)
    return of_parts(
        planner,
        name,
        {"statistics": statistics, "activations": activations},
        None if activations is None else statistics + activations,
        note=f"batch {batch}{'; ' if note else ''}{note}",
    )


def _width(planner: Planner, batch: int) -> Stage:
    """The largest of three peaks: of fits (sums of as many maps as one pass has room for, and the
    teacher's activations at their blocks), of the decomposition of the largest modulation matrix,
    and of prices."""
    shapes = [(m.inputs, m.outputs) for m in modulation.matrices(planner.transformer)]
    # [d, d] of the inputs: moments, directions and their root; [out, d]: W, W times the root, and
    # its singular vectors.
    factored = max((8 * (3 * d * d + 3 * d * out) for d, out in shapes), default=0)
    factored = factored if planner.matrices else 0
    if not planner.widens:
        return _priced(planner, "width", batch, factored, factored)
    candidates = linear_map_candidates.ffn_candidates(planner.transformer)
    maps = [one for unit in candidates for p in unit.new_blocks for one in linear_maps.maps_of(p)]
    sequence = blocks.block_sequence(planner.transformer)
    texts = sum(block.width.text is not None for block in sequence)
    channels = max(max(planner.channels(block).values()) for block in sequence)
    one = 4 * 8 * channels**2
    # A block may borrow from each of the `longest - 1` blocks before it, and end a run each time:
    # two maps.
    wanted = len(maps) + 2 * texts * (planner.settings.width.longest - 1)
    at_once = min(wanted, max(1, SUMS_BYTES // one))
    statistics = at_once * one
    activations = None
    if planner.example is not None:
        new_blocks = [NewBlock(*ends) for ends in dict.fromkeys(m.target for m in maps[:at_once])]
        arguments = planner.example(batch, planner.dtype)

        def run():
            return teaching.teacher_states(planner.transformer, new_blocks, arguments)

        activations = footprint.measured(run).peak + bytes_of(arguments) if new_blocks else 0
    fit = None if activations is None else max(statistics + activations, factored)
    return _priced(planner, "width", batch, fit, max(statistics, factored))


def _pinned(size: int) -> int:
    """Bytes that torch takes for `size` bytes of pinned memory: the next power of two."""
    return 1 << (size - 1).bit_length()
