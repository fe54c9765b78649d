"""Reads prompts files, for the stages and for the checks before them. Imports no torch.

A file is read exactly as it stands, or refused with the number of the line. Text files are UTF-8,
and a newline, or a carriage return and a newline, ends a line: no other character does.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppcl.errors import UserError

FORMATS = ".txt (one prompt per line), .csv, .tsv, .jsonl or .parquet"


def read(path: str | Path, key: str = "prompts") -> list[dict[str, str]]:
    """The rows of a prompts file, column -> text. Each has `prompt`; tables keep other columns too.

    The file's ending decides its format. With .txt, or without an ending, a line is a prompt: blank
    lines are skipped, and blanks at both ends of a line dropped. Tables are .csv and .tsv, whose
    first line names the columns; .jsonl, with an object per line; and .parquet. Prompts in tables
    are kept as they are. A column `image` names a picture for pipelines that take one, relative to
    the file's folder or to the working directory; the row holds the path at which it exists.

    Args:
        key: the config key that names the file, for messages.

    Raises:
        UserError: the file is missing, empty, damaged or of another format (says in which line); or
            a picture is missing.
    """
    path, ending = Path(path), Path(path).suffix.lower()
    if ending not in _READERS:
        raise UserError(
            f"{key}: {path} ends in '{ending}', and prompts are read from {FORMATS}; save "
            "or rename it as what it is"
        )
    rows = []
    for place, row in _READERS[ending](path, key):
        where = f"{key}: {path}: {place}"
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UserError(
                f"{where}: the prompt is {shown(row.get('prompt'))}, and has to be a text; write "
                "one, or remove the whole row"
            )
        rows.append({_plain(name, where): _plain(value, where) for name, value in row.items()})
        if "image" in row:
            rows[-1]["image"] = _picture(row["image"], path, where)
        elif "image" in rows[0]:
            raise UserError(f"{where}: has no image; name one in every row, or in none")
        if "image" in row and "image" not in rows[0]:
            raise UserError(f"{where}: has an image, and rows before have none; name one in each")
    if not rows:
        raise UserError(f"{key}: {path} is empty; write at least one prompt, one per line")
    return rows


def table_rows(path: Path, key: str, need: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .csv, .jsonl or .parquet table, whose columns have to hold `need`."""
    if path.suffix == ".jsonl":
        return objects(path, key)
    if path.suffix == ".parquet":
        return _read_parquet(path, key, need)
    return _table(",", need)(path, key)


def pictures(rows: list[dict[str, str]]) -> list[str]:
    """Paths of the pictures that rows name, each once."""
    return list(dict.fromkeys(row["image"] for row in rows if "image" in row))


def heldout_count(prompts: int, fraction: float) -> int:
    """How many of so many different prompts are held out from every fit: their fraction, but at
    least two (one to select by and one to report on), and never all, so that one is left to fit
    on."""
    return min(max(2, round(prompts * fraction)), prompts - 1)


def shown(text: Any) -> str:
    """A value for messages: in quotes, on one line, cut to at most 70 characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= 70 else f"{quoted[:60]}...{quoted[-1]}"


def _regular(path: Path, key: str) -> bytes:
    """All bytes of a file; UserError if it is no regular file, or can't be read."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{key}: {path} is no regular file; set the key to a prompts file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{key}: cannot read {path} ({error.strerror}); set the key to a prompts file"
        ) from error


def lines(path: Path, key: str) -> list[str]:
    """The lines of a text file, without their line ends; UserError if it is not plain UTF-8."""
    content = _regular(path, key)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{key}: {path} is UTF-16; save the file as UTF-8")
    try:
        # utf-8-sig: spreadsheets prefix a byte order mark, which would become part of a prompt.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{key}: {path} is not UTF-8 (byte {error.start}, line {at}); save the file as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").split("\n")
    for mark, what in (
        ("\r", "a carriage return without a newline, so where lines end is unclear"),
        ("\0", "a NUL character, as texts that are not UTF-8 have"),
        ("\ufeff", "a byte order mark, as files have that were joined"),
    ):
        for number, line in enumerate(lines if mark in text else (), start=1):
            if mark in line:
                raise UserError(
                    f"{key}: {path}: line {number} holds {what}; save the file as UTF-8, with "
                    "plain line ends"
                )
    return lines


