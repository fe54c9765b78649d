"""The cheapest path that gains enough, against all paths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl import routes
from ppcl.routes import Arc


def take_or_leave(costs, gains):
    """A path is a subset of items."""
    arcs = []
    for index, (cost, gain) in enumerate(zip(costs, gains, strict=True)):
        arcs.append(Arc(index, index + 1, 0.0, (0.0,) * len(gain)))
        arcs.append(Arc(index, index + 1, cost, tuple(gain), (index,)))
    return arcs


@st.composite
def items(draw):
    """Costs, gains and needs; many ties, gains that are losses, needs that can't be had."""
    measures = draw(st.integers(0, 3))
    item = st.tuples(st.integers(0, 20), *[st.integers(-2, 9)] * measures)
    found = draw(st.lists(item, min_size=1, max_size=7))
    needs = draw(st.tuples(*[st.integers(0, 25)] * measures))
    return [cost / 8 for cost, *_ in found], [gain for _, *gain in found], needs


def all_subsets(costs, gains, needs):
    """The least cost that gains enough, or None."""
    costs_found = [
        sum(cost for cost, taken in zip(costs, chosen, strict=True) if taken)
        for chosen in itertools.product((False, True), repeat=len(costs))
        if all(
            sum(gain[m] for gain, taken in zip(gains, chosen, strict=True) if taken) >= need
            for m, need in enumerate(needs)
        )
    ]
    return min(costs_found, default=None)


@settings(max_examples=300, deadline=None)
@given(items(), st.sampled_from([2, 5, routes.CAP]))
def test_it_is_the_best_of_all_paths(items, cap):
    """With fronts cut down to a few ways, it still is a path that is enough, with a true bound."""
    costs, gains, needs = items
    best = all_subsets(costs, gains, needs)
    found = routes.cheapest(take_or_leave(costs, gains), needs, cap)
    if best is None:
        assert found is None
        return
    if cap == routes.CAP:
        assert found.cost == pytest.approx(best, abs=1e-12) and found.bound == found.cost
    elif found is None:  # only several needs at once may be lost with a cut front
        assert len(needs) > 1
        return
    assert found.bound <= best + 1e-9 and found.cost >= best - 1e-12
    assert found.cost == pytest.approx(sum(costs[i] for i in found.chosen), abs=1e-12)
    for measure, need in enumerate(needs):
        total = sum(gains[i][measure] for i in found.chosen)
        assert found.gains[measure] == total >= need


def test_dead_ends_are_no_paths():
    arcs = [Arc(0, 1, 0.0, (9.0,), ("dead",)), Arc(0, 2, 5.0, (1.0,), ("a",))]
    arcs += [Arc(2, 3, 1.0, (1.0,), ("b",)), Arc(2, 3, 0.5, (0.0,), ("c",))]
    assert routes.cheapest(arcs, [2]).chosen == ("a", "b")
    assert routes.cheapest(arcs, [1]).chosen == ("a", "c")
    assert routes.cheapest(arcs, [3]) is None
    assert routes.most(arcs).tolist() == [2]


@pytest.mark.parametrize("measures", [1, 2, 3])
def test_many_items_take_moments_and_are_exact(measures):
    random = np.random.default_rng(0)
    costs = random.exponential(size=120)
    gains = random.exponential(size=(120, 1)) * (1 + 0.2 * random.random((120, measures)))
    found = routes.cheapest(take_or_leave(costs, gains), 0.45 * gains.sum(axis=0))
    assert found.bound == found.cost


def test_costs_that_are_the_gains_are_cut_and_the_gap_is_small():
    """The hardest case: no way is better than any other, so that all fronts outgrow the cap."""
    gains = np.random.default_rng(0).random((60, 1))
    found = routes.cheapest(take_or_leave(gains[:, 0], gains), [13.0], cap=500)
    assert 12.9 < found.bound <= 13
    assert 13 <= found.cost < 13 * 1.02
