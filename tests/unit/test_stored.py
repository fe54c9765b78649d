"""Budgets of bytes: what is foretold of a model's stored weights, and what they are."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from ppcl.closed_forms import modulation, stored_sizes
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.planning import artifacts
from ppcl.pruning import quantisable
from ppcl.pruning.quantisation import GIB, METHODS
from ppcl.search import budgets, savings, selection, stored
from ppcl.settings import Settings, Variant
from ppcl.storage import schemas, tables
from ppcl.transformer import blocks
from support import pruned, zoo_images

RANKS = [((8, "img_mod.1"), 4), ((8, "txt_mod.1"), 2)]


def settings(*how):
    variants = [
        {"name": f"v{number}", "budget": {"gib": 1.0}} | ({"quantise": one} if one else {})
        for number, one in enumerate(how)
    ]
    return Settings.of(config.complete({"variants": variants}, "mine.yaml"))


def foretold(transformer, folder, intervals=(), runs=(), ffns=(), ranks=()):
    """Method -> bytes of a model, by the table that `record` writes and what selection adds up."""
    tables.write(folder / "sizes.parquet", stored_sizes.table(transformer), schemas.SIZES, {})
    every = {one.key: one for one in modulation.matrices(transformer)}
    offered = [(matrix, rank, 6) for matrix, rank in ranks]
    depth = len(blocks.block_sequence(transformer))
    methods = [None, *METHODS]
    weights, totals = stored.measures(
        settings(*methods), folder / "sizes.parquet", depth, every, offered
    )
    measures = {method: budgets.bytes_measure(method) for method in methods}
    return {
        method: totals[measure]
        - savings.saved(intervals, runs, ffns, weights[measure])
        - sum(weights[measure].ranks[one] for one in offered)
        for method, measure in measures.items()
    }


@pytest.mark.parametrize(
    ("made", "taken"),
    [
        ({}, {}),
        ({"merged": pruned.MERGED}, {"intervals": pruned.MERGED}),
        ({"merged": [(0, 2)]}, {"intervals": [(0, 2)]}),
        (
            {"narrowed": pruned.NARROW},
            {
                "runs": [(4, 6)],
                "ffns": [(0, "image"), (0, "text"), (5, "image")],
                "ranks": RANKS,
            },
        ),
    ],
)
def test_what_is_foretold_is_what_is_stored(tmp_path, made, taken):
    transformer = DiffusionPipeline.from_pretrained(pruned.TEACHER).transformer
    model, _ = pruned.model(transformer, **made)
    inventory = quantisable.inventory(model, quantisable.names(model))
    given = foretold(transformer, tmp_path, **taken)
    assert given == {method: inventory.stored(method) for method in given}
    assert given[None] == quantisable.stored_bytes(model)


@pytest.mark.parametrize("specimen", ["flux", "sd3", "wan"])
def test_the_same_of_other_classes(tmp_path, specimen):
    pipe = {**zoo_images.SPECIMENS, **_videos()}[specimen].make(3)
    transformer = pipe.transformer
    sequence = blocks.block_sequence(transformer)
    ffns = [(1, stream) for stream in sequence[1].width.ffn]
    linear = {1: {"linear_ffn": [stream for _, stream in ffns]}} if ffns else {}
    model, _ = pruned.model(transformer, narrowed=linear)
    inventory = quantisable.inventory(model, quantisable.names(model))
    given = foretold(transformer, tmp_path, ffns=ffns)
    assert given == {method: inventory.stored(method) for method in given}


def _videos():
    from support import zoo_videos

    return zoo_videos.SPECIMENS


def test_a_budget_of_gib_is_counted_in_the_variants_own_bytes():
    facts = {"bytes": 5.0 * GIB, "bytes in int8": 3.0 * GIB}
    one = {"name": "a", "budget": {"gib": 2.5}, "train": True, "finetune_steps": 0}
    both = [Variant.of(one), Variant.of({**one, "name": "b", "quantise": "int8"})]
    needs = budgets.targets(both, facts)
    assert needs == {"bytes": 2.5 * GIB, "bytes in int8": 0.5 * GIB}
    assert budgets.amounts(needs) == "2.5 GiB and 0.5 GiB in int8"
    assert [each["name"] for each in config.tightest(both)] == ["smallest-gib", "smallest-gib-int8"]
    assert config.tightest(both)[1]["quantise"] == "int8"


def test_the_choice_depends_on_quantise_where_bytes_are_limited_alone():
    of = {"train": True, "finetune_steps": 0, "quantise": "int8"}
    by_bytes = {"name": "a", "budget": {"gib": 1}, **of}
    assert "quantise" in config.budgets([by_bytes])[0]
    assert "quantise" not in config.budgets([by_bytes | {"budget": 0.5}])[0]


def test_the_cheapest_set_is_small_enough_in_quantised_bytes(tmp_path):
    transformer = DiffusionPipeline.from_pretrained(pruned.TEACHER).transformer
    tables.write(tmp_path / "sizes.parquet", stored_sizes.table(transformer), schemas.SIZES, {})
    weights, totals = stored.measures(settings("int8"), tmp_path / "sizes.parquet", 24, {}, ())
    (measure,) = weights
    limit = 2.5e6 / GIB  # of 4.2e6 bytes
    needs = budgets.needed({"gib": limit}, totals, "int8")
    costs = {(first, first + 1): 1.0 + first for first in range(0, 24, 2)}
    weights["blocks"] = savings.by_blocks(24)
    chosen = selection.select(selection.Choices(intervals=costs), weights, needs)
    model, _ = pruned.model(transformer, merged=chosen.intervals)
    size = quantisable.inventory(model, quantisable.names(model)).stored("int8")
    assert size == totals[measure] - chosen.saved[measure] <= limit * GIB
    # Without the last of them it would be too large.
    model, _ = pruned.model(transformer, merged=chosen.intervals[:-1])
    less = quantisable.inventory(model, quantisable.names(model)).stored("int8")
    assert less > limit * GIB and chosen.intervals[0] == (0, 1)


def test_forecasts_of_quantised_variants_are_no_smaller_than_they_are():
    transformer = DiffusionPipeline.from_pretrained(pruned.TEACHER).transformer
    planner = SimpleNamespace(transformer=transformer, dtype=torch.float32, least=0)
    one = {"name": "a", "budget": {"gib": 0.008}, "train": True, "finetune_steps": 0}
    whole = Variant.of(one)
    parameters = artifacts._variant_parameters(planner, whole)
    assert parameters == int(0.008 * GIB / 4)
    assert artifacts._stored(planner, parameters, whole) == 4 * parameters
    model, _ = pruned.model(transformer, merged=pruned.MERGED)
    inventory = quantisable.inventory(model, quantisable.names(model))
    for method in METHODS:
        copy = Variant.of({"name": "b", "of": "a", "quantise": method, "train": True})
        planned = artifacts._stored(planner, inventory.parameters, copy)
        assert inventory.stored(method) <= planned < 1.2 * inventory.stored(method)


def test_bytes_without_their_table_are_refused():
    with pytest.raises(UserError, match="a budget is of gib: name the sizes of blocks, --sizes"):
        stored.measures(settings(None), None, 3, {}, ())
