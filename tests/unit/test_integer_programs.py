"""Integer programs against all subsets of their columns."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.search import integer_programs


def best_of_all(costs, gains, needs, rows):
    """The least cost of any set of columns that gains enough and keeps to the rows, or None."""
    totals = [
        sum(itertools.compress(costs, taken))
        for taken in itertools.product((0, 1), repeat=len(costs))
        if all(np.dot(taken, gained) >= need for gained, need in zip(gains, needs, strict=True))
        and all(sum(v * taken[i] for i, v in row.items()) <= most for row, most in rows)
    ]
    return min(totals, default=None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.booleans())
def test_it_is_the_cheapest_of_all_sets(seed, measures, wild):
    """Of costs with many ties, and of all magnitudes; with columns that lose, and exclusions."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 9))
    costs = 10.0 ** random.uniform(-15, 3, count) if wild else random.integers(0, 5, count) / 4
    gains = random.integers(-2, 10, (measures, count))
    needs = random.integers(1, 16, measures)
    rows = [
        ({int(i): 1.0 for i in random.permutation(count)[:2]}, 1.0)
        for _ in range(random.integers(3))
    ]
    best = best_of_all(costs.tolist(), gains, needs, rows)
    taken = integer_programs.cheapest(costs, gains.T, needs, rows)
    if best is None:
        assert taken is None
        return
    assert taken.cost == pytest.approx(best, rel=1e-7)
    assert taken.bound <= best * (1 + 1e-12) and taken.bound == pytest.approx(best, rel=1e-5)
    assert taken.columns == tuple(sorted(set(taken.columns)))
    assert (gains[:, list(taken.columns)].sum(axis=1) >= needs).all()


def test_of_equally_cheap_sets_the_smallest_is_taken():
    assert integer_programs.cheapest([1, 1, 2], [(1,), (1,), (2,)], [2]).columns == (2,)
    assert integer_programs.cheapest([0, 0, 0], [(1,), (1,), (2,)], [2]).columns == (2,)
    assert integer_programs.cheapest([0, 0, 0], [()] * 3, []).columns == ()
    assert (
        integer_programs.cheapest([0] * 5, [(1,)] * 5, [3]).columns
        == (0, 2, 4)
        == (integer_programs.cheapest([7] * 5, [(1,)] * 5, [3]).columns)
    )


def test_what_is_needed_is_met_to_the_last_parameter():
    """HiGHS calls a sum enough that falls short by a millionth."""
    sizes = [10**10, 10**10 - 1]
    assert integer_programs.cheapest([2.0, 1.0], [(size,) for size in sizes], [10**10]).columns == (
        0,
    )
    assert integer_programs.cheapest(
        [2.0, 1.0], [(size,) for size in sizes], [10**10 - 1]
    ).columns == (1,)
    assert (
        integer_programs.cheapest([1.0, 1.0], [(size,) for size in sizes], [sum(sizes) + 1]) is None
    )


def test_most_is_the_largest_gain():
    rows = [({0: 1.0, 1: 1.0}, 1.0)]
    assert integer_programs.most([5, 7, 2, -1], rows) == 9
    assert integer_programs.most([5, 7], [({0: -1.0}, -1.0), *rows]) == 5
    assert integer_programs.most([0, 0], rows) == 0


@pytest.mark.parametrize("measures", [1, 3])
def test_many_columns_take_moments(measures):
    random = np.random.default_rng(0)
    costs = random.exponential(size=120)
    gains = random.exponential(size=(120, 1)) * (1 + 0.2 * random.random((120, measures)))
    taken = integer_programs.cheapest(costs, gains, 0.45 * gains.sum(axis=0))
    assert taken.cost <= taken.bound * (1 + 1e-6)
