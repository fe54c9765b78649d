"""The benchmarks run and print what they measured; wiring only, no time is judged."""

import argparse
import functools
import sys

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import (
    cka,
    controlnet,
    extraction,
    few_step_lora,
    few_steps,
    late,
    lora,
    material,
    measuring,
    options,
    teaching,
    variants,
)
from benchmarks import run as program
from ppcl.configuration import config
from ppcl.evaluation import metrics
from ppcl.runtime import devices
from ppcl.teacher import pipelines
from support import ROOT, pruned, tiny

TINY = material.SIZES["tiny"]


@pytest.fixture
def in_place(monkeypatch):
    """No processes of their own: importing torch once more takes longer than all the rest."""
    monkeypatch.setattr(measuring, "fresh", lambda function, *given, **_: function(*given))
    monkeypatch.setattr(measuring, "process_peak", lambda run: run() or 1)
    # Nor machine code of blocks, which takes longer still.
    eager = functools.partial(devices.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(devices, "compile_blocks", eager)


@pytest.mark.parametrize(
    ("benchmark", "count"),
    [
        (extraction.run, 6),
        (cka.run, 5),
        (teaching.floor, 2),
        (teaching.memory, 2),
        (teaching.naive, 3),
        (late.run, 1),
        (variants.run, 3),
    ],
)
def test_a_benchmark_gives_its_ratios(in_place, tmp_path, benchmark, count):
    ratios = benchmark(TINY, tmp_path)
    assert len(ratios) == count
    assert all(ratio.measured >= 0 and ratio.against > 0 for ratio in ratios)


def test_each_option_is_measured_against_none(in_place, tmp_path):
    ratios = options.run(TINY, tmp_path)
    assert {ratio.name.split(":")[0] for ratio in ratios} >= {
        "distill, mixed_precision",
        "distill, gradient_checkpointing",
        "distill, teacher.compile",
        "fine-tune, mixed_precision",
        "fine-tune, gradient_checkpointing",
    }
    assert all(
        ratio.verdict == "reported" and min(ratio.measured, ratio.against) > 0 for ratio in ratios
    )


def test_loras_are_put_into_a_variant_in_each_way(tmp_path):
    """On a variant that nobody trained, with a random LoRA as the trained one, and no pictures."""
    folder = pruned.folder(tmp_path / "models/b22", merged=[(3, 5)])
    for name in ("record", "scratch"):
        (tmp_path / name).mkdir()
    tiny.record(pruned.TEACHER, tmp_path / "record/calls.parquet", batch=4)
    asked = argparse.Namespace(
        config=str(ROOT / "config/digits-depth.yaml"),
        run=tmp_path,
        models=[folder.name],
        ways=list(lora.WAYS),
        teacher=pruned.TEACHER,
        steps=2,
        fit_pictures=2,
        samples=2,
    )
    for kind in lora.KINDS:
        lora.random_lora(lora.load(pruned.TEACHER), tmp_path / "loras" / kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "Judge", lambda: None)
        patch.setattr(lora.Inks, "share", lambda _self, pipe: len(pipe.get_list_adapters()))
        rows = lora.measure(asked, tmp_path / "loras", tmp_path / "scratch").set_index("way")
    assert rows.cosine["first"] > max(rows.cosine["numbers"], rows.cosine["sum"])
    assert all(-1 <= value <= 1 for value in rows.cosine) and rows.trained.tolist() == [1.0] * 6
    assert "| fit |" in lora.table(rows.reset_index())


def test_a_controlnet_is_put_onto_a_variant_in_each_way(tmp_path):
    """On a variant that nobody trained, with a ControlNet of two steps."""
    folder = pruned.folder(tmp_path / "models/b22", merged=[(3, 5)])
    asked = argparse.Namespace(
        run=tmp_path,
        models=[folder.name],
        teacher=pruned.TEACHER,
        controlnet=tmp_path / "sketch",
        steps=2,
        pictures=60,
    )
    rows = controlnet.measure(asked)
    again = controlnet.measure(asked)  # with the one that is there
    assert rows.equals(again) and len(rows) == 1 + 1 + len(controlnet.WAYS)
    of_ways = rows[rows.model == "b22"].set_index("way")
    assert of_ways.cosine.between(-1, 1).all() and of_ways.error.nunique() > 1
    assert "| b22 | sum |" in controlnet.table(rows)


def test_a_few_step_lora_is_one_that_the_config_takes(tmp_path, monkeypatch, capsys):
    accuracy = metrics.Estimate(1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(few_steps, "accuracy", lambda *_: accuracy)
    command = ["--steps", "2", "--samples", "2", "--pictures", "2", "--output", str(tmp_path / "l")]
    monkeypatch.setattr(sys, "argv", ["few_step_lora.py", *command])
    few_step_lora.main()
    assert "| four calls with the LoRA |" in capsys.readouterr().out
    plain = config.load(str(few_step_lora.CONFIG)).teacher
    (entry,) = plain.loras
    fused = plain.replace(loras=[entry.replace(path=str(tmp_path / "l"))])
    first, other = (
        pipelines.load_transformer(one, torch.device("cpu")).transformer_blocks[0].attn.to_q.weight
        for one in (fused, plain.replace(loras=()))
    )
    assert 0 < (first - other).abs().max() < 0.1


def test_the_direct_way_gives_the_same_values(tmp_path):
    (difference,) = [r for r in cka.run(TINY, tmp_path) if r.unit == "CKA"]
    assert difference.verdict == "pass"


def test_a_bar_is_met_from_its_own_side():
    def verdict(measured, least):
        return measuring.Ratio("b", "n", measured, 1.0, "s", 1.1, least).verdict

    assert verdict(1.0, False) == verdict(1.2, True) == "pass"
    assert verdict(1.2, False) == verdict(1.0, True) == "fail"
    assert measuring.Ratio("b", "n", 1.0, 1.0, "s").verdict == "reported"


def test_the_peak_counts_what_is_alive_at_once():
    def run():
        for _ in range(3):
            one = torch.ones(2**18)
            del one

    assert 2**20 <= measuring.torch_peak(run) < 1.1 * 2**20


def test_the_program_stores_what_it_prints(monkeypatch, tmp_path, capsys):
    output = tmp_path / "results.parquet"
    command = ["run.py", "--size", "tiny", "--only", "variants", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    program.main()
    torch.set_num_threads(threads)
    rows = pq.read_table(output).to_pylist()
    printed = capsys.readouterr().out
    assert len(rows) == 3 and all(row["name"] in printed for row in rows)
    assert {row["verdict"] for row in rows} <= {"pass", "fail"}


def test_averages_beside_a_training_are_those_that_ema_keeps(tmp_path):
    def trained(ema: float, beside: bool):
        torch.manual_seed(0)
        module, accelerator = torch.nn.Linear(3, 3), few_steps.processes.accelerator("cpu")
        modules = {"m": module}

        def losses(step):
            yield "m", (module(torch.full((2, 3), step + 1.0)) - 1).square().mean(), {}

        averaged = few_steps.Averaged(modules, losses)
        how = few_steps.loop.Optimisation(steps=30, lr=0.1, ema=ema)
        path = tmp_path / f"{ema}"
        few_steps.loop.train(modules, averaged if beside else losses, how, accelerator, path, "x")
        return module, averaged

    module, averaged = trained(0.0, beside=True)
    averaged.update()
    kept = {decay: module.weight.clone() for decay in averaged.at_each_decay()}
    assert torch.equal(kept[0.0], module.weight)
    for decay in (0.9, 0.99):
        expected = trained(decay, beside=False)[0].weight
        assert torch.equal(kept[decay], expected) and not torch.equal(kept[0.0], expected)
