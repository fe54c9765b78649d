"""Recorded calls as tables, and the file that holds them, calls.parquet.

A row is one sample of one call: its tensors, its other arguments, the transformer's answer (the
velocity or noise prediction), and the denoising step, guidance branch and noise level of the call.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.storage import schemas, tables
from ppcl.transformer import call_arguments
from ppcl.transformer.call_arguments import Samples
from ppcl.transformer.call_columns import CallColumn, Held

OUTPUT = "output"


def to_tables(
    arguments: dict[str, Any],
    output: Tensor,
    rows: dict[str, list],
    shared: tuple[str, ...] = (),
    batch_dims: Mapping[str, int] | None = None,
) -> list[pa.Table]:
    """A batched call as tables, one row per sample; samples with tensors of the same shapes are in
    one table.

    Args:
        arguments: of the transformer, by name.
        output: the transformer's answer [batch, ...].
        rows: column of schemas.CALLS -> a value per sample, for all columns but `arguments`.
        shared: arguments that have no batch dimension.
        batch_dims: argument -> its batch dimension, if not the first.

    Raises:
        UserError: an argument can't be stored, or holds NaN or infinity.
    """
    split = call_arguments.split(arguments, len(output), shared, batch_dims)
    cut = split.cut | {OUTPUT: Samples(list(output.detach().cpu()))}
    groups: dict[tuple, list[int]] = {}
    for sample in range(len(output)):
        shapes = tuple((name, each.tensors[sample].shape) for name, each in cut.items())
        groups.setdefault(shapes, []).append(sample)
    every = []
    for members in groups.values():
        table = {name: pa.array([values[i] for i in members]) for name, values in rows.items()}
        texts = [json.dumps(split.other[i], sort_keys=True) for i in members]
        table["arguments"] = pa.array(texts)
        for name, each in cut.items():
            stacked = torch.stack([each.tensors[i] for i in members])
            column = _column(name, stacked, each.held, each.batch_dim)
            table[column.name] = column.to_arrow(stacked)
        for name, tensor in split.whole.items():
            column = _column(name, tensor[None], Held.SHARED)
            value = column.to_arrow(tensor[None])
            table[column.name] = pa.concat_arrays([value, _nulls(value.type, len(members) - 1)])
        every.append(pa.table(table))
    return every


def _column(argument: str, rows: Tensor, held: Held, batch_dim: int = 0) -> CallColumn:
    """The column for an argument's values [rows, ...].

    Raises:
        UserError: they hold NaN or infinity, or no column can hold them.
    """
    if rows.is_floating_point() and not torch.isfinite(rows).all():
        raise UserError(
            f"the transformer's '{argument}' holds NaN or infinity while recording; the teacher is "
            "numerically broken in this dtype: set teacher.dtype: bfloat16 or float32"
        )
    try:
        return CallColumn(argument, tuple(rows.shape[1:]), rows.dtype, held, batch_dim)
    except ValueError as error:
        raise UserError(
            f"the pipeline calls its transformer in a way that can't be recorded yet: {error}"
        ) from error


def write(
    path: Path,
    file_schemas: Iterable[pa.Schema],
    every: Iterable[pa.Table],
    provenance: dict[str, str],
    plain: pa.Schema = schemas.CALLS,
) -> None:
    """Writes calls.parquet, with a row group per table.

    Args:
        file_schemas: of all tables. The file has the tensor columns of each; a table that lacks one
            gets nulls there.
        every: the tables, each with all columns of `plain`.
        plain: the columns that are not tensors.
    """
    extra = {
        field.name: pa.field(field.name, field.type, metadata={b"nan": b"allowed"})
        for schema in file_schemas
        for field in schema
        if field.name not in plain.names
    }
    schema = pa.schema([*plain, *(extra[name] for name in sorted(extra))])
    with tables.writer(path, schema, provenance) as out:
        for table in every:
            for field in schema:
                if field.name not in table.column_names:
                    table = table.append_column(field, _nulls(field.type, len(table)))
            out.write(table)


def merge(
    parts: list[Path],
    path: Path,
    provenance: dict[str, str],
    plain: pa.Schema = schemas.CALLS,
) -> None:
    """Joins files of recorded calls, one row group in memory at a time; `plain` as in `write`."""
    files = [tables.File(part) for part in parts]
    groups = (file.group(number) for file in files for number in range(len(file)))
    write(path, [file.schema for file in files], groups, provenance, plain)


def _nulls(kind: pa.DataType, length: int) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.nulls(length, kind.storage_type))
