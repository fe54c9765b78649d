"""Shares the students of distill out over jobs, as balanced as their depth allows.

python workflow/scripts/assign_shards.py --config config/mine.yaml \
    --calls results/mine/record/calls.parquet --selection results/mine/prune/selection.json \
    --shards results/mine/distill/shards/shards.json
"""

from ppcl import program
from ppcl.configuration import config
from ppcl.pruning import selection_file
from ppcl.training import input_cache, shards
from ppcl.transformer import calls


def main() -> None:
    args = program.parser(
        __doc__, "config", reads=("calls", "selection"), writes=("shards",)
    ).parse_args()
    settings = config.load(args.config)
    options = settings.distill
    caching = input_cache.caching(calls.Reader(args.calls), options, settings.seed)
    jobs = shards.assign(selection_file.read(args.selection).distilled, options.shards, caching)
    shards.write(args.shards, jobs)
    for number, units in enumerate(jobs):
        names = ", ".join(unit.name for unit in units)
        passes = f"{shards.cost(units, caching):.4g} block passes a step" if units else ""
        print(f"shard {number}: {names or '-'} ({passes or 'nothing to do'})")


if __name__ == "__main__":
    program.run(main)
