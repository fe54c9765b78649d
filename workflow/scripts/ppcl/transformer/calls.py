"""The transformer's own calls, read from calls.parquet in batches that can be replayed.

Replaying a batch needs neither text encoder nor scheduler, and works for any family. `call_tables`
says what a row holds, and writes the file.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
from ppcl.transformer import call_arguments
from ppcl.transformer.call_columns import CallColumn, Held
from ppcl.transformer.call_tables import OUTPUT

CPU = torch.device("cpu")


@dataclass
class Batch:
    """Recorded calls that can be replayed together.

    Attributes:
        arguments: keyword arguments of the transformer, batched.
        output: the transformer's recorded answer [batch, ...].
        rows: column of schemas.CALLS, such as step or timestep -> its values [batch]; without
            `arguments`.
        numbers: the samples' row numbers in the file, [batch].
    """

    arguments: dict[str, Any]
    output: Tensor
    rows: dict[str, np.ndarray]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.output)

    def to_float32(self) -> "Batch":
        """The batch with all floating-point tensors in float32."""
        arguments = tree_map(as_float32, self.arguments)
        return Batch(arguments, self.output.float(), self.rows, self.numbers)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device. From a `pinned` batch, copies to CUDA are
        asynchronous."""
        return self._each(lambda value: value.to(device, non_blocking=device.type == "cuda"))

    def pinned(self, device: torch.device) -> "Batch":
        """The batch in page-locked memory if the device is CUDA, else as it is."""
        return self._each(Tensor.pin_memory) if device.type == "cuda" else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        moved = tree_map(
            lambda value: change(value) if isinstance(value, Tensor) else value, self.arguments
        )
        return Batch(moved, change(self.output), self.rows, self.numbers)


class Ahead:
    """Batches by number, each made while the one before it is in use.

    A call with number n returns batch n and starts a thread that makes batch n + 1. If that fails,
    the call with n + 1 raises the error. A call with any other number, as after a resume, makes its
    batch at once. (torch's DataLoader would need a process, with decoded row groups of its own.)

    Args:
        make: number -> batch.
        count: number of batches; None if there is no last one.
    """

    def __init__(self, make: Callable[[int], Batch], count: int | None = None):
        self._make, self._count = make, count
        self._next: tuple[int, threading.Thread, list] | None = None

    def __call__(self, number: int) -> Batch:
        following, self._next = self._next, None
        if following and following[0] == number:
            _, thread, made = following
            thread.join()
            batch, error = made.pop()
            if error is not None:
                raise error
        else:
            batch = self._make(number)
        if self._count is None or number + 1 < self._count:
            self._begin(number + 1)
        return batch

    def _begin(self, number: int) -> None:
        made: list[tuple[Batch | None, BaseException | None]] = []

        def run() -> None:
            try:
                made.append((self._make(number), None))
            except BaseException as error:
                made.append((None, error))

        thread = threading.Thread(target=run, name=f"batch {number}")
        self._next = number, thread, made
        thread.start()


def refuse_zeros(power: float) -> None:
    """Raises UserError if `power`, the squared norm of recorded answers, is no positive number, so
    that errors can't be relative to it."""
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


