"""The presets of models at their real size: all that can be checked without weights or a GPU."""

import csv
import functools
import inspect
import json
import os
import sys

import pytest
import yaml

from ppcl.configuration import config, preflight
from ppcl.settings import Settings
from ppcl.storage import schemas, tables
from ppcl.teacher import prompts
from support import ROOT, fresh

PRESETS = ROOT / "config/presets"
ARCHITECTURES = ROOT / "resources/architectures"
PROMPTS = ROOT / "resources/prompts"

# Parameters without buffers, and channels of a token.
SIZES = {
    "qwen-image": (20_430_401_088, 3072),
    "flux1-dev": (11_901_408_320, 3072),
    "flux1-schnell": (11_891_178_560, 3072),
    "flux1-lite": (8_163_264_064, 3072),
    "sd35-medium": (2_243_171_520, 1536),
    "sd35-large": (8_056_627_520, 2432),
    "wan22": (14_288_491_584, 5120),
}
# Presets without training -> the architecture, and GB of the text encoders, of which each model has
# a copy: Qwen2.5-VL 7B, and T5-XXL with CLIP, in bf16.
FREE = {
    "qwen-image-free": ("qwen-image", 16.6),
    "qwen-image-lightning": ("qwen-image", 16.6),
    "flux1-dev-free": ("flux1-dev", 9.8),
}
EVERY = [*SIZES, *FREE]
# Steps of 40 in which the pipeline calls the first transformer of Wan 2.2, at the least: it does as
# long as the noise level is above 0.875, which is longer the larger the scheduler's flow_shift.
WAN_STEPS = 12


