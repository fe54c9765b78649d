"""What variants are made of: the search, whose students, and the files."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ppcl.errors import UserError
from ppcl.pruning.units import Modulation, NewBlock, Unit
from ppcl.search import choosing, savings, set_tables, sets, sets_file
from ppcl.search.choosing import Choice
from ppcl.search.offers import Offer
from ppcl.search.savings import Weights
from ppcl.search.selection import Choices
from ppcl.search.sets import Member, Set
from ppcl.settings import Variant
from ppcl.storage import schemas, tables

DEPTH, TOTAL = 6, 1500
INTERVAL = Unit((NewBlock(1, 2),))
NARROW = Unit((NewBlock(4, 4, ("image", "text")),))
MATRICES = {
    (block, "mod"): Modulation(block, "mod", 5, 60, ffn="image" if block < DEPTH else "")
    for block in (0, 1, DEPTH)
}


def offered(**changes) -> Offer:
    saves = {
        (key, rank, sixths): one.parameters(sixths=sixths) - one.parameters(rank, sixths)
        for key, one in MATRICES.items()
        for rank in (1, 2)
        for sixths in one.shares
    }
    none = [0.0] * DEPTH
    counted = Weights(
        none,
        [50.0] * DEPTH,
        [20.0] * DEPTH,
        {(block, stream): 30.0 for block in range(DEPTH) for stream in ("image", "text")},
        saves,
        {"01-02": 100, "04-04": 60},
    )
    ffns = {
        (block, stream): 1e-5 * (1 + block) * (10 if stream == "image" else 1)
        for block in range(DEPTH)
        for stream in ("image", "text")
    }
    closed = Choices(
        {},
        {(0, 1): 4e-5, (3, 5): 9e-5},
        ffns,
        {key: {1: 3e-6, 2: 1e-6} for key in MATRICES},
        modulations=MATRICES,
    )
    errors = {
        "01-02": {"start": 9e-4, "distill": 2e-4, "subsets": 3e-4},
        "04-04": {"closed": 5.5e-4, "distill": 4e-4, "subsets": 6e-4},
    }
    blocks = Weights(none, none, none, units={"01-02": 1, "04-04": 0})
    given = {
        "closed": closed,
        "units": {"01-02": INTERVAL, "04-04": NARROW},
        "errors": errors,
        "weights": {"parameters": counted, "blocks": blocks},
        "facts": {"transformer_parameters": TOTAL, "blocks": DEPTH},
    }
    return Offer(**given | changes)


def variant(budget, train=True, name="v"):
    return Variant.of({"name": name, "budget": budget, "train": train})


def searched(offer, *variants):
    return {v.name: (v, choosing.search(offer, v)) for v in variants}


def test_the_error_of_a_unit_whose_maps_were_fitted_once_more_is_the_one_before():
    errors = {"04-04": {sets.CLOSED: 0.25, "distill": 0.5}}
    offer, one = offered(errors=errors), Set((Member(NARROW, f"{sets.REFIT}v"),))
    (row,) = set_tables.rows(offer, "v", Choice(one, 0.25, {"parameters": 60}))
    assert (row["source"], row["velocity_error"]) == ("refit-v", 0.25)


def test_larger_budgets_never_cost_more_and_every_row_saves_its_part():
    """What the rows save adds up to what the selection does, ranks of halved matrices included."""
    offer, before = offered(), np.inf
    reached = set()
    for budget in np.linspace(0.32, 1, 14):
        choice = choosing.search(offer, variant(float(budget)))
        assert choice.cost <= before + 1e-12
        before = choice.cost
        assert offer.parameters_left(choice.saved) <= budget * TOTAL + 1e-9
        rows = set_tables.rows(offer, "v", choice)
        assert sum(row["saved_parameters"] for row in rows) == TOTAL - offer.parameters_left(
            choice.saved
        )
        assert sum(row["velocity_error"] for row in rows) == pytest.approx(choice.cost)
        reached |= {(row["kind"], row["source"]) for row in rows}
        taken = [b for u in choice.set.units for b in range(u.first, u.last + 1)]
        assert len(taken) == len(set(taken))
    assert reached == {
        ("interval", "distill"),
        ("text", "closed"),
        ("ffn", "closed"),
        ("modulation", "closed"),
    }


def test_without_training_nothing_trained_is_in_it():
    offer = offered()
    tight = variant({"blocks": DEPTH - 1}, train=False)
    choice = choosing.search(offer, tight)
    assert choice.set.sources["01-02"] == "start"
    assert choice.cost == pytest.approx(9e-4)
    assert choosing.search(offer, tight.replace(train=True)).cost == pytest.approx(2e-4)
    with pytest.raises(UserError, match="the budget of 'v' needs .* blocks"):
        choosing.search(offer, variant({"blocks": 1}))


def measured_as(errors):
    """Errors of sets from those of sources, and a count of what was asked for."""
    asked = []

    def measure(some):
        asked.append([one.sources for one in some])
        return [errors(one) for one in some]

    return measure, asked


def test_each_unit_is_from_the_stage_that_serves_the_set():
    """Alone, 01-02 is best after distill; beside 04-04, that of subsets is."""
    offer = offered(closed=Choices())
    both = Set((Member(INTERVAL, "distill"), Member(NARROW, "distill")))
    start = Choice(both, 6e-4, {"parameters": 160.0, "blocks": 1})
    worth = {("subsets", "distill"): 1.0, ("subsets", "subsets"): 2.0, ("start", "closed"): 2.5}

    def error(one):
        return worth.get((one.sources["01-02"], one.sources["04-04"]), 3.0)

    measure, asked = measured_as(error)
    decided = choosing.decide(offer, {"v": (variant(0.9), start)}, measure)["v"]
    assert decided.choice.set.sources == {"01-02": "subsets", "04-04": "distill"}
    assert decided.choice.error == 1.0
    # Its best alone, all of each of four sources; then the others of each unit.
    assert [len(one) for one in asked] == [5, 2, 2]
    assert list(decided.tried)[:2] == ["each at its best alone", "all of closed"]
    whole = choosing.decide(offer, {"v": (variant(0.9), start)}, measure, flips=False)["v"]
    assert whole.choice.error == 2.0
    last = choosing.as_last_trained(offer, {"v": (variant(0.9), start)}, measure)["v"]
    assert set(last.choice.set.sources.values()) == {"subsets"}
    untrained = variant(0.9, train=False)
    plain = start.set.having({"01-02": "start", "04-04": "closed"})
    asked_for = {"v": (untrained, sets.replace(start, set=plain))}
    assert choosing.decide(offer, asked_for, measure)["v"].choice.error == 2.5


@pytest.mark.parametrize("seed", range(5))
def test_larger_budgets_are_never_measured_worse(seed):
    """Whatever the sets cost together; but nothing trained goes into what may not be trained."""
    offer, rng = offered(), np.random.default_rng(seed)
    drawn = {}

    def measure(some):
        return [drawn.setdefault(one.key, rng.random()) for one in some]

    budgets = sorted(rng.uniform(0.4, 1, 4))
    wanted = [variant(float(b), name=f"p{n}") for n, b in enumerate(budgets)]
    wanted += [variant(float(budgets[1]), False, "free")]
    decided = choosing.decide(offer, searched(offer, *wanted), measure)
    errors = [decided[f"p{n}"].choice.error for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    for each in wanted:
        choice = decided[each.name].choice
        assert choosing.meets(choice, offer, each)
        assert choice.error == min(c.error for c in decided[each.name].tried.values())
    assert not set(decided["free"].choice.set.sources.values()) & set(sets.TRAINED)


def test_a_budget_is_met_however_sums_are_rounded():
    """Three of 0.1 s are all of 0.1 + 0.2, which is the next number above 0.3; times of blocks are
    multiples of one step, so that sums often are what is needed."""
    none = [0.0] * DEPTH
    weights = offered().weights | {
        "latency": Weights(none, none, none, {(b, "image"): 0.1 for b in range(DEPTH)})
    }
    facts = offered().facts | {"transformer_seconds": 2 * (0.1 + 0.2)}
    offer = offered(weights=weights, facts=facts, units={}, errors={})
    wanted = variant({"latency": 0.5})
    choice = choosing.search(offer, wanted)
    measure, _ = measured_as(lambda one: 1.0)
    assert choosing.decide(offer, {"v": (wanted, choice)}, measure)["v"].choice.error == 1.0
    exact, short = ({"latency": value, "parameters": 0.0, "blocks": 0} for value in (0.3, 0.2999))
    assert [choosing.meets(replace(choice, saved=s), offer, wanted) for s in (exact, short)] == [
        1,
        0,
    ]


def test_files_hold_what_was_decided(tmp_path):
    offer = offered()
    asked = searched(offer, variant(0.5, name="a"), variant(0.8, name="b"))
    decided = choosing.decide(offer, asked, lambda some: [1e-3] * len(some))
    choices = {name: one.choice for name, one in decided.items()}
    path = tmp_path / "sets.json"
    sets_file.write(path, offer, choices, {})
    written = sets_file.read(path)
    assert written.sets == {name: choice.set for name, choice in choices.items()}
    assert written.parameters["a"] == offer.parameters_left(choices["a"].saved) <= 750
    assert written.alone == offer.errors and written.of("a").key == choices["a"].set.key
    assert written.of("a").key != written.of("b").key
    with pytest.raises(UserError, match="has no variant 'c'; it has a, b"):
        written.of("c")
    each = tmp_path / "b.json"
    sets_file.write_one(each, offer, choices["b"], "digest")
    one, content = sets_file.read(each), each.read_bytes()
    assert one.sets == {"b": choices["b"].set} and one.facts["b"]["refits"] == "digest"
    assert one.parameters["b"] == written.parameters["b"]
    measured = replace(choices["b"], error=0.5, cost=0.1, saved=choices["b"].saved | {"latency": 1})
    sets_file.write_one(each, offer, measured, "digest")
    assert each.read_bytes() == content  # another timing makes no other model
    rows = [row for name, choice in choices.items() for row in set_tables.rows(offer, name, choice)]
    trials = [
        row for name, one in decided.items() for row in set_tables.trial_rows(offer, name, one)
    ]
    for rows_, schema in ((rows, schemas.VARIANT_UNITS), (trials, schemas.VARIANT_SETS)):
        table = pd.DataFrame(rows_, columns=schema.names)
        tables.write(tmp_path / "t.parquet", table, schema, {})
    assert sum(row["chosen"] for row in trials) >= 2
    assert all(json.loads(row["sources"]).keys() <= offer.units.keys() for row in trials)
    path.write_text(path.read_text().replace('"a"', '"e"'))
    with pytest.raises(UserError, match="delete"):
        sets_file.read(path)


def test_a_closed_text_run_is_a_unit_of_several_parts():
    offer = offered(units={}, errors={})
    choice = choosing.search(offer, variant(0.4))
    runs = [unit for unit in choice.set.units if len(unit.new_blocks) > 1]
    assert runs and set(choice.set.sources.values()) == {"closed"}
    assert savings.saved([], [(runs[0].first, runs[0].last)], [], offer.weights["parameters"]) > 0
