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
    parser = program.parser(__doc__)
    groups = parser.add_subparsers(required=True, dest="group", metavar="GROUP")
    for name, about in catalogue.GROUPS.items():
        group = groups.add_parser(name, help=about, description=about)
        entries = catalogue.of_group(name)
        given = {table: TABLES[table] for entry in entries for table in entry.tables}
        several = [table for table in given if "<variant>" in given[table]]
        program.add_options(
            group,
            "config",
            may_read=[table for table in given if table not in several],
            writes=("output",),
            **given | {"output": "folder of the figures"},
        )
        for table in several:
            about = f"input, optional: {given[table]}, of each variant"
            option = f"--{table.replace('_', '-')}"
            group.add_argument(option, type=Path, nargs="*", metavar="FILE", help=about)
        names = [entry.name for entry in entries]
        about = "which; default: all whose tables are given"
        group.add_argument("--figures", nargs="*", choices=names, help=about)
    return parser.parse_args()


def main() -> None:
    """Parse the command line and draw one group of figures."""
    options = vars(arguments())
    given = {name: options.get(name) or [] for name in TABLES}
    paths = {name: files if isinstance(files, list) else [files] for name, files in given.items()}
    run = RunTables(paths, config.load(options["config"]))
    draw(options["group"], run, options["figures"], options["output"])


if __name__ == "__main__":
    program.run(main)
