"""Makes the pruned model before training: the plan, and every new block's start weights.

    python workflow/scripts/prune.py --config config/digits.yaml \
        --intervals results/digits/intervals/intervals.parquet \
        --candidates results/digits/width/candidates.parquet \
        --calls results/digits/record/calls.parquet \
        --plan results/digits/prune/plan.json --students results/digits/prune/students.safetensors

The plan holds the units of the selection that are trained: all with intervals, and kept blocks
whose least-squares maps cost more than width.floor of the whole plan; training could only harm the
others, which it lists as closed. Of them it names those that distill trains: with width.schedule:
staged these are the depth students alone, whole blocks still. Narrow blocks start from least
squares on recorded calls.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.closed_forms import linear_map_candidates, linear_map_fits, linear_maps, solved
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import pins, selection_file, students
from ppcl.pruning.units import Unit, new_blocks_of, units_of
from ppcl.runtime import devices, stopping
from ppcl.search import measured
from ppcl.storage import schemas, tables, texts
from ppcl.teacher import pipelines, teacher_identity
from ppcl.transformer import blocks, calls


@dataclass(frozen=True)
class Selection:
    """What selection took.

    Attributes:
        every: all units. depth: its depth students alone.
        costs: by unit, what its closed forms cost, NaN if one is pinned and was not measured; of
            depth students there are none.
        total: what the selection costs, ranks of modulations included.
    """

    every: list[Unit]
    depth: list[Unit]
    costs: dict[str, float]
    total: float

    def trained(self, floor: float) -> list[Unit]:
        """Units with intervals, and those that cost no less than a share of the whole, or nobody
        knows what: of these there are no least-squares maps but what training starts from."""
        return [
            unit
            for unit in self.every
            if unit.removed_blocks or not self.costs[unit.name] < floor * self.total
        ]


def selected(path: Path, schema) -> pd.DataFrame:
    """The selected rows of a table of candidates."""
    table = tables.read(path, schema).to_pandas()
    return table[table["selected"]]


def selection_of(args: argparse.Namespace, unread_after: int | None) -> Selection:
    """What the tables of candidates say."""
    depth = selected(args.intervals, schemas.INTERVALS)
    intervals = [tuple(pair) for pair in depth[["first", "last"]].to_numpy().tolist()]
    total, prices = float(depth["cost"].sum()), {}  # what is not measured counts as nothing
    if args.candidates:
        narrower = selected(args.candidates, schemas.WIDTH_CANDIDATES)
        total += float(narrower["velocity_error"].sum())
        for row in narrower[narrower["kind"] != "modulation"].itertuples():
            key = (row.first, row.last if row.kind == "text" else row.stream)
            prices[key] = row.velocity_error
    runs = [key for key in prices if not isinstance(key[1], str)]
    every = units_of(intervals, runs, [key for key in prices if key not in runs], unread_after)
    costs = {
        unit.name: prices.get((unit.first, unit.last), 0.0)
        + sum(
            prices[new_block.first, stream]
            for new_block in unit.new_blocks
            for stream in new_block.linear_ffn
        )
        for unit in every
    }
    return Selection(every, units_of(intervals), costs, total)


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        reads=("intervals", "calls"),
        may_read=("candidates", "latency"),
        writes=("plan", "students"),
        students="prune/students.safetensors",
    ).parse_args()
    settings = config.load(args.config)
    options, how = settings.width, settings.prune.start

    device = devices.choose(settings.device)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, device)
    found = selection_of(args, linear_maps.unread_after(transformer))
    if found.every and found.every[-1].last >= len(blocks.block_sequence(transformer)):
        raise UserError(
            f"{args.intervals} names blocks that this teacher lacks; delete it and rerun"
        )
    units = found.trained(options.floor)
    closed = [unit for unit in found.every if unit not in units]
    distilled = found.depth if options.schedule == "staged" else units
    shared = reader, options, settings.seed, device
    made = solved.start(transformer, new_blocks_of(distilled), how, *shared)
    made = linear_map_fits.start(transformer, made, *shared)
    stamp = provenance.stamp(settings.given, units=len(units), closed=len(closed))
    depth = len(blocks.block_sequence(transformer))
    pinned, _ = pins.wishes(settings, depth)
    if closed:
        print(
            f"{len(units)} units are trained; {len(closed)} are left as least squares makes them, "
            f"since each costs less than {options.floor:g} of the selection's {found.total:.3g} "
            "(width.floor)",
            flush=True,
        )

    def entries(some: list[Unit]) -> list[dict]:
        seconds = measured.saved_seconds(some, args.latency)
        return [
            selection_file.unit_entry(
                unit,
                linear_map_candidates.saved_parameters(transformer, unit),
                saved,
                pins.holds(unit, pinned),
            )
            for unit, saved in zip(some, seconds, strict=True)
        ]

    timed = {"transformer_seconds": measured.timing(args.latency, depth)[1]} if args.latency else {}
    plan = timed | {
        "teacher": settings.teacher.path,
        "blocks": depth,
        "transformer_parameters": blocks.parameter_count(transformer),
        "start": how,
        "units": entries(units),
        "distilled": entries(distilled),
        "closed": entries(closed),
        "provenance": stamp,
    }
    stopping.ignore()
    students.save(args.students, made, stamp)
    texts.write_sealed(args.plan, plan)


if __name__ == "__main__":
    program.run(main)
