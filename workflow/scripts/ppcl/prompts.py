"""Prompts files, as the stages and the checks before them read them. No torch."""

import csv
from pathlib import Path

from ppcl.errors import UserError

JUDGE_COLUMNS = ("digit", "digit_color", "background_color")
"""What the judge `digits` needs to know of every evaluation prompt."""


def read(path: str | Path, key: str = "prompts") -> list[dict[str, str]]:
    """The rows of a prompts file: each has `prompt`, a CSV keeps its other columns too.

    A .csv needs a header with `prompt`; any other file holds one prompt per line (empty lines
    are skipped). Raises UserError if it is missing, empty, not UTF-8 or has no prompt column.
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
        rows = list(reader)
        for row in rows:
            if None in row:
                raise UserError(
                    f"{key}: {path}: '{row['prompt']}' is followed by more columns than the header "
                    "has; put prompts with commas in double quotes"
                )
        rows = [row for row in rows if (row["prompt"] or "").strip()]
    else:
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{key}: {path} is empty; write at least one prompt, one per line")
    return rows
