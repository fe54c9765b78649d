"""Shares the students of distill out over jobs, as balanced as their depth allows.

python workflow/scripts/allot.py --config config/mine.yaml \
    --calls results/mine/record/calls.parquet --plan results/mine/prune/plan.json \
    --shards results/mine/distill/shards/shards.json
"""

import argparse
from pathlib import Path

from ppcl import program
from ppcl.configuration import config
from ppcl.pruning import selection_file
from ppcl.training import entrance, shards
from ppcl.transformer import calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--shards", type=Path, required=True, help="shards.json to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    options = settings.distill
    caching = entrance.caching(calls.Reader(args.calls), options, settings.seed)
    jobs = shards.allot(selection_file.read(args.plan).distilled, options.shards, caching)
    shards.write(args.shards, jobs)
    for number, units in enumerate(jobs):
        names = ", ".join(unit.name for unit in units)
        passes = f"{shards.cost(units, caching):.4g} block passes a step" if units else ""
        print(f"shard {number}: {names or '-'} ({passes or 'nothing to do'})")


if __name__ == "__main__":
    program.run(main)
