"""What earlier stages measured, as selection wants it: matrices and facts from their tables.

Needs no torch.
"""

import json
from pathlib import Path

import numpy as np

from ppcl import schemas, selection, tables
from ppcl.errors import UserError
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
    """The rows of width/measured.parquet."""
    table = tables.read(path, schemas.WIDTH_MEASURED).to_pandas()
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
