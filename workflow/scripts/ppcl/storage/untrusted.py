"""Checked readers of files that others made: texts, JSON, and the headers of safetensors files.

Whatever such a file holds, it is read in bounded time and memory, or refused with its name.
"""

import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any, TypeGuard

from ppcl.errors import UserError

JSON_LIMIT = 32 << 20  # bytes; an index of 100,000 weights has about 12 MiB
HEADER_LIMIT = 100_000_000  # bytes; the format's own
DEPTH = 64  # levels of objects and lists
DIMENSIONS = 64  # torch's own
BITS = {
    "BOOL": 8,
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: not a regular file, too large, not UTF-8, no JSON, not an object, or one whose
            names repeat or that is nested too deep.
        FileNotFoundError: there is no such file, about which the caller knows more.
    """
    return _parsed(_head(path, JSON_LIMIT)[0], path)


def text(path: Path, limit: int) -> str:
    """What a text file holds.

    Args:
        limit: most bytes that it may have.

    Raises:
        UserError: not a regular file, larger than `limit`, or not UTF-8.
        FileNotFoundError: there is no such file, about which the caller knows more.
    """
    try:
        return _head(path, limit)[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and data_offsets of every tensor of a safetensors file, none of which
    is read.

    Raises:
        UserError: it is truncated, or breaks a rule of the format.
        FileNotFoundError: there is no such file.
    """
    begin, size = _head(path, 8, whole=False)
    length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else size
    if length > HEADER_LIMIT or length > size - 8:
        raise _broken(path, "its header does not end within it, or is larger than 100 MB")
    header = _parsed(_head(path, 8 + length, whole=False)[0][8:], path)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise _broken(path, "its __metadata__ holds other values than texts")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1], path)):
        bits = BITS.get(entry.get("dtype")) if isinstance(entry.get("dtype"), str) else None
        if bits is None or not _counts(entry.get("shape")):
            raise _broken(path, f"{name[:200]!r} has no known dtype, or no shape")
        if entry["data_offsets"][0] != end:
            raise _broken(path, f"{name[:200]!r} does not begin where another ends")
        end = entry["data_offsets"][1]
        if math.prod(entry["shape"]) * bits != 8 * (end - entry["data_offsets"][0]):
            raise _broken(path, f"{name[:200]!r} is not as long as its shape and dtype say")
    if end != size - 8 - length:
        raise _broken(path, "its tensors do not fill it")
    return header


def _begin(entry: Any, path: Path) -> tuple[int, int]:
    """Where a tensor's data begin and end."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _broken(path, "it has a tensor without a place")
    return offsets[0], offsets[1]


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of integers, not too many, that 63 bits hold; no booleans."""
    if not isinstance(value, list) or len(value) > DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: truncated or not a safetensors file ({reason}); restore or remake it"
    )


def _head(path: Path, limit: int, whole: bool = True) -> tuple[bytes, int]:
    """The first bytes of a regular file, and its size; `whole` refuses a file with more bytes.

    Nothing else is opened: a pipe would wait for a writer, and a device may do anything.
    """
    try:
        # A link's target counts: the Hub's cache is made of links.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a regular file; put the file itself there")
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:
            size = os.fstat(f.fileno()).st_size
            if whole and size > limit:
                raise UserError(f"{path}: larger than {limit >> 20} MiB; restore the file")
            return f.read(limit), size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); mend that") from error


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        value = None
    except ValueError as error:  # also of bytes that are not UTF-8, and of endless numbers
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict) or _deep(value):
        raise UserError(
            f"{path}: not valid JSON of this kind: it should be one object, nested at most {DEPTH} "
            "levels deep; restore the file"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose names may not repeat: readers would differ in which of them counts."""
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name[:200]!r} is there twice")
        content[name] = value
    return content


def _deep(top: Any) -> bool:
    level = [top]
    for _ in range(DEPTH):
        nested = [value for value in level if isinstance(value, (dict, list))]
        level = [
            child
            for value in nested
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True
