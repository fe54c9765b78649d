"""The rows of forecast.parquet: sizes, FLOPs, memory, what fits on which GPU, files and hours."""

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from ppcl.planning import artifacts, durations, weightless
from ppcl.planning.device_memory import Stage
from ppcl.planning.planner import Planner
from ppcl.planning.workloads import Work
from ppcl.storage import schemas
from ppcl.transformer import blocks


def rows(planner: Planner, every: Sequence[Stage], gpus: Sequence[float]) -> Iterator[dict]:
    """The rows of forecast.parquet; every: the stages that run the transformer."""
    whole = None
    for name, (model, block_map) in planner.variants.items():
        counted = planner.flops(model)
        unknown: Sequence[int | None] = [None] * len(block_map)
        per_block, total = counted or (unknown, None)
        whole = whole or total
        share = "by FLOPs, of the teacher's call"
        for measure, value, unit, note in (
            ("parameters", blocks.parameter_count(model), "parameters", ""),
            (
                "size",
                weightless.weight_bytes(model),
                "bytes",
                f"in {planner.settings.teacher.dtype}",
            ),
            ("blocks", len(block_map), "blocks", ""),
            ("flops", total, "FLOPs", "of one call, batch 1"),
            ("latency share", total / whole if total and whole else total, "share", share),
        ):
            yield _row("variant", name, measure, value, unit, note=note)
        for block, spent in zip(blocks.block_sequence(model), per_block, strict=True):
            ends = block_map[block.index]
            stands = f"for {ends[0]}" + (f" to {ends[-1]}" if len(ends) > 1 else "")
            at = {"note": stands, "block": block.index}
            by_flops = {**at, "note": f"{stands}; by FLOPs, of this variant's call"}
            count = blocks.parameter_count(block.module)
            of_call = spent / total if spent and total else spent
            yield _row("block", name, "parameters", count, "parameters", **at)
            yield _row("block", name, "flops", spent, "FLOPs", **at)
            yield _row("block", name, "latency share", of_call, "share", **by_flops)
    for stage in every:
        for part, value in stage.parts.items():
            yield _row("stage", stage.name, part, value, "bytes", note=stage.note)
        for kind in ("resident", "offloaded", "least"):
            peak = getattr(stage, kind)
            yield _row("stage", stage.name, f"peak {kind}", peak, "bytes", note=stage.note)
        for gpu in gpus:
            for kind in ("resident", "offloaded"):
                fits = stage.fits(gpu, kind == "offloaded")
                yield _row("gpu", stage.name, f"fits {kind}", fits, "fits", gpu_gib=float(gpu))
    for path, value in artifacts.sizes(planner).items():
        yield _row("artifact", path, "size", value, "bytes", note="at most, uncompressed")


def _row(item: str, name: str, measure: str, value: float | None, unit: str, **more) -> dict:
    """more: columns that not every row has something for."""
    number = math.nan if value is None else float(value)
    what = {"item": item, "name": name, "measure": measure, "value": number, "unit": unit}
    return what | {"block": -1, "gpu_gib": math.nan, "note": ""} | more


def time_rows(planner: Planner, works: Mapping[str, Work]) -> pd.DataFrame:
    """Rows of forecast.parquet: how long each stage is expected to take."""
    settings = planner.settings
    rows = []
    for name, work in works.items():
        speed = durations.speed(settings, work) / 1e12
        note = f"{work.flops / 1e12:.4g} TFLOPs at {speed:g} TFLOP/s"
        if work.float32:
            slow = durations.speed(settings, work, float32=True) / 1e12
            note += f", {work.float32 / 1e12:.4g} at {slow:g} in float32"
        note += f" on each of {work.devices}"
        spent = durations.seconds(work, settings, planner.weights)
        what = {"item": "job", "name": name, "measure": "time", "unit": "s", "note": note}
        rows.append(what | {"block": -1, "gpu_gib": math.nan, "value": spent})
    return pd.DataFrame(rows, columns=schemas.FORECAST.names)
