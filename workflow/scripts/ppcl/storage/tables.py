"""Parquet tables with a fixed schema, provenance, and no half-written or non-finite content.

The footer holds the digest of every column chunk and a seal of the footer itself, so that a reader
of some row groups and columns checks these alone, before Arrow sees them.
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ppcl import errors
from ppcl.errors import UserError
from ppcl.storage import seals, whole

PROVENANCE_KEY = b"provenance"
_DIGESTS = b"digests"  # 32 hex digits per column chunk, row group by row group
_MAGIC = b"PAR1"


class Writer:
    """Appends tables to one parquet file, each as a row group of its own."""

    def __init__(self, path: Path, sink: pq.ParquetWriter, schema: pa.Schema):
        self._path, self._sink, self._schema, self._rows = path, sink, schema, 0
        self.groups = 0

    def write(self, table: pa.Table | pd.DataFrame) -> None:
        """Casts `table` to the schema and appends it as a row group. Raises as `conform` does."""
        table = conform(table, self._schema, self._path, first_row=self._rows)
        self._sink.write_table(table, row_group_size=max(1, len(table)))
        self._rows += len(table)
        self.groups += 1


@contextmanager
def writer(path: str | Path, schema: pa.Schema, provenance: dict[str, str]) -> Iterator[Writer]:
    """Write a parquet file row group by row group; it appears at `path` only when complete."""
    path = Path(path)
    stamped = schema.with_metadata(
        {**(schema.metadata or {}), PROVENANCE_KEY: json.dumps(provenance).encode()}
    )
    with whole.writing(path) as partial:
        # lz4, as large tables are read and written several times, and zstd saves little of floats.
        with pq.ParquetWriter(
            partial, stamped, compression="lz4", use_dictionary=_repeating(schema)
        ) as sink:
            out = Writer(path, sink, stamped)
            yield out
            room = b"." * 32 * out.groups * len(schema)
            sink.add_key_value_metadata({_DIGESTS: room, seals.KEY: seals.EMPTY})
        _seal(partial, room)


def _repeating(schema: pa.Schema) -> list[str]:
    """Columns, as parquet names them, whose values come again, so that a dictionary of them makes a
    file smaller.

    Floats of 32 bits and more hardly ever do: a dictionary that is begun in vain takes time, and
    makes recorded calls half as large again. Those of 16 bits have few enough values for one.
    """
    repeating = []
    for field in schema:
        kind, name = field.type, field.name
        if isinstance(kind, pa.FixedShapeTensorType):
            kind, name = kind.value_type, f"{name}.list.element"
        if not (pa.types.is_float32(kind) or pa.types.is_float64(kind)):
            repeating.append(name)
    return repeating


def write(
    path: str | Path,
    table: pa.Table | pd.DataFrame,
    schema: pa.Schema,
    provenance: dict[str, str],
) -> None:
    """Writes a whole table as one row group, atomically. Raises as `conform` does."""
    with writer(path, schema, provenance) as sink:
        sink.write(table)


class File:
    """A parquet file of `writer`, of which any part can be read; what is read is checked first.

    Attributes:
        metadata: pyarrow's, of the whole file and its row groups.
        schema: Arrow's.
        provenance: what was stamped into it.

    Raises:
        UserError: the file, or a part that is read, is missing, truncated or was changed.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        with self._readable():
            # Opened once: another run may put a newer file in its place at any time.
            self._open = open(path, "rb")  # noqa: SIM115
            footer = _footer(self._open.fileno())
            if not seals.sealed(footer):
                raise self._damaged()
            self._file = pq.ParquetFile(self._open)
            self.metadata, self.schema = self._file.metadata, self._file.schema_arrow
            # What lies between columns and footer belongs to neither, and has no digest.
            if _end(self.metadata) != os.fstat(self._open.fileno()).st_size - 8 - len(footer):
                raise self._damaged()
        kept = self.metadata.metadata or {}
        try:
            self.provenance: dict[str, str] = json.loads(kept.get(PROVENANCE_KEY, b"{}"))
            self._digests = kept.get(_DIGESTS, b"").decode()
        except ValueError as error:
            raise self._damaged() from error

    def __len__(self) -> int:
        """The number of row groups."""
        return self.metadata.num_row_groups

    def group(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """A row group, or some columns of it."""
        self._check(range(number, number + 1), columns)
        with self._readable():
            return self._file.read_row_group(number, columns=columns)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All row groups, or some columns of them."""
        self._check(range(len(self)), columns)
        with self._readable():
            return self._file.read(columns=columns)

    def _check(self, groups: range, columns: list[str] | None) -> None:
        names = self.schema.names
        wanted = [i for i, name in enumerate(names) if columns is None or name in columns]
        with self._readable():
            for group in groups:
                for column in wanted:
                    place = 32 * (group * len(names) + column)
                    start, size = _chunk(self.metadata, group, column)
                    if (
                        seals.digest(self._open.fileno(), start, size)[:32]
                        != self._digests[place:][:32]
                    ):
                        raise self._damaged()

    def _damaged(self) -> UserError:
        return UserError(f"{self._path} {seals.DAMAGED}; {_REMAKE}")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{self._path}: no such file; run snakemake to make it") from error
        except (pa.ArrowException, OSError, ValueError) as error:  # names may be no UTF-8
            if trouble := errors.trouble(error, self._path):
                raise UserError(trouble) from error
            raise UserError(
                f"{self._path}: truncated or not parquet ({error}); {_REMAKE}"
            ) from error


def read(
    path: str | Path,
    schema: pa.Schema | None = None,
    columns: list[str] | None = None,
    where: tuple[str, Collection] | None = None,
) -> pa.Table:
    """The table at `path`; with a schema, its columns come first, further ones follow.

    Args:
        columns: only those columns are read from the file.
        where: a column and values: only rows with one of them are kept, and only row groups that
            have such rows are read, one at a time.

    Raises UserError if the file is missing, truncated or changed, or if a column of the schema is
    missing or has another type.
    """
    file = File(path)
    table = file.read(columns) if where is None else _rows_where(file, columns, *where)
    if schema is None:
        return table
    require(path, table.schema, schema)
    further = [name for name in table.column_names if name not in schema.names]
    return table.select([*schema.names, *further])


def require(path: str | Path, stored: pa.Schema, schema: pa.Schema) -> None:
    """Raises UserError if the schema `stored` in a file lacks a column of `schema`, or its type."""
    for field in schema:
        if field.name not in stored.names:
            raise UserError(f"{path}: column '{field.name}' is missing; {_REMAKE}")
        kind = stored.field(field.name).type
        if kind != field.type:
            raise UserError(f"{path}: column '{field.name}' is {kind}, not {field.type}; {_REMAKE}")


def _rows_where(file: File, columns: list[str] | None, name: str, values: Collection) -> pa.Table:
    groups = []
    for number in range(len(file)):
        wanted = [value in values for value in file.group(number, [name])[name].to_pylist()]
        if any(wanted):
            groups.append(file.group(number, columns).filter(pa.array(wanted)))
    if not groups:
        return file.schema.empty_table().select(columns or file.schema.names)
    return pa.concat_tables(groups)


def provenance(path: str | Path) -> dict[str, str]:
    """The provenance stamped into a parquet file ({} if it has none)."""
    return File(path).provenance


def conform(
    table: pa.Table | pd.DataFrame, schema: pa.Schema, path: str | Path, first_row: int = 0
) -> pa.Table:
    """`table` cast to `schema`, its columns in the schema's order.

    Args:
        path: the file, for messages.
        first_row: number of the table's first row in that file.

    Raises:
        UserError: a null, NaN or infinity in a column that does not allow it; names the first row.
        ValueError: a column is missing, or is not in the schema.
    """
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


_REMAKE = "delete it and rerun: snakemake makes it again"


def _seal(path: Path, room: bytes) -> None:
    """Writes the digests and the seal into a new file's footer, where `writer` left `room`."""
    with open(path, "rb+") as file:
        footer = _footer(file.fileno())
        metadata = pq.read_metadata(path)
        chunks = [
            seals.digest(file.fileno(), *_chunk(metadata, group, column))[:32]
            for group in range(metadata.num_row_groups)
            for column in range(metadata.num_columns)
        ]
        if 32 * len(chunks) != len(room):
            raise ValueError(f"{path}: row groups without rows, or columns with several parts")
        file.seek(-8 - len(footer), os.SEEK_END)
        # The last such text: texts of the table itself come before.
        start = footer.rindex(room)
        footer = footer[:start] + "".join(chunks).encode() + footer[start + len(room) :]
        file.write(seals.seal(footer))


def _footer(file: int) -> bytes:
    """The bytes of an open parquet file's footer."""
    size = os.fstat(file).st_size
    end = os.pread(file, 8, max(0, size - 8))
    length = int.from_bytes(end[:4], "little")
    if os.pread(file, 4, 0) != _MAGIC or end[4:] != _MAGIC or length + 12 > size:
        raise OSError("its ends are not those of a parquet file")
    return os.pread(file, length, size - 8 - length)


def _chunk(metadata: pq.FileMetaData, group: int, column: int) -> tuple[int, int]:
    """Where a column of a row group lies in the file: its first byte, and how many it has."""
    chunk = metadata.row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return start, chunk.total_compressed_size


def _end(metadata: pq.FileMetaData) -> int:
    """Where the last column ends, behind which comes the footer."""
    # Without rows, a column that has no dictionary has no bytes either, nor a place.
    for group in reversed(range(metadata.num_row_groups)):
        columns = range(metadata.num_columns)
        if end := max((sum(_chunk(metadata, group, column)) for column in columns), default=0):
            return end
    return len(_MAGIC)


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
