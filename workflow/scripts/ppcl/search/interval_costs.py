"""What an interval costs: a function per value of intervals.cost. Selection adds these costs up.

Costs are float64 [first, last], as in ppcl.search.intervals; NaN where nobody measured one, which
selection leaves out. Needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppcl.search import intervals, measured


@dataclass(frozen=True)
class CostInputs:
    """What costs are made of.

    Attributes:
        cka: [first, last], of the stream that decides.
        stream: its name, as the config's similarity.streams.
        sensitivity, probes: tables of these stages; None if nobody made them.
        training_leaves: share of a measured error that is left once students are trained.
    """

    cka: np.ndarray
    stream: str
    sensitivity: Path | None = None
    probes: Path | None = None
    training_leaves: float = 1.0

    @property
    def depth(self) -> int:
        return len(self.cka)


def velocity(given: CostInputs) -> np.ndarray:
    """The velocity error with an untrained student, times the share that training leaves."""
    return given.training_leaves * measured.costs(given.sensitivity, given.depth)


def dissimilarity(given: CostInputs) -> np.ndarray:
    """1 - cka(first - 1, last): what the paper predicts."""
    return 1 - given.cka


def influence(given: CostInputs) -> np.ndarray:
    """The sum of the influences of the blocks that go; see `intervals.by_influence`."""
    influences = measured.influences(given.probes, given.stream, given.depth)
    return intervals.by_influence(influences)


# What the config's intervals.cost may name, when `auto` is decided.
COSTS: dict[str, Callable[[CostInputs], np.ndarray]] = {
    "velocity": velocity,
    "cka": dissimilarity,
    "influence": influence,
}
