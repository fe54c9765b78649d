"""Planted blocks inside a real diffusers model: the right intervals are known and must be found.

A stock QwenImageTransformer2DModel, run by the stock pipeline, in which some blocks are exactly the
identity (a stock block with closed gates) or exactly linear per token (a block whose forward is
replaced). Record, extract, probe, similarity and intervals then run as in the workflow.
"""

import numpy as np
import pytest
from torch import nn

from ppcl.extraction import activations, token_table
from ppcl.search import cka_draws, intervals
from ppcl.settings import ExtractSettings
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines, recording
from ppcl.transformer import block_facts, blocks, call_tables, calls, claims
from ppcl.transformer.block_facts import BlockFacts
from ppcl.transformer.context import State
from ppcl.transformer.family import IMAGE, TEXT
from support import tiny

DEPTH, WIDTH = 12, 32
LINEAR, IDENTITY, IMAGE_ONLY = (2, 3, 4), (7, 8), (9, 10)
PROMPTS = [f"a {ink} {digit} on blue" for ink in ("red", "green") for digit in range(8)]


class LinearBlock(nn.Module):
    """For a stock block: x + x A + b per token on some streams, the block's own work on others."""

    def __init__(self, stock: nn.Module, streams: tuple[str, ...]):
        super().__init__()
        self.stock, self.streams = stock, streams
        self.maps = nn.ModuleDict({s: nn.Linear(WIDTH, WIDTH) for s in streams})

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
        modulate_index=None,
    ):
        text, image = self.stock(
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
            modulate_index,
        )
        if TEXT in self.streams:
            text = encoder_hidden_states + self.maps[TEXT](encoder_hidden_states)
        if IMAGE in self.streams:
            image = hidden_states + self.maps[IMAGE](hidden_states)
        return text, image


def planted_transformer():
    """Random weights of a size at which an unplanted block bends its streams strongly."""
    transformer = tiny.transformer(DEPTH, scale=0.25)
    every = transformer.transformer_blocks
    for index in IDENTITY:
        tiny.silence(every[index])
    for index in LINEAR:
        every[index] = LinearBlock(every[index], (IMAGE, TEXT))
    for index in IMAGE_ONLY:
        every[index] = LinearBlock(every[index], (IMAGE,))
    return transformer.eval()


@pytest.fixture(scope="module")
def folder(tiny_teacher, tmp_path_factory):
    """What record and extract leave of the planted model."""
    folder = tmp_path_factory.mktemp("planted")
    pipe = tiny.load(tiny_teacher)
    pipe.register_modules(transformer=planted_transformer())
    # Not replayed on a stock transformer, which has no such blocks.
    recorded = recording.record_batch(
        pipe, pipe.transformer, tiny.samples(PROMPTS), tiny.SETTINGS, 2, seed=0, replayed=False
    )
    call_tables.write(folder / "calls.parquet", [table.schema for table in recorded], recorded, {})
    reader = calls.Reader(folder / "calls.parquet")
    claims.verify(pipe.transformer, reader.batch(np.arange(2)).arguments)
    options = {"batch_size": 16, "moment_tokens": 16, "sample_tokens": 4, "checkpoint_every": 99}
    moments, samples = activations.collect(
        tiny.context(pipe.transformer, reader),
        np.arange(len(reader)),
        ExtractSettings.of(options),
        State(folder, ""),
        tiny.NoBar(),
    )
    size = blocks.parameter_count(pipe.transformer.transformer_blocks[0])
    # The stand-ins have other weights, but count as blocks of one kind here.
    facts = BlockFacts(["transformer_blocks"] * DEPTH, [0], {}, [size] * DEPTH, size * DEPTH)
    block_facts.write(folder / "block-facts.parquet", facts, {})
    token_table.write_sample(folder / "tokens.parquet", samples, {})
    tensors.write(folder / "moments.safetensors", moments.sums, {})
    table, probes, tokens = (
        folder / "p.parquet",
        folder / "p.safetensors",
        folder / "tokens.parquet",
    )
    moments = folder / "moments.safetensors"
    tiny.stage("probe", SETTINGS, moments=moments, tokens=tokens, probes_table=table, probes=probes)
    cka, pairs = folder / "cka.parquet", folder / "blocks.parquet"
    tiny.stage("similarity", SETTINGS, probes=probes, tokens=tokens, cka=cka, blocks=pairs)
    return folder


SETTINGS = {"seed": 0, "device": "cpu", "probe": {"ridge": 0}, "similarity": {"bootstrap": 4}}


def selected(folder, streams, removed, segmentation="optimal", cost="cka"):
    """Intervals chosen when `removed` blocks have to go."""
    wanted = {
        "similarity": {"streams": streams, "bootstrap": 4},
        "intervals": {"segmentation": segmentation, "tolerance": 1e-4, "cost": cost},
        "width": {"enabled": False},
        "modulation": {"enabled": False},
        "variants": [{"name": "small", "budget": 1 - removed / DEPTH}],
    }
    paths = {name: folder / f"{name}.parquet" for name in ("cka", "sensitivity", "intervals")}
    paths["block_facts"] = folder / "block-facts.parquet"
    tiny.stage("intervals", SETTINGS | wanted, **paths)
    candidates = tables.read(folder / "intervals.parquet", schemas.INTERVALS).to_pandas()
    chosen = candidates[candidates["selected"]]
    return list(zip(chosen["first"], chosen["last"], strict=True)), candidates


