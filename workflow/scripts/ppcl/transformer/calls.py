"""The transformer's own calls: recorded while the stock pipeline runs, stored, read, replayed.

A recorded row is one sample of one call: its tensors, its other arguments, the transformer's answer
(the velocity or noise prediction), and where in the sampling it happened. Replaying a batch of rows
needs neither text encoder nor scheduler, and works for any family.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ppcl.errors import UserError, warn_of_fewer, warn_once
from ppcl.storage import schemas, seals, tables

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
CPU = torch.device("cpu")


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
        arguments = tree_map(as_float32, self.arguments)
        return Batch(arguments, self.output.float(), self.rows, self.numbers)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device; copies to CUDA of what is `pinned` go on while
        the caller does."""
        return self._each(lambda value: value.to(device, non_blocking=device.type == "cuda"))

    def pinned(self, device: torch.device) -> "Batch":
        """The batch in memory from which a copy to that device needs no waiting."""
        return self._each(Tensor.pin_memory) if device.type == "cuda" else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        moved = tree_map(
            lambda value: change(value) if isinstance(value, Tensor) else value, self.arguments
        )
        return Batch(moved, change(self.output), self.rows, self.numbers)


class Ahead:
    """Batches by number, each made while the one before it is in use.

    Whoever asks for number n has n + 1 made in a thread, which ends with that; an error in it is
    raised to whom asks for n + 1. Any other number is made at once, as after a resume. (torch's
    DataLoader would need a process for it, with decoded row groups of its own.)

    Args:
        make: the batch of a number.
        count: of batches, if there is a last one.
    """

    def __init__(self, make: Callable[[int], Batch], count: int | None = None):
        self._make, self._count = make, count
        self._next: tuple[int, threading.Thread, list] | None = None

    def __call__(self, number: int) -> Batch:
        following, self._next = self._next, None
        if following and following[0] == number:
            _, thread, found = following
            thread.join()
            batch, error = found.pop()
            if error is not None:
                raise error
        else:
            batch = self._make(number)
        if self._count is None or number + 1 < self._count:
            self._begin(number + 1)
        return batch

    def _begin(self, number: int) -> None:
        found: list[tuple[Batch | None, BaseException | None]] = []

        def run() -> None:
            try:
                found.append((self._make(number), None))
            except BaseException as error:
                found.append((None, error))

        thread = threading.Thread(target=run, name=f"batch {number}")
        self._next = number, thread, found
        thread.start()


def refuse_zeros(power: float) -> None:
    """Raises UserError if errors relative to recorded answers of such a squared norm are none."""
    if not power > 0:
        raise UserError(
            "calls.parquet: recorded answers are all zero: no error relative to them is defined; "
            "the teacher looks untrained: give another (teacher.path, teacher.component), and rerun"
        )


