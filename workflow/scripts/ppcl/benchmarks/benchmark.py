"""What a benchmark is here: a table's entry, and what is handed to and from its functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.errors import UserError
from ppcl.storage import seals, texts


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        key: what the benchmark calls it; files are named after it.
        text: what the pipeline is given.
        group: the part of the benchmark that it belongs to, such as GenEval's tag; may be empty.
        source: what has to lie beside its pictures, such as its line of the prompts file.
    """

    key: str
    text: str
    group: str = ""
    source: str = ""


@dataclass(frozen=True)
class File:
    """A file of pictures that a scorer reads.

    Attributes:
        path: below the benchmark's folder of pictures.
        prompt: number of its prompt.
        pictures: which of the prompt's pictures are in it: one, or several as a grid, row by row.
    """

    path: str
    prompt: int
    pictures: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The pictures that one model makes for one benchmark; its manifest holds it.

    Attributes:
        benchmark: its name in the registry.
        label: what its folder and its metrics are called.
        model: teacher, or the variant's name.
        part: the part of the benchmark (BenchmarkSettings.part); may be empty.
        count: pictures of each prompt.
        folder: of the benchmark's pictures, those of all models.
        prompts: in the order of the prompts file.
        others: the run's other models, where it is known: their scores are not this one's.
    """

    benchmark: str
    label: str
    model: str
    part: str
    count: int
    folder: str
    prompts: tuple[Prompt, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A metric as a scorer measured it.

    Attributes:
        scores: of pictures, or of prompts [n].
        prompts: number of each score's prompt [n].
        pictures: which of the prompt's pictures each is of [n]; 0 for a score of all of them.
        weights: of the scores in the metric, their weighted mean [n]; None: equal ones.
        total: the metric as the scorer gives it, where that is no such mean; None: it is one.
        higher_is_better: false for a distance.
    """

    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    prompts: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    pictures: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    weights: np.ndarray | None = None
    total: float | None = None
    higher_is_better: bool = True

    @property
    def shares(self) -> np.ndarray:
        """The weights [n], also where they are equal."""
        return np.ones(len(self.scores)) if self.weights is None else self.weights


# Name of a metric within its benchmark, "" for the one that sums it up -> what was measured.
Scores = dict[str, Measured]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its prompts are read, where its pictures go, how its scores are read back.

    Attributes:
        about: in a few words.
        prompts: (file, key of the config for messages, part) -> the prompts.
        files: the pictures that its scorer reads.
        scores: (plan, files with scores) -> metrics.
        patterns: of the paths that `files` and `texts` may make for {model}.
        score_patterns: (model, part) -> patterns of the files with its scores, below the
            benchmark's folder.
        command: how its scorer is started, with {pictures}, {scores} (the folders), {prompts}
            (their file), {model}, {count}, {side} (of a picture, in pixels), {grid}
            (columns,rows) and {part}.
        count: pictures of a prompt, as its authors have it.
        most: of them at most.
        columns: of a grid; 0: each picture is a file of its own.
        square: whether its scorer takes the sides of a picture to be equal.
        videos: whether it scores videos.
        parts: names of its parts, one of which is scored at a time; () if it has none.
        texts: other files that its scorer reads, path -> content.
    """

    about: str
    prompts: Callable[[Path, str, str], list[Prompt]]
    files: Callable[[Plan], list[File]]
    scores: Callable[[Plan, Sequence[Path]], Scores]
    patterns: tuple[str, ...]
    score_patterns: Callable[[str, str], Sequence[str]]
    command: str
    count: int
    most: int = 100
    columns: int = 0
    square: bool = False
    videos: bool = False
    parts: tuple[str, ...] = ()
    texts: Callable[[Plan], Mapping[str, str]] = lambda plan: {}


NAMES = "has at most 100 letters, none of them invisible, and does not end in _difference"


def names_metric(name: str) -> bool:
    """Whether a part of a benchmark, as strangers' files call it, can be the name of a metric in
    tables and figures (NAMES)."""
    return 0 < len(name) <= 100 and name.isprintable() and not name.endswith("_difference")


def write_manifest(path: Path, plan: Plan, files: Sequence[str], sides: tuple[int, int]) -> None:
    """Writes the plan, the files that were made by it, and height and width of a picture."""
    value = {"plan": asdict(plan), "files": list(files), "sides": list(sides)}
    texts.write_sealed(path, value)


def read_manifest(path: Path) -> tuple[Plan, list[str], tuple[int, int]]:
    """What `write_manifest` wrote.

    Raises:
        UserError: it is missing, or was changed.
    """
    value: dict[str, Any] = texts.read_sealed(path)
    try:
        plan = dict(value["plan"])
        plan["prompts"] = tuple(Prompt(**each) for each in plan["prompts"])
        plan["others"] = tuple(plan["others"])
        height, width = value["sides"]
        return Plan(**plan), list(value["files"]), (int(height), int(width))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no manifest of pictures; {seals.REMAKE}") from error