def test_probes_are_exact_on_planted_blocks_only(folder):
    quality = tables.read(folder / "p.parquet", schemas.PROBES).to_pandas()
    quality = quality.set_index(["stream", "block"])
    exact = {(s, b) for s in (IMAGE, TEXT) for b in LINEAR + IDENTITY}
    exact |= {(IMAGE, b) for b in IMAGE_ONLY}
    for place, row in quality.iterrows():
        if place in exact:
            assert row["r2_heldout"] > 1 - 1e-6, place
        else:
            assert row["r2_heldout"] < 0.95, place
    assert (
        quality["residual_norm"].loc[[(s, b) for s in (IMAGE, TEXT) for b in IDENTITY]] == 0
    ).all()
    bends = quality.drop([(s, b) for s in (IMAGE, TEXT) for b in LINEAR + IDENTITY])
    assert bends["residual_norm"].min() > 0.1  # the other blocks do matter


def test_cka_of_planted_runs_is_one(folder):
    cka = tables.read(folder / "cka.parquet", schemas.CKA).to_pandas()
    cka = cka.set_index(["stream", "start", "end"])["cka"].sort_index()
    for stream in (IMAGE, TEXT, "mean"):
        for run_ in (LINEAR, IDENTITY):
            first, last = run_[0], run_[-1]
            assert cka[stream, first - 1, last] == pytest.approx(1, abs=1e-6)
            assert cka[stream, first - 1, last + 1] < 1 - 1e-3 or (stream, last) == (IMAGE, 8)
            assert cka[stream, first - 2, last] < 1 - 1e-3
    assert cka[IMAGE, 6, 10] == pytest.approx(1, abs=1e-6)
    assert cka[TEXT, 8, 10] < 1 - 1e-3
    blocks_ = tables.read(folder / "blocks.parquet", schemas.BLOCKS).to_pandas()
    pair = blocks_[(blocks_["block_a"] == 6) & (blocks_["block_b"] == 8)]
    assert pair["cka"].to_numpy() == pytest.approx([1, 1])


@pytest.mark.parametrize("streams", ["mean", TEXT])
def test_runs_planted_in_both_streams_are_selected(folder, streams):
    chosen, _ = selected(folder, streams, removed=3)
    assert chosen == [(2, 4), (7, 8)]


def test_image_stream_alone_also_finds_what_is_linear_in_it(folder):
    chosen, _ = selected(folder, IMAGE, removed=5)
    assert chosen == [(2, 4), (7, 10)]


def test_eq_5_ends_at_the_planted_ends(folder):
    """Searches that start at a planted run end where it ends."""
    table = tables.read(folder / "cka.parquet", schemas.CKA).to_pandas()
    for stream, run_ in ((IMAGE, (2, 4)), (TEXT, (2, 4)), ("mean", (2, 4)), (IMAGE, (7, 10))):
        rows = table[table["stream"] == stream]
        cka = np.full((DEPTH, DEPTH), np.nan)
        cka[rows["start"] + 1, rows["end"]] = rows["cka"]
        delta = cka_draws.differences(cka)
        assert intervals.trend_end(delta, run_[0], DEPTH - 1, 1e-4) == run_[1]
    _, candidates = selected(folder, "mean", removed=1, segmentation="trend")
    assert {"trend"} <= set(candidates["source"])


def test_measured_costs_find_the_block_that_identities_follow(folder, tiny_teacher, monkeypatch):
    """Block 6 and the identities 7 and 8 are block 6 alone, however far from linear it is."""
    monkeypatch.setattr(pipelines, "load_transformer", lambda *_, **__: planted_transformer())
    settings = {
        "device": "cpu",
        "teacher": {"path": str(tiny_teacher)},
        "prune": {"start": "first"},
        "sensitivity": {"rows": 6, "longest": 3},
    }
    table = folder / "sensitivity.parquet"
    tiny.stage(
        "sensitivity",
        SETTINGS | settings,
        calls=folder / "calls.parquet",
        state=folder / "state",
        table=table,
    )
    chosen, candidates = selected(folder, "mean", removed=2, cost="velocity")
    assert chosen == [(6, 8)] and 0 <= candidates.loc[candidates["selected"], "cost"].item() < 1e-9
    costs = tables.read(table, schemas.SENSITIVITY).to_pandas()
    costs = costs.set_index(["first", "last"])["velocity_error"]
    free = {(6, 7), (6, 8), (7, 8)}
    assert costs[list(free)].max() < 1e-9 and costs.drop(list(free)).min() > 1e-5
    assert selected(folder, "mean", removed=2)[0] != chosen
