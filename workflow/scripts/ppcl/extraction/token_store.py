"""The state of an extraction, on disk: so memory does not grow with the number of tokens, and a
killed run goes on from its checkpoint.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppcl import errors
from ppcl.errors import UserError
from ppcl.extraction.conditioning import Conditioning
from ppcl.storage import seals, tensors

CHECKPOINT = "checkpoint.safetensors"


class Store:
    """Tokens of a stream at all boundaries, [boundaries, n, d] float32, in a file.

    Tokens are added a call at a time and read a boundary at a time. Tokens that are read are
    compared with a digest of the tokens that were added. An existing file is overwritten: two runs
    of one config write the same.

    Args:
        shape: number of boundaries, upper bound of n, d.
        length, digest: number of tokens n that a killed run left in the file, and their `digest`.
            Without a length the store starts empty.

    Raises:
        UserError: the disk is full or fails (all methods too), or the file does not hold the tokens
            that the digest is of.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], length: int = 0, digest: str = ""):
        self._path, self._most, self._length = path, shape, length
        self._hashes = [hashlib.sha256() for _ in range(shape[0])]
        with self._disk():
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | (0 if length else os.O_CREAT)
            self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        if length:
            for boundary, hasher in enumerate(self._hashes):
                hasher.update(_bytes(self._read(boundary)))
            if self.digest() != digest:
                raise self._damaged()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._most[0], self._length, self._most[2]

    def __len__(self) -> int:
        return self._most[0]

    def append(self, values: np.ndarray) -> None:
        """Adds tokens [boundaries, tokens, d] float32."""
        with self._disk():
            for boundary, value in enumerate(values):
                left = _bytes(np.ascontiguousarray(value))
                self._hashes[boundary].update(left)
                self._seek(boundary, self._length)
                while len(left):
                    left = left[self._file.write(left) :]
        self._length += values.shape[1]

    def __getitem__(self, boundary: int) -> np.ndarray:
        """The tokens of a boundary, [n, d]."""
        if not 0 <= boundary < len(self):
            raise IndexError(boundary)
        value = self._read(boundary)
        if hashlib.sha256(_bytes(value)).digest() != self._hashes[boundary].digest():
            raise self._damaged()
        return value

    def digest(self) -> str:
        """SHA-256 (hex) of the SHA-256 digests of all boundaries, in order."""
        return hashlib.sha256(b"".join(hasher.digest() for hasher in self._hashes)).hexdigest()

    def kept(self) -> dict:
        """The entry of this store in a checkpoint (shape, length, digest), after all tokens have
        been flushed to the disk."""
        with self._disk():
            os.fsync(self._file.fileno())
        return {"shape": self._most, "length": self._length, "digest": self.digest()}

    def _read(self, boundary: int) -> np.ndarray:
        value = np.empty(self.shape[1:], np.float32)
        left = _bytes(value)
        with self._disk():
            self._seek(boundary, 0)
            while len(left):
                if not (read := self._file.readinto(left)):
                    raise self._damaged()
                left = left[read:]
        return value

    def _seek(self, boundary: int, token: int) -> None:
        self._file.seek(4 * (boundary * self._most[1] + token) * self._most[2])

    def _damaged(self) -> UserError:
        return UserError(f"{self._path} {seals.DAMAGED}; delete {self._path.parent} and rerun")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if (reason := errors.trouble(error, self._path)) is None:
                raise
            raise UserError(reason) from error


def _bytes(values: np.ndarray) -> memoryview:
    flat = values.reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # numpy says so from Python 3.12 on


@dataclass
class Kept:
    """The state of an extraction.

    Attributes:
        folder: of its files.
        batches: number of batches done.
        sums: those of `activations.Moments`.
        conditioning: the sums of `modulation_inputs.Sums`.
        stores: stream -> its tokens.
        about: stream -> a mapping per batch: name (such as `step`) -> a value per token, [n].
        first: stream -> the number of its first boundary.
    """

    folder: Path
    batches: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    conditioning: Conditioning = field(default_factory=lambda: Conditioning([], {}))
    stores: dict[str, Store] = field(default_factory=dict)
    about: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(
        self, stream: str, values: np.ndarray, about: dict[str, np.ndarray], first: int, most: int
    ) -> None:
        """Adds a call's tokens.

        Args:
            values: [boundaries, tokens, d] float32.
            about: name -> a value per token, [tokens].
            first: number of the stream's first boundary.
            most: upper bound of the stream's tokens in all calls together.
        """
        if stream not in self.stores:
            shape = len(values), most, values.shape[2]
            self.stores[stream] = Store(self.folder / f"{stream}.tokens", shape)
            self.first[stream] = first
        self.stores[stream].append(values)
        self.about.setdefault(stream, []).append(about)

    def joined(self, stream: str) -> dict[str, np.ndarray]:
        """Name -> a value per token [n], over all batches, for a stream."""
        parts = self.about[stream]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def save(self, identity: str) -> None:
        """Writes a checkpoint."""
        held = {f"sum/{name}": value for name, value in self.sums.items()}
        given = self.conditioning.tensors().items()
        held |= {f"conditioning/{name}": value for name, value in given}
        for stream in self.stores:
            vectors = self.joined(stream).items()
            held |= {f"{stream}/{name}": torch.from_numpy(value) for name, value in vectors}
        streams = {s: store.kept() | {"first": self.first[s]} for s, store in self.stores.items()}
        metadata = {"batches": str(self.batches), "streams": json.dumps(streams)}
        metadata |= {"matrices": self.conditioning.described()}
        tensors.write(self.folder / CHECKPOINT, held, metadata | {"identity": identity})


def resume(folder: Path, identity: str) -> Kept:
    """The state that a killed run of this identity left in a folder; an empty one if there is none.

    Raises:
        UserError: a file there is not what was written.
    """
    sample = Kept(folder)
    if not (folder / CHECKPOINT).exists():
        return sample
    held, metadata = tensors.read(folder / CHECKPOINT)
    if metadata["identity"] != identity:
        return sample
    sample.batches = int(metadata["batches"])
    sample.sums = _under("sum", held)
    sample.conditioning = Conditioning.stored(_under("conditioning", held), metadata["matrices"])
    for stream, kept in json.loads(metadata["streams"]).items():
        shape, path = tuple(kept["shape"]), folder / f"{stream}.tokens"
        sample.stores[stream] = Store(path, shape, kept["length"], kept["digest"])
        sample.first[stream] = kept["first"]
        sample.about[stream] = [{n: value.numpy() for n, value in _under(stream, held).items()}]
    return sample


def _under(name: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with this one and a slash, by the rest of their names."""
    return {k.removeprefix(f"{name}/"): v for k, v in held.items() if k.startswith(f"{name}/")}
