"""Prompts files, as the stages and the checks before them read them. No torch."""

import csv
import re
from pathlib import Path

from ppcl.errors import UserError

JUDGE_COLUMNS = ("digit", "digit_color", "background_color")
"""What the judge `digits` needs to know of every evaluation prompt."""


def read(path: str | Path, key: str = "prompts") -> list[dict[str, str]]:
    """The rows of a prompts file: each has `prompt`, a CSV keeps its other columns too.

    A .csv needs a header with `prompt`; any other file holds one prompt per line (empty lines
    are skipped). A column `image` names a picture for pipelines that take one, relative to the
    file's folder or to the working directory; rows hold the path that was found.

    Raises UserError if the file is missing, empty, not UTF-8 or has no prompt column, or if a
    picture is missing.
    """
    try:
        # utf-8-sig: spreadsheets prefix a byte order mark, which would become part of a prompt.
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {path} is not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(
            f"{key}: cannot read {path} ({error.strerror}); set the key to a prompts file"
        ) from error
    if str(path).lower().endswith(".csv"):
        reader = csv.DictReader(text.splitlines(keepends=True))
        if text.strip() and "prompt" not in (reader.fieldnames or []):
            raise UserError(f"{key}: {path} has no column 'prompt'; name it in the first line")
        rows = list(reader) if text.strip() else []
        for row in rows:
            if None in row:
                raise UserError(
                    f"{key}: {path}: '{row['prompt']}' is followed by more columns than the header "
                    "has; put prompts with commas in double quotes"
                )
        rows = [row for row in rows if (row["prompt"] or "").strip()]
        for row in rows:
            if "image" in row:
                row["image"] = _picture(row["image"] or "", Path(path), key, row["prompt"])
    else:
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{key}: {path} is empty; write at least one prompt, one per line")
    return rows


def pictures(rows: list[dict[str, str]]) -> list[str]:
    """Paths of the pictures that rows name, each once."""
    return list(dict.fromkeys(row["image"] for row in rows if "image" in row))


def _picture(name: str, file: Path, key: str, prompt: str) -> str:
    """Where a picture is; UserError if nowhere."""
    if not name.strip():
        raise UserError(
            f"{key}: {file}: '{prompt}' has no image; name one in every row, or drop the column"
        )
    if re.search(r"[{}\x00-\x1f]", name.strip()):
        raise UserError(
            f"{key}: {file}: the image {name.strip()!r} of '{prompt}' has braces or control "
            "characters in its name, which Snakemake can't follow; rename it"
        )
    for path in (file.parent / name.strip(), Path(name.strip())):
        if path.is_file():
            return str(path)
    raise UserError(
        f"{key}: {file}: the image {name.strip()} of '{prompt}' is neither in {file.parent} nor in "
        "the working directory; add the picture or correct its name"
    )
