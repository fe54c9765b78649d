"""Seams: where one kind of blocks ends and the next begins, on axes that number blocks.

FLUX has double blocks, then single ones: no interval reaches from one kind into the other, and what
is measured of them does not compare. Without torch, from record/blocks.parquet alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from ppcl.figures import style

_LINE: dict[str, Any] = {"color": "#222222", "lw": 1.1, "zorder": 2.5, "clip_on": False}
_LINE["path_effects"] = [withStroke(linewidth=2.6, foreground="white", alpha=0.7)]
_BELOW = 0.3  # inches from an axis to the lower end of a seam's line, past the numbers of blocks


@dataclass(frozen=True)
class Run:
    """Blocks of one kind, from `first` to `last`.

    Attributes:
        name: the list that they are in, such as `single_transformer_blocks`.
    """

    first: int
    last: int
    name: str


def runs(facts: pd.DataFrame) -> list[Run]:
    """The runs of like blocks of a model; of one kind alone, one run.

    facts: as schemas.BLOCK_FACTS.
    """
    facts = facts.sort_values("block")
    first = [int(block) for block in facts.loc[facts["seam"], "block"]]
    last = [block - 1 for block in first[1:]] + [len(facts) - 1]
    names = facts.set_index("block")["list"]
    return [Run(a, b, str(names[a])) for a, b in zip(first, last, strict=True)]


def mark(ax: Axes, kinds: Sequence[Run], axis: str = "x") -> None:
    """A line at every seam that an axis of block numbers reaches over."""
    low, high = sorted(ax.get_xlim() if axis == "x" else ax.get_ylim())
    for run in kinds[1:]:
        if low < run.first - 0.5 < high:
            line = ax.axvline if axis == "x" else ax.axhline
            line(run.first - 0.5, **_LINE)


def name_blocks(ax: Axes, kinds: Sequence[Run], words: str = "block", labelpad: float = 4) -> None:
    """Labels an x axis of block numbers; with seams, names each kind below its blocks, and draws
    the lines between them down to the names.

    Names that are wider than their blocks on this axis are left out.

    Args:
        words: the label without seams; with seams it stands before the longest run's name.
        labelpad: as matplotlib's, in points.
    """
    low, high = ax.get_xlim()
    shown = [run for run in kinds if run.last > low and run.first < high]
    if len(shown) < 2:
        names = [run.name for run in shown if len(kinds) > 1]
        ax.set_xlabel(": ".join([words, *names]), labelpad=labelpad)
        return
    box = ax.get_position()
    width, height = style.figure_of(ax).get_size_inches() * (box.width, box.height)
    for run in shown[1:]:
        seam = [run.first - 0.5] * 2
        ax.plot(seam, [0, -_BELOW / height], transform=ax.get_xaxis_transform(), **_LINE)
    longest = max(shown, key=lambda run: run.last - run.first)
    for number, run in enumerate(shown):
        begin, end = max(run.first - 0.5, low), min(run.last + 0.5, high)
        name = _name(run, shown[number - 1] if number else None)
        for label in ([f"{words}: {name}"] if run is longest else []) + [name]:
            if len(label) * 0.062 < (end - begin) / (high - low) * width:
                ax.annotate(
                    label,
                    ((begin + end) / 2, 0),
                    (0, -13.5 - labelpad),
                    xycoords=ax.get_xaxis_transform(),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=8.5,
                    parse_math=False,
                    annotation_clip=False,
                )
                break


def _name(run: Run, before: Run | None) -> str:
    """What a kind is called on an axis; blocks of one list may be of two kinds."""
    return run.name if before is None or before.name != run.name else f"{run.name}, another kind"
