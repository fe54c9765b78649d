"""Quantised variants in a config, and which weights of a model they are of."""

import pandas as pd
import pytest
from torch import nn

from ppcl.configuration import config, variant_checks
from ppcl.errors import UserError
from ppcl.export import quantising
from ppcl.figures import quality
from ppcl.pruning import quantisable
from ppcl.pruning.quantisation import METHODS, Inventory
from ppcl.settings import Settings
from ppcl.transformer import blocks
from support import pruned, zoo_images

HALF = {"name": "half", "budget": 0.5}
COPY = {"name": "small", "of": "half", "quantise": "int8"}


def completed(*variants, **keys):
    return config.complete({"variants": list(variants), **keys}, "mine.yaml")


def test_a_copy_is_quantised_and_nothing_of_it_is_searched_for_or_trained():
    filled = completed(HALF, COPY)
    settings = Settings.of(filled)
    assert [variant.name for variant in settings.pruned] == ["half"]
    small = settings.variants[1]
    assert (small.parent, small.quantise, small.budget, small.finetune_steps) == (
        *("half", "int8"),
        {},
        0,
    )
    assert config.budgets(filled["variants"]) == config.budgets(completed(HALF)["variants"])
    assert config.tightest(settings.variants) == config.tightest(settings.variants[:1])
    # Programs get the completed config once more.
    assert config.complete(filled, "--config") == filled


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([{"name": "a"}], "'a' has no budget; give it one"),
        ([HALF, {**COPY, "of": "hal"}], "'small' is of 'hal', of which there is no .* one of half"),
        ([HALF, {**COPY, "of": "small"}], "'small' is of itself"),
        ([HALF, COPY, {**COPY, "name": "b", "of": "small"}], "'b' is of 'small', .* quantised its"),
        (
            [{**COPY, "of": "b"}, {**COPY, "name": "b", "of": "small"}, HALF],
            "'small' is of 'b', which is quantised itself",
        ),
        ([{**HALF, "quantise": "int8"}, COPY], "'small' is of 'half', which is quantised itself"),
        ([HALF, {"name": "b", "of": "half"}], "'b' is of 'half', but has no quantise"),
        ([HALF, {**COPY, "budget": 0.4}], "'small' is a quantised copy of 'half', but has budget"),
        ([HALF, {**COPY, "finetune_steps": 4}], "'small' is .*, but has finetune_steps; leave"),
        ([HALF, {**COPY, "train": False}], "'small' is a quantised copy of 'half', but has train"),
        ([HALF, {**COPY, "quantise": "int4"}], r"variants\[1\].quantise.*did you mean 'int8'"),
        ([HALF, {**COPY, "name": "half"}], "the name 'half' is used twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(variants, message):
    with pytest.raises(UserError, match=message):
        completed(*variants)


@pytest.mark.parametrize(
    ("variant", "keys", "installed", "message"),
    [
        (COPY, {}, False, "'small' has quantise: int8, which needs the package torchao; .*0.18.0"),
        ({**COPY, "quantise": "nf4"}, {}, True, "nf4, which diffusers runs on CUDA alone, but dev"),
        (COPY, {"teacher": {"offload": "stream"}}, True, "but teacher.offload is stream"),
    ],
)
def test_what_is_not_here_is_refused_before_anything_runs(
    monkeypatch, variant, keys, installed, message
):
    monkeypatch.setattr(variant_checks, "find_spec", lambda name: installed or None)
    with pytest.raises(UserError, match=message):
        settings = Settings.of(completed(HALF, variant, device="cpu", **keys))
        variant_checks.check_quantised(settings, "mine.yaml")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(UserError, match="int8 needs the package torchao .*torchao==0.18.0"):
        quantising.refuse_missing("int8")


@pytest.mark.parametrize(("stored", "shown"), [(0.5, False), (0.15, True)])
def test_figures_show_bytes_where_a_variant_is_quantised(stored, shown):
    columns = ("value", "ci_low", "ci_high", "samples")
    metrics = pd.DataFrame(
        [
            {"variant": name, "metric": metric, **dict.fromkeys(columns, value)}
            for name, share, of_bytes in (("teacher", 1.0, 1.0), ("half", 0.5, stored))
            for metric, value in (
                ("parameter_fraction", share),
                ("stored_fraction", of_bytes),
                ("psnr", 20.0),
            )
        ]
    )
    figure = quality.quality_against_cost(metrics)
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert ("bytes as stored (teacher = 1)" in labels) == shown


def test_inventories_add_up():
    one = Inventory(10, 40, 6, 3, 1, 24, 12)
    assert one + one - one == one
    # Kept, weights, and of every row a zero point and a scale.
    assert one.stored("int8") == 40 + 6 + 3 + 12
    assert one.stored(None) == 40 + 24
    assert one.stored("nf4") == 40 + 4 + 192  # 3 bytes and 6 / 64 of a scale, rounded up
    assert {method.cuda for method in METHODS.values()} == {True, False}


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module")
def narrow():
    """The embedded teacher with all kinds of narrow blocks."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(pruned.TEACHER)
    return pruned.model(pipe.transformer, narrowed=pruned.NARROW)[0]


def test_linears_of_blocks_are_quantised_but_first_modulations_and_products(narrow):
    chosen = set(quantisable.names(narrow))
    kept = linears(narrow) - chosen
    outside = {name for name in kept if not name.startswith("transformer_blocks.")}
    assert {"img_in", "txt_in", "proj_out", "norm_out.linear"} <= outside
    assert kept - outside == {
        *(f"transformer_blocks.0.{stream}_mod.1" for stream in ("img", "txt")),
        *(
            f"transformer_blocks.8.{stream}_mod.1.{part}"
            for stream in ("img", "txt")
            for part in ("down", "up")
        ),
    }
    assert "transformer_blocks.5.linear_ffn.image" in chosen


def test_an_inventory_is_all_that_is_stored(narrow):
    every = quantisable.inventory(narrow, quantisable.names(narrow))
    assert every.parameters == blocks.parameter_count(narrow)
    assert every.stored(None) == quantisable.stored_bytes(narrow)
    inside = sum(
        (
            quantisable.inventory(block.module, quantisable.in_block(block.module))
            for block in blocks.block_sequence(narrow)[1:]
        ),
        Inventory(),
    )
    first = blocks.block_sequence(narrow)[0]
    names = quantisable.in_block(first.module, first.list.modulations)
    first_block = quantisable.inventory(first.module, names)
    assert (inside + first_block).values == every.values


def test_names_of_what_is_kept_keep_nothing_else():
    """FLUX: the last projection has the name of one in each of its single blocks."""
    flux = zoo_images.SPECIMENS["flux"].make(2).transformer
    chosen = quantisable.names(flux)
    kept = sorted(linears(flux) - set(chosen))
    assert "proj_out" in kept and "single_transformer_blocks.1.proj_out" in chosen
    for name in quantising._named("int8", kept, chosen):
        assert name.endswith(".weight") and name.removesuffix(".weight") in kept
    named = quantising._named("nf4", kept, chosen)
    assert set(kept) - set(named) == {"proj_out"}
