"""Bytes of weights as stored that candidates of selection save, from record/sizes.parquet.

Needs no torch.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ppcl.errors import UserError
from ppcl.pruning.quantisation import Inventory
from ppcl.pruning.units import Matrix, Modulation, Unit
from ppcl.search import measured, savings
from ppcl.search.budgets import bytes_measure
from ppcl.search.savings import Weights
from ppcl.settings import Settings
from ppcl.storage import schemas, tables
from ppcl.transformer.family import IMAGE, TEXT

Part = tuple[int, str, str]  # block, part, path


def measures(
    settings: Settings,
    path: Path | None,
    depth: int,
    modulations: Mapping[Matrix, Modulation],
    ranks: Collection[tuple[Matrix, int, int]],
) -> tuple[dict[str, Weights], dict[str, float]]:
    """By `budgets.bytes_measure`, of each that a variant's budget limits: what candidates save, and
    what the transformer has.

    Args:
        path: record/sizes.parquet.
        modulations, ranks: the matrices that may be of low rank, and (matrix, rank, sixths) on
            offer, as `measured.closed` has them.

    Raises:
        UserError: bytes are limited, and there is no table, or one of another teacher.
    """
    wanted = {each.quantise for each in settings.pruned if "gib" in each.budget}
    if not wanted:
        return {}, {}
    if path is None:
        raise UserError("variants: a budget is of gib: name the sizes of blocks, --sizes")
    parts = _read(path, depth)
    weights, totals = {}, {}
    for method in wanted:
        weights[bytes_measure(method)] = _weights(parts, depth, method, modulations, ranks)
        totals[bytes_measure(method)] = float(parts[-1, "transformer", ""].stored(method))
    return weights, totals


def _read(path: Path, depth: int) -> dict[Part, Inventory]:
    table = tables.read(path, schemas.SIZES).to_pandas()
    measured.check_depth(path, table["block"] - (table["part"] == "modulation"), depth)
    parts = {
        (row.block, row.part, row.path): Inventory(
            row.parameters,
            row.kept,
            row.values,
            row.rows,
            row.matrices,
            row.matrix_bytes,
            row.row_bytes,
        )
        for row in table.itertuples()
    }
    if (-1, "transformer", "") not in parts or (depth - 1, "block", "") not in parts:
        raise UserError(f"{path} lacks sizes of this teacher; delete it and rerun")
    return parts


def _weights(
    parts: Mapping[Part, Inventory],
    depth: int,
    method: str | None,
    modulations: Mapping[Matrix, Modulation],
    ranks: Collection[tuple[Matrix, int, int]],
) -> Weights:
    def per_block(part: str) -> list[float]:
        every = (parts.get((block, part, ""), Inventory()) for block in range(depth))
        return [float(one.stored(method)) for one in every]

    return Weights(
        per_block("block"),
        per_block("text"),
        per_block("text_output"),
        {
            (block, stream): float(parts[block, f"ffn_{stream}", ""].stored(method))
            for block in range(depth)
            for stream in (IMAGE, TEXT)
            if (block, f"ffn_{stream}", "") in parts
        },
        {
            (matrix, rank, sixths): _saved(
                modulations[matrix],
                parts[matrix[0], "modulation", matrix[1]],
                rank,
                sixths,
                method,
            )
            for matrix, rank, sixths in ranks
        },
        source=dict(enumerate(per_block("text_lent"))),
    )


def _saved(
    matrix: Modulation, whole: Inventory, rank: int, sixths: int, method: str | None
) -> float:
    """Bytes that a rank saves, with so many sixths of a matrix's outputs kept either way. Products
    are not quantised."""
    outputs = matrix.outputs * sixths // 6
    size = whole.stored(None) // whole.parameters
    before = Inventory(0, size * matrix.parameters(sixths=sixths))
    if whole.matrices:
        values = outputs * matrix.inputs
        before = Inventory(
            kept=size * matrix.bias * outputs,
            values=values,
            rows=outputs,
            matrices=1,
            matrix_bytes=size * values,
            row_bytes=size * outputs,
        )
    return float(before.stored(method) - size * matrix.parameters(rank, sixths))


def with_units(weights: Weights, units: Iterable[Unit], unread: int | None) -> Weights:
    """With what each trained unit saves, by its name: the sum of what its parts do."""
    saving = {
        unit.name: savings.saved(
            [new_block.ends for new_block in unit.new_blocks if new_block.last > new_block.first],
            [(unit.first, unit.last)] if len(unit.new_blocks) > 1 else [],
            [
                (new_block.first, stream)
                for new_block in unit.new_blocks
                for stream in new_block.linear_ffn
            ],
            weights,
            unread,
        )
        for unit in units
    }
    return replace(weights, units=saving)
