"""The transformer's own calls: recorded while the stock pipeline runs, stored, read, replayed.

A recorded row is one sample of one call: its tensors, its other arguments, the transformer's answer
(the velocity or noise prediction), and where in the sampling it happened. Replaying a batch of rows
needs neither text encoder nor scheduler, and works for any family.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ppcl import schemas, tables
from ppcl.errors import UserError

# Arrow has no bfloat16 and its booleans are bits: both are stored as integers of the same bytes.
_STORED_AS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}
_ARROW = {
    torch.float32: pa.float32(),
    torch.float64: pa.float64(),
    torch.float16: pa.float16(),
    torch.int64: pa.int64(),
    torch.int32: pa.int32(),
    torch.int16: pa.int16(),
    torch.uint8: pa.uint8(),
}
OUTPUT = "output"


@dataclass
class Batch:
    """Recorded calls that can be replayed together.

    Attributes:
        arguments: keyword arguments of the transformer, batched.
        output: the transformer's recorded answer [batch, ...].
        rows: per sample: sample, prompt, step, branch, sigma, timestep, kind, heldout.
        numbers: the samples' row numbers in the file.
    """

    arguments: dict[str, Any]
    output: Tensor
    rows: dict[str, np.ndarray]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.output)

    def to_float32(self) -> "Batch":
        """The batch for a float32 model, whatever the dtype of the teacher that was recorded."""
        arguments = {k: as_float32(v) for k, v in self.arguments.items()}
        return Batch(arguments, self.output.float(), self.rows, self.numbers)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        return Batch(moved, self.output.to(device), self.rows, self.numbers)


def as_float32(value: Any) -> Any:
    """A floating-point tensor in float32; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value


# ---- one call to rows


def split_arguments(arguments: dict[str, Any], batch: int, shared: tuple[str, ...]):
    """Sorts a call's arguments into (tensors per sample, shared tensors, other values per sample).

    A tensor whose leading dimension is the batch is cut into samples unless the family calls it
    shared; a list as long as the batch is cut as well; None and `return_dict` are dropped.

    Raises:
        UserError: an argument holds tensors inside a list or a mapping.
    """
    cut, whole, other = {}, {}, [{} for _ in range(batch)]
    for name, value in arguments.items():
        if value is None or name == "return_dict":
            continue
        if isinstance(value, Tensor):
            if name not in shared and value.ndim > 0 and value.shape[0] == batch:
                cut[name] = value.detach().cpu()
            else:
                whole[name] = value.detach().cpu()
        elif isinstance(value, list) and len(value) == batch:
            for row, item in zip(other, value, strict=True):
                row[name] = {"each": _encode(item, name)}
        else:
            for row in other:
                row[name] = {"all": _encode(value, name)}
    return cut, whole, other


def _encode(value: Any, name: str) -> Any:
    """JSON that keeps tuples apart from lists."""
    if isinstance(value, (list, tuple)):
        items = [_encode(v, name) for v in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"mapping": {k: _encode(v, name) for k, v in value.items()}}
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    raise UserError(
        f"the pipeline passes a {type(value).__name__} inside the transformer argument '{name}'; "
        "such calls can't be recorded yet"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_decode(v) for v in value["tuple"])
        return {k: _decode(v) for k, v in value["mapping"].items()}
    return value


def to_table(
    arguments: dict[str, Any], output: Tensor, rows: dict[str, list], shared: tuple[str, ...]
) -> pa.Table:
    """A batched call as a table, one row per sample.

    A tensor argument becomes a column `<argument>/<shape>/<dtype>` of Arrow's fixed-shape tensors;
    shared ones get a leading `=` and are repeated. The shape is in the name because a prompt's
    length varies: a row fills the column of its shape and leaves the others null.
    """
    cut, whole, other = split_arguments(arguments, len(output), shared)
    columns = {name: pa.array(values) for name, values in rows.items()}
    columns["arguments"] = pa.array([json.dumps(o, sort_keys=True) for o in other])
    for name, tensor in (cut | {OUTPUT: output.detach().cpu()}).items():
        key, column = _tensor_column(name, tensor)
        columns[key] = column
    for name, tensor in whole.items():
        key, column = _tensor_column(f"={name}", tensor.expand(len(output), *tensor.shape))
        columns[key] = column
    return pa.table(columns)


