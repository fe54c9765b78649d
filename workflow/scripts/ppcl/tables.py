"""Parquet tables with a fixed schema, provenance, and no half-written or non-finite content."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ppcl.errors import UserError

PROVENANCE_KEY = b"provenance"


class Writer:
    """Appends tables to one parquet file, each as a row group of its own."""

    def __init__(self, path: Path, sink: pq.ParquetWriter, schema: pa.Schema):
        self._path, self._sink, self._schema, self._rows = path, sink, schema, 0

    def write(self, table: pa.Table | pd.DataFrame) -> None:
        """Cast `table` to the schema, refuse missing or non-finite values, and append it.

        Raises UserError naming the file, the column and the first offending row.
        """
        table = conform(table, self._schema, self._path, first_row=self._rows)
        self._sink.write_table(table, row_group_size=max(1, len(table)))
        self._rows += len(table)


@contextmanager
def writer(path: str | Path, schema: pa.Schema, provenance: dict[str, str]) -> Iterator[Writer]:
    """Write a parquet file row group by row group; it appears at `path` only when complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    stamped = schema.with_metadata(
        {**(schema.metadata or {}), PROVENANCE_KEY: json.dumps(provenance).encode()}
    )
    try:
        with pq.ParquetWriter(partial, stamped, compression="zstd") as sink:
            yield Writer(path, sink, stamped)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(
    path: str | Path,
    table: pa.Table | pd.DataFrame,
    schema: pa.Schema,
    provenance: dict[str, str],
) -> None:
    """Write a whole table as one row group, atomically. Raises UserError as Writer.write does."""
    with writer(path, schema, provenance) as sink:
        sink.write(table)


def read(
    path: str | Path, schema: pa.Schema | None = None, columns: list[str] | None = None
) -> pa.Table:
    """The table at `path`; with a schema, its columns come first, further ones follow.

    `columns` reads only those columns from the file.

    Raises UserError if the file is missing or truncated, or lacks a column or its type.
    """
    with _readable(path):
        table = pq.read_table(path, columns=columns)
    if schema is None:
        return table
    for field in schema:
        if field.name not in table.column_names:
            raise UserError(f"{path}: column '{field.name}' is missing; {_REMAKE}")
        found = table.schema.field(field.name).type
        if found != field.type:
            raise UserError(
                f"{path}: column '{field.name}' is {found}, not {field.type}; {_REMAKE}"
            )
    further = [name for name in table.column_names if name not in schema.names]
    return table.select([*schema.names, *further])


def provenance(path: str | Path) -> dict[str, str]:
    """The provenance stamped into a parquet file ({} if it has none)."""
    with _readable(path):
        metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(PROVENANCE_KEY, b"{}"))


def conform(
    table: pa.Table | pd.DataFrame, schema: pa.Schema, path: str | Path, first_row: int = 0
) -> pa.Table:
    """`table` cast to `schema`. Raises UserError for missing columns and values, NaN and inf."""
    if isinstance(table, pd.DataFrame):
        # Column by column with from_pandas=False: otherwise NaN would silently become null.
        table = pa.table(
            {
                name: pa.array(table[name].to_numpy(), from_pandas=False)
                if table[name].dtype.kind == "f"
                else pa.array(table[name], from_pandas=True)
                for name in table.columns
            }
        )
    missing = [name for name in schema.names if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in schema.names]
    if missing or unknown:
        raise ValueError(f"{path}: missing columns {missing}, columns not in schema {unknown}")
    table = table.select(schema.names).cast(schema)
    for field in schema:
        if (field.metadata or {}).get(b"nan") == b"allowed":
            continue
        row = _first_unusable(table.column(field.name))
        if row is not None:
            raise UserError(
                f"{path}: column '{field.name}', row {first_row + row} is not a finite number or "
                f"is missing; nothing was written. Look for overflow in the stage's inputs "
                f"(float16 or bfloat16 weights, a too large learning rate)"
            )
    return table


_REMAKE = "delete the file and run snakemake again to remake it"


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; run snakemake to make it")
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: truncated or not parquet ({error}); {_REMAKE}") from error


def _first_unusable(column: pa.ChunkedArray) -> int | None:
    """The first row with a null, NaN or infinity, or None."""
    start = 0
    for chunk in (c for c in column.chunks if len(c)):
        bad = chunk.is_null().to_numpy(zero_copy_only=False)
        values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        width = 1
        while pa.types.is_fixed_size_list(values.type):
            width *= values.type.list_size
            values = values.flatten()
        if pa.types.is_floating(values.type) and len(values) == len(chunk) * width:
            finite = np.isfinite(values.to_numpy(zero_copy_only=False))
            bad = bad | ~finite.reshape(len(chunk), -1).all(axis=1)
        if bad.any():
            return start + int(bad.argmax())
        start += len(chunk)
    return None
