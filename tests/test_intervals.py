"""Eq. 5 against a literal search, selection against all subsets, and the stage's program."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl import intervals, schemas, similarity, tables
from ppcl.errors import UserError
from ppcl.intervals import Interval

seeds = st.integers(0, 2**32 - 1)


def random_cka(seed, depth):
    """[first, last]: falls with every added block, unevenly; NaN below the diagonal."""
    generator = np.random.default_rng(seed)
    falls = generator.exponential(0.05, size=(depth, depth))
    falls[np.tril_indices(depth, -1)] = 0
    cka = 1 - np.cumsum(falls, axis=1)
    cka[np.tril_indices(depth, -1)] = np.nan
    return cka


def every_interval(cka, runs):
    """All intervals inside the runs, priced by 1 - cka."""
    return intervals.priced(intervals.all_within(runs), cka, 1 - cka)


def literal_eq_5(cka, u, depth, tolerance):
    """v of METHOD.md with 0-based blocks: cka(u, k) is cka[u + 1, k], and M is depth - 1."""

    def cka_of(k):
        return 1.0 if k == u else cka[u + 1, k]

    def delta(k):
        return -(cka_of(k) - cka_of(k - 1))

    ends = [v for v in range(u + 2, depth) if v + 1 < depth and delta(v + 1) > delta(v) + tolerance]
    return min(ends, default=depth - 1)


def subsets_without_overlap(choices, after=-1):
    """Every set of disjoint intervals, as tuples in order of depth."""
    yield ()
    for it in choices:
        if it.first > after:
            for rest in subsets_without_overlap(choices, it.last):
                yield (it, *rest)


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
    delta = similarity.differences(cka)
    np.testing.assert_allclose(delta[0], falls)
    assert intervals.trend_end(delta, 0, 5) == 3  # the rise at k = 4 ends the run at block 3
    assert intervals.trend_end(delta, 0, 5, tolerance=0.21) == 5  # a rise of 0.2 is noise
    assert intervals.trend_end(delta, 0, 3) == 3
    # A rise at the second block (k = u + 2) is out of Eq. 5's range: k - 1 starts at u + 2.
    cka[0] = 1 - np.cumsum([0.1, 0.3, 0.2, 0.1, 0.1, 0.1])
    assert intervals.trend_end(similarity.differences(cka), 0, 5, 1e-9) == 5


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
    found = intervals.all_within(intervals.spans(depth, seams, kept), longest)
    assert found == [
        (first, last)
        for first, last in itertools.combinations(range(depth), 2)
        if last - first < (longest or depth)
        and not kept & set(range(first, last + 1))
        and not any(first < seam <= last for seam in seams)
    ]


def test_priced_takes_similarity_and_cost_from_their_own_tables():
    cka, costs = random_cka(0, 4), random_cka(1, 4)
    costs[1, 3] = np.nan
    found = intervals.priced([(0, 2), (1, 3)], cka, costs)
    assert found[0] == Interval(0, 2, cka[0, 2], costs[0, 2])
    assert (found[1].cka, type(found[1].cka)) == (cka[1, 3], float)
    assert np.isnan(found[1].cost)


@settings(max_examples=30, deadline=None)
@given(
    seeds,
    st.lists(st.sampled_from([5, 12]), min_size=2, max_size=6),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.sets(st.integers(0, 5), max_size=2),
    st.none() | st.integers(2, 6),
)
def test_selection_is_the_best_of_all_subsets(seed, sizes, share, floor, protected, longest):
    """By 1 - cka, or by costs of their own that were measured up to a longest run only."""
    depth = len(sizes)
    cka = random_cka(seed, depth)
    costs = 1 - cka
    if longest:
        costs = np.random.default_rng(seed + 1).exponential(size=(depth, depth))
        costs[np.triu_indices(depth, longest)] = np.nan
    needed = round(share * sum(sizes[1:]))
    choices = intervals.priced(intervals.all_within([range(depth)]), cka, costs)
    usable = [it for it in choices if it.cka >= floor and not set(it.blocks) & protected]
    usable = [it for it in usable if it.last - it.first < (longest or depth)]
    options = []
    for subset in subsets_without_overlap(usable):
        saved = sum(sum(sizes[b] for b in it.blocks) - sizes[it.first] for it in subset)
        options.append((saved, sum(costs[it.first, it.last] for it in subset)))
    enough = [option for option in options if option[0] >= needed]
    if not enough:
        with pytest.raises(
            UserError,
            match=r"cka_floor.*protect_first.*protect_last.*sensitivity\.longest.*segmentation",
        ):
            intervals.select(choices, sizes, needed, floor, protected)
        return
    plan = intervals.select(choices, sizes, needed, floor, protected)
    close = [option for option in enough if option[0] < needed + min(sizes)]
    if close:
        expected = min(cost for _, cost in close)
    else:
        closest = min(saved for saved, _ in enough)
        expected = min(cost for saved, cost in enough if saved == closest)
    assert plan.cost == pytest.approx(expected, abs=1e-12)
    assert plan.cost == pytest.approx(sum(it.cost for it in plan.intervals), abs=1e-12)
    assert plan.saved == sum(
        sum(sizes[b] for b in it.blocks) - sizes[it.first] for it in plan.intervals
    )
    assert plan.saved >= needed
    assert all(a.last < b.first for a, b in itertools.pairwise(plan.intervals))
    assert set(plan.intervals) <= set(usable)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_one_table_gives_the_best_plan_for_every_count(seed):
    cka = random_cka(seed, 6)
    choices = every_interval(cka, [range(6)])
    table = intervals.plans(choices, [7] * 6)
    best = {}
    for subset in subsets_without_overlap(choices):
        removed = sum(it.removed for it in subset)
        cost = sum(1 - it.cka for it in subset)
        best[removed] = min(cost, best.get(removed, np.inf))
    # Blocks of one size leave one plan per count.
    assert {n: plan.cost for (n, _), plan in table.items()} == pytest.approx(best, abs=1e-12)
    assert len(table) == len(best)
    for key, plan in table.items():
        assert key == (plan.removed, plan.saved) == (plan.removed, 7 * plan.removed)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 15))
def test_equal_blocks_remove_exactly_the_count_and_no_worse_than_greedy(seed, removed):
    cka = random_cka(seed, 30)
    choices = every_interval(cka, [range(30)])
    plan = intervals.select(choices, [10] * 30, 10 * removed - 3)
    assert plan.removed == removed
    greedy, left = [], removed
    for it in sorted(choices, key=lambda it: it.cost / it.removed):
        if it.removed <= left and not any(set(it.blocks) & set(other.blocks) for other in greedy):
            greedy.append(it)
            left -= it.removed
    if left == 0:
        assert plan.cost <= sum(it.cost for it in greedy) + 1e-12


def test_overshoot_is_taken_only_where_nothing_fits():
    long, short = Interval(0, 3, 0.99, 0.01), Interval(4, 5, 0.5, 0.5)
    assert intervals.select([long, short], [1] * 6, 1).intervals == (short,)
    assert intervals.select([long, short], [1] * 6, 2).intervals == (long,)
    assert intervals.select([long], [1] * 6, 1).intervals == (long,)
    assert intervals.select([long, short], [1] * 6, 0).intervals == ()
    # One whole block more than needed is too much, however cheap.
    assert intervals.select([Interval(0, 2, 0.99, 0.01), short], [1] * 6, 1).intervals == (short,)


def test_rows_say_what_a_selected_part_belongs_to():
    chain = [Interval(0, 3, 0.9, 0.1), Interval(4, 5, 0.8, 0.3)]
    plan = intervals.Plan(0.35, 2, (Interval(1, 2, 0.95, 0.05), chain[1]))
    part, run, whole = sorted(intervals.rows(chain, plan, 2, 0.1), key=lambda row: -row["cka"])
    assert (part["source"], part["selected"]) == ("optimal", True)
    assert part["reason"].endswith("part of the Eq. 5 run [0,3]")
    assert (run["source"], run["selected"]) == ("trend", False)
    assert run["reason"] == "costs more at this budget than [1,2] on its blocks"
    assert (whole["source"], whole["selected"]) == ("trend", True)
    assert "part of" not in whole["reason"]
    assert (whole["cost"], whole["tolerance"]) == (0.3, 0.1)


def test_unreachable_budget_says_what_can_be_had():
    choices = every_interval(random_cka(0, 6), [range(6)])
    with pytest.raises(UserError, match=r"needs 60 .* at most 30 \(3 of 6 blocks\)"):
        intervals.select(choices, [10] * 6, 60, protected={0, 5})


def test_parameters_needed_leaves_at_most_the_budget():
    assert intervals.parameters_needed(20, 0.55) == 9
    assert intervals.parameters_needed(1000, 0.7) == 300
    assert intervals.parameters_needed(7, 0.5) == 4
    assert intervals.parameters_needed(100, 0.57) == 43  # 0.57 * 100 is 56.99999999999999
    assert intervals.parameters_needed(7, 1.0) == 0


def test_flux_like_seam_and_sizes_take_moments():
    sizes = [340] * 19 + [141] * 38
    cka = random_cka(1, 57)
    runs = intervals.spans(57, [0, 19])
    plan = intervals.select(every_interval(cka, runs), sizes, round(0.3 * sum(sizes)))
    assert 0 <= plan.saved - 0.3 * sum(sizes) < 142
    assert not any(it.first < 19 <= it.last for it in plan.intervals)


def write_cka(path, cka, **facts):
    first, last = np.nonzero(np.isfinite(cka))
    delta = similarity.differences(cka)[first, last]
    values = {"cka": cka[first, last], "delta": delta}
    for name in ("cka", "delta"):
        values |= {f"{name}_low": values[name], f"{name}_high": values[name]}
    table = pd.DataFrame({"stream": "mean", "start": first - 1, "end": last, **values})
    depth = len(cka)
    facts = {
        "block_parameters": [100] * depth,
        "transformer_parameters": 100 * depth + 50,
        "seams": [0],
        "untouchable": [],
        "delta_noise": {"mean": 0.0},
        **facts,
    }
    tables.write(path, table, schemas.CKA, {key: json.dumps(value) for key, value in facts.items()})


def write_costs(path, costs):
    """The table of `sensitivity` from costs [first, last]; NaN is not measured."""
    first, last = np.nonzero(np.isfinite(costs))
    table = {"first": first, "last": last, "velocity_error": costs[first, last], "rows": 8}
    tables.write(path, pd.DataFrame(table), schemas.SENSITIVITY, {})


def run_stage(monkeypatch, folder, stream="mean", **chosen):
    """The stage's program in this process; the rows that it wrote."""
    choices = {
        "seed": 0,
        "similarity": {"streams": stream},
        "intervals": {"segmentation": "trend", "cost": "cka", **chosen},
        "variants": [{"name": "small", "budget": 0.6}, {"name": "large", "budget": 0.9}],
    }
    script = Path(intervals.__file__).parents[1] / "intervals.py"
    arguments = ["--config", json.dumps(choices)]
    for table in ("cka", "sensitivity", "intervals"):
        arguments += [f"--{table}", str(folder / f"{table}.parquet")]
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    return tables.read(folder / "intervals.parquet", schemas.INTERVALS).to_pandas()