def _read_lines(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a file with one prompt per line."""
    numbered = [(n, line.strip(" \t")) for n, line in enumerate(lines(path, key), start=1)]
    numbered = [(number, line) for number, line in numbered if line.strip()]
    first = numbered[0][1] if numbered else ""
    names = [name.strip(' "').lower() for name in re.split(r"[,;\t]", first)]
    if "prompt" in names or first in ("[", "{") or _is_json(first):
        raise UserError(
            f"{key}: {path}: line {numbered[0][0]}, {shown(first)}, is of a table, but the file's "
            "name makes every line a prompt; let it end in .csv, .tsv or .jsonl, as it is"
        )
    return ((f"line {number}", {"prompt": line}) for number, line in numbered)


def _is_json(text: str) -> bool:
    """Whether a line is an object or a list."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def _table(
    delimiter: str, need: str = "prompt"
) -> Callable[[Path, str], Iterator[tuple[str, dict]]]:
    """A reader for tables with this delimiter, which yields (place, row)."""

    def rows(path: Path, key: str) -> Iterator[tuple[str, dict]]:
        of_file = lines(path, key)
        if not any(line.strip() for line in of_file):
            return
        reader = csv.reader([f"{line}\n" for line in of_file], delimiter=delimiter, strict=True)
        names: list[str] = []
        end = 0
        try:
            for cells in reader:
                start, end = end + 1, reader.line_num
                blank = not any(cell.strip() for cell in cells)
                if blank:
                    continue
                if not names:
                    names = [cell.strip() for cell in cells]
                    _check_names(names, f"{key}: {path}", of_file[start - 1], need)
                    continue
                place = f"line {start}" if start == end else f"lines {start} to {end}"
                if len(cells) != len(names):
                    raise UserError(
                        f"{key}: {path}: {place}: {shown(cells[0])} is of {len(cells)} columns, "
                        f"and there should be {len(names)}; put prompts with commas in double "
                        "quotes, and leave no column out"
                    )
                if quoted := [cell for cell in cells if re.match(r'\s+".*"\s*$', cell, re.S)]:
                    raise UserError(
                        f"{key}: {path}: {place}: {shown(quoted[0])} has a blank before its first "
                        "quote, which so is part of the text; remove that blank"
                    )
                row = {n: c.strip() for n, c in zip(names, cells, strict=True) if n}
                yield place, row | {need: cells[names.index(need)]}
        except csv.Error as error:
            if not names:
                _check_names(of_file[0].split(delimiter), f"{key}: {path}", of_file[0], need)
            raise UserError(
                f"{key}: {path}: the row that begins in line {end + 1} can't be read ({error}); "
                "close its double quotes, and write those inside of a quoted prompt twice"
            ) from error

    return rows


def _check_names(names: list[str], where: str, line: str, need: str = "prompt") -> None:
    """Raises UserError if the names of columns lack `need`, or have one twice.

    Args:
        line: the file's first line, for the message.
    """
    if need not in names:
        parts = [part.strip(' "') for part in re.split(r"[,;\t|]", line)]
        fix = "name it in the first line"
        if need in parts and len(parts) > len(names):
            fix = "separate columns by commas in a .csv, by tabs in a .tsv"
        elif close := [name for name in names if name.lower() == need]:
            fix = f"write '{close[0]}' in small letters"
        raise UserError(f"{where} has no column '{need}' (its first line: {shown(line)}); {fix}")
    for name in filter(None, names):
        if names.count(name) > 1:
            raise UserError(f"{where} has two columns '{name}'; rename or remove one")


def objects(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a file with a JSON object per line."""
    for number, line in enumerate(lines(path, key), start=1):
        if not line.strip():
            continue
        where = f"{key}: {path}: line {number}"
        try:
            row = json.loads(line, object_pairs_hook=lambda pairs: once(pairs, where))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not JSON ({error}); write one object per line, such as "
                '{"prompt": "a cat"}'
            ) from error
        if not isinstance(row, dict):
            raise UserError(f'{where} is no object; write one per line, such as {{"prompt": "a"}}')
        yield f"line {number}", row


def once(pairs: list[tuple[str, Any]], where: str) -> dict:
    """The mapping of a JSON object's (key, value) pairs; UserError if it has a key twice."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: has the key '{twice}' twice; remove one")
    return mapping


def _read_parquet(path: Path, key: str, need: str = "prompt") -> Iterator[tuple[str, dict]]:
    """(place, row) of a parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    content = _regular(path, key)
    if not content.strip():
        return
    try:
        table = parquet.ParquetFile(pa.BufferReader(content)).read()
        columns = {
            name: column.to_pylist()
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}: {path} is not a whole parquet file ({reason}); write or copy it anew"
        ) from error
    _check_names(table.column_names, f"{key}: {path}", ", ".join(table.column_names), need)
    for number in range(len(table)):
        yield f"row {number + 1}", {name: column[number] for name, column in columns.items()}


def _plain(value: Any, where: str) -> str:
    """A value of a row as text: whole numbers without a point, missing ones empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: {shown(text)} holds NUL or half a character; write it anew")
    return text


def _picture(name: Any, file: Path, where: str) -> str:
    """The path of the picture that a prompts file names; UserError if there is none."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"{where}: has no image (but {shown(name)}); name one in every row, or drop the column"
        )
    if re.search(r"[{}\x00-\x1f]", name.strip()):
        raise UserError(
            f"{where}: the image {name.strip()!r} has braces or control characters in its name, "
            "which Snakemake can't follow; rename it"
        )
    for path in (file.parent / name.strip(), Path(name.strip())):
        if os.path.isfile(path):  # Path.is_file raises for names that are too long
            return str(path)
    raise UserError(
        f"{where}: the image {shown(name.strip())[1:-1]} is neither in {file.parent} nor in the "
        "working directory; add the picture or correct its name"
    )


_READERS = {
    "": _read_lines,
    ".txt": _read_lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".jsonl": objects,
    ".parquet": _read_parquet,
}
