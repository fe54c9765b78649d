"""Selection over intervals, text runs, FFNs, ranks and trained units against all sets; its budgets,
and its speed."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Named
from ppcl.pruning.units import Modulation, NewBlock, Unit, units_of
from ppcl.search import measured, selection
from ppcl.search.budgets import needed, parameters_needed, targets
from ppcl.search.savings import Weights, by_blocks, saved
from ppcl.search.selection import Choices
from ppcl.settings import Settings, Variant
from ppcl.storage import schemas, tables
from ppcl.transformer.family import IMAGE, TEXT
from support import ROOT

seeds = st.integers(0, 2**32 - 1)
tenths = st.integers(0, 11).map(lambda n: n / 10)
DEPTH = 5


class Sizes:
    """Parameters of a made-up model of `depth` blocks, counted one new block at a time."""

    def __init__(self, random, depth, unread):
        self.depth, self.unread = depth, unread
        self.output = int(random.integers(1, 9))  # maps of text channels are alike
        names = ("rest", "query", "lost", "text", "input", "linear")
        self.of = [{name: int(random.integers(1, 9)) for name in names} for _ in range(depth)]
        self.ffn = {
            (b, s): int(random.integers(9, 20)) for b in range(depth) for s in (IMAGE, TEXT)
        }
        self.modulations = {}
        for block in range(depth + 1):
            for path, stream in (
                (("image", IMAGE), ("text", TEXT)) if block < depth else (("", ""),)
            ):
                shape = (2, 12) if stream else (2, 4)
                made = Modulation(block, path, *shape, ffn=stream, text=stream == TEXT)
                self.modulations[made.key] = made

    def part(self, part, ranks=None):
        """Of a new block, as the paper and METHOD.md tell what it has."""
        block, ranks = self.of[part.first], ranks or {}
        total = block["rest"]
        streams = {IMAGE} if part.borrows else {IMAGE, TEXT}
        total += block["input"] if part.borrows else block["text"]
        total += 0 if part.borrows or part.text == "lend" else block["query"] + block["lost"]
        total += self.output if part.text == "close" else 0
        for stream in streams:
            sixths = 6
            if stream == TEXT and part.text == "lend":
                sixths = 2
            elif stream in part.linear_ffn:
                sixths = 3
                total += block["linear"]
            else:
                total += self.ffn[part.first, stream]
            matrix = part.first, stream
            total += self.modulations[matrix].parameters(ranks.get(matrix), sixths)
        return total

    def model(self, units, ranks):
        """Of the whole model; None if a rank is of a matrix that is not there."""
        parts = [part for unit in units for part in unit.new_blocks]
        held = {block for part in parts for block in range(part.first, part.last + 1)}
        parts += [NewBlock(block, block) for block in range(self.depth) if block not in held]
        there = {(part.first, IMAGE) for part in parts} | {(self.depth, "")}
        there |= {(part.first, TEXT) for part in parts if not part.borrows}
        if ranks.keys() - there:
            return None
        last = self.modulations[self.depth, ""]
        return sum(self.part(part, ranks) for part in parts) + last.parameters(ranks.get(last.key))

    def weights(self, ffns, ranks, units):
        """As selection wants them: differences of the new blocks."""

        def saves(block, **role):
            return self.part(NewBlock(block, block)) - self.part(NewBlock(block, block, **role))

        blocks = range(self.depth)
        borrowed = [saves(block, text="borrow", source=(0, 0)) for block in blocks]
        return Weights(
            [self.part(NewBlock(block, block)) for block in blocks],
            borrowed,
            [0 if b == self.unread else self.output for b in blocks],
            {(b, stream): saves(b, linear_ffn=(stream,)) for b, stream in ffns},
            {
                (matrix, rank, sixths): self.modulations[matrix].saved(rank, sixths)
                for matrix, offered in ranks.items()
                for rank in offered
                for sixths in (2, 3, 6)
            },
            {
                name: self.model([], {}) - self.model([unit], {})
                for name, (unit, _) in units.items()
            },
            {b: saves(b, text="lend") for b in blocks},
        )


def problem(seed, depth=DEPTH, intervals=3, runs=2, ffns=3, matrices=2, units=1):
    """Random candidates, costs with many ties or of all magnitudes, three measures, sizes."""
    random = np.random.default_rng(seed)
    wild = random.random() < 0.5

    def cost():
        return 10.0 ** random.uniform(-12, 0) if wild else float(random.integers(0, 12)) / 4

    def some(items, count):
        return {items[i]: cost() for i in random.permutation(len(items))[:count]}

    sizes = Sizes(random, depth, [None, depth - 1][random.integers(2)])
    pairs = [*itertools.combinations(range(depth), 2)]
    every = [*itertools.product(range(depth), (IMAGE, TEXT))]
    taken = [*some(list(sizes.modulations), matrices)]
    choices = Choices(
        some(pairs, intervals),
        some(pairs, runs),
        some(every, ffns),
        {matrix: {rank: cost() for rank in (1, 2)} for matrix in taken},
        trained(random, depth, units, cost, sizes.unread),
        {matrix: sizes.modulations[matrix] for matrix in taken},
        sizes.unread,
    )
    weights = {
        "blocks": replace(
            by_blocks(depth),
            units={name: unit.removed_blocks for name, (unit, _) in choices.units.items()},
        ),
        "parameters": sizes.weights(every, choices.ranks, choices.units),
        "latency": Weights(
            random.random(depth).tolist(),
            (random.random(depth) / 3).tolist(),
            [0.0] * depth,
            {ffn: float(random.random() / 4) for ffn in every[::2]},
            units={name: float(random.random()) for name in choices.units},
        ),
    }
    return choices, weights, sizes


def trained(random, depth, count, cost, unread):
    """Units of one trained selection: an interval, a narrow block or a run with either in it."""
    units = {}
    for _ in range(count):
        first = int(random.integers(depth - 1))
        last = int(random.integers(first, depth))
        inside = [*range(first, last + 1)]
        cut = int(random.integers(first, last + 1))
        intervals = [(cut, last)] if cut < last else []
        run = [(first, last)] if cut > first and random.random() < 0.7 else []
        linear = [(b, s) for b in inside for s in (IMAGE, TEXT) if random.random() < 0.3]
        linear = [ffn for ffn in linear if not cut < ffn[0] <= last]
        if made := units_of(intervals, run, linear, unread):
            unit = made[0]
            if not any(u.first <= unit.last and unit.first <= u.last for u, _ in units.values()):
                units[unit.name] = (unit, cost())
    return units


def every_set(choices, weights, sizes, required=constraints.NOTHING):
    """((intervals, runs, ffns, units, ranks), cost, savings) of every set that holds what is
    required; the depth is cut into parts: intervals, and blocks that are kept."""

    def subsets(items):
        return itertools.chain.from_iterable(
            itertools.combinations(sorted(items), n) for n in range(len(items) + 1)
        )

    offered = choices.intervals, choices.runs, choices.ffns, choices.units
    for chosen in itertools.product(*map(subsets, offered)):
        closed = parts_of(*chosen[:3], sizes)
        inside = [choices.units[name][0] for name in chosen[3]]
        if closed is None or not apart([*closed, *inside]):
            continue
        units = [*closed, *inside]
        if not holds(units, chosen, required):
            continue
        cost = sum(t[i] for t, items in zip(offered[:3], chosen, strict=False) for i in items)
        cost += sum(choices.units[name][1] for name in chosen[3])
        savings = {}
        for name in ("blocks", "latency"):
            each = weights[name]
            savings[name] = saved(*chosen[:3], each, sizes.unread)
            savings[name] += sum(each.units.get(unit, 0) for unit in chosen[3])
        for ranks in itertools.product(
            *([(matrix, None), *((matrix, r) for r in o)] for matrix, o in choices.ranks.items())
        ):
            ranks = {matrix: rank for matrix, rank in ranks if rank}
            count = sizes.model(units, ranks)
            if count is None or not ranks_required(units, ranks, choices, required.ranks):
                continue
            more = sum(choices.ranks[matrix][rank] for matrix, rank in ranks.items())
            gone = savings | {"parameters": sizes.model([], {}) - count}
            yield (*chosen, ranks), cost + more, gone


def parts_of(intervals, runs, ffns, sizes):
    """The units of a set, or None if it is none."""
    owner = {}
    for ends in intervals:
        for block in range(ends[0], ends[1] + 1):
            if block in owner:
                return None
            owner[block] = ends
    parts = {owner.get(block, (block, block)) for block in range(sizes.depth)}
    lent = {}
    for first, last in runs:
        members = sorted(p for p in parts if first <= p[0] and p[1] <= last)
        held = sum(p[1] - p[0] + 1 for p in members)
        if len(members) < 2 or held != last - first + 1 or lent.keys() & set(members):
            return None
        lent |= {p: n > 0 or last == sizes.unread for n, p in enumerate(members)}
    for block, stream in ffns:
        part = owner.get(block, (block, block))
        if part[0] != block or (stream == TEXT and lent.get(part)):
            return None
    return units_of(intervals, runs, ffns, sizes.unread)


def apart(units):
    return all(a.last < b.first or b.last < a.first for a, b in itertools.combinations(units, 2))


def holds(units, chosen, required):
    """Whether what is required is there, in a unit or not."""
    parts = [part for unit in units for part in unit.new_blocks]
    linear = {(part.first, stream) for part in parts for stream in part.linear_ffn}
    ends = {part.ends for part in parts if part.last > part.first}
    runs = {(unit.first, unit.last) for unit in units if len(unit.new_blocks) > 1}
    return required.intervals <= ends and required.runs <= runs and required.ffns <= linear


def ranks_required(units, ranks, choices, blocks):
    """Whether the matrices of some blocks have low ranks, or went with their text streams."""
    parts = [part for unit in units for part in unit.new_blocks]
    for block in blocks:
        if any(part.first < block <= part.last for part in parts):
            return False
        borrows = any(part.first == block and part.borrows for part in parts)
        for matrix in choices.ranks:
            if matrix[0] == block and matrix not in ranks and not (borrows and matrix[1] == TEXT):
                return False
    return True


MEASURES = [
    ["parameters"],
    ["blocks"],
    ["latency"],
    ["parameters", "latency"],
    ["blocks", "parameters"],
]


def members(plan):
    return plan.intervals, plan.runs, plan.ffns, plan.units, dict(plan.ranks)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(MEASURES), st.tuples(tenths, tenths))
def test_selection_is_the_best_of_all_sets(seed, measures, shares):
    choices, weights, sizes = problem(seed)
    sets = list(every_set(choices, weights, sizes))
    most = {m: max(savings[m] for *_, savings in sets) for m in measures}
    needs = {m: share * most[m] for m, share in zip(measures, shares, strict=False)}
    enough = [s for s in sets if all(s[2][m] >= need - 1e-12 for m, need in needs.items())]
    if not enough:
        with pytest.raises(UserError, match="the smallest budgets need .* at most"):
            selection.select(choices, weights, needs)
        return
    plan = selection.select(choices, weights, needs)
    check(plan, enough)
    assert (plan.cost > 0) <= any(need > 0 for need in needs.values())


def check(plan, enough):
    """That a selection is among the sets that are enough, the cheapest, and saves what they say."""
    best = min(cost for _, cost, _ in enough)
    assert plan.cost == pytest.approx(best, rel=1e-6, abs=1e-15)
    assert plan.bound <= best * (1 + 1e-12) and plan.bound == pytest.approx(best, rel=1e-6)
    _, cost, savings = next(s for s in enough if s[0] == members(plan))
    assert plan.cost == pytest.approx(cost, rel=1e-12)
    assert plan.saved == pytest.approx(savings)


@settings(max_examples=30, deadline=None)
@given(seeds, st.data())
def test_pins_are_kept_and_nothing_else_is_added_without_need(seed, data):
    choices, weights, sizes = problem(seed)
    sets = list(every_set(choices, weights, sizes))
    wanted, _, _ = data.draw(st.sampled_from(sets))
    required = Named(*map(frozenset, wanted[:3]), frozenset(block for block, _ in wanted[4]))
    target = data.draw(st.sampled_from(sets))[2]["parameters"]
    with_them = list(every_set(choices, weights, sizes, required))
    # Pinned ranks may be so high that they cost parameters, which is enough where none has to go.
    enough = [s for s in with_them if target <= 0 or s[2]["parameters"] >= target]
    if not enough:
        with pytest.raises(UserError):
            selection.select(choices, weights, {"parameters": target}, required)
        return
    plan = selection.select(choices, weights, {"parameters": target}, required)
    check(plan, enough)
    least = min(with_them, key=lambda s: s[1])
    if least in enough and not any(s[1] == least[1] for s in with_them if s[0] != least[0]):
        assert members(plan) == least[0]


@settings(max_examples=6, deadline=None)
@given(seeds, st.sampled_from(["parameters", "blocks", "latency"]))
def test_larger_budgets_never_cost_more(seed, measure):
    choices, weights, _ = problem(seed, 8, 12, 8, 10, 8, 2)
    costs = []
    for share in np.linspace(1, 0, 7):
        need = share * sum(weights[measure].block[1:]) * 0.9
        try:
            costs.append(selection.select(choices, weights, {measure: need}).cost)
        except UserError:
            assert not costs
    assert costs and costs == sorted(costs, reverse=True)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_the_order_in_which_choices_come_decides_nothing(seed):
    choices, weights, _ = problem(seed, 8, 12, 8, 10, 8, 2)
    need = {"parameters": 0.4 * sum(weights["parameters"].block)}
    turned = Choices(
        *(dict(reversed(offered.items())) for offered in (choices.intervals, choices.runs)),
        dict(reversed(choices.ffns.items())),
        {m: dict(reversed(o.items())) for m, o in reversed(choices.ranks.items())},
        dict(reversed(choices.units.items())),
        choices.modulations,
        choices.unread,
    )
    selections = [selection.select(each, weights, need) for each in (choices, turned)]
    assert selections[0] == selections[1]


# ---- budgets

FACTS = {"transformer_parameters": 1000, "blocks": 20, "transformer_seconds": 0.5}


def test_a_budget_is_what_has_to_go():
    assert needed({"fraction": 0.7}, FACTS) == {"parameters": 300}
    assert needed({"parameters": 640}, FACTS) == {"parameters": 360}
    assert needed({"blocks": 12}, FACTS) == {"blocks": 8}
    assert needed({"latency": 0.8}, FACTS) == {"latency": pytest.approx(0.1)}
    several = {"fraction": 0.7, "parameters": 600, "latency": 0.8}
    expected = {"parameters": 400, "latency": pytest.approx(0.1)}
    assert needed(several, FACTS) == expected
    for small in ({"parameters": 2000}, {"blocks": 30}, {"latency": 1.0}, {"fraction": 1.0}):
        assert list(needed(small, FACTS).values()) == [0]


def test_targets_are_those_of_the_smallest_budgets():
    budgets = [0.7, {"parameters": 500}, {"blocks": 12}, {"blocks": 15}, {"latency": 0.9}, 0.9]
    variants = [
        Variant.of({"name": str(n), "budget": b, "train": True}) for n, b in enumerate(budgets)
    ]
    expected = {"parameters": 500, "blocks": 8, "latency": pytest.approx(0.05)}
    assert targets(variants, FACTS) == expected
    least = [Variant.of(each) for each in config.tightest(variants)]
    assert len(least) == 4 and targets(least, FACTS) == expected


def test_parameters_needed_leaves_at_most_the_budget():
    assert parameters_needed(20, 0.55) == 9
    assert parameters_needed(1000, 0.7) == 300
    assert parameters_needed(7, 0.5) == 4
    assert parameters_needed(100, 0.57) == 43  # 0.57 * 100 is 56.99999999999999
    assert parameters_needed(7, 1.0) == 0


def test_unreachable_budgets_say_what_can_be_had():
    choices = Choices({(0, 1): 1.0, (2, 3): 1.0})
    weights = {
        "blocks": by_blocks(6),
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
    rows = [
        {"block": block, "part": part, "seconds": seconds + block / 1000}
        for block in range(depth)
        for part, seconds in parts.items()
        if block < 3 or part == "block"
    ]
    tables.write(path, pd.DataFrame(rows), schemas.LATENCY, {"transformer_seconds": "2.5"})
    return path


def test_times_are_read_by_part(tmp_path):
    path = latency_table(tmp_path / "blocks.parquet")
    weights, whole = measured.timing(path, 4)
    assert whole == 2.5
    assert weights.block == pytest.approx([0.4, 0.401, 0.402, 0.403])
    assert weights.text == pytest.approx([0.1, 0.101, 0.102, 0])
    assert weights.output == [0] * 4 and (3, IMAGE) not in weights.ffn
    assert weights.ffn[2, TEXT] == pytest.approx(0.052)
    with pytest.raises(UserError, match="names blocks that this teacher lacks"):
        measured.timing(path, 3)


def test_units_save_the_seconds_of_their_parts(tmp_path):
    path = latency_table(tmp_path / "blocks.parquet")
    run = Unit((NewBlock(0, 0, (TEXT,)), NewBlock(1, 2, (IMAGE,))))
    alone = Unit((NewBlock(1, 3),))
    seconds = measured.saved_seconds([run, alone], path)
    assert seconds == pytest.approx([0.05 + 0.402 + 0.101 + 0.061, 0.402 + 0.403])
    assert np.isnan(measured.saved_seconds([run, alone], None)).all()


# ---- models of real depth

# Qwen-Image's counts: parameters of a block, of a borrower's text stream, of l^h, of an FFN, and of
# what a source keeps for itself alone.
BLOCK, BORROWED, OUTPUT, LINEAR = 339_831_296, 132_000_000, 9_440_256, 94_500_000
LENT = 132_154_624
QWEN = {"transformer_parameters": 20_430_401_088, "blocks": 60}


def deep(depth=60, longest=7, ranks=(2, 4, 8, 16, 32)):
    """All candidates of a Qwen-like model, with random costs of many magnitudes."""
    random = np.random.default_rng(0)
    every = [*itertools.product(range(depth), (IMAGE, TEXT))]
    pairs = [(a, b) for a, b in itertools.combinations(range(depth), 2) if b - a < longest]
    matrices = [
        Modulation(block, stream, 3072, 6 * 3072, ffn=stream, text=stream == TEXT)
        for block, stream in every
    ]
    matrices.append(Modulation(depth, "", 3072, 2 * 3072))
    choices = Choices(
        {(a, b): float(random.exponential() * (b - a) ** 1.5) for a, b in pairs},
        {(a, b): float(random.exponential() * (b - a) / 3) for a, b in pairs},
        {ffn: 10.0 ** random.uniform(-9, 0) for ffn in every},
        {m.key: {r: 10.0 ** random.uniform(-6, -3) / r**2 for r in ranks} for m in matrices},
        modulations={matrix.key: matrix for matrix in matrices},
        unread=depth - 1,
    )
    jitter = 1 + 0.01 * random.random((3, depth))
    weights = {
        "blocks": by_blocks(depth),
        "parameters": Weights(
            [BLOCK] * depth,
            [BORROWED] * depth,
            [OUTPUT] * depth,
            dict.fromkeys(every, LINEAR),
            {
                (matrix.key, rank, sixths): matrix.saved(rank, sixths)
                for matrix in matrices
                for rank in ranks
                for sixths in (2, 3, 6)
            },
            source=dict.fromkeys(range(depth), LENT),
        ),
        "latency": Weights(
            (0.04 * jitter[0]).tolist(),
            (0.012 * jitter[1]).tolist(),
            [0.0] * depth,
            {ffn: 0.01 * float(jitter[2, ffn[0]]) for ffn in every},
        ),
    }
    return choices, weights


def test_sixty_blocks_with_all_candidates_take_seconds_and_are_exact():
    choices, weights = deep()
    needs = {"parameters": 0.65 * 60 * BLOCK, "latency": 0.5 * 60 * 0.04}
    began = time.process_time()
    plan = selection.select(choices, weights, needs)
    assert time.process_time() - began < 60
    assert plan.cost <= plan.bound * (1 + 1e-5)
    assert plan.intervals and plan.runs and plan.ffns and plan.ranks
    assert all(plan.saved[measure] >= need * (1 - 1e-12) for measure, need in needs.items())


def test_the_published_lists_are_a_config_and_come_out_as_they_are():
    """As config/README.md has them."""
    text = (ROOT / "config/README.md").read_text(encoding="utf-8")
    published = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    variants = [{"name": "small", "budget": {"parameters": 11_000_000_000}}]
    wanted = Settings.of(config.complete({**published, "variants": variants}, "published"))
    required, _ = constraints.of_config(wanted, 60)
    assert len(required.intervals) == 13 and len(required.runs) == 6 and len(required.ffns) == 4
    choices, weights = deep()
    free = Choices(
        choices.intervals | dict.fromkeys(required.intervals, 0.0),
        choices.runs | dict.fromkeys(required.runs, 0.0),
        choices.ffns,
    )
    needs = targets(wanted.variants, QWEN)
    plan = selection.select(free, weights, needs, required)
    assert set(plan.intervals) == required.intervals
    assert set(plan.runs) == required.runs and set(plan.ffns) == required.ffns
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
        "blocks": by_blocks(57),
        "parameters": Weights(sizes, [130] * 19 + [0] * 38, [9] * 57),
    }
    need = round(0.4 * sum(sizes))
    plan = selection.select(Choices(apart, double), weights, {"parameters": need})
    assert plan.bound == pytest.approx(plan.cost, rel=1e-6) and plan.saved["parameters"] >= need
    assert plan.runs
