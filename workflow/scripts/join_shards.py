"""Joins what the shards of distill left: the same files as distill leaves when it is one job.

python workflow/scripts/join_shards.py --config config/mine.yaml \
    --selection results/mine/prune/selection.json \
    --students results/mine/distill/shards/*.safetensors \
    --logs results/mine/distill/shards/*-log.parquet \
    --costs results/mine/distill/shards/*-unit_costs.parquet \
    --output results/mine/distill/students.safetensors \
    --log-table results/mine/distill/log.parquet \
    --unit-costs results/mine/distill/unit_costs.parquet

Files are given in the order of the shards, which is that of depth.
"""

from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import selection_file
from ppcl.runtime import stopping
from ppcl.storage import schemas, tables, tensors


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        reads=("selection",),
        writes=("output", "log_table", "unit_costs"),
        output="distill/students.safetensors",
        log_table="distill/log.parquet",
        unit_costs="distill/unit_costs.parquet",
    )
    for name in ("students", "logs", "costs"):
        parser.add_argument(
            f"--{name}", type=Path, nargs="+", required=True, help="input: one file of each shard"
        )
    args = parser.parse_args()
    settings = config.load(args.config)

    costs = _joined(args.costs, schemas.UNIT_COSTS)
    wanted = [unit.name for unit in selection_file.read(args.selection).distilled]
    if costs["unit"].tolist() != wanted:
        raise UserError(
            f"{args.costs[0].parent}: the shards hold units {', '.join(costs['unit'])}, but "
            f"{args.selection} has {', '.join(wanted)}; delete that folder and rerun"
        )
    # One job logs a step's students in order of depth, then the next step's.
    log = _joined(args.logs, schemas.DISTILL_LOG).sort_values("step", kind="stable")
    state = {key: value for path in args.students for key, value in tensors.read(path)[0].items()}
    stamp = provenance.stamp(settings.given, rows=tables.provenance(args.costs[0])["rows"])
    stopping.ignore()
    tensors.write(args.output, state, stamp)
    tables.write(args.log_table, log, schemas.DISTILL_LOG, stamp)
    tables.write(args.unit_costs, costs, schemas.UNIT_COSTS, stamp)


def _joined(paths: list[Path], schema) -> pd.DataFrame:
    shards = [tables.read(path, schema).to_pandas() for path in paths]
    return pd.concat(shards, ignore_index=True)


if __name__ == "__main__":
    program.run(main)
