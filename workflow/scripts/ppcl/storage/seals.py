"""Digests inside files, by which a reader knows that it reads what was written.

A file's description (JSON, the header of safetensors, the footer of parquet) ends with a seal: the
SHA-256 of the description itself with zeros in the seal's place. It holds the digests of the data
that it describes, so a reader checks no more than what it reads. Seals find damage, by a disk, a
copy or an editor; they are no signatures.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppcl.errors import UserError

KEY = "seal"
EMPTY = "sha256:" + "0" * 64
DAMAGED = "is not what was written"
REMAKE = "delete it and rerun; the stage that writes it makes it again"

# As JSON writes it, or as parquet's footer does: a text's length precedes it (71, which is "G").
_SEAL = re.compile(rb'seal(?:": ?"|\x18G)sha256:([0-9a-f]{64})')
_BLOCK = 16 << 20


def seal(description: bytes) -> bytes:
    """The description with its digest in place of EMPTY.

    Raises:
        UserError: it holds several seals, as when a prompt's text looks like one.
    """
    matches = list(_SEAL.finditer(description))
    if len(matches) != 1:
        raise UserError(f"a text in the results looks like a seal ({EMPTY[:10]}...); change it")
    start, end = matches[0].span(1)
    digest = hashlib.sha256(description).hexdigest().encode()
    return description[:start] + digest + description[end:]


def sealed(description: bytes) -> bool:
    """Whether the description is what `seal` returned."""
    matches = list(_SEAL.finditer(description))
    if len(matches) != 1:
        return False
    start, end = matches[0].span(1)
    zeroed = description[:start] + b"0" * 64 + description[end:]
    return hashlib.sha256(zeroed).hexdigest().encode() == matches[0][1]


def digest(file: int, start: int, size: int) -> str:
    """SHA-256 (hex) of the digests of 16 MiB blocks of a part of a file.

    In blocks, so that all cores of the machine hash a large file.

    Args:
        file: descriptor of an open file, whose position does not matter.
    """

    def block(offset: int) -> bytes:
        count = min(_BLOCK, start + size - offset)
        return hashlib.sha256(os.pread(file, count, offset)).digest()

    offsets = range(start, start + size, _BLOCK)
    if len(offsets) < 2:
        return hashlib.sha256(b"".join(map(block, offsets))).hexdigest()
    with ThreadPoolExecutor(min(len(offsets), os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(block, offsets))).hexdigest()


def file_digest(path: Path) -> str:
    """`digest` of a whole file."""
    with open(path, "rb") as file:
        return digest(file.fileno(), 0, os.fstat(file.fileno()).st_size)
