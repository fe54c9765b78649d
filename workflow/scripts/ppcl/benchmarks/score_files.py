"""Reads files in which scorers leave scores, so far as several of them are alike: whatever such a
file holds, it is read in bounded time and memory, or refused with its name."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.benchmarks import benchmark
from ppcl.benchmarks.benchmark import File, Measured, Plan
from ppcl.errors import UserError
from ppcl.storage import untrusted

LIMIT = 1 << 28  # bytes; GenEval's details of 2,212 pictures are some 5 MiB
AGAIN = "score the pictures again, or remove the file"


def refused(path: Path, reason: str) -> UserError:
    """The error of a file with scores that can't be used."""
    return UserError(f"{path}: {reason}; {AGAIN}")


def text(path: Path) -> str:
    """The text of a file with scores."""
    try:
        return untrusted.text(path, LIMIT)
    except FileNotFoundError as error:
        raise refused(path, "is gone") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a file with a JSON object per line; the last line has to be whole too."""
    content = text(path)
    if content and not content.endswith("\n"):
        # pandas ends the last line only since 1.5, so that one is read too, if it is whole.
        content += "\n"
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        value = _parsed(line, path, f"line {number}")
        if not isinstance(value, dict):
            raise refused(path, f"line {number} is no JSON object")
        yield f"line {number}", value


def json_value(path: Path) -> Any:
    """What a JSON file holds."""
    return _parsed(text(path), path, "it")


def _parsed(line: str, path: Path, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refused(path, f"{place} is not whole JSON ({error})") from error


def number(value: Any, path: Path, place: str) -> float:
    """A finite number, which may be a text or true or false."""
    try:
        if isinstance(value, str | int | float) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise refused(path, f"{place} holds no number but {str(value)[:60]!r}")


def metric(name: str, path: Path) -> str:
    """What a file calls a metric, if tables and figures can have it."""
    if not benchmark.names_metric(name):
        raise refused(path, f"names a metric {ascii(name[:60])}, and such a name {benchmark.NAMES}")
    return name


def table(path: Path) -> dict[str, dict[str, str]]:
    """Row -> column -> cell of a CSV file, as it stands, whose first column names the rows."""
    content = text(path)
    try:
        rows = list(csv.reader(io.StringIO(content)))
    except csv.Error as error:
        raise refused(path, f"is no table ({error})") from error
    if not content.endswith("\n"):  # its last number may have lost digits
        raise refused(path, "is half written: its last line does not end")
    width = len(rows[0]) if rows else 0
    if width < 2 or any(len(row) != width for row in rows):
        raise refused(path, "is half written, or no table: its rows have not the same length")
    names = [row[0] for row in rows[1:]]
    for line in (names, rows[0]):
        for name, times in Counter(line).items():
            if times > 1:
                raise refused(path, f"has {name[:60]!r} twice")
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}


def columns(path: Path) -> dict[str, dict[str, str]]:
    """As `table`, column -> row -> cell."""
    made: dict[str, dict[str, str]] = {}
    for row, cells in table(path).items():
        for column, cell in cells.items():
            made.setdefault(column, {})[row] = cell
    return made


def numbers(cell: str, path: Path, place: str) -> list[float] | None:
    """The numbers of a cell: one, or a list of them in brackets; None of an empty cell."""
    if not cell.strip():
        return None
    inside = cell.strip().removeprefix("[").removesuffix("]")
    return [number(each, path, place) for each in inside.split(",")]


class Collected:
    """Scores of the pictures of a plan, each of which is scored once.

    Args:
        plan: the pictures of one model.
        files: those that are scored, as `Benchmark.files` gives them.
        path: the file with the scores, for messages.
    """

    def __init__(self, plan: Plan, files: Sequence[File], path: Path):
        self._plan, self._path = plan, path
        self._files = {file.path.split("/", 1)[1]: file for file in files}
        self._depth = {name.count("/") + 1 for name in self._files}.pop()
        self.seen: dict[str, File] = {}

    def file(self, name: Any, place: str, text: str | None = None) -> File:
        """The file of the plan that a scorer's path names, which counts as scored now.

        Only the path's end has to be as in the plan: pictures may have been scored elsewhere.

        text: the prompt as the scorer has it, if it tells.
        """
        parts = Path(name).parts if isinstance(name, str) else ()
        end, model = "/".join(parts[-self._depth :]), (parts[: -self._depth] or ("",))[-1]
        known = self._files.get(end)
        if model in self._plan.others and model != self._plan.model:
            raise refused(
                self._path, f"{place} scores a picture of {model}, not of {self._plan.model}"
            )
        if known is None:
            raise refused(
                self._path,
                f"{place} scores {str(name)[:200]!r}, which is no picture of {self._plan.label}",
            )
        if text is not None and text != self._plan.prompts[known.prompt].text:
            raise refused(
                self._path, f"{place} has another prompt for {end} than {self._plan.label}"
            )
        if end in self.seen:
            raise refused(self._path, f"{place} scores {end} a second time")
        self.seen[end] = known
        return known

    def finish(self, may_miss: Container[int] = ()) -> None:
        """Raises UserError if a picture has no score; may_miss: of these prompts it needs none."""
        missing = [
            name
            for name, file in self._files.items()
            if name not in self.seen and file.prompt not in may_miss
        ]
        if missing:
            raise refused(
                self._path,
                f"is half written, or of other pictures: {len(missing)} of {len(self._files)} "
                f"have no score, such as {missing[0]}",
            )


def measured(files: Iterable[File], scores: Iterable[float], **more: Any) -> Measured:
    """A metric of a score for each file of one picture."""
    taken = list(files)
    return Measured(
        np.array(list(scores), dtype=np.float64),
        np.array([file.prompt for file in taken]),
        np.array([file.pictures[0] if len(file.pictures) == 1 else 0 for file in taken]),
        **more,
    )


def by_group(
    plan: Plan,
    files: Sequence[File],
    scores: Sequence[float],
    weights: np.ndarray | None = None,
    **more: Any,
) -> dict[str, Measured]:
    """Group of prompts -> the metric as `measured` makes it, of that group's alone; none of prompts
    without a group."""
    groups = [plan.prompts[file.prompt].group for file in files]
    made = {}
    for group in filter(None, dict.fromkeys(groups)):
        of = [number for number, each in enumerate(groups) if each == group]
        own = None if weights is None else weights[of]
        made[group] = measured([files[n] for n in of], [scores[n] for n in of], weights=own, **more)
    return made


def agree(path: Path, what: str, given: float, own: float, tolerance: float) -> None:
    """Raises UserError if a file's own sum of its scores is not that of what was read of it."""
    if not abs(given - own) <= tolerance:
        raise refused(
            path, f"says that {what} is {given:g}, but its scores of pictures make {own:g}"
        )


def newest(files: Sequence[Path], names: Mapping[Path, str]) -> list[Path]:
    """Of files that hold the same by `names`, the last in the order of their paths: scorers put the
    time into them."""
    last = {names[path]: path for path in sorted(files, key=str)}
    return sorted(last.values(), key=str)