def as_float32(value: Any) -> Any:
    """A floating-point tensor in float32; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value


# ---- one call to rows


@dataclass
class _Split:
    """A call's arguments, sorted.

    Attributes:
        cut: column name -> the samples' tensors.
        whole: column name -> a tensor that all samples share.
        other: per sample, JSON of what is no tensor, with the places of nested tensors.
    """

    cut: dict[str, list[Tensor]]
    whole: dict[str, Tensor]
    other: list[dict]


def split_arguments(
    arguments: dict[str, Any],
    batch: int,
    shared: tuple[str, ...] = (),
    batch_dims: Mapping[str, int] | None = None,
) -> _Split:
    """Sorts a call's arguments into those of each sample and those that all share.

    A tensor whose batch dimension is as long as the batch is cut into samples unless the family
    calls it shared; a list as long as the batch is cut as well, be it of tensors; tensors in
    tuples, lists and mappings are taken out of them; None and `return_dict` are dropped.

    Raises:
        UserError: an argument holds something else than tensors, texts and numbers.
    """
    found = _Split({}, {}, [{} for _ in range(batch)])
    dims = batch_dims or {}

    def keep(path: str, tensor: Tensor) -> None:
        root, tensor = path.split(".")[0], tensor.detach().cpu()
        dim = dims.get(root, 0)
        if root not in shared and tensor.ndim > dim and tensor.shape[dim] == batch:
            # A copy for each: a view would be stored with the whole.
            found.cut[f"{path}@{dim}" if dim else path] = list(tensor.movedim(dim, 0))
        else:
            found.whole[path] = tensor

    for name, value in arguments.items():
        if value is None or name == "return_dict":
            continue
        listed = isinstance(value, list) and len(value) == batch and name not in shared
        if isinstance(value, Tensor):
            keep(name, value)
        elif listed and all(isinstance(item, Tensor) for item in value):
            found.cut[f"*{name}"] = [item.detach().cpu() for item in value]
        elif listed:
            for row, item in zip(found.other, value, strict=True):
                row[name] = {"each": encode(item, name, None)}
        else:
            encoded = encode(value, name, keep)
            for row in found.other:
                row[name] = {"all": encoded}
    return found


def encode(value: Any, path: str, keep: Callable[[str, Tensor], None] | None) -> Any:
    """JSON that keeps tuples apart from lists; tensors go to `keep`, by their place.

    Raises:
        UserError: there is something else than tensors, texts and numbers.
    """
    if isinstance(value, Tensor) and keep is not None:
        keep(path, value)
        return {"tensor": path}
    if isinstance(value, (list, tuple)):
        items = [encode(v, f"{path}.{i}", keep) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"mapping": {k: encode(v, f"{path}.{k}", keep) for k, v in value.items()}}
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    raise UserError(
        f"the pipeline passes a value of type {type(value).__name__} inside the transformer "
        f"argument '{path.split('.')[0]}'; such calls can't be recorded yet"
    )


def _decode(value: Any, found: dict[str, Any]) -> Any:
    """The value again; its tensors are taken out of `found`."""
    if isinstance(value, list):
        return [_decode(v, found) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return found.pop(value["tensor"])
        if "tuple" in value:
            return tuple(_decode(v, found) for v in value["tuple"])
        return {k: _decode(v, found) for k, v in value["mapping"].items()}
    return value


def to_tables(
    arguments: dict[str, Any],
    output: Tensor,
    rows: dict[str, list],
    shared: tuple[str, ...] = (),
    batch_dims: Mapping[str, int] | None = None,
) -> list[pa.Table]:
    """A batched call as tables, one row per sample; samples of other shapes have another table.

    A tensor argument becomes a column `<argument>/<shape>/<dtype>` of Arrow's fixed-shape tensors.
    The shape is in the name because a prompt's length varies: a row fills the column of its shape
    and leaves the others null. Before the name, `=` says that all samples share the tensor, which
    the first row holds, and `*` that the argument is a list of the samples' tensors; after it, `@1`
    that the batch is its dimension 1. `a.0` is the first in the tuple, list or mapping `a`.
    """
    split = split_arguments(arguments, len(output), shared, batch_dims)
    columns = split.cut | {OUTPUT: list(output.detach().cpu())}
    groups: dict[tuple, list[int]] = {}
    for sample in range(len(output)):
        shapes = tuple((name, values[sample].shape) for name, values in columns.items())
        groups.setdefault(shapes, []).append(sample)
    found = []
    for members in groups.values():
        table = {name: pa.array([values[i] for i in members]) for name, values in rows.items()}
        texts = [json.dumps(split.other[i], sort_keys=True) for i in members]
        table["arguments"] = pa.array(texts)
        for name, values in columns.items():
            key, column = _tensor_column(name, torch.stack([values[i] for i in members]))
            table[key] = column
        for name, tensor in split.whole.items():
            key, column = _tensor_column(f"={name}", tensor[None])
            table[key] = pa.concat_arrays([column, _nulls(column.type, len(members) - 1)])
        found.append(pa.table(table))
    return found


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
    files = [tables.File(part) for part in parts]
    groups = (file.group(number) for file in files for number in range(len(file)))
    write(path, [file.schema for file in files], groups, provenance)


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
        self._reading = threading.Lock()
        self._file = tables.File(path)
        self.provenance = self._file.provenance
        table = tables.read(path, schemas.CALLS, columns=schemas.CALLS.names)
        self.index = {
            name: table.column(name).to_numpy(zero_copy_only=False) for name in schemas.CALLS.names
        }
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(len(self._file))]
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._groups: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._held = 0
        tensors = [f for f in self._file.schema if f.name not in schemas.CALLS.names]
        self._tensor_columns = [field.name for field in tensors]
        try:
            for field in tensors:
                _check_column(field)
            self.buckets = self._find_buckets()
            if not len(self):
                raise ValueError("no rows")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: holds no recorded calls ({error!r}); {seals.REMAKE}"
            ) from error

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
        if purpose == "report" and not second.any():
            warn_once(
                f"{self.path}: one prompt alone is held out, so what selects blocks is also what "
                "errors are reported on, which flatters them; record more prompts "
                "(record.prompts, record.samples, record.heldout_fraction)"
            )
            return rows
        return rows[second if purpose == "report" else ~second]

    def sample_heldout(
        self, purpose: str, count: int, seed: int, key: str | None = None
    ) -> np.ndarray:
        """Up to `count` random ones of `heldout_rows(purpose)`; the same for the same seed.

        One comes from each of `count` groups of neighbouring timesteps, by which errors differ
        most: so few rows tell as much as twice as many that are drawn without that.

        Args:
            key: of the config, that asks for so many: there is a warning if there are fewer.
        """
        rows = self.heldout_rows(purpose)
        if key:
            warn_of_fewer(key, count, len(rows), f"held-out calls to {purpose} by")
        rng = np.random.default_rng(seed)
        rows = rng.permutation(rows)
        if count >= len(rows):
            return rows
        by_time = rows[np.argsort(self.index["timestep"][rows], kind="stable")]
        return np.array([rng.choice(group) for group in np.array_split(by_time, count)])

    def draw(self, rows: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
        """`size` random rows that fit in one batch; a pure function of its arguments.

        The bucket is drawn in proportion to its share of `rows`, so every row is equally likely.
        """
        rng = np.random.default_rng(seed)
        bucket = self._bucket_of[rng.choice(rows)]
        choices = rows[self._bucket_of[rows] == bucket]
        return rng.choice(choices, size=size, replace=len(choices) < size)

    def in_batches(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """All of `rows` in batches of at most `size`, bucket by bucket."""
        every = []
        for bucket in np.unique(self._bucket_of[rows]):
            members = rows[self._bucket_of[rows] == bucket]
            every += [members[start : start + size] for start in range(0, len(members), size)]
        return every

    def batches(
        self, rows: np.ndarray, size: int, device: torch.device = CPU, start: int = 0
    ) -> Iterator["Batch"]:
        """The batches of `in_batches` from number `start` on; the next one is read while the
        present one is in use.

        Args:
            device: where they will be needed (`Batch.pinned`); they are on the CPU.
        """
        every = self.in_batches(rows, size)[start:]
        ahead = Ahead(lambda number: self.batch(every[number]).pinned(device), len(every))
        yield from map(ahead, range(len(every)))

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows of one bucket as a batch on the CPU."""
        picked: dict[str, list[Tensor]] = {}
        with self._reading:  # one batch may be made ahead, in a thread
            for row in rows:
                group = int(np.searchsorted(self._first, row, side="right")) - 1
                for name, values in self._group(group).items():
                    at = 0 if name.startswith("=") else row - self._first[group]
                    picked.setdefault(name, []).append(values[at])
        found: dict[str, Any] = {}
        for key, values in picked.items():
            name, _, dim = key.split("/")[0].partition("@")
            if name.startswith("="):
                found[name[1:]] = values[0]
            elif name.startswith("*"):
                found[name[1:]] = values
            else:
                found[name] = torch.stack(values, int(dim or 0))
        output = found.pop(OUTPUT)
        texts = [self.index["arguments"][row] for row in rows]
        once = {text: json.loads(text) for text in set(texts)}
        encoded = [once[text] for text in texts]
        arguments: dict[str, Any] = {}
        for name, value in encoded[0].items():
            if "all" in value:
                arguments[name] = _decode(value["all"], found)
            else:
                arguments[name] = [_decode(e[name]["each"], {}) for e in encoded]
        arguments |= found
        meta = {k: v[rows] for k, v in self.index.items() if k != "arguments"}
        return Batch(arguments | {"return_dict": False}, output, meta, np.asarray(rows))

    def _group(self, group: int) -> dict[str, Tensor]:
        """Decoded tensor columns of a row group (least recently used ones are forgotten)."""
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        table = self._file.group(group, self._present(group))
        found = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            found[name] = _decode_column(column[:1] if name.startswith("=") else column, name)
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
        alike: dict[tuple, str] = {}  # by columns and text, of which most rows have the same
        self._bucket_of = np.empty(len(self), dtype=np.int64)
        for group in range(len(self._file)):
            columns = tuple(self._present(group))
            shared = self._shared_values(group, columns)
            held = {name.split("/")[0].split("@")[0].lstrip("=*") for name in columns}
            if OUTPUT not in held:
                raise ValueError(f"row group {group} has no output")
            for row in range(self._first[group], self._first[group + 1]):
                text = self.index["arguments"][row]
                if (columns, text) not in alike:
                    other = json.loads(text)
                    _check_arguments(other, held)
                    kept = {k: v if "all" in v else "each" for k, v in other.items()}
                    alike[columns, text] = json.dumps(kept, sort_keys=True)
                key = (columns, shared, alike[columns, text])
                self._bucket_of[row] = numbers.setdefault(key, len(numbers))
        return [np.flatnonzero(self._bucket_of == number) for number in range(len(numbers))]

    def _shared_values(self, group: int, columns: tuple[str, ...]) -> str:
        """The values of a row group's shared tensors, which one batch can hold only once."""
        names = [name for name in columns if name.startswith("=")]
        if not names:
            return ""
        table = self._file.group(group, names)
        digest = hashlib.sha256()
        for name in names:
            column = table.column(name).combine_chunks()[:1]
            digest.update(column.storage.flatten().to_numpy(zero_copy_only=False))
        return digest.hexdigest()


