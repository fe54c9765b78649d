"""Selection over intervals, text runs and FFNs against all sets, its budgets, and its speed."""

import itertools
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from readme_tables import ROOT

from ppcl import config, pins, schemas, selection, tables
from ppcl.errors import UserError
from ppcl.families import IMAGE, TEXT
from ppcl.pins import Named
from ppcl.plans import Part, Unit
from ppcl.selection import Choices, Weights

seeds = st.integers(0, 2**32 - 1)
tenths = st.integers(0, 11).map(lambda n: n / 10)
DEPTH = 5


def problem(seed, depth=DEPTH, intervals=4, runs=3, ffns=4):
    """Random candidates with costs of many ties, and three measures."""
    random = np.random.default_rng(seed)

    def cost():
        return float(random.integers(0, 12)) / 4

    pairs = [*itertools.combinations(range(depth), 2)]
    some = [
        [pairs[i] for i in random.permutation(len(pairs))[:count]] for count in (intervals, runs)
    ]
    every = [*itertools.product(range(depth), (IMAGE, TEXT))]
    linear = [every[i] for i in random.permutation(len(every))[:ffns]]
    choices = Choices(*({item: cost() for item in items} for items in (*some, linear)))

    def whole(low, high):
        return random.integers(low, high, depth).tolist()

    weights = {
        "blocks": selection.by_blocks(depth),
        "parameters": Weights(
            whole(5, 14),
            whole(2, 6),
            whole(0, 4),
            {ffn: int(random.integers(1, 4)) for ffn in every},
        ),
        "latency": Weights(
            random.random(depth).tolist(),
            (random.random(depth) / 3).tolist(),
            [0.0] * depth,
            {ffn: float(random.random() / 4) for ffn in every[::2]},
        ),
    }
    return choices, weights


def literally(intervals, runs, ffns, weights):
    """What a set saves in one measure, part by part as METHOD.md tells it; None if it is none.

    The depth is cut into parts: intervals, and blocks that are kept.
    """
    depth = len(weights.block)
    owner = [None] * depth
    for ends in [*intervals, *((b, b) for b in range(depth))]:
        for block in range(ends[0], ends[1] + 1):
            if owner[block] is None:
                owner[block] = ends
            elif ends[0] != ends[1]:
                return None
    parts = sorted(set(owner))
    lent = {}
    for first, last in runs:
        members = [p for p in parts if first <= p[0] and p[1] <= last]
        held = sum(p[1] - p[0] + 1 for p in members)
        if len(members) < 2 or held != last - first + 1 or lent.keys() & set(members):
            return None
        lent |= {p: n > 0 for n, p in enumerate(members)}
    total = -sum(weights.output[last] for _, last in runs)
    for part in parts:
        total += sum(weights.block[b] for b in range(part[0] + 1, part[1] + 1))
        total += weights.text[part[0]] if lent.get(part) else 0
    for block, stream in ffns:
        part = owner[block]
        if part[0] != block or (stream == TEXT and lent.get(part)):
            return None
        total += weights.ffn.get((block, stream), 0)
    return total


def every_set(choices, weights):
    """(intervals, runs, ffns, cost, savings) of every set that can be had."""

    def subsets(items):
        return itertools.chain.from_iterable(
            itertools.combinations(sorted(items), n) for n in range(len(items) + 1)
        )

    for chosen in itertools.product(*map(subsets, (choices.intervals, choices.runs, choices.ffns))):
        savings = {name: literally(*chosen, each) for name, each in weights.items()}
        if None not in savings.values():
            tables_ = (choices.intervals, choices.runs, choices.ffns)
            cost = sum(t[item] for t, items in zip(tables_, chosen, strict=True) for item in items)
            yield (*chosen, cost, savings)


MEASURES = [
    ["parameters"],
    ["blocks"],
    ["latency"],
    ["parameters", "latency"],
    ["blocks", "latency"],
]


@settings(max_examples=80, deadline=None)
@given(seeds, st.sampled_from(MEASURES), st.tuples(tenths, tenths))
def test_selection_is_the_best_of_all_sets(seed, measures, shares):
    choices, weights = problem(seed)
    sets = list(every_set(choices, weights))
    most = {m: max(savings[m] for *_, savings in sets) for m in measures}
    needs = {m: share * most[m] for m, share in zip(measures, shares, strict=False)}
    enough = [s for s in sets if all(s[4][m] >= need - 1e-12 for m, need in needs.items())]
    if not enough:
        with pytest.raises(UserError, match="the smallest budgets need .* at most"):
            selection.select(choices, weights, needs)
        return
    plan = selection.select(choices, weights, needs)
    assert plan.cost == pytest.approx(min(s[3] for s in enough), rel=1e-6, abs=1e-12)
    found = next(s for s in enough if s[:3] == (plan.intervals, plan.runs, plan.ffns))
    assert found[3] == pytest.approx(plan.cost, abs=1e-12)
    assert plan.saved == pytest.approx(found[4])