@functools.cache
def loaded(name: str) -> Settings:
    """A preset completed with all defaults."""
    return config.load(str(PRESETS / f"{name}.yaml"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Presets name their prompts relative to where Snakemake runs."""
    monkeypatch.chdir(ROOT)


def dry_run(name: str) -> str:
    """Rules and numbers of jobs that Snakemake would run for a preset."""
    # --nolock: other tests may run the workflow in this folder.
    command = ["-m", "snakemake", "--cores", "2", "-n", "--nolock"]
    command += ["--configfile", f"config/presets/{name}.yaml"]
    quick = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = fresh.run(fresh.SNAKEMAKE, *command, cwd=ROOT, env=quick)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.split("Job stats:")[1].split("total")[0]


def test_there_is_a_preset_and_an_architecture_for_each_model():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(EVERY)
    assert {path.stem for path in ARCHITECTURES.glob("*.json")} == set(SIZES)


@pytest.mark.parametrize("name", EVERY)
def test_preset_passes_every_check_made_before_a_run(name):
    settings, (model, _) = loaded(name), FREE.get(name, (name, 0))
    assert settings.run == name
    preflight.check(settings, f"{name}.yaml")
    assert settings.teacher.dtype == "bfloat16"
    assert settings.forecast.transformer_config == f"resources/architectures/{model}.json"
    if name in FREE:
        assert not settings.trains and not settings.intervals.enabled
        assert not any(v.train or v.finetune_steps for v in settings.variants)
        return
    steps = settings.distill.steps, settings.width.steps
    assert steps == (6000, 2000) and settings.width.schedule == "staged"
    assert max(variant.finetune_steps for variant in settings.variants) == 1000


@pytest.mark.parametrize("name", EVERY)
def test_calls_of_the_pipeline_fit_its_signature(name):
    """Each family's stock pipeline has the arguments that the preset gives it."""
    import diffusers

    known = {
        "Qwen": diffusers.QwenImagePipeline,
        "black": diffusers.FluxPipeline,
        "Freep": diffusers.FluxPipeline,
        "stabi": diffusers.StableDiffusion3Pipeline,
        "Wan-A": diffusers.WanPipeline,
    }
    settings = loaded(name)
    made_by = next(v for k, v in known.items() if settings.teacher.path.startswith(k))
    assert set(settings.pipeline) <= set(inspect.signature(made_by.__call__).parameters)


def test_lightning_has_the_levels_of_its_card():
    """shared/cases has the same of a recorded pipeline."""
    import diffusers

    keys = loaded("qwen-image-lightning").teacher.scheduler
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        {"shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9} | dict(keys)
    )
    for mu in (scheduler.config.base_shift, scheduler.config.max_shift):
        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=mu)
        wanted = [3 / (3 + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)]
        assert scheduler.sigmas.tolist()[:4] == pytest.approx(wanted)


@pytest.mark.parametrize("name", SIZES)
def test_architecture_has_the_published_size(name):
    import diffusers
    import torch

    parameters, channels = SIZES[name]
    published = json.loads((ARCHITECTURES / f"{name}.json").read_text(encoding="utf-8"))
    heads, width = published["num_attention_heads"], published["attention_head_dim"]
    assert heads * width == channels
    with torch.device("meta"):
        transformer = getattr(diffusers, published["_class_name"]).from_config(published)
    assert sum(p.numel() for p in transformer.parameters()) == parameters


@pytest.mark.parametrize("name", SIZES)
def test_tokens_suffice_for_every_channel(name):
    settings, (_, channels) = loaded(name), SIZES[name]
    extract, record = settings.extract, settings.record
    half = extract.rows // 2  # one half fits the probes, the other is held out
    assert 15 <= half * extract.moment_tokens / channels <= 50
    assert extract.rows * extract.sample_tokens / channels >= 10
    # Of these, half are held out, for which only the debiased estimator is safe.
    assert settings.similarity.estimator == "debiased"

    rows = prompts.read(record.prompts)
    used = len({row["prompt"] for row in rows[: record.samples]})
    calls = WAN_STEPS if name == "wan22" else settings.pipeline["num_inference_steps"]
    guided = not name.startswith("flux")
    calls = (calls + record.renoised_per_sample) * (2 if guided else 1)
    heldout = round(used * record.heldout_fraction)
    selecting = -(-heldout // 2)  # the others are only reported on
    repeats = record.samples // used
    assert selecting * repeats * calls >= half
    assert (used - heldout) * repeats * calls >= half


def test_published_selection_of_the_qwen_preset_is_valid():
    """The lines of qwen-image.yaml behind #| are the overlay that its comment promises."""
    text = (PRESETS / "qwen-image.yaml").read_text(encoding="utf-8")
    lines = [line[3:] for line in text.splitlines() if line.startswith("#| ")]
    merged = yaml.safe_load(text)
    for key, value in yaml.safe_load("\n".join(lines)).items():
        merged[key] = merged[key] | value if isinstance(value, dict) else value
    settings = Settings.of(config.complete(merged, "qwen-image.yaml"))
    preflight.check(settings, "qwen-image.yaml")
    removed = sum(last - first for first, last in settings.intervals.require)
    assert 60 - removed == settings.variants[0].budget["blocks"]


def test_prompts_are_unique_and_cover_what_they_promise():
    seen: set[str] = set()
    for path in PROMPTS.glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows == prompts.read(path)
        texts = [row["prompt"] for row in rows]
        assert len(set(texts)) == len(texts) and not seen & set(texts), path
        seen |= set(texts)
        for row in rows:
            chinese = any("\u4e00" <= letter <= "\u9fff" for letter in row["prompt"])
            assert chinese == (row["language"] == "zh"), row
        if path.name.startswith("video"):
            continue
        for language, length in (("en", 240), ("zh", 80)):
            long = [r for r in rows if (r["kind"], r["language"]) == ("long_text", language)]
            assert len(long) >= 8 and all(len(row["prompt"]) >= length for row in long)
        lengths = [len(text) for text in texts]
        assert min(lengths) < 15 and max(lengths) > 350
    assert len(seen) >= 380


@pytest.mark.parametrize("name", EVERY)
def test_preset_can_be_planned(name, tmp_path, monkeypatch, capsys):
    import forecast

    model, encoders = FREE.get(name, (name, 0))
    table, preset = tmp_path / "forecast.parquet", f"config/presets/{name}.yaml"
    given = ["--config", preset, "--table", str(table), "--resources", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["forecast.py", *given])
    forecast.main()  # in this process: imports take longer than planning
    assert f"{SIZES[model][0]:,}" in capsys.readouterr().out
    rows = tables.read(table, schemas.FORECAST).to_pandas()
    sizes = rows[rows["item"] == "artifact"].set_index("name")["value"]
    variants = loaded(name).variants
    for variant in variants:  # no budget is out of reach
        allowed = 2 * SIZES[model][0] * variant.budget["fraction"]
        assert sizes[f"models/{variant.name}/"] <= allowed
    if name in FREE:
        hours = rows.loc[rows["item"] == "job", "value"].sum() / 3600
        assert hours < 1.6  # of two: assemble copies, and loads again what it wrote
        assert sizes.sum() / 1e9 + encoders * len(variants) < 60
        assert rows.loc[rows["gpu_gib"] == 80, "value"].all()  # everything fits, as it is


@pytest.mark.parametrize("name", EVERY)
def test_workflow_of_the_preset_resolves(name):
    jobs = set(dry_run(name).split())
    always = {"record", "extract", "width", "choose", "assemble", "pareto", "evaluate"}
    trained = {"similarity", "sensitivity", "intervals", "prune", "distill", "narrow", "subsets"}
    trained.add("finetune")
    assert always <= jobs and jobs & trained == (set() if name in FREE else trained)
