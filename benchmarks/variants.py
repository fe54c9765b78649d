"""Pruned variants: how much of the FLOPs that go, a model's latency follows."""

from functools import partial
from pathlib import Path

import torch

from benchmarks import material, measuring
from benchmarks.material import Size
from benchmarks.measuring import Ratio
from ppcl.planning import footprint
from ppcl.transformer import blocks

NAME = "variants"
SHARES = (0.25, 0.5, 0.75)  # of the blocks, that go
BAR = 1.10


def run(size: Size, folder: Path) -> list[Ratio]:
    """Latency of variants of one teacher over what their FLOPs let expect of it."""
    teacher = material.transformer(size)
    given = material.arguments(size, size.batch)
    models = {0: teacher}
    for share in SHARES:
        removed = max(1, round(share * size.blocks))
        # One interval: its first block stands for the rest, as a student would.
        interval = (0, removed)
        students = {interval: teacher.transformer_blocks[0]}
        models[removed], _ = blocks.assembled(teacher, students)
    flops = {removed: footprint.flops(model, given)[1] for removed, model in models.items()}
    runs = {removed: partial(model, **given) for removed, model in models.items()}
    with torch.no_grad():
        times = measuring.interleaved(runs, 2 * size.repeats)
    seconds = {removed: measuring.least(values) for removed, values in times.items()}
    found = []
    for removed in list(models)[1:]:
        left = flops[removed] / flops[0]
        found.append(
            Ratio(
                NAME,
                f"latency / expected, {removed} of {size.blocks} blocks gone",
                seconds[removed],
                left * seconds[0],
                "s",
                BAR,
                note=f"{1 - left:.1%} of the FLOPs gone, "
                f"{1 - seconds[removed] / seconds[0]:.1%} of the latency",
            )
        )
    return found