@settings(max_examples=60, deadline=None)
@given(seeds, st.data())
def test_pins_are_kept_and_nothing_else_is_added_without_need(seed, data):
    choices, weights = problem(seed)
    sets = list(every_set(choices, weights))
    wanted = data.draw(st.sampled_from(sets))
    pinned = Named(*map(frozenset, wanted[:3]))
    target = data.draw(st.sampled_from([s[4]["parameters"] for s in sets]))
    with_them = [
        s for s in sets if all(set(p) <= set(q) for p, q in zip(wanted[:3], s, strict=False))
    ]
    enough = [s for s in with_them if s[4]["parameters"] >= target]
    if not enough:
        with pytest.raises(UserError):
            selection.select(choices, weights, {"parameters": target}, pinned)
        return
    plan = selection.select(choices, weights, {"parameters": target}, pinned)
    assert plan.cost == pytest.approx(min(s[3] for s in enough), abs=1e-12)
    if wanted[4]["parameters"] >= target or target <= 0:
        assert (plan.intervals, plan.runs, plan.ffns) == wanted[:3]


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(["parameters", "blocks", "latency"]))
def test_larger_budgets_never_cost_more(seed, measure):
    choices, weights = problem(seed, depth=8, intervals=12, runs=8, ffns=10)
    costs = []
    for share in np.linspace(0, 1, 9):
        need = share * sum(weights[measure].block[1:]) * 0.9
        try:
            costs.append(selection.select(choices, weights, {measure: need}).cost)
        except UserError:
            break
    assert costs and costs == sorted(costs)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_saved_is_the_literal_saving(seed):
    choices, weights = problem(seed)
    for *chosen, _, savings in itertools.islice(every_set(choices, weights), 0, None, 7):
        for name, each in weights.items():
            assert selection.saved(*chosen, each) == pytest.approx(savings[name])


# ---- budgets

FACTS = {"transformer_parameters": 1000, "blocks": 20, "transformer_seconds": 0.5}


def test_a_budget_is_what_has_to_go():
    assert selection.needed(0.7, FACTS) == {"parameters": 300}
    assert selection.needed({"parameters": 640}, FACTS) == {"parameters": 360}
    assert selection.needed({"blocks": 12}, FACTS) == {"blocks": 8}
    assert selection.needed({"latency": 0.8}, FACTS) == {"latency": pytest.approx(0.1)}
    several = {"fraction": 0.7, "parameters": 600, "latency": 0.8}
    expected = {"parameters": 400, "latency": pytest.approx(0.1)}
    assert selection.needed(several, FACTS) == expected
    for small in ({"parameters": 2000}, {"blocks": 30}, {"latency": 1.0}, 1.0):
        assert list(selection.needed(small, FACTS).values()) == [0]


def test_targets_are_those_of_the_smallest_budgets():
    budgets = [0.7, {"parameters": 500}, {"blocks": 12}, {"blocks": 15}, {"latency": 0.9}, 0.9]
    variants = [{"name": str(n), "budget": budget} for n, budget in enumerate(budgets)]
    expected = {"parameters": 500, "blocks": 8, "latency": pytest.approx(0.05)}
    assert selection.targets(variants, FACTS) == expected
    least = config.tightest(variants)
    assert len(least) == 4 and selection.targets(least, FACTS) == expected


def test_parameters_needed_leaves_at_most_the_budget():
    assert selection.parameters_needed(20, 0.55) == 9
    assert selection.parameters_needed(1000, 0.7) == 300
    assert selection.parameters_needed(7, 0.5) == 4
    assert selection.parameters_needed(100, 0.57) == 43  # 0.57 * 100 is 56.99999999999999
    assert selection.parameters_needed(7, 1.0) == 0


def test_unreachable_budgets_say_what_can_be_had():
    choices = Choices({(0, 1): 1.0, (2, 3): 1.0})
    weights = {
        "blocks": selection.by_blocks(6),
        "parameters": Weights([10] * 6, [0] * 6, [0] * 6),
    }
    message = r"need 60 parameters removed; .* at most 20 parameters\. .*sensitivity\.longest"
    with pytest.raises(UserError, match=message):
        selection.select(choices, weights, {"parameters": 60})
    with pytest.raises(
        UserError, match=r"60 parameters and 1 blocks .* 2 blocks \(each on its own"
    ):
        selection.select(choices, weights, {"parameters": 60, "blocks": 1})


def latency_table(path, depth=4):
    parts = {"block": 0.4, "text": 0.1, "ffn_image": 0.06, "ffn_text": 0.05}
    found = [
        {"block": block, "part": part, "seconds": seconds + block / 1000}
        for block in range(depth)
        for part, seconds in parts.items()
        if block < 3 or part == "block"
    ]
    tables.write(path, pd.DataFrame(found), schemas.LATENCY, {"transformer_seconds": "2.5"})
    return path