class Reader:
    """Reads recorded calls by row group, keeping recently used ones decoded in memory.

    Args:
        path: calls.parquet, or another file, with the `schema` of its columns that are no tensors.
        memory: bytes of decoded row groups to keep; if all fit, each is read from disk once.

    Attributes:
        index: column of schemas.CALLS -> its values [rows], in file order.
        buckets: groups of row numbers; rows of one group have the same tensor shapes and shared
            arguments, so that they can be in one batch.
        provenance: the file's.

    Raises:
        UserError: the file is missing or damaged, or holds no recorded calls.
    """

    def __init__(self, path: str | Path, memory: int = 4 << 30, schema: pa.Schema = schemas.CALLS):
        self.path, self._memory = Path(path), memory
        self._reading = threading.Lock()
        self._file = tables.File(path)
        self.provenance = self._file.provenance
        table = tables.read(path, schema, columns=schema.names)
        self.index = {
            name: table.column(name).to_numpy(zero_copy_only=False) for name in schema.names
        }
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(len(self._file))]
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._groups: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._held = 0
        tensors = [f for f in self._file.schema if f.name not in schema.names]
        try:
            self._columns = {field.name: CallColumn.parse(field.name) for field in tensors}
            for field in tensors:
                self._columns[field.name].check(field)
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
        """Row numbers, in file order.

        Args:
            heldout: True for held-out rows, False for rows to fit on; None for both.
            kinds: `pipeline` or `renoised`; empty for both.
        """
        keep = np.ones(len(self), bool)
        if heldout is not None:
            keep &= self.index["heldout"] == heldout
        if kinds:
            keep &= np.isin(self.index["kind"], kinds)
        return np.flatnonzero(keep)

    def heldout_rows(self, purpose: str) -> np.ndarray:
        """Row numbers of the held-out calls to `select` by, or to `report` on: held-out prompts go
        to the two purposes in turn.

        Errors on the calls that selected intervals and students would flatter these. If one prompt
        alone is held out, both purposes get it, with a warning.
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
        """Up to `count` random rows of `heldout_rows(purpose)`; the same for the same seed.

        The rows are stratified by timestep, by which errors differ most: one comes from each of
        `count` groups of neighbouring timesteps. A plain draw needs twice as many to tell as much.

        Args:
            key: the config key that sets `count`; with it, there is a warning if rows are fewer.
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
        """`size` random rows of one bucket; a pure function of its arguments.

        The bucket is drawn in proportion to its share of `rows`, so every row is equally likely. A
        bucket with fewer than `size` rows is drawn from with replacement.
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
            device: where they will be used (`Batch.pinned`). The batches themselves are on the
                CPU.
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
                    at = 0 if self._shared(name) else row - self._first[group]
                    picked.setdefault(name, []).append(values[at])
        columns = {name: self._columns[name] for name in picked}
        joined = {column.argument: column.joined(picked[n]) for n, column in columns.items()}
        output = joined.pop(OUTPUT)
        assert isinstance(output, Tensor), "the output is stacked (`call_tables.to_tables`)"
        texts = [self.index["arguments"][row] for row in rows]
        once = {text: json.loads(text) for text in set(texts)}
        arguments = call_arguments.joined([once[text] for text in texts], joined)
        meta = {k: v[rows] for k, v in self.index.items() if k != "arguments"}
        return Batch(arguments | {"return_dict": False}, output, meta, np.asarray(rows))

    def _group(self, group: int) -> dict[str, Tensor]:
        """Decoded tensor columns of a row group, [rows, ...] each, [1, ...] if shared; the groups
        used least recently are dropped from memory."""
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        table = self._file.group(group, self._present(group))
        decoded = {}
        for name in table.column_names:
            rows = table.column(name).combine_chunks()
            decoded[name] = self._columns[name].to_torch(rows[:1] if self._shared(name) else rows)
        self._groups[group] = decoded
        self._held += sum(t.nbytes for t in decoded.values())
        while self._held > self._memory and len(self._groups) > 1:
            _, old = self._groups.popitem(last=False)
            self._held -= sum(t.nbytes for t in old.values())
        return decoded

    def _shared(self, name: str) -> bool:
        """Whether a column's first row holds the value of all rows of its group."""
        return self._columns[name].held is Held.SHARED

    def _present(self, group: int) -> list[str]:
        """Tensor columns that hold values in a row group (a group is one call: all rows alike)."""
        metadata = self._file.metadata.row_group(group)
        names = set()
        for i in range(metadata.num_columns):
            column = metadata.column(i)
            values = column.statistics
            if values is None or values.null_count < column.num_values:
                names.add(column.path_in_schema.removesuffix(".list.element"))
        return [name for name in self._columns if name in names]

    def _find_buckets(self) -> list[np.ndarray]:
        numbers: dict[tuple, int] = {}
        alike: dict[tuple, str] = {}  # by (columns, text): most rows repeat an earlier pair
        self._bucket_of = np.empty(len(self), dtype=np.int64)
        for group in range(len(self._file)):
            columns = tuple(self._present(group))
            shared = self._shared_values(group, columns)
            held = {self._columns[name].argument for name in columns}
            if OUTPUT not in held:
                raise ValueError(f"row group {group} has no output")
            for row in range(self._first[group], self._first[group + 1]):
                text = self.index["arguments"][row]
                if (columns, text) not in alike:
                    other = json.loads(text)
                    call_arguments.check(other, held)
                    alike[columns, text] = json.dumps(
                        call_arguments.batched_by(other), sort_keys=True
                    )
                key = (columns, shared, alike[columns, text])
                self._bucket_of[row] = numbers.setdefault(key, len(numbers))
        return [np.flatnonzero(self._bucket_of == number) for number in range(len(numbers))]

    def _shared_values(self, group: int, columns: tuple[str, ...]) -> str:
        """Digest of the shared tensors of a row group, which have one value in a batch."""
        names = [name for name in columns if self._shared(name)]
        if not names:
            return ""
        table = self._file.group(group, names)
        digest = hashlib.sha256()
        for name in names:
            column = table.column(name).combine_chunks()[:1]
            digest.update(column.storage.flatten().to_numpy(zero_copy_only=False))
        return digest.hexdigest()
