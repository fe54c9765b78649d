"""A teacher with a LoRA and a scheduler of its own, from its recording to a pipeline folder."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from ppcl.teacher import pipelines
from ppcl.transformer import calls
from support import ROOT, dry_runs, loras, tiny, tiny_run
from support.schedules import LIGHTNING


def test_the_exported_pipeline_is_the_few_step_model(tmp_path, capsys):
    teacher = tiny.pipeline(tmp_path / "teacher", blocks=5)
    lora = loras.save(DiffusionPipeline.from_pretrained(teacher), tmp_path / "four.safetensors")
    source = {"path": str(teacher), "loras": [{"path": str(lora)}], "scheduler": LIGHTNING}
    (tmp_path / "p.txt").write_text("a red 1 on blue\na blue 2 on red\n")
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "true_cfg_scale": 1.0}
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": source,
        "pipeline": call,
        "record": {
            "prompts": str(tmp_path / "p.txt"),
            "samples": 2,
            "batch_size": 2,
            "renoised_per_sample": 1,
            "heldout_fraction": 0.5,
        },
    }
    made = {"calls": tmp_path / "calls.parquet", "block_facts": tmp_path / "blocks.parquet"}
    tiny.stage("record", settings, **made, state=tmp_path / "state")
    reader = calls.Reader(made["calls"])
    levels = sorted(set(reader.index["sigma"][reader.rows(kinds=("pipeline",))].tolist()))
    assert len(levels) == 4 and levels[0] == torch.tensor(0.5).item()  # 3 / (3 + 1 / .25 - 1)

    of_run, given = tiny.pruned(
        tmp_path, source, made["calls"], pipeline=call, runs=((0, 1), (3, 4))
    )
    sets = tiny.chosen(tmp_path / "sets.json", given["selection"], "start")
    tiny.stage(
        "assemble",
        of_run,
        calls=made["calls"],
        sets=sets,
        start=given["students"],
        variant="p70",
        output=tmp_path / "p70",
    )
    card = json.loads((tmp_path / "p70/pruning.json").read_text())
    (noted,) = card["loras"]
    assert noted["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert (noted["scale"], noted["component"]) == (1.0, "transformer")
    assert (card["scheduler"], card["pipeline"]) == (LIGHTNING, call)

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "p70")
    whole = pipelines.load(tiny.source(teacher).replace(**source), torch.device("cpu"))
    kept, old = pipe.transformer.transformer_blocks[1], whole.transformer.transformer_blocks[2]
    for name, weight in old.state_dict().items():
        assert torch.equal(kept.state_dict()[name], weight), name
    bare = DiffusionPipeline.from_pretrained(teacher).transformer.transformer_blocks[2]
    assert not torch.equal(bare.attn.to_q.weight, kept.attn.to_q.weight)
    for each in (pipe, whole):
        each(prompt="a red 1 on blue", output_type="latent", **call)
    assert torch.equal(pipe.scheduler.sigmas, whole.scheduler.sigmas)

    # Another LoRA is fitted to the few-step model's pictures, by the run's config alone.
    style = loras.save(
        DiffusionPipeline.from_pretrained(teacher), tmp_path / "s.safetensors", seed=1
    )
    few = {"model": tmp_path / "p70", "lora": style, "steps": 3, "pictures": 2}
    tiny.stage("remap_lora", settings, **few, output=tmp_path / "o.safetensors")
    assert "fitted: the squared error" in capsys.readouterr().out
    pipe.load_lora_weights(tmp_path, weight_name="o.safetensors")
    given = few | {"teacher": teacher, "calls": made["calls"], "output": tmp_path / "n.safetensors"}
    for config, why in ((settings, "leave --calls and --teacher out"), (None, "LoRAs were fused")):
        with pytest.raises(SystemExit):
            tiny.stage("remap_lora", config, **given)
        assert why in capsys.readouterr().err


def test_every_stage_takes_a_teacher_with_a_lora(tmp_path, monkeypatch):
    monkeypatch.setattr("ppcl.export.assembly.prove", lambda *_: None)  # the test above has it
    teacher = tiny.pipeline(tmp_path / "teacher", blocks=5)
    lora = loras.save(DiffusionPipeline.from_pretrained(teacher), tmp_path / "four.safetensors")
    settings = tiny_run.settings(teacher, tmp_path)
    settings["teacher"] |= {"loras": [{"path": str(lora), "scale": 0.5}], "scheduler": LIGHTNING}
    settings["pipeline"] |= {"num_inference_steps": 4, "true_cfg_scale": 1.0}
    for stage in tiny_run.STAGES:
        if stage.program not in ("plot", "pareto"):
            tiny.stage(stage.program, settings, *stage.group, **stage.paths(tmp_path))
    metrics = pq.read_table(tmp_path / "metrics.parquet").to_pandas()
    of_variant = metrics[metrics["variant"] == "small"]
    assert {"velocity_error", "psnr", "latency_ratio"} <= set(of_variant["metric"])
    page = (tmp_path / "card/README.md").read_text(encoding="utf-8")
    assert "LoRA `four.safetensors` (scale 0.5)" in page and "num_inference_steps=4" in page


def test_the_config_of_a_few_step_teacher_resolves(tmp_path):
    """Its LoRA is made by benchmarks/few_step_lora.py, and stands in here."""
    pipe = DiffusionPipeline.from_pretrained(ROOT / "resources" / "digits")
    path = loras.save(pipe, tmp_path / "l.safetensors")
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"teacher": {"loras": [{"path": str(path)}]}})
    )
    files = ["--configfile", "config/digits-fast.yaml", tmp_path / "mine.yaml"]
    printed = dry_runs.run("snakemake", "--nolock", "--cores", "1", "-n", "-F", *files)
    jobs = dry_runs.counts(printed)
    assert jobs["assemble"] == 2 and "finetune" not in jobs
