"""Writing text files whole or not at all, and JSON with a seal that shows if it was changed."""

import json
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.storage import seals, whole


def write(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically (text as UTF-8)."""
    with whole.writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON atomically; NaN and infinity are refused (ValueError)."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_sealed(path: str | Path, value: dict) -> None:
    """As `write_json`, with a seal (ppcl/storage/seals.py) as the last key."""
    content = json.dumps(value | {seals.KEY: seals.EMPTY}, indent=1, allow_nan=False) + "\n"
    write(path, seals.seal(content.encode()))


def read_sealed(path: str | Path) -> dict:
    """What `write_sealed` wrote.

    Raises:
        UserError: the file can't be read, or is not what `write_sealed` wrote.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); run the stage that writes it"
        ) from error
    if not seals.sealed(content):
        raise UserError(f"{path} {seals.DAMAGED}; {seals.REMAKE}")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {seals.REMAKE}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON mapping; {seals.REMAKE}")
    return {key: kept for key, kept in value.items() if key != seals.KEY}
