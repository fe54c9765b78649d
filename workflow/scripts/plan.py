"""What a run needs, before it runs: parameters, FLOPs, memory per stage, disk. No weights needed.

    python workflow/scripts/plan.py --config config/mine.yaml \
        --table results/mine/plan/plan.parquet --resources results/mine/plan/resources.json

The transformer's stock class is built without weights, from plan.transformer_config, else from the
teacher's folder, else from the Hub. What is plugged in is the detected selection (--intervals,
--candidates) or, without one, what the config pins. Shapes of a call come from recorded ones
(--calls), or from the config's `pipeline`.
"""

import argparse
import logging
import math
from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.planning import device_memory, durations, plan_table, planner, stages, weightless
from ppcl.pruning.units import Matrix
from ppcl.runtime import devices
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import schemas, tables, texts, untrusted
from ppcl.transformer import blocks, example_calls

log = logging.getLogger(__name__)


def detected(args: argparse.Namespace) -> tuple[dict, dict[Matrix, int] | None]:
    """The selection that the run's tables hold, as `weightless.selection` takes it, and ranks."""
    found, ranks = {}, None
    if args.intervals:
        table = tables.read(args.intervals, schemas.INTERVALS).to_pandas()
        table = table[table["selected"]]
        found["intervals"] = list(zip(table["first"].tolist(), table["last"].tolist(), strict=True))
    if args.candidates:
        table = tables.read(args.candidates, schemas.WIDTH_CANDIDATES).to_pandas()
        table = table[table["selected"]]
        texts, ffns, low = (table[table["kind"] == k] for k in ("text", "ffn", "modulation"))
        found["narrower"] = (
            list(zip(texts["first"].tolist(), texts["last"].tolist(), strict=True)),
            list(zip(ffns["first"].tolist(), ffns["stream"].tolist(), strict=True)),
        )
        matrices = zip(low["first"].tolist(), low["path"], strict=True)
        ranks = dict(zip(matrices, low["rank"].tolist(), strict=True))
    return found, ranks