def test_times_are_read_by_part(tmp_path):
    path = latency_table(tmp_path / "blocks.parquet")
    weights, whole = selection.timing(path, 4)
    assert whole == 2.5
    assert weights.block == pytest.approx([0.4, 0.401, 0.402, 0.403])
    assert weights.text == pytest.approx([0.1, 0.101, 0.102, 0])
    assert weights.output == [0] * 4 and (3, IMAGE) not in weights.ffn
    assert weights.ffn[2, TEXT] == pytest.approx(0.052)
    with pytest.raises(UserError, match="names blocks that this teacher lacks"):
        selection.timing(path, 3)


def test_units_save_the_seconds_of_their_parts(tmp_path):
    path = latency_table(tmp_path / "blocks.parquet")
    run = Unit((Part(0, 0, (TEXT,)), Part(1, 2, (IMAGE,))))
    alone = Unit((Part(1, 3),))
    found = selection.saved_seconds([run, alone], path)
    assert found == pytest.approx([0.05 + 0.402 + 0.101 + 0.061, 0.402 + 0.403])
    assert np.isnan(selection.saved_seconds([run, alone], None)).all()


# ---- models of real depth

# Qwen-Image's counts: parameters of a block, of a borrower's text stream, of l^h, and of an FFN.
BLOCK, BORROWED, OUTPUT, LINEAR = 339_831_296, 132_000_000, 9_440_256, 94_500_000
QWEN = {"transformer_parameters": 20_430_401_088, "blocks": 60}


def deep(depth=60, longest=6):
    """All candidates of a Qwen-like model, with random costs that grow with their length."""
    random = np.random.default_rng(0)
    every = [*itertools.product(range(depth), (IMAGE, TEXT))]
    pairs = [(a, b) for a, b in itertools.combinations(range(depth), 2) if b - a < longest]
    choices = Choices(
        {(a, b): float(random.exponential() * (b - a) ** 1.5) for a, b in pairs},
        {(a, b): float(random.exponential() * (b - a) / 3) for a, b in pairs},
        {ffn: float(random.exponential() / 2) for ffn in every},
    )
    jitter = 1 + 0.01 * random.random((3, depth))
    weights = {
        "blocks": selection.by_blocks(depth),
        "parameters": Weights(
            [BLOCK] * depth, [BORROWED] * depth, [OUTPUT] * depth, dict.fromkeys(every, LINEAR)
        ),
        "latency": Weights(
            (0.04 * jitter[0]).tolist(),
            (0.012 * jitter[1]).tolist(),
            [0.0] * depth,
            {ffn: 0.01 * float(jitter[2, ffn[0]]) for ffn in every},
        ),
    }
    return choices, weights


@pytest.mark.parametrize("measures", [["parameters"], ["latency"], ["parameters", "latency"]])
def test_sixty_blocks_with_all_candidates_take_seconds_and_are_exact(measures):
    choices, weights = deep()
    needs = {"parameters": 0.45 * 60 * BLOCK, "latency": 0.5 * 60 * 0.04}
    began = time.process_time()
    plan = selection.select(choices, weights, {m: needs[m] for m in measures})
    assert time.process_time() - began < 30
    assert plan.bound == pytest.approx(plan.cost, rel=1e-6)
    assert plan.intervals and plan.runs and plan.ffns


def test_the_published_lists_are_a_config_and_come_out_as_they_are():
    """As config/README.md has them."""
    text = (ROOT / "config/README.md").read_text(encoding="utf-8")
    published = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    variants = [{"name": "small", "budget": {"parameters": 11_000_000_000}}]
    wanted = config.complete({**published, "variants": variants}, "published")
    pinned, _ = pins.wishes(wanted, 60)
    assert len(pinned.intervals) == 13 and len(pinned.runs) == 6 and len(pinned.ffns) == 4
    choices, weights = deep()
    free = Choices(
        choices.intervals | dict.fromkeys(pinned.intervals, 0.0),
        choices.runs | dict.fromkeys(pinned.runs, 0.0),
        choices.ffns,
    )
    needs = selection.targets(wanted["variants"], QWEN)
    plan = selection.select(free, weights, needs, pinned)
    assert set(plan.intervals) == pinned.intervals
    assert set(plan.runs) == pinned.runs and set(plan.ffns) == pinned.ffns
    assert plan.saved["blocks"] == 25
    # Kept blocks 51, 58, 59 and three intervals borrow the text of 50; five pairs have one each.
    assert plan.saved["parameters"] == 25 * BLOCK + 11 * BORROWED - 6 * OUTPUT + 4 * LINEAR


def test_flux_like_seam_and_sizes():
    """Two sizes of block; no interval over the seam, and text only before it."""
    choices, _ = deep(57)
    sizes = [340] * 19 + [141] * 38
    apart = {ends: c for ends, c in choices.intervals.items() if not ends[0] < 19 <= ends[1]}
    double = {run: c for run, c in choices.runs.items() if run[1] < 19}
    weights = {
        "blocks": selection.by_blocks(57),
        "parameters": Weights(sizes, [130] * 19 + [0] * 38, [9] * 57),
    }
    need = round(0.4 * sum(sizes))
    plan = selection.select(Choices(apart, double), weights, {"parameters": need})
    assert plan.bound == pytest.approx(plan.cost, rel=1e-6) and plan.saved["parameters"] >= need
    assert plan.runs
