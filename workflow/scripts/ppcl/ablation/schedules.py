"""Ways to spend the any-subset phase, for the ablation: which units a step plugs in, and mixtures.

`DRAWS` holds one function each; the workflow's own phase draws as `uniform`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ppcl.pruning.units import Unit
from ppcl.search import integer_programs
from ppcl.training import distillation

# What a step plugs in, by its seed (run, step).
Draw = Callable[[tuple[int, ...]], list[Unit]]
# Of each unit: its error when it is plugged in alone, and what it saves.
Prices = tuple[Sequence[float], Sequence[int]]


def uniform(units: Sequence[Unit], prices: Prices) -> Draw:
    """Every size is equally likely, then every subset of that size."""
    return lambda seed: distillation.random_subset(units, seed)


def large(units: Sequence[Unit], prices: Prices) -> Draw:
    """A size's probability is proportional to it; every subset of that size is equally likely."""
    sizes = np.arange(1, len(units) + 1)

    def draw(seed: tuple[int, ...]) -> list[Unit]:
        rng = np.random.default_rng((*seed, 1))
        size = rng.choice(sizes, p=sizes / sizes.sum())
        return [units[i] for i in sorted(rng.permutation(len(units))[:size])]

    return draw


def budgets(units: Sequence[Unit], prices: Prices) -> Draw:
    """As `uniform` every other time; else what a budget drawn at random would choose."""
    costs, savings = prices

    @functools.cache
    def chosen(wanted: int) -> list[int]:
        return cheapest(costs, savings, wanted)

    def draw(seed: tuple[int, ...]) -> list[Unit]:
        rng = np.random.default_rng((*seed, 2))
        if rng.random() < 0.5:
            return distillation.random_subset(units, seed)
        # A whole number, as savings are, and above 0, as `integer_programs.cheapest` needs it.
        return [units[i] for i in chosen(math.ceil((1 - rng.random()) * sum(savings)))]

    return draw


def everything(units: Sequence[Unit], prices: Prices) -> Draw:
    """All units at every step: students learn to serve the model of this one size alone."""
    return lambda seed: list(units)


DRAWS = {"uniform": uniform, "large": large, "budgets": budgets, "everything": everything}


def cheapest(costs: Sequence[float], savings: Sequence[float], wanted: float) -> list[int]:
    """Indices of the units that save at least `wanted` at the least total cost; all units where
    rounding makes `wanted` more than they save."""
    taken = integer_programs.cheapest(costs, [[saved] for saved in savings], [wanted])
    return list(range(len(costs)) if taken is None else taken.columns)


def mixed(losses: Callable, others: Callable, name: str, weight: float) -> Callable:
    """Step losses of one phase, then `weight` times those of another, logged under `name`.

    Args:
        losses, others: functions of the step (see training.Losses).
    """

    def losses_of_step(step: int) -> Iterator:
        yield from losses(step)
        for _, loss, _ in others(step):
            yield name, weight * loss, {}

    return losses_of_step
