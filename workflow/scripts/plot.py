"""Draw the figures of a run from its parquet files (no model, no torch).

    plot.py quality --config config/digits.yaml --figures tradeoff \
        --metrics results/digits/evaluation/metrics.parquet --output plots

What there is to draw, and from which tables, is in ppcl/figures/catalogue.py.

Each figure is written as SVG and PNG to --output; the same tables give the same files.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ppcl import program
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.figures import catalogue, style
from ppcl.figures.run_tables import TABLES, RunTables
from ppcl.storage import tables


def origin(path: Path) -> str:
    """Where a figure comes from, for its metadata: its table's provenance but for the time."""
    stamps = tables.provenance(path)
    return json.dumps({k: v for k, v in sorted(stamps.items()) if k != "created"})


def draw(group: str, run: RunTables, wanted: Sequence[str] | None, output: Path) -> None:
    """Write figures of a group to the folder `output`, once all are drawn.

    wanted: their names; None: all whose tables are there.

    Raises:
        UserError: a wanted figure lacks a table, or another error of reading one.
    """
    drawn: dict[str, tuple[Figure, str]] = {}
    for entry in catalogue.of_group(group):
        missing = [name for name in entry.tables if name not in run]
        if wanted is None and missing or wanted is not None and entry.name not in wanted:
            continue
        if missing:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise UserError(f"figure {entry.name}: name the tables {options}")
        drawn[entry.name] = entry.draw(run), origin(run.file(entry.tables[0]))
    for name, (figure, source) in drawn.items():
        style.save(figure, output / name, source)


def arguments() -> argparse.Namespace:
    """The command line, of one group of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = parser.add_subparsers(required=True, dest="group", metavar="GROUP")
    for name, about in catalogue.GROUPS.items():
        group = groups.add_parser(name, help=about, description=about)
        group.add_argument("--config", required=True, help="config file, or JSON")
        entries = catalogue.of_group(name)
        names = [entry.name for entry in entries]
        group.add_argument(
            "--figures", nargs="*", choices=names, help="default: all whose tables are given"
        )
        for table in dict.fromkeys(table for entry in entries for table in entry.tables):
            several = "<variant>" in TABLES[table]
            group.add_argument(
                f"--{table.replace('_', '-')}",
                type=Path,
                nargs="*" if several else 1,
                default=[],
                metavar="PARQUET",
                help=TABLES[table] + (", of each variant" if several else ""),
            )
        group.add_argument("--output", type=Path, required=True, help="folder of the figures")
    return parser.parse_args()


def main() -> None:
    """Parse the command line and draw one group of figures."""
    options = arguments()
    paths = {name: getattr(options, name, []) for name in TABLES}
    run = RunTables(paths, config.load(options.config))
    draw(options.group, run, options.figures, options.output)


if __name__ == "__main__":
    program.run(main)