def test_stage_lists_the_chain_and_the_selection_with_reasons(tmp_path, monkeypatch):
    cka = random_cka(3, 12)
    write_cka(tmp_path / "cka.parquet", cka)
    found = run_stage(monkeypatch, tmp_path, cka_floor=0.2, protect_first=1)
    chain = intervals.trend_chain(cka, [range(12)])
    trend = found[found["source"] == "trend"]
    assert list(zip(trend["first"], trend["last"], strict=True)) == chain
    assert found["cost"].tolist() == pytest.approx(1 - found["cka"])
    selected = found[found["selected"]]
    assert selected["removed_blocks"].sum() == 5  # 1250 parameters, at most 750 stay: 500 go
    blocks = [b for row in selected.itertuples() for b in range(row.first, row.last + 1)]
    assert len(set(blocks)) == len(blocks)
    assert 0 not in blocks
    assert (selected["cka"] >= 0.2).all()
    assert found["reason"].str.len().min() > 10
    assert "protected block 0" in found["reason"][0]
    assert not any(found.duplicated(["first", "last"]))


def test_stage_keeps_untouchable_blocks_and_blocks_without_cka(tmp_path, monkeypatch):
    cka = random_cka(4, 12)
    cka[5, :] = cka[:5, 5:] = np.nan
    write_cka(tmp_path / "cka.parquet", cka, untouchable=[9], seams=[0, 3])
    found = run_stage(monkeypatch, tmp_path, segmentation="optimal")
    for row in found.itertuples():
        assert not {5, 9} & set(range(row.first, row.last + 1))
        assert not row.first < 3 <= row.last
    assert found.loc[found["selected"], "removed_blocks"].sum() == 5