def latent_scale(teacher: TeacherSettings) -> int | None:
    """Pixels per latent of a local teacher's autoencoder, if its config tells."""
    file = Path(teacher.path, teacher.subfolder or "", "vae", "config.json")
    try:
        vae = untrusted.json_object(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    told = vae.get("scale_factor_spatial")
    for key, first in (("temperal_downsample", 0), ("block_out_channels", 1)):
        if told is None and isinstance(vae.get(key), list):
            told = 2 ** (len(vae[key][:10]) - first)
    return told if type(told) is int and told > 0 else None


def made_for(args: argparse.Namespace, settings: Settings) -> planner.Planner:
    """The planner of a config and of what its run has found so far."""
    teacher = settings.teacher
    found, where = weightless.architecture(teacher, settings.plan.transformer_config)
    transformer = weightless.on_meta(found, devices.dtype(teacher.dtype), where)
    selected, ranks = detected(args)
    depth, every = weightless.selection(settings, transformer, **selected)
    pipeline = blocks.family(transformer).pipeline
    example = None
    if args.calls:
        example = example_calls.recorded(args.calls)
    elif pipeline:
        size = example_calls.size_of(pipeline.size, settings.pipeline, latent_scale(teacher))

        def example(batch, dtype):
            return example_calls.made(pipeline, transformer.config, size, batch, dtype)

    else:
        log.warning(
            "calls of %s are not known: no FLOPs and no memory of activations until the run has "
            "recorded some (record/calls.parquet)",
            type(transformer).__name__,
        )
    made = planner.Planner(settings, transformer, depth, every, example, pipeline, ranks)
    made.forget_unusable()
    return made


def _gib(value: float) -> str:
    return "?" if pd.isna(value) else f"{value / device_memory.GIB:,.1f}"


def printed(table: pd.DataFrame) -> str:
    """The plan for people: variants, then stages in GiB with what they fit on, then disk."""
    variants = table[table["item"] == "variant"].pivot(
        index="name", columns="measure", values="value"
    )
    lines = [f"{'variant':<24}{'blocks':>8}{'parameters':>18}{'GiB':>9}{'TFLOPs':>10}{'share':>8}"]
    for name in table[table["item"] == "variant"]["name"].unique():
        one = variants.loc[name]
        spent = "?" if pd.isna(one["flops"]) else f"{one['flops'] / 1e12:,.3f}"
        share = "?" if pd.isna(one["latency share"]) else f"{one['latency share']:.3f}"
        lines.append(
            f"{name:<24}{one['blocks']:>8.0f}{one['parameters']:>18,.0f}{_gib(one['size']):>9}"
            f"{spent:>10}{share:>8}"
        )
    gpus = sorted(table[table["item"] == "gpu"]["gpu_gib"].unique())
    heads = "".join(f"{f'{gpu:g} GiB':>12}" for gpu in gpus)
    lines += ["", f"{'peak GiB of':<14}{'resident':>10}{'offloaded':>11}{'least':>9}{heads}"]
    stages = table[table["item"] == "stage"].pivot(index="name", columns="measure", values="value")
    fits = table[table["item"] == "gpu"].set_index(["name", "gpu_gib", "measure"])["value"]
    for name in table[table["item"] == "stage"]["name"].unique():
        peaks = [_gib(stages.loc[name, f"peak {k}"]) for k in ("resident", "offloaded", "least")]
        cells = "".join(f"{_fit(fits[name][gpu]):>12}" for gpu in gpus)
        lines.append(f"{name:<14}{peaks[0]:>10}{peaks[1]:>11}{peaks[2]:>9}{cells}")
    lines += ["", f"{'on disk, at most':<40}{'GiB':>10}"]
    for row in table[table["item"] == "artifact"].itertuples():
        lines.append(f"{row.name:<40}{_gib(row.value):>10}")
    jobs = table[table["item"] == "job"].pivot(index="name", columns="measure", values="value")
    lines += ["", f"{'jobs':<14}{'hours':>10}{'limit':>9}"]
    for name in table[table["item"] == "job"]["name"].unique():
        spent = jobs.loc[name, "time"]
        limit = durations.minutes(spent) / 60
        lines.append(f"{name:<14}{spent / 3600:>10.2f}{limit:>9.2f}")
    return "\n".join(lines)


def time_rows(made: planner.Planner, works: dict[str, durations.Work]) -> pd.DataFrame:
    """Rows of plan.parquet: how long each stage is expected to take."""
    settings = made.settings
    rows = []
    for name, work in works.items():
        speed = durations.speed(settings, work) / 1e12
        note = f"{work.flops / 1e12:.4g} TFLOPs at {speed:g} TFLOP/s"
        if work.float32:
            slow = durations.speed(settings, work, float32=True) / 1e12
            note += f", {work.float32 / 1e12:.4g} at {slow:g} in float32"
        note += f" on each of {work.devices}"
        spent = durations.seconds(work, settings, made.weights)
        what = {"item": "job", "name": name, "measure": "time", "unit": "s", "note": note}
        rows.append(what | {"block": -1, "gpu_gib": math.nan, "value": spent})
    return pd.DataFrame(rows, columns=schemas.PLAN.names)


def _fit(fits: pd.Series) -> str:
    if fits.isna().any():
        return "?"
    if fits["fits resident"]:
        return "resident"
    return "offloaded" if fits["fits offloaded"] else "-"


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        may_read=("intervals", "candidates", "calls"),
        writes=("table", "resources"),
        table="plan/plan.parquet",
        resources="plan/resources.json",
    ).parse_args()
    settings = config.load(args.config)

    made = made_for(args, settings)
    every, works = list(stages.every(made)), durations.works(made)
    table = pd.DataFrame(plan_table.rows(made, every, settings.plan.gpus))
    if works:
        table = pd.concat([table, time_rows(made, works)], ignore_index=True)
    stamp = provenance.stamp(
        settings.given,
        blocks=len(blocks.block_sequence(made.transformer)),
        units=len(made.every),
    )
    tables.write(args.table, table[schemas.PLAN.names], schemas.PLAN, stamp)
    needs = durations.resources(made, every, works)
    # By what Snakemake hands over it can tell whether the limits are those of its config.
    of = {"config": provenance.digest(args.config)} if args.config[0] == "{" else {}
    texts.write_sealed(args.resources, needs | of)
    print(printed(table))


if __name__ == "__main__":
    program.run(main)