def _tensor_column(name: str, tensor: Tensor) -> tuple[str, pa.Array]:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(
            f"the transformer's '{name}' holds NaN or infinity while recording; the teacher is "
            "numerically broken in this dtype: set teacher.dtype: bfloat16 or float32"
        )
    stored = tensor.view(_STORED_AS[tensor.dtype]) if tensor.dtype in _STORED_AS else tensor
    shape = list(tensor.shape[1:])
    kind = pa.fixed_shape_tensor(_ARROW[stored.dtype], shape)
    flat = pa.array(stored.contiguous().numpy().ravel())
    size = int(np.prod(shape, dtype=int))
    storage = pa.FixedSizeListArray.from_arrays(flat, size)
    key = "/".join((name, "x".join(map(str, shape)), str(tensor.dtype).removeprefix("torch.")))
    return key, pa.ExtensionArray.from_storage(kind, storage)


def write(
    path: Path, schemas_: Iterable[pa.Schema], found: Iterable[pa.Table], provenance: dict[str, str]
) -> None:
    """Writes calls to one file, a row group each; the file has the tensor columns of all schemas.

    A row that lacks a tensor column gets null there.
    """
    extra = {
        field.name: pa.field(field.name, field.type, metadata={b"nan": b"allowed"})
        for schema in schemas_
        for field in schema
        if field.name not in schemas.CALLS.names
    }
    schema = pa.schema([*schemas.CALLS, *(extra[name] for name in sorted(extra))])
    with tables.writer(path, schema, provenance) as out:
        for table in found:
            for field in schema:
                if field.name not in table.column_names:
                    table = table.append_column(field, _nulls(field.type, len(table)))
            out.write(table)


def merge(parts: list[Path], path: Path, provenance: dict[str, str]) -> None:
    """Joins files of recorded calls, one row group in memory at a time."""
    files = [pq.ParquetFile(part) for part in parts]
    groups = (f.read_row_group(g) for f in files for g in range(f.num_row_groups))
    write(path, [f.schema_arrow for f in files], groups, provenance)


def _nulls(kind: pa.DataType, length: int) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.nulls(length, kind.storage_type))


# ---- rows to batches


