"""What extraction keeps of the teacher's activations: moments for probes, tokens for CKA.

Boundary b is the input of block b, boundary M the output of the last block, so the output of block
i is boundary i + 1.
"""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ppcl import blocks, calls, devices, errors, probes, schemas, seals, tables
from ppcl.errors import UserError


class Moments:
    """Sums over tokens that determine every probe (Eq. 1): X^T X, X^T Y and their companions.

    X is a block's input and Y = T_i(X) - X its residual; float64 [d, d] per block and stream.
    Memory does not depend on the number of tokens added.

    Args:
        device: where the products are made and, unless they are apart, the sums are.
        apart: the sums are in main memory, as a GPU has better use for what may be half as much as
            the teacher. Tokens wait there too until they are as many as channels: a product
            [d, d] has a long way, and comes once for d tokens.
    """

    def __init__(self, device: torch.device, apart: bool = False):
        self._device, self._apart = devices.statistics_device(device), apart
        self._waiting: dict[tuple[str, int | str], list[tuple[Tensor, Tensor]]] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, stream: str, block: int | str, x: Tensor, after: Tensor) -> None:
        """Adds tokens, on the device or on their way (see `settle`).

        x, after [tokens, d]: before and after the block, of any float dtype.
        """
        if self._apart:
            x, after = (devices.to_main_memory(t) for t in (x, after))
            self._waiting.setdefault((stream, block), []).append((x, after))
        else:
            self._sum(stream, block, x, after)

    def settle(self, everything: bool = False) -> None:
        """Sums up what waits: where that is enough, or `everything`.

        The device must have done what it was asked for: until then tokens are not all there.
        """
        for key, parts in self._waiting.items():
            if parts and (everything or sum(len(x) for x, _ in parts) >= parts[0][0].shape[1]):
                x, after = (torch.cat(side) for side in zip(*parts, strict=True))
                parts.clear()
                self._sum(*key, x, after)

    def _sum(self, stream: str, block: int | str, x: Tensor, after: Tensor) -> None:
        x, after = (t.to(self._device).double() for t in (x, after))  # MPS casts to no float64
        y = after - x
        parts = {
            "count": torch.full((1,), len(x), dtype=torch.float64, device=x.device),
            "x_sum": x.sum(0),
            "y_sum": y.sum(0),
            "y_y": y.square().sum()[None],
        }
        rest = torch.device("cpu") if self._apart else x.device
        for name, value in parts.items():
            key, value = f"{stream}.{block}.{name}", value.to(rest)
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        for name, other in (("x_x", x), ("x_y", y)):  # in place: a batch has few tokens for d x d
            key = f"{stream}.{block}.{name}"
            if key not in self.sums:
                self.sums[key] = (x.T @ other).to(rest)
            elif rest == x.device:
                self.sums[key].addmm_(x.T, other)
            else:
                self.sums[key] += (x.T @ other).to(rest)


def stored_moments(sums: Mapping[str, Tensor], stream: str, block: int | str) -> probes.Moments:
    """The moments of one block and stream, by their names in `Moments.sums` or its file."""
    names = ("count", "x_sum", "x_x", "y_sum", "x_y", "y_y")
    found = {name: sums[f"{stream}.{block}.{name}"].cpu().double().numpy() for name in names}
    return probes.Moments(
        **found | {"count": int(found["count"].item()), "y_y": float(found["y_y"].item())}
    )


