"""What earlier stages measured, as selection wants it: matrices and facts from their tables.

Needs no torch.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppcl.errors import UserError
from ppcl.pruning.constraints import Ends, Ffn
from ppcl.pruning.units import Matrix, Modulation, Unit
from ppcl.search import savings
from ppcl.search.savings import Weights
from ppcl.storage import schemas, seals, tables
from ppcl.transformer.family import IMAGE, JOINT, TEXT


def cka(path: Path, stream: str, depth: int) -> np.ndarray:
    """cka [first, last] of one stream (NaN where the table has no row)."""
    table = tables.read(path, schemas.CKA).to_pandas()
    rows = table[table["stream"] == stream]
    if rows.empty:
        raise UserError(
            f"{path}: no rows for similarity.streams '{stream}'; "
            f"set it to one of {', '.join(sorted(set(table['stream'])))}"
        )
    check_depth(path, rows["end"], depth)
    values = np.full((depth, depth), np.nan)
    values[rows["start"] + 1, rows["end"]] = rows["cka"]
    return values


def costs(path: Path | None, depth: int) -> np.ndarray:
    """velocity_error [first, last] (NaN where nobody measured)."""
    if path is None:
        raise UserError("intervals.cost is velocity: name the measured costs, --sensitivity")
    table = tables.read(path, schemas.SENSITIVITY).to_pandas()
    check_depth(path, table["last"], depth)
    values = np.full((depth, depth), np.nan)
    values[table["first"], table["last"]] = table["velocity_error"]
    return values


def influences(path: Path | None, stream: str, depth: int) -> np.ndarray:
    """Block influence of every block [depth] in one stream (NaN where it passes none), as the probe
    stage measured it. Blocks of a joint sequence count for image and text; `mean` takes the mean
    over streams."""
    if path is None:
        raise UserError("intervals.cost is influence: name the probes' table, --probes")
    table = tables.read(path, schemas.PROBES).to_pandas()
    wanted = table["stream"].isin([stream, JOINT]) | (stream == "mean")
    means = table[wanted].groupby("block")["influence"].mean()
    return means.reindex(range(depth)).to_numpy()


def facts(path: Path, *names: str) -> dict:
    """Facts that an earlier stage left in the provenance of its table."""
    stamp = tables.provenance(path)
    try:
        return {name: json.loads(stamp[name]) for name in names}
    except KeyError as error:
        raise UserError(f"{path}: its provenance lacks {error}; {seals.REMAKE}") from error


@dataclass(frozen=True)
class ClosedForm:
    """A row of width/measured.parquet, whose columns schemas.WIDTH_MEASURED explains.

    Attributes:
        saved: parameters.
        cost: its velocity error; NaN if nobody measured it.
    """

    kind: str
    first: int
    last: int
    stream: str
    fit_error: float
    cka: float
    saved: int
    cost: float
    path: str = ""
    rank: int = 0

    @property
    def ends(self) -> Ends:
        return self.first, self.last

    @property
    def ffn(self) -> Ffn:
        return self.first, self.stream

    @property
    def matrix(self) -> Matrix:
        return self.first, self.path


def closed_forms(path: Path, depth: int) -> list[ClosedForm]:
    """The rows of width/measured.parquet."""
    table = tables.read(path, schemas.WIDTH_MEASURED).to_pandas()
    # The last modulation's block is the number of blocks.
    low_rank = table["kind"] == "modulation"
    check_depth(path, table["last"] - low_rank, depth)
    return [
        ClosedForm(
            row.kind,
            int(row.first),
            int(row.last),
            row.stream,
            row.fit_error_heldout,
            row.cka,
            int(row.parameters_saved),
            row.velocity_error,
            row.path,
            int(row.rank),
        )
        for row in table.itertuples()
    ]


@dataclass(frozen=True)
class ClosedForms:
    """Closed forms, as the `width` stage left them in its table.

    Attributes:
        rows: those of the table.
        modulations: of every matrix of which there are rows.
        weights: parameters that each saves, those of whole blocks among them.
        unread: the block after which nothing reads the text stream, if there is one.
    """

    rows: list[ClosedForm]
    modulations: dict[Matrix, Modulation]
    weights: Weights
    unread: int | None


def closed(
    path: Path | None, block_parameters: Sequence[int], kinds: Collection[str]
) -> ClosedForms:
    """Closed forms of some kinds (text, ffn, modulation) at their prices.

    path: width/measured.parquet; without, there are none.
    """
    depth = len(block_parameters)
    if path is None:
        return ClosedForms([], {}, Weights(block_parameters, [0] * depth, [0] * depth), None)
    names = "text_saved", "text_output", "text_lent", "unread", "modulations"
    known = facts(path, *names)
    rows = [row for row in closed_forms(path, depth) if row.kind in kinds]
    every = {one.key: one for one in (Modulation(**kept) for kept in known["modulations"])}
    ranks = [(one.matrix, one.rank) for one in rows if one.kind == "modulation"]
    weights = Weights(
        block_parameters,
        known["text_saved"],
        known["text_output"],
        {row.ffn: row.saved for row in rows if row.kind == "ffn"},
        {
            (matrix, rank, sixths): every[matrix].saved(rank, sixths)
            for matrix, rank in ranks
            for sixths in every[matrix].shares
        },
        source=dict(enumerate(known["text_lent"])),
    )
    return ClosedForms(rows, {m: every[m] for m, _ in ranks}, weights, known["unread"])


def timing(path: Path, depth: int) -> tuple[Weights, float]:
    """Seconds per call that can be saved, and those of the whole transformer, as `latency` timed
    them. The map at the end of a text run counts as 0 s."""
    table = tables.read(path, schemas.LATENCY).to_pandas()
    check_depth(path, table["block"], depth)
    seconds = {(row.part, row.block): row.seconds for row in table.itertuples()}

    def per_block(part: str) -> list[float]:
        return [seconds.get((part, block), 0.0) for block in range(depth)]

    ffns = {
        (block, stream): seconds[f"ffn_{stream}", block]
        for stream in (IMAGE, TEXT)
        for block in range(depth)
        if (f"ffn_{stream}", block) in seconds
    }
    try:
        whole = float(tables.provenance(path)["transformer_seconds"])
    except KeyError as error:
        raise UserError(f"{path}: its provenance lacks {error}; delete it and rerun") from error
    return Weights(per_block("block"), per_block(TEXT), [0.0] * depth, ffns), whole


def saved_seconds(units: Iterable[Unit], path: Path | None) -> list[float]:
    """Seconds per call that each unit saves, from `latency`'s table; NaN without one."""
    units = list(units)
    if path is None:
        return [math.nan] * len(units)
    depth = 1 + int(tables.read(path, schemas.LATENCY)["block"].to_numpy().max())
    weights, _ = timing(path, depth)
    return [
        savings.saved(
            [new_block.ends for new_block in unit.new_blocks if new_block.last > new_block.first],
            [(unit.first, unit.last)] if len(unit.new_blocks) > 1 else [],
            [
                (new_block.first, stream)
                for new_block in unit.new_blocks
                for stream in new_block.linear_ffn
            ],
            weights,
        )
        for unit in units
    ]


def check_depth(path: Path, blocks: Iterable[int], depth: int) -> None:
    """Raises UserError if a table names blocks that a teacher of this depth lacks."""
    if max(blocks, default=0) >= depth:
        raise UserError(f"{path} names blocks that this teacher lacks; delete it and rerun")


def unit_errors(path: Path) -> dict[str, float]:
    """Velocity error of the teacher with each unit alone, by its name, from unit_costs.parquet."""
    table = tables.read(path, schemas.UNIT_COSTS)
    return dict(zip(table["unit"].to_pylist(), table["velocity_error"].to_pylist(), strict=True))
