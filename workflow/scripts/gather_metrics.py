"""Gathers all metrics of a run: what evaluate measured, and what scorers of benchmarks left.

    python workflow/scripts/gather_metrics.py --config config/digits.yaml \
        --measured results/digits/evaluation/measured.parquet \
        --benchmarks results/digits/evaluation/benchmarks \
        --metrics results/digits/evaluation/metrics.parquet

Each of the config's evaluate.benchmarks has a folder below --benchmarks, which
benchmark_pictures.py filled, with the files that its own scorer wrote. Metrics are called
<benchmark> or <benchmark>/<part>; ..._difference is the variant's less the teacher's, of the same
prompts and seeds. Intervals are 95 % bootstrap intervals over prompts, where the scorer tells
scores of prompts. Scores that are not there yet are left out, and the command that makes them is
printed.
"""

import argparse
from pathlib import Path

import pandas as pd

from ppcl import program
from ppcl.configuration import config
from ppcl.evaluation import benchmark_metrics
from ppcl.storage import schemas, tables


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        "config",
        reads=("measured",),
        writes=("metrics",),
        measured="evaluation/measured.parquet",
    )
    parser.add_argument(
        "--benchmarks", type=Path, metavar="FOLDER", help="input, optional: evaluation/benchmarks"
    )
    return parser.parse_args()


def main() -> None:
    args = command_line()
    settings = config.load(args.config)
    measured = tables.read(args.measured, schemas.METRICS).to_pandas()
    stamp = tables.provenance(args.measured)
    if args.benchmarks is not None:
        rows = benchmark_metrics.rows(
            args.benchmarks, settings.evaluate, set(measured["variant"]), settings.seed
        )
        if rows:
            measured = pd.concat([measured, pd.DataFrame(rows)], ignore_index=True)
    tables.write(args.metrics, measured, schemas.METRICS, stamp)


if __name__ == "__main__":
    program.run(main)
