"""What of a selection is trained, and what selection.json says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from torch import nn

from ppcl.closed_forms import linear_map_candidates
from ppcl.errors import UserError
from ppcl.pruning import constraints, selection_file
from ppcl.pruning.units import Unit, units_of
from ppcl.search import measured
from ppcl.settings import Settings, WidthSettings
from ppcl.storage import schemas, tables
from ppcl.transformer import blocks


@dataclass(frozen=True)
class Selected:
    """What selection took.

    Attributes:
        every: all units.
        depth: units of the intervals alone, without text runs and linear FFNs.
        costs: name of a unit -> summed cost of its closed forms: 0 if it has none, NaN if one is
            required and was not measured.
        total: what the selection costs, ranks of modulations included.
    """

    every: list[Unit]
    depth: list[Unit]
    costs: dict[str, float]
    total: float

    def trained(self, floor: float) -> list[Unit]:
        """The units to train: those with intervals, those whose closed forms cost at least `floor`
        of the total, and those of unknown cost (NaN), which have no measured maps to be left with.
        """
        return [
            unit
            for unit in self.every
            if unit.removed_blocks or not self.costs[unit.name] < floor * self.total
        ]

    def refuse_beyond(self, transformer: nn.Module, path: Path) -> None:
        """Raises UserError if there are units of blocks that the teacher lacks.

        path: of the table of intervals.
        """
        if self.every and self.every[-1].last >= len(blocks.block_sequence(transformer)):
            raise UserError(f"{path} names blocks that this teacher lacks; delete it and rerun")


def selected(
    intervals_table: Path, candidates_table: Path | None, unread_after: int | None
) -> Selected:
    """The selection, from the selected rows of the tables of candidates.

    Args:
        intervals_table: intervals/intervals.parquet.
        candidates_table: width/candidates.parquet, if closed forms were searched.
        unread_after: from `linear_maps.unread_after`.
    """
    depth = _selected_rows(intervals_table, schemas.INTERVALS)
    intervals = [tuple(pair) for pair in depth[["first", "last"]].to_numpy().tolist()]
    total, prices = float(depth["cost"].sum()), {}  # what is not measured counts as nothing
    if candidates_table:
        narrower = _selected_rows(candidates_table, schemas.WIDTH_CANDIDATES)
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
    return Selected(every, units_of(intervals), costs, total)


def _selected_rows(path: Path, schema: pa.Schema) -> pd.DataFrame:
    """The selected rows of a table of candidates."""
    table = tables.read(path, schema).to_pandas()
    return table[table["selected"]]


@dataclass(frozen=True)
class TrainingPlan:
    """Which units of a selection are trained.

    Attributes:
        units: those that are trained.
        distilled: those that the stage `distill` trains.
        closed: those that are left as least squares makes them.
    """

    units: list[Unit]
    distilled: list[Unit]
    closed: list[Unit]

    @classmethod
    def of(cls, taken: Selected, options: WidthSettings) -> "TrainingPlan":
        """Decides it, and prints how many units are left as least squares makes them.

        Args:
            options: floor, schedule.
        """
        trained = taken.trained(options.floor)
        closed = [unit for unit in taken.every if unit not in trained]
        if closed:
            print(
                f"{len(trained)} units are trained; {len(closed)} are left as least squares makes "
                f"them, since each costs less than {options.floor:g} of the selection's "
                f"{taken.total:.3g} (width.floor)",
                flush=True,
            )
        return cls(trained, taken.depth if options.schedule == "staged" else trained, closed)

    def facts(
        self, transformer: nn.Module, settings: Settings, latency: Path | None
    ) -> dict[str, Any]:
        """The content of selection.json without its provenance.

        Args:
            settings: teacher, prune, and what is required.
            latency: table of measured times, if there is a latency budget.
        """
        depth = len(blocks.block_sequence(transformer))
        required, _ = constraints.of_config(settings, depth)

        def entries(some: Sequence[Unit]) -> list[dict]:
            seconds = measured.saved_seconds(some, latency)
            return [
                selection_file.unit_entry(
                    unit,
                    linear_map_candidates.saved_parameters(transformer, unit),
                    saved,
                    constraints.holds(unit, required),
                )
                for unit, saved in zip(some, seconds, strict=True)
            ]

        timed = {"transformer_seconds": measured.timing(latency, depth)[1]} if latency else {}
        return timed | {
            "teacher": settings.teacher.path,
            "blocks": depth,
            "transformer_parameters": blocks.parameter_count(transformer),
            "start": settings.prune.start,
            "units": entries(self.units),
            "distilled": entries(self.distilled),
            "closed": entries(self.closed),
        }
