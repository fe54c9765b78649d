"""Eq. 5 against a literal search, and the candidates that it leaves."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.configuration import config
from ppcl.search import cka_draws, interval_costs, intervals
from ppcl.search.intervals import Interval

seeds = st.integers(0, 2**32 - 1)


def random_cka(seed, depth):
    """[first, last]: falls with every added block, unevenly; NaN below the diagonal."""
    generator = np.random.default_rng(seed)
    falls = generator.exponential(0.05, size=(depth, depth))
    falls[np.tril_indices(depth, -1)] = 0
    cka = 1 - np.cumsum(falls, axis=1)
    cka[np.tril_indices(depth, -1)] = np.nan
    return cka


def literal_eq_5(cka, u, depth, tolerance):
    """v of METHOD.md with 0-based blocks: cka(u, k) is cka[u + 1, k], and M is depth - 1."""

    def cka_of(k):
        return 1.0 if k == u else cka[u + 1, k]

    def delta(k):
        return -(cka_of(k) - cka_of(k - 1))

    ends = [v for v in range(u + 2, depth) if v + 1 < depth and delta(v + 1) > delta(v) + tolerance]
    return min(ends, default=depth - 1)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 14), st.sampled_from([0.0, 0.01, 0.1]))
def test_chain_is_literal_eq_5(seed, depth, tolerance):
    cka = random_cka(seed, depth)
    expected, u = [], -1
    while u + 2 < depth:
        v = literal_eq_5(cka, u, depth, tolerance)
        expected.append((u + 1, v))
        u = v
    chain = intervals.trend_chain(cka, [range(depth)], tolerance)
    assert chain == expected
    assert all(last > first for first, last in chain)
    # No gap: what follows an interval is the next one, or one last block alone.
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(chain))
    assert chain[-1][1] >= depth - 2


def test_trend_end_by_hand():
    # One search from the embeddings; Delta is 0.3, 0.2, 0.1, 0.05, 0.25, 0.01.
    falls = [0.3, 0.2, 0.1, 0.05, 0.25, 0.01]
    cka = np.full((6, 6), np.nan)
    cka[0] = 1 - np.cumsum(falls)
    delta = cka_draws.differences(cka)
    np.testing.assert_allclose(delta[0], falls)
    assert intervals.trend_end(delta, 0, 5) == 3  # the rise at k = 4 ends the run at block 3
    assert intervals.trend_end(delta, 0, 5, tolerance=0.21) == 5  # a rise of 0.2 is noise
    assert intervals.trend_end(delta, 0, 3) == 3
    # A rise at the second block (k = u + 2) is out of Eq. 5's range: k - 1 starts at u + 2.
    cka[0] = 1 - np.cumsum([0.1, 0.3, 0.2, 0.1, 0.1, 0.1])
    assert intervals.trend_end(cka_draws.differences(cka), 0, 5, 1e-9) == 5


def test_spans_end_at_seams_and_kept_blocks():
    assert intervals.spans(6) == [range(6)]
    assert intervals.spans(6, seams=[0, 4]) == [range(4), range(4, 6)]
    assert intervals.spans(6, kept={2}) == [range(2), range(3, 6)]
    assert intervals.spans(6, [3], {0, 3, 5}) == [range(1, 3), range(4, 5)]


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["trend", "optimal"]), st.lists(st.integers(1, 9), max_size=2))
def test_candidates_stay_inside_their_list(seed, segmentation, seams):
    cka = random_cka(seed, 10)
    runs = intervals.spans(10, seams)
    chain = intervals.trend_chain(cka, runs)
    choices = intervals.candidates(runs, segmentation, chain)
    assert len(set(choices)) == len(choices)
    for first, last in [*chain, *choices]:
        assert not any(first < seam <= last for seam in seams)
    if segmentation == "trend":
        pairs = {(f, k) for u, v in chain for f in range(u, v) for k in range(f + 1, v + 1)}
        assert set(chain) <= set(choices)
    else:
        pairs = {(f, k) for run in runs for f in run for k in run if k > f}
    assert set(choices) == pairs


@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 8), max_size=2),
    st.sets(st.integers(0, 8), max_size=2),
    st.none() | st.integers(2, 10),
)
def test_all_within_is_every_run_up_to_the_longest(depth, seams, kept, longest):
    runs = intervals.all_within(intervals.spans(depth, seams, kept), longest)
    assert runs == [
        (first, last)
        for first, last in itertools.combinations(range(depth), 2)
        if last - first < (longest or depth)
        and not kept & set(range(first, last + 1))
        and not any(first < seam <= last for seam in seams)
    ]


def test_priced_takes_similarity_and_cost_from_their_own_tables():
    cka, costs = random_cka(0, 4), random_cka(1, 4)
    costs[1, 3] = np.nan
    priced = intervals.priced([(0, 2), (1, 3)], cka, costs)
    assert priced[0] == Interval(0, 2, cka[0, 2], costs[0, 2])
    assert (priced[1].cka, type(priced[1].cka)) == (cka[1, 3], float)
    assert np.isnan(priced[1].cost)


def test_a_config_may_name_each_cost_of_the_catalogue():
    node = config.schema()["properties"]["intervals"]["properties"]["cost"]
    assert set(node["enum"]) == {*interval_costs.COSTS, "auto"}
