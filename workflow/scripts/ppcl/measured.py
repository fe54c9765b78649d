"""What earlier stages measured, as selection wants it: matrices and facts from their tables.

Needs no torch.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppcl import schemas, selection, tables
from ppcl.errors import UserError
from ppcl.plans import Matrix, Modulation
from ppcl.reasons import Width


def cka(path: Path, stream: str, depth: int) -> np.ndarray:
    """cka [first, last] of one stream (NaN where the table has no row)."""
    table = tables.read(path, schemas.CKA).to_pandas()
    rows = table[table["stream"] == stream]
    if rows.empty:
        raise UserError(
            f"{path}: no rows for similarity.streams '{stream}'; "
            f"set it to one of {', '.join(sorted(set(table['stream'])))}"
        )
    values = np.full((depth, depth), np.nan)
    values[rows["start"] + 1, rows["end"]] = rows["cka"]
    return values


def costs(path: Path | None, depth: int) -> np.ndarray:
    """velocity_error [first, last] (NaN where nobody measured)."""
    if path is None:
        raise UserError("intervals.cost is velocity: name the measured costs, --sensitivity")
    table = tables.read(path, schemas.SENSITIVITY).to_pandas()
    selection.check_depth(path, table["last"], depth)
    values = np.full((depth, depth), np.nan)
    values[table["first"], table["last"]] = table["velocity_error"]
    return values


def facts(path: Path, *names: str) -> dict:
    """Facts that an earlier stage left in the provenance of its table."""
    stamp = tables.provenance(path)
    try:
        return {name: json.loads(stamp[name]) for name in names}
    except KeyError as error:
        raise UserError(
            f"{path}: its provenance lacks {error}; delete it and activations/, and rerun"
        ) from error


def widths(path: Path, depth: int) -> list[Width]:
    """Text runs and FFNs of width/measured.parquet."""
    table = tables.read(path, schemas.WIDTH_MEASURED).to_pandas()
    table = table[table["kind"] != "modulation"]
    selection.check_depth(path, table["last"], depth)
    return [
        Width(
            row.kind,
            int(row.first),
            int(row.last),
            row.stream,
            row.fit_error_heldout,
            row.cka,
            int(row.parameters_saved),
            row.velocity_error,
        )
        for row in table.itertuples()
    ]


@dataclass(frozen=True)
class Rank:
    """A modulation at a rank: a row of width/measured.parquet; cost is its velocity error."""

    modulation: Modulation
    rank: int
    fit_error: float
    cost: float


def ranks(path: Path) -> list[Rank]:
    """Modulations of width/measured.parquet."""
    table = tables.read(path, schemas.WIDTH_MEASURED).to_pandas()
    table = table[table["kind"] == "modulation"]
    if table.empty:
        return []
    every = [Modulation(**one) for one in facts(path, "modulations")["modulations"]]
    by_key = {one.key: one for one in every}
    return [
        Rank(
            by_key[int(row.first), row.path],
            int(row.rank),
            row.fit_error_heldout,
            row.velocity_error,
        )
        for row in table.itertuples()
    ]


def rank_savings(found: Iterable[Rank]) -> dict[tuple[Matrix, int, int], int]:
    """Parameters that each saves, by how many sixths of the matrix's outputs are kept."""
    return {
        (one.modulation.key, one.rank, sixths): one.modulation.parameters(sixths=sixths)
        - one.modulation.parameters(one.rank, sixths)
        for one in found
        for sixths in (2, 3, 6)
    }