@pytest.mark.parametrize(("tolerance", "used"), [("bootstrap", 0.037), (0.5, 0.5)])
def test_stage_tolerance(tmp_path, monkeypatch, tolerance, used):
    cka = random_cka(5, 12)
    write_cka(tmp_path / "cka.parquet", cka, delta_noise={"mean": 0.037})
    found = run_stage(monkeypatch, tmp_path, tolerance=tolerance)
    assert (found["tolerance"] == used).all()
    chain = intervals.trend_chain(cka, [range(12)], used)
    assert len(chain) == (found["source"] == "trend").sum()
    assert len(chain) < len(intervals.trend_chain(cka, [range(12)]))


def test_stage_names_the_streams_that_there_are(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 4))
    with pytest.raises(SystemExit) as stopped:
        run_stage(monkeypatch, tmp_path, stream="text")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "similarity.streams 'text'; set it to one of mean" in message


def test_stage_refuses_a_table_without_the_models_facts(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 4))
    table = tables.read(tmp_path / "cka.parquet", schemas.CKA)
    tables.write(tmp_path / "cka.parquet", table, schemas.CKA, {"seed": "0"})
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, tmp_path)
    assert "cka.parquet: its provenance lacks 'block_parameters'" in capsys.readouterr().err


def test_stage_takes_what_was_measured_to_cost_least(tmp_path, monkeypatch):
    depth, longest = 9, 4
    cka, costs = random_cka(7, depth), np.random.default_rng(8).exponential(size=(depth, depth))
    costs[np.tril_indices(depth)] = costs[np.triu_indices(depth, longest)] = np.nan
    write_cka(tmp_path / "cka.parquet", cka)
    write_costs(tmp_path / "sensitivity.parquet", costs)
    found = run_stage(monkeypatch, tmp_path, segmentation="optimal", cost="velocity", tolerance=0.2)
    selected = found[found["selected"]]
    assert selected["removed_blocks"].sum() == 4  # 950 parameters, at most 570 stay: 380 go
    measured = [
        Interval(first, last, 1.0, costs[first, last])
        for first, last in itertools.combinations(range(depth), 2)
        if last - first < longest
    ]
    best = min(
        sum(it.cost for it in subset)
        for subset in subsets_without_overlap(measured)
        if sum(it.removed for it in subset) == 4
    )
    assert selected["cost"].sum() == pytest.approx(best)
    np.testing.assert_array_equal(found["cost"], costs[found["first"], found["last"]])
    # Eq. 5's runs that are longer than what was measured have no cost, and say so.
    without = found[found["removed_blocks"] >= longest]
    assert len(without) and without["cost"].isna().all() and not without["selected"].any()
    assert (without["reason"] == "has no measured cost: longer than sensitivity.longest").all()
    assert len(without) == found["cost"].isna().sum()

    cheapest = selected[["first", "last"]].to_numpy().tolist()
    by_cka = run_stage(monkeypatch, tmp_path, segmentation="optimal")
    assert by_cka.query("selected")[["first", "last"]].to_numpy().tolist() != cheapest


def test_stage_refuses_costs_of_a_deeper_model(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 5))
    write_costs(tmp_path / "sensitivity.parquet", random_cka(6, 6))
    with pytest.raises(SystemExit) as stopped:
        run_stage(monkeypatch, tmp_path, cost="velocity")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "sensitivity.parquet names blocks that this teacher lacks" in message
    assert not (tmp_path / "intervals.parquet").exists()
