"""The judges that `evaluate.judge` names: each reads facts from pictures, such as a colour.

A picture is right where what a judge reads is what the row of its prompt states, in a column of the
fact's name. A new judge is an entry in `JUDGES`, and its name in the config's schema: nothing else
knows one of them by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ppcl.errors import UserError


class Reader(Protocol):
    """A judge at work, with whatever it had to load or fit."""

    def read(self, pictures: np.ndarray) -> list[dict[str, Any]]:
        """Fact -> what is read, of every picture; pictures: [n, height, width, 3], 0 to 1."""


@dataclass(frozen=True)
class Judge:
    """What is known of a judge before it is loaded; an entry imports its code when it is called.

    Attributes:
        facts: what it reads, a column of the prompts file each -> what tables and figures call it.
        together: what they call that all facts are right.
        sides: height and width in pixels of the pictures that it reads; None: any.
        values: makes the values that prompts may state, fact -> values.
        load: makes it ready to read.
        tested: of a reader, metric -> whether it was right [n], on pictures that it was not fitted
            on and of which the truth is known; {} if there are none.
        words: what it read of a picture, as a reader would say it.
    """

    facts: Mapping[str, str]
    together: str
    sides: tuple[int, int] | None
    values: Callable[[], Mapping[str, Sequence[str]]]
    load: Callable[[], Reader]
    tested: Callable[[Any], Mapping[str, np.ndarray]]
    words: Callable[[Mapping[str, Any]], str]

    @property
    def labels(self) -> dict[str, str]:
        """Metric -> what figures call it: that a fact is right, and that all are."""
        named = {f"{fact}_accuracy": f"{words} right" for fact, words in self.facts.items()}
        return named | {"all_correct": f"{self.together} right"}


def named(name: str) -> Judge | None:
    """The judge that the config names; None for `none`."""
    return JUDGES.get(name)


def labels() -> dict[str, str]:
    """`Judge.labels` of all judges."""
    return {metric: label for judge in JUDGES.values() for metric, label in judge.labels.items()}


def facts() -> dict[str, str]:
    """Metric -> what tables call its fact, of all judges; without that all are right."""
    return {
        f"{fact}_accuracy": words
        for judge in JUDGES.values()
        for fact, words in judge.facts.items()
    }


def refuse_without_facts(name: str, rows: Sequence[Mapping[str, str]], path: str) -> None:
    """Raises UserError if a prompt states nothing of a fact that the judge `name` reads."""
    judge = named(name)
    for number, row in enumerate(rows if judge else (), start=1):
        if missing := [fact for fact in JUDGES[name].facts if not row.get(fact)]:
            where = "has no column" if number == 1 else f"has for prompt {number} no"
            raise UserError(
                f"evaluate.judge is '{name}', but {path} {where} {', '.join(missing)}; add it or "
                "set evaluate.judge: none"
            )


def refuse_unknown_facts(name: str, rows: Sequence[Mapping[str, str]], path: str) -> None:
    """Raises UserError if a prompt states what the judge `name` never reads."""
    judge = named(name)
    known = judge.values() if judge else {}
    for number, row in enumerate(rows):
        for fact, values in known.items():
            if row.get(fact) not in values:
                raise UserError(
                    f"evaluate.judge is {name}, but prompt {number} of {path} has {fact} "
                    f"'{row.get(fact)}'; it must be one of {', '.join(values)} "
                    "(or set evaluate.judge: none)"
                )


def refuse_sides(name: str, height: int, width: int) -> None:
    """Raises UserError if the judge `name` can't read pictures of this size."""
    judge = named(name)
    if judge and judge.sides and judge.sides != (height, width):
        raise UserError(
            f"evaluate.judge: {name} reads pictures of {judge.sides[1]} x {judge.sides[0]} pixels, "
            f"these have {width} x {height}; set evaluate.judge: none, or pipeline.height and width"
        )


def readings(
    judge: Judge, reader: Reader, pictures: np.ndarray, stated: Sequence[Mapping[str, str]]
) -> list[str]:
    """JSON of what is read in each picture: every fact; `text`, the same in words; `correct`.

    Args:
        pictures: [n, height, width, 3], 0 to 1.
        stated: the row of each picture's prompt.
    """
    return [
        json.dumps(
            read
            | {"text": judge.words(read)}
            | {"correct": all(str(read[fact]) == row[fact] for fact in judge.facts)}
        )
        for read, row in zip(reader.read(pictures), stated, strict=True)
    ]


def scores(
    judge: Judge, readings: Sequence[str], stated: Sequence[Mapping[str, str]]
) -> dict[str, np.ndarray]:
    """Metric -> 1 or 0 for each picture [n]: whether a fact is right, and whether all are."""
    read = [json.loads(text) for text in readings]
    right = {
        f"{fact}_accuracy": np.array(
            [float(str(mine[fact]) == row[fact]) for mine, row in zip(read, stated, strict=True)]
        )
        for fact in judge.facts
    }
    return right | {"all_correct": np.min(list(right.values()), axis=0)}


def _digits() -> Reader:
    from ppcl.digits.judge import Judge as DigitsJudge

    return DigitsJudge()


def _digits_tested(reader: Any) -> dict[str, np.ndarray]:
    from ppcl.digits.handwriting import digits

    count = len(digits("test")[1])
    right = round(reader.accuracy_on_real_digits()["digit"] * count)
    return {"judge_digit_accuracy": np.arange(count) < right}


def _digits_values() -> dict[str, Sequence[str]]:
    from ppcl.digits.handwriting import COLORS

    return {
        "digit": [str(digit) for digit in range(10)],
        "digit_color": COLORS,
        "background_color": COLORS,
    }


JUDGES = {
    "digits": Judge(
        facts={"digit": "digit", "digit_color": "digit colour", "background_color": "background"},
        together="all three",
        sides=(32, 32),
        values=_digits_values,
        load=_digits,
        tested=_digits_tested,
        words=lambda read: "{digit} {digit_color} on {background_color}".format(**read),
    ),
}
