"""Reading and writing safetensors: whole or not at all, with provenance, refused if changed.

The header's metadata holds the digest of the tensors' bytes and a seal of the header itself.
"""

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ppcl import errors
from ppcl.errors import UserError
from ppcl.storage import seals, untrusted, whole

_DATA = "data.sha256"
_NO_DIGEST = "0" * 64
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_FLOATS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_PIECE = 16 << 20  # bytes that are copied at once


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors atomically; aliases and views are stored as contiguous copies.

    Raises:
        UserError: the disk is full, fails, or may not be written to.
        ValueError: the metadata has one of the keys that digests are stored under.
    """
    unsealed = _unsealed(path, metadata)
    with whole.writing(path) as temporary:
        safetensors.torch.save_file(_whole_and_apart(tensors), temporary, metadata=unsealed)
        _seal(temporary)


@dataclass(frozen=True)
class Region:
    """Bytes `start` to `stop`, exclusive, of a file."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in files: its dtype, as safetensors names it, its shape, and its bytes'
    regions in order."""

    dtype: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


def gather(path: str | Path, stored: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Writes tensors that lie in other files to one file, without loading them.

    Raises:
        UserError: the disk is full, fails, or may not be written to; a file can't be read.
        ValueError: as `write`.
    """
    content: dict[str, dict] = {"__metadata__": _unsealed(path, metadata)}
    end = 0
    # As safetensors itself does: the widest numbers first, so that all are aligned.
    ordered = dict(sorted(stored.items(), key=lambda each: -untrusted.BITS[each[1].dtype]))
    for name, tensor in ordered.items():
        begin, end = end, end + sum(region.stop - region.start for region in tensor.regions)
        about = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        content[name] = about
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data after the header
    with whole.writing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered.values():
                for region in tensor.regions:
                    _copy(region, file)
        _seal(temporary)


def load(name: str, stored: Stored) -> Tensor:
    """Reads a tensor of floating-point numbers from the files in which it lies, in its own dtype.

    Raises:
        UserError: a file can't be read, or it is of other numbers.
    """
    if stored.dtype not in _FLOATS:
        raise UserError(f"{stored.regions[0].path}: {name!r} is of {stored.dtype}, no floats")
    data = io.BytesIO()
    for region in stored.regions:
        _copy(region, data)
    if not data.tell():
        return torch.empty(stored.shape, dtype=_FLOATS[stored.dtype])
    return torch.frombuffer(data.getbuffer(), dtype=_FLOATS[stored.dtype]).view(stored.shape)


def _copy(region: Region, file: BinaryIO) -> None:
    with open(region.path, "rb") as source:
        source.seek(region.start)
        left = region.stop - region.start
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise UserError(f"{region.path} became shorter while it was read; rerun")
            file.write(piece)
            left -= len(piece)


def join(path: str | Path, sources: Iterable[Path], metadata: Mapping[str, str]) -> None:
    """Writes the tensors of several files, made by `write`, to one file, without loading them.

    Args:
        sources: no two of them with a tensor of the same name.

    Raises:
        UserError: as `write` and `read`.
    """
    stored = {}
    for source in map(Path, sources):
        _checked(source, whole=True)
        with open(source, "rb") as file:
            header, _ = _parts(file.fileno(), whole=False)
        entries = json.loads(header[8:])
        del entries["__metadata__"]
        for name, entry in sorted(entries.items(), key=lambda each: each[1]["data_offsets"]):
            begin, end = (len(header) + offset for offset in entry["data_offsets"])
            stored[name] = Stored(entry["dtype"], entry["shape"], (Region(source, begin, end),))
    gather(path, stored, metadata)


def _unsealed(path: str | Path, metadata: Mapping[str, str]) -> dict[str, str]:
    if taken := {_DATA, seals.KEY} & metadata.keys():
        raise ValueError(f"{path}: the metadata's key {min(taken)!r} is the format's own")
    return dict(metadata) | {_DATA: _NO_DIGEST, seals.KEY: seals.EMPTY}


def _seal(path: Path) -> None:
    with open(path, "rb+") as file:
        header, data = _parts(file.fileno())
        empty = f'"{_DATA}":"{_NO_DIGEST}"'.encode()
        file.write(seals.seal(header.replace(empty, f'"{_DATA}":"{data}"'.encode())))


def _whole_and_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with a storage of its own that it fills, as safetensors asks
    for; copied only where that is not so."""
    copies, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(storage.data_ptr())
        copies[name] = tensor
    return copies


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata; the tensors are not looked at. Raises UserError as `read` does."""
    return _checked(Path(path), whole=False)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and the metadata.

    Raises:
        UserError: the file is missing, truncated, not safetensors, or not what `write` wrote.
    """
    while True:
        before = _identity(path)
        stored = _checked(Path(path), whole=True)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                read = {k: file.get_tensor(k) for k in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise _broken(path, error) from error
        # It was opened twice: another run may have put a newer file in its place in between.
        if before == _identity(path):
            return read, stored


def opened(path: str | Path, check: bool = True) -> tuple[safetensors.safe_open, dict[str, str]]:
    """A file that is open to read tensor by tensor, and its metadata. Nobody may replace the file
    meanwhile.

    Args:
        check: whether to check the tensors' digest, too, and not the header alone.

    Raises:
        UserError: as `read`.
    """
    stored = _checked(Path(path), whole=check)
    try:
        return safetensors.safe_open(path, framework="pt"), stored
    except (safetensors.SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _identity(path: str | Path) -> tuple | None:
    """Changes when another file takes the place of this one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked(path: Path, whole: bool) -> dict[str, str]:
    """The metadata, once the header, and the data if `whole`, are checked. Raises as `read`."""
    if not path.is_file():
        raise UserError(f"{path} does not exist. Run the stage that writes it.")
    try:
        with open(path, "rb") as file:
            header, data = _parts(file.fileno(), whole)
        content = json.loads(header[8:]) if seals.sealed(header) else {}
        stored = dict(content.pop("__metadata__", {}))
        size = len(header) + max((t["data_offsets"][1] for t in content.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, error) from error
    if stored and size != path.stat().st_size:
        raise _broken(path, "it is too short or too long")
    if not stored or whole and stored.get(_DATA) != data:
        raise UserError(f"{path} {seals.DAMAGED}; {seals.REMAKE}")
    return {key: value for key, value in stored.items() if key not in (_DATA, seals.KEY)}


def _parts(file: int, whole: bool = True) -> tuple[bytes, str]:
    """A file's header, with its length in front; the digest of the rest, empty unless `whole`."""
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if size < 8 or 8 + length > size:
        raise ValueError("it ends within its header")
    header = os.pread(file, 8 + length, 0)
    return header, seals.digest(file, 8 + length, size - 8 - length) if whole else ""


def _broken(path: str | Path, error: Exception | str) -> UserError:
    if isinstance(error, Exception) and (trouble := errors.trouble(error, path)):
        return UserError(trouble)
    return UserError(f"{path} is not a whole safetensors file ({error}); {seals.REMAKE}")
