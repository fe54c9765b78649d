"""Captions of coloured handwritten digits, as prompts of the embedded teacher."""

import hashlib
from dataclasses import dataclass
from functools import cache

from ppcl.digits.handwriting import COLORS

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a {c} handwritten {d} on a {b} background",
    "the digit {d} in {c} over {b}",
    "a {c} {d} on {b}",
    "{c} {d} , {b} background",
    "handwritten {d} in {c} ink on {b} paper",
    "a photo of a {c} digit {d} on {b} paper",
    "on a {b} background , a {c} {d}",
    "{b} paper with a {c} {d} on it",
    "the number {d} , {c} on {b}",
    "a {b} image of the number {d} in {c}",
    "a {b} card showing a {c} {d}",
    "{d} written in {c} on {b}",
    "someone wrote {d} in {c} on a {b} wall",
    "a {c} number {d} over a {b} background",
)


@dataclass(frozen=True)
class Caption:
    """A caption and the three facts it states."""

    prompt: str
    digit: int
    digit_color: str
    background_color: str


@cache
def captions(split: str) -> tuple[Caption, ...]:
    """All captions of a split, in a fixed order.

    Args:
        split: `train` (four fifths of all captions) or `evaluation` (the rest). The digest of the
            caption's text decides, so a caption never changes sides when templates are added.
    """
    every = (
        Caption(template.format(d=form, c=color, b=background), digit, color, background)
        for template in TEMPLATES
        for digit in range(10)
        for form in (str(digit), WORDS[digit])
        for color in COLORS
        for background in COLORS
        if color != background
    )
    held_out = split == "evaluation"
    return tuple(
        c for c in every if (hashlib.sha256(c.prompt.encode()).digest()[0] < 51) == held_out
    )
