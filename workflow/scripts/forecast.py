"""What a run needs, before it runs: parameters, FLOPs, memory per stage, disk. No weights needed.

    python workflow/scripts/forecast.py --config config/mine.yaml \
        --table results/mine/forecast/forecast.parquet \
        --resources results/mine/forecast/resources.json

The transformer's stock class is built without weights, from forecast.transformer_config, else from
the teacher's folder, else from the Hub. What is plugged in is the detected selection (--intervals,
--candidates) or, without one, what the config requires. Shapes of a call come from recorded ones
(--calls), or from the config's `pipeline`.
"""

import argparse
import logging
from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.planning import (
    forecast_table,
    forecast_text,
    job_limits,
    planner,
    stages,
    weightless,
    workloads,
)
from ppcl.pruning.units import Matrix
from ppcl.runtime import devices
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import schemas, tables, texts, untrusted
from ppcl.transformer import blocks, diffusers_model, example_calls

log = logging.getLogger(__name__)


def detected(args: argparse.Namespace) -> tuple[dict, dict[Matrix, int] | None]:
    """The selection in the run's tables, as arguments of `weightless.selection`; and the ranks by
    matrix, None without a table of candidates."""
    selected: dict = {}
    ranks = None
    if args.intervals:
        table = tables.read(args.intervals, schemas.INTERVALS).to_pandas()
        table = table[table["selected"]]
        selected["intervals"] = list(
            zip(table["first"].tolist(), table["last"].tolist(), strict=True)
        )
    if args.candidates:
        table = tables.read(args.candidates, schemas.WIDTH_CANDIDATES).to_pandas()
        table = table[table["selected"]]
        texts, ffns, low = (table[table["kind"] == k] for k in ("text", "ffn", "modulation"))
        selected["narrower"] = (
            list(zip(texts["first"].tolist(), texts["last"].tolist(), strict=True)),
            list(zip(ffns["first"].tolist(), ffns["stream"].tolist(), strict=True)),
        )
        matrices = zip(low["first"].tolist(), low["path"], strict=True)
        ranks = dict(zip(matrices, low["rank"].tolist(), strict=True))
    return selected, ranks


def latent_scale(teacher: TeacherSettings) -> int | None:
    """Pixels per latent, along a side, of a local teacher's autoencoder; None if unknown."""
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
    architecture, where = weightless.architecture(teacher, settings.forecast.transformer_config)
    transformer = weightless.on_meta(architecture, devices.dtype(teacher.dtype), where)
    selected, ranks = detected(args)
    depth, every = weightless.selection(settings, transformer, **selected)
    pipeline = blocks.family(transformer).pipeline
    example = None
    if args.calls:
        example = example_calls.recorded(args.calls)
    elif pipeline:
        size = example_calls.size_of(pipeline.size, settings.pipeline, latent_scale(teacher))

        def example(batch, dtype):
            of_model = diffusers_model.of(transformer).config
            return example_calls.made(pipeline, of_model, size, batch, dtype)

    else:
        log.warning(
            "calls of %s are not known: no FLOPs and no memory of activations until the run has "
            "recorded some (record/calls.parquet)",
            type(transformer).__name__,
        )
    made = planner.Planner(settings, transformer, depth, every, example, pipeline, ranks)
    made.forget_unusable()
    return made


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        may_read=("intervals", "candidates", "calls"),
        writes=("table", "resources"),
        table="forecast/forecast.parquet",
        resources="forecast/resources.json",
    ).parse_args()
    settings = config.load(args.config)

    made = made_for(args, settings)
    every, works = list(stages.every(made)), workloads.works(made)
    table = pd.DataFrame(forecast_table.rows(made, every, settings.forecast.gpus))
    if works:
        table = pd.concat([table, forecast_table.time_rows(made, works)], ignore_index=True)
    stamp = provenance.stamp(
        settings.given,
        blocks=len(blocks.block_sequence(made.transformer)),
        units=len(made.every),
    )
    tables.write(args.table, table[schemas.FORECAST.names], schemas.FORECAST, stamp)
    needs = job_limits.resources(made, every, works)
    # Snakemake hands the config over as JSON. By its digest it can tell later whether the limits
    # are those of its config.
    of = {"config": provenance.digest(args.config)} if args.config[0] == "{" else {}
    texts.write_sealed(args.resources, needs | of)
    print(forecast_text.of(table))


if __name__ == "__main__":
    program.run(main)
