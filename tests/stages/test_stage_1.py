"""The programs probe, similarity and intervals, one after the other, on a planted stack: its blocks
are exactly linear in known places, and the right intervals are those."""

import json
import runpy

import numpy as np
import pytest
import torch

from ppcl.ablation import rivals
from ppcl.extraction import token_table
from ppcl.search import probes
from ppcl.storage import schemas, tables, tensors
from ppcl.transformer import block_facts
from ppcl.transformer.block_facts import BlockFacts
from support import SCRIPTS

LINEAR = {2, 3, 4, 7, 8}
WIDTH, PROMPTS, PER_PROMPT = 6, 80, 12
SETTINGS = {
    "seed": 0,
    "probe": {"ridge": 0},
    "device": "cpu",
    "similarity": {"bootstrap": 8},
    "intervals": {"segmentation": "optimal", "cka_floor": 0.999, "cost": "cka"},
    "width": {"enabled": False},
    "modulation": {"enabled": False},
    "variants": [{"name": "small", "budget": 0.7}],
}


def stack(generator):
    """Boundaries 0..10 of ten blocks, with one channel of scale 1e4."""
    tokens = [generator.normal(size=(PROMPTS * PER_PROMPT, WIDTH))]
    scales = np.array([1e4, *[1] * (WIDTH - 1)])
    for block in range(10):
        weight = generator.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
        residual = tokens[-1] @ weight
        if block not in LINEAR:
            residual = 2 * np.sin(3 * residual)
        tokens.append(tokens[-1] + 0.5 * residual)
    return [(x * scales).astype(np.float32) for x in tokens]


def record(folder):
    """What `extract` leaves of the planted stack, for two streams."""
    prompts = np.repeat(np.arange(PROMPTS), PER_PROMPT)
    heldout = prompts % 4 == 0
    sums, samples = {}, {}
    for seed, stream in enumerate(["image", "text"]):
        values = np.stack(stack(np.random.default_rng(seed)))
        samples[stream] = {
            "value": values,
            "prompt": prompts,
            "step": np.zeros(len(prompts), int),
            "timestep": np.zeros(len(prompts)),
            "token": np.arange(len(prompts)),
            "heldout": heldout,
        }
        for block in range(10):
            x, y = (values[b][~heldout].astype(float) for b in (block, block + 1))
            for name, value in vars(probes.Moments.of(x, y - x)).items():
                sums[f"{stream}.{block}.{name}"] = torch.from_numpy(
                    np.atleast_1d(value).astype(float)
                )
    token_table.write_sample(folder / "tokens.parquet", samples, {})
    facts = BlockFacts(["blocks"] * 10, [0], {}, [100] * 10, 1000)
    block_facts.write(folder / "block-facts.parquet", facts, {})
    tensors.write(folder / "moments.safetensors", sums, {})


def run(monkeypatch, name, folder, **paths):
    options = ["--config", json.dumps(SETTINGS)]
    for option, path in paths.items():
        options += [f"--{option.replace('_', '-')}", str(folder / path)]
    monkeypatch.setattr("sys.argv", [name, *options])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


@pytest.fixture
def folder(tmp_path):
    record(tmp_path)
    return tmp_path


def run_probe(monkeypatch, folder):
    paths = {"moments": "moments.safetensors", "tokens": "tokens.parquet"}
    outputs = {"probes_table": "probes.parquet", "probes": "probes.safetensors"}
    run(monkeypatch, "probe", folder, **paths, **outputs)


def test_planted_linear_runs_are_found(folder, monkeypatch):
    run_probe(monkeypatch, folder)
    paths = {"probes": "probes.safetensors", "tokens": "tokens.parquet"}
    run(monkeypatch, "similarity", folder, **paths, cka="cka.parquet", blocks="blocks.parquet")
    paths = {"sensitivity": "none.parquet", "intervals": "intervals.parquet"}
    paths |= {"block_facts": "block-facts.parquet", "cka": "cka.parquet"}
    run(monkeypatch, "intervals", folder, **paths)

    quality = tables.read(folder / "probes.parquet", schemas.PROBES).to_pandas()
    assert len(quality) == 20
    linear = quality["block"].isin(LINEAR)
    assert quality.loc[linear, ["r2_heldout", "r2_fit"]].min().min() > 1 - 1e-9
    assert quality.loc[~linear, "r2_heldout"].max() < 0.99
    assert (quality["tokens"] == 60 * PER_PROMPT).all()
    assert (quality["tokens_heldout"] == 20 * PER_PROMPT).all()
    tokens = token_table.TokenReader(folder / "tokens.parquet")
    for stream, rows in quality.groupby("stream"):
        influence = rivals.block_influence(tokens, [stream])
        np.testing.assert_allclose(rows.set_index("block")["influence"].sort_index(), influence)

    cka = tables.read(folder / "cka.parquet", schemas.CKA).to_pandas()
    assert cka.groupby("stream").size().to_dict() == {"image": 55, "mean": 55, "text": 55}
    at = cka.set_index(["stream", "start", "end"]).sort_index()
    mean = (at.loc["image", "cka"] + at.loc["text", "cka"]) / 2
    np.testing.assert_allclose(at.loc["mean", "cka"], mean)
    assert (cka["cka_low"] <= cka["cka"]).all()
    assert (cka["cka"] <= cka["cka_high"]).all()
    assert at.loc[("image", 1, 4), "cka"] == pytest.approx(1, abs=1e-6)
    blocks = tables.read(folder / "blocks.parquet", schemas.BLOCKS).to_pandas()
    assert len(blocks) == 200

    candidates = tables.read(folder / "intervals.parquet", schemas.INTERVALS).to_pandas()
    selected = candidates[candidates["selected"]]
    assert list(zip(selected["first"], selected["last"], strict=True)) == [(2, 4), (7, 8)]


def test_a_truncated_input_is_named(folder, monkeypatch, capsys):
    path = folder / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stopped:
        run_probe(monkeypatch, folder)
    assert stopped.value.code == 2
    assert "moments.safetensors" in capsys.readouterr().err
    assert not (folder / "probes.parquet").exists()