class Reader:
    """Reads recorded calls by row group, keeping recently used ones decoded in memory.

    Args:
        path: calls.parquet.
        memory: bytes of decoded row groups to keep; a set that fits is read from disk once.

    Attributes:
        index: per row, in file order: sample, step, branch, sigma, timestep, kind, heldout, ...
        buckets: rows that can be batched together (same tensor shapes, same shared arguments).
        provenance: the file's.
    """

    def __init__(self, path: str | Path, memory: int = 4 << 30):
        self.path, self._memory = Path(path), memory
        self.provenance = tables.provenance(path)
        table = tables.read(path, schemas.CALLS, columns=schemas.CALLS.names)
        self.index = {
            name: table.column(name).to_numpy(zero_copy_only=False) for name in schemas.CALLS.names
        }
        self._file = pq.ParquetFile(path)
        sizes = [
            self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)
        ]
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._groups: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._held = 0
        self._tensor_columns = [
            f.name for f in self._file.schema_arrow if f.name not in schemas.CALLS.names
        ]
        self.buckets = self._find_buckets()

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows(self, heldout: bool | None = None, kinds: tuple[str, ...] = ()) -> np.ndarray:
        """Row numbers of one split (None: both) and, if given, of some kinds."""
        keep = np.ones(len(self), bool)
        if heldout is not None:
            keep &= self.index["heldout"] == heldout
        if kinds:
            keep &= np.isin(self.index["kind"], kinds)
        return np.flatnonzero(keep)

    def heldout_rows(self, purpose: str) -> np.ndarray:
        """Held-out rows to `select` by, or to `report` on: every other prompt each.

        What chose the intervals and students would flatter them if it also judged the result.
        """
        rows = self.rows(heldout=True)
        prompts = self.index["prompt"][rows]
        second = np.isin(prompts, np.unique(prompts)[1::2])
        return rows[second if purpose == "report" and second.any() else ~second]

    def sample_heldout(self, purpose: str, count: int, seed: int) -> np.ndarray:
        """Up to `count` random ones of `heldout_rows(purpose)`; the same for the same seed."""
        return np.random.default_rng(seed).permutation(self.heldout_rows(purpose))[:count]

    def draw(self, rows: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
        """`size` random rows that fit in one batch; a pure function of its arguments.

        The bucket is drawn in proportion to its share of `rows`, so every row is equally likely.
        """
        rng = np.random.default_rng(seed)
        bucket = self._bucket_of[rng.choice(rows)]
        choices = rows[self._bucket_of[rows] == bucket]
        return rng.choice(choices, size=size, replace=len(choices) < size)

    def batches(self, rows: np.ndarray, size: int) -> Iterator["Batch"]:
        """All of `rows`, in batches of at most `size`, bucket by bucket."""
        for bucket in np.unique(self._bucket_of[rows]):
            members = rows[self._bucket_of[rows] == bucket]
            for start in range(0, len(members), size):
                yield self.batch(members[start : start + size])

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows of one bucket as a batch on the CPU."""
        picked: dict[str, list[Tensor]] = {}
        for row in rows:
            group = int(np.searchsorted(self._first, row, side="right")) - 1
            for name, values in self._group(group).items():
                picked.setdefault(name, []).append(values[row - self._first[group]])
        arguments: dict[str, Any] = {}
        for key, values in picked.items():
            name = key.split("/")[0]
            arguments[name.lstrip("=")] = values[0] if name.startswith("=") else torch.stack(values)
        output = arguments.pop(OUTPUT)
        encoded = [json.loads(self.index["arguments"][row]) for row in rows]
        for name, value in encoded[0].items():
            if "all" in value:
                arguments[name] = _decode(value["all"])
            else:
                arguments[name] = [_decode(e[name]["each"]) for e in encoded]
        meta = {k: v[rows] for k, v in self.index.items() if k != "arguments"}
        return Batch(arguments | {"return_dict": False}, output, meta, np.asarray(rows))

    def _group(self, group: int) -> dict[str, Tensor]:
        """Decoded tensor columns of a row group (least recently used ones are forgotten)."""
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        table = self._file.read_row_group(group, columns=self._present(group))
        found = {}
        for name in table.column_names:
            found[name] = _decode_column(table.column(name).combine_chunks(), name)
        self._groups[group] = found
        self._held += sum(t.nbytes for t in found.values())
        while self._held > self._memory and len(self._groups) > 1:
            _, old = self._groups.popitem(last=False)
            self._held -= sum(t.nbytes for t in old.values())
        return found

    def _present(self, group: int) -> list[str]:
        """Tensor columns of a row group that hold values (a group is one call: all rows alike)."""
        metadata = self._file.metadata.row_group(group)
        names = set()
        for i in range(metadata.num_columns):
            column = metadata.column(i)
            values = column.statistics
            if values is None or values.null_count < column.num_values:
                names.add(column.path_in_schema.removesuffix(".list.element"))
        return [name for name in self._tensor_columns if name in names]

    def _find_buckets(self) -> list[np.ndarray]:
        numbers: dict[tuple, int] = {}
        self._bucket_of = np.empty(len(self), dtype=np.int64)
        for group in range(self._file.num_row_groups):
            columns = tuple(self._present(group))
            shared = self._shared_values(group, columns)
            for row in range(self._first[group], self._first[group + 1]):
                other = json.loads(self.index["arguments"][row])
                alike = {k: v if "all" in v else "each" for k, v in other.items()}
                key = (columns, shared, json.dumps(alike, sort_keys=True))
                self._bucket_of[row] = numbers.setdefault(key, len(numbers))
        return [np.flatnonzero(self._bucket_of == number) for number in range(len(numbers))]

    def _shared_values(self, group: int, columns: tuple[str, ...]) -> str:
        """The values of a row group's shared tensors, which one batch can hold only once."""
        names = [name for name in columns if name.startswith("=")]
        if not names:
            return ""
        table = self._file.read_row_group(group, columns=names)
        return str([table.column(name).chunk(0).storage[0].as_py() for name in names])


def _decode_column(column: pa.Array, name: str) -> Tensor:
    _, shape, dtype = name.split("/")
    size = [int(n) for n in shape.split("x")] if shape else []
    values = torch.from_numpy(column.storage.flatten().to_numpy(zero_copy_only=False).copy())
    return values.view(getattr(torch, dtype)).reshape(len(column), *size)