def _check_column(field: pa.Field) -> None:
    """ValueError and the like unless it is a column of `_tensor_column`."""
    _, shape, dtype = field.name.split("/")
    kind = getattr(torch, dtype)
    stored = _ARROW[_STORED_AS.get(kind, kind)]
    size = [int(n) for n in shape.split("x")] if shape else []
    if field.type != pa.fixed_shape_tensor(stored, size):
        raise ValueError(f"column '{field.name}' is {field.type}")


def _check_arguments(encoded: dict, held: set[str]) -> None:
    """ValueError and the like unless they are of `split_arguments`, with tensors that are held."""

    def check(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                check(item)
        elif isinstance(value, dict):
            ((kind, content),) = value.items()
            if (
                kind == "tensor"
                and content not in held
                or kind not in ("tensor", "tuple", "mapping")
            ):
                raise ValueError(f"arguments hold {value}")
            for item in {"tuple": list, "mapping": dict.values}.get(kind, lambda _: ())(content):
                check(item)

    for value in encoded.values():
        ((kind, content),) = value.items()
        if kind not in ("all", "each"):
            raise ValueError(f"arguments hold {value}")
        check(content)


def _decode_column(column: pa.Array, name: str) -> Tensor:
    _, shape, dtype = name.split("/")
    size = [int(n) for n in shape.split("x")] if shape else []
    values = torch.from_numpy(column.storage.flatten().to_numpy(zero_copy_only=False).copy())
    return values.view(getattr(torch, dtype)).reshape(len(column), *size)