def pick_tokens(
    masks: blocks.Streams,
    stream: str,
    shape: tuple[int, int],
    count: int,
    rows: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Positions [batch, count'] of random real tokens per sample; count' <= count.

    Every sample gives the same number, as many as its shortest companion has; the choice depends on
    the row numbers, not on how rows were batched.
    """
    batch, length = shape
    mask = masks[stream].cpu().numpy() if stream in masks else np.ones((batch, length), bool)
    count = min(count, int(mask.sum(1).min()))
    picked = [
        np.random.default_rng((seed, int(row))).permutation(np.flatnonzero(m))[:count]
        for row, m in zip(rows, mask, strict=True)
    ]
    return np.stack(picked)  # in random order, so that a part of them is random too


@torch.no_grad()
def collect(
    transformer: nn.Module,
    reader: calls.Reader,
    rows: np.ndarray,
    settings: dict,
    seed: int,
    device: torch.device,
    folder: Path,
    progress,
) -> tuple[Moments, dict[str, dict]]:
    """Replays recorded calls and returns the probes' moments and the token sample.

    Args:
        rows: row numbers of the calls to replay, of both splits.
        settings: batch_size; moment_tokens and sample_tokens per row and stream.
        folder: on a disk with room for the token sample, which is kept there without a name.

    Returns:
        The moments (rows of the fit split only), and per stream the sample: `value`, a `Store`
        [boundaries, n, d], the number of its `first` boundary, and n-vectors `prompt`, `step`,
        `timestep`, `token`, `heldout`.

    Raises:
        UserError: an activation is NaN or infinite; says the block and the stream. Or there is no
            room for the sample.
    """
    sequence = blocks.block_sequence(transformer)
    moments = Moments(device, apart=devices.free_memory(device) is not None)
    samples, first = {}, {}
    stores: dict[str, Store] = {}
    for recorded in reader.batches(rows, settings["batch_size"], device):
        batch = recorded.to(device)
        fit = torch.from_numpy(np.flatnonzero(~batch.rows["heldout"])).to(device)
        family = blocks.family(transformer)
        before: blocks.Streams = {}
        positions: dict[str, np.ndarray] = {}
        many: dict[str, Tensor] = {}
        few: dict[str, Tensor] = {}
        lengths: dict[str, int] = {}
        kept: dict[str, list[Tensor]] = {}
        finite: dict[tuple[int, str], Tensor] = {}

        def look(block, bound):
            before.clear()
            for stream, x in block.inputs(bound).items():
                if stream not in positions:
                    # Of the call as it was read: the device need not be asked for its masks.
                    masks = blocks.token_masks(family, recorded.arguments, {stream: x})
                    places = pick_tokens(
                        masks,
                        stream,
                        x.shape[:2],
                        settings["moment_tokens"],
                        recorded.numbers,
                        seed,
                    )
                    positions[stream] = places[:, : settings["sample_tokens"]]
                    many[stream] = torch.from_numpy(places).to(device)
                    few[stream] = many[stream][:, : settings["sample_tokens"]]
                    kept[stream] = [_gather(x, few[stream])]
                    first[stream], lengths[stream] = block.index, x.shape[1]
                elif x.shape[1] != lengths[stream]:
                    raise UserError(
                        f"extract: block {block.index} gets another number of {stream} tokens than "
                        "the blocks before; give its list a stream of its own in "
                        "workflow/scripts/ppcl/families.py"
                    )
                before[stream] = _gather(x, many[stream])

        def learn(block, returned):
            for stream, out in returned.items():
                finite[block.index, stream] = torch.isfinite(out).all()
                kept[stream].append(_gather(out, few[stream]))
                if len(fit):
                    x, after = before[stream][fit], _gather(out, many[stream])[fit]
                    moments.add(stream, block.index, x.flatten(0, 1), after.flatten(0, 1))

        with blocks.watch(sequence, look, learn, stop_after=sequence[-1].index) as run:
            run(transformer, batch.arguments)
        _refuse_nonfinite(finite)
        moments.settle()
        for stream, values in kept.items():
            values = _on_host(torch.stack(values).flatten(1, 2).float())
            per_row = {
                "prompt": batch.rows["prompt_index"],
                "step": batch.rows["step"],
                "timestep": batch.rows["timestep"],
                "heldout": batch.rows["heldout"],
            }
            places = positions[stream]
            found = {k: np.repeat(v, places.shape[1]) for k, v in per_row.items()}
            found["token"] = places.ravel()
            if stream not in stores:
                most = len(rows) * settings["sample_tokens"]
                stores[stream] = Store(folder, (len(values), most, values.shape[2]))
            stores[stream].append(values)
            samples.setdefault(stream, []).append(found)
        progress.update(len(batch))
    moments.settle(everything=True)
    joined = {
        stream: {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        | {"first": first[stream], "value": stores[stream]}
        for stream, parts in samples.items()
    }
    return moments, joined


class Store:
    """Tokens of a stream at all boundaries, [boundaries, n, d] float32, on disk: main memory must
    not grow with their number. Tokens are added a call at a time, and read a boundary at a time.

    Args:
        folder: for the file. It has no name, and is gone whatever ends the program.
        shape: boundaries, the most tokens that there can be, channels.

    Raises:
        UserError, here and in all methods: the disk is full or fails.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self._folder, self._most = folder, shape
        self._length = 0
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._most[0], self._length, self._most[2]

    def __len__(self) -> int:
        return self._most[0]

    def append(self, values: np.ndarray) -> None:
        """Adds tokens [boundaries, tokens, d] float32."""
        with self._disk():
            for boundary, value in enumerate(values):
                self._seek(boundary, self._length)
                left = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
                while len(left):
                    left = left[self._file.write(left) :]
        self._length += values.shape[1]

    def __getitem__(self, boundary: int) -> np.ndarray:
        """The tokens of a boundary, [n, d]."""
        if not 0 <= boundary < len(self):
            raise IndexError(boundary)
        value = np.empty(self.shape[1:], np.float32)
        left = memoryview(value.reshape(-1).view(np.uint8))
        with self._disk():
            self._seek(boundary, 0)
            while len(left):
                if not (read := self._file.readinto(left)):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                left = left[read:]
        return value

    def _seek(self, boundary: int, token: int) -> None:
        self._file.seek(4 * (boundary * self._most[1] + token) * self._most[2])

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if (reason := errors.trouble(error, self._folder)) is None:
                raise
            raise UserError(reason) from error


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _on_host(x: Tensor) -> np.ndarray:
    """A copy from the device, for which all that it was asked for must be done: one a call."""
    return x.cpu().numpy()


def _refuse_nonfinite(finite: dict[tuple[int, str], Tensor]) -> None:
    """Reads a call's flags, by block and stream in data-flow order."""
    broken = ~_on_host(torch.stack(list(finite.values())))
    if broken.any():
        block, stream = list(finite)[int(broken.argmax())]
        raise UserError(
            f"extract: the {stream} stream after block {block} holds NaN or infinity; set "
            "teacher.dtype: float32 (or bfloat16 in place of float16)"
        )


def write_sample(path: Path, samples: dict[str, dict], provenance: dict[str, str]) -> None:
    """Writes tokens.parquet: a row group per boundary and stream, tokens in one order in all.

    Streams of fewer channels than others are filled up with zeros; the metadata has their widths.
    """
    widths = {stream: s["value"].shape[-1] for stream, s in samples.items()}
    widest = max(widths.values())
    schema = schemas.tokens(widest)
    kind = schema.field("value").type
    with tables.writer(path, schema, provenance | {"widths": json.dumps(widths)}) as out:
        for stream, sample in samples.items():
            for boundary, value in enumerate(sample["value"], start=sample.get("first", 0)):
                value = np.pad(value, ((0, 0), (0, widest - value.shape[1])))
                storage = pa.FixedSizeListArray.from_arrays(value.ravel(), value.shape[1])
                columns = {
                    "boundary": pa.array(np.full(len(value), boundary, np.int32)),
                    "stream": pa.array([stream] * len(value)),
                    "value": pa.ExtensionArray.from_storage(kind, storage),
                }
                rest = {n: pa.array(sample[n]) for n in schema.names if n not in columns}
                out.write(pa.table(columns | rest))


class TokenReader:
    """Reads tokens.parquet one boundary of one stream at a time.

    Attributes:
        streams: names, in file order.
        boundaries: their number, M + 1.
        provenance: the file's, with what extraction knows of the blocks (see `facts`).
    """

    def __init__(self, path: str | Path):
        self._file = tables.File(path)
        self.provenance = self._file.provenance
        if missing := set(schemas.tokens(1).names) - set(self._file.schema.names):
            raise UserError(f"{path}: no token table, it lacks column '{min(missing)}'; remake it")
        if not len(self._file):
            raise UserError(f"{path}: holds no tokens; {seals.REMAKE}")
        self._groups: dict[tuple[str, int], int] = {}
        for group in range(len(self._file)):
            head = self._file.group(group, ["stream", "boundary"])
            self._groups[head["stream"][0].as_py(), head["boundary"][0].as_py()] = group
        self.streams = list(dict.fromkeys(stream for stream, _ in self._groups))
        self._first = {s: min(b for stream, b in self._groups if stream == s) for s in self.streams}
        self.boundaries = 1 + max(boundary for _, boundary in self._groups)
        try:
            self._widths = json.loads(self.provenance["widths"])
            kind = self._file.schema.field("value").type
            stored = schemas.tokens(*kind.shape)
            if any(self._file.schema.field(f.name).type != f.type for f in stored):
                raise ValueError(f"columns {self._file.schema.names}")
            for stream in self.streams:
                if not 0 < self._widths[stream] <= kind.shape[0]:
                    raise ValueError(f"{stream} of {self._widths[stream]} channels")
                # A stream may begin or end at a seam, but has no gaps.
                passed = [boundary for of, boundary in self._groups if of == stream]
                if len(passed) != 1 + max(passed) - min(passed):
                    raise ValueError(f"{stream} at boundaries {sorted(passed)}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: holds no tokens ({error!r}); {seals.REMAKE}") from error

    @property
    def facts(self) -> dict:
        """block_parameters, transformer_parameters, seams, untouchable, as extraction saw them."""
        names = ("block_parameters", "transformer_parameters", "seams", "untouchable")
        return {name: json.loads(self.provenance[name]) for name in names}

    def values(self, boundary: int, stream: str) -> np.ndarray:
        """Tokens [n, d], float32."""
        column = self._column(boundary, stream, "value").combine_chunks()
        return column.to_numpy_ndarray()[:, : self._widths[stream]]

    def heldout(self, stream: str) -> np.ndarray:
        """Which tokens [n] come from prompts that no probe was fitted on."""
        return self._column(self._first[stream], stream, "heldout").to_numpy(zero_copy_only=False)

    def prompts(self, stream: str) -> np.ndarray:
        """Prompt index [n] of every token."""
        return self._column(self._first[stream], stream, "prompt").to_numpy()

    def _column(self, boundary: int, stream: str, name: str):
        group = self._groups[stream, boundary]
        return self._file.group(group, [name]).column(name)
