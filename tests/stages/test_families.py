"""Every supported family from a tiny stock pipeline to a pruned one, through every stage's program.

Real diffusers classes with random weights, two blocks in a row of which do nothing: the search must
find them, and what replaces them must cost nothing. Wiring only: nothing here is about quality.
"""

import copy
import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from ppcl.configuration import config
from ppcl.evaluation import generation, measuring, model_folders
from ppcl.export import assembly, reload_gate
from ppcl.pruning import narrow
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import schemas, tables
from ppcl.teacher import pipelines
from ppcl.training import tail
from ppcl.transformer import blocks, calls, claims, families
from support import ROOT, fresh, tiny, zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
SPECIMENS = {name: one for name, one in ZOO.items() if one.family in families.FAMILIES}
DEPTH, PLANTED = 6, (3, 4)  # blocks per list, and which of each do nothing
FRESH = ("flux2", "sd3", "wan22-low")  # through Snakemake in CI: a joint stream, two, one
LOW = ("flux", "wan22")  # in bfloat16; Wan keeps some of its weights in float32
WIDE = [
    name for name in SPECIMENS if any(b.width for b in families.FAMILIES[ZOO[name].family].lists)
]


def silence(transformer) -> int:
    """Zeroes the planted blocks, which leaves their streams as they are; how many can go."""
    spare = 0
    for listed in blocks.family(transformer).lists:
        members = getattr(transformer, listed.attribute)
        if len(members) == DEPTH:
            for index in PLANTED:
                for parameter in members[index].parameters():
                    parameter.zero_()
            spare += len(PLANTED)
    return spare


def make(name: str, folder: Path) -> dict:
    """A planted pipeline in a folder, its prompts, and the config of a run on it."""
    one = ZOO[name]
    pipe = one.make(DEPTH)
    with torch.no_grad():
        spare = silence(getattr(pipe, one.component))
    pipe.save_pretrained(folder / "teacher")
    columns = {"prompt": ["a red 1 on blue", "a blue 2 on red", "a green 3 on red", "4 in red"]}
    if one.image:
        columns["image"] = ["picture.png"] * 4
        Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(folder / "picture.png")
    rows = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    for split, chosen in (
        ("calibration", rows),
        ("evaluation", [rows[0], *(f"no {r}" for r in rows[1:3])]),
    ):
        (folder / f"{split}.csv").write_text("\n".join(chosen) + "\n")
    transformer = getattr(pipe, one.component)
    depth = len(blocks.block_sequence(transformer))
    training = {"batch_size": 2, "warmup_steps": 1, "checkpoint_every": 2}
    return config.complete(
        {
            "run": name,
            "device": "cpu",
            "processes": 1,
            "teacher": {
                "path": str(folder / "teacher"),
                "component": one.component,
                "dtype": "bfloat16" if name in LOW else "float32",
            },
            "pipeline": one.settings,
            "record": {
                "prompts": str(folder / "calibration.csv"),
                "samples": 4,
                "batch_size": 2,
                "renoised_per_sample": 0,
                "heldout_fraction": 0.5,
            },
            "extract": {"rows": 16, "batch_size": 4, "moment_tokens": 64, "sample_tokens": 16},
            "modulation": {"timesteps": 8},
            "similarity": {"bootstrap": 4},
            "sensitivity": {"rows": 4, "longest": 3, "batch_size": 4},
            "intervals": {"segmentation": "optimal"},
            "width": {
                "enabled": name in WIDE,
                "rows": 2,
                "fit_rows": 8,
                "batch_size": 4,
                "longest": 2,
                "ridge": 1e-3,
                "cka_floor": 0,
            },
            "distill": training
            | {"steps": 2, "lr": 1e-9, "heldout_rows": 4, "cache_inputs": "always"},
            "subsets": training | {"steps": 2, "lr": 1e-9, "heldout_rows": 4},
            "finetune": training | {"lr": 1e-9},
            "variants": [
                {"name": "spare", "budget": {"blocks": depth - spare}, "finetune_steps": 2}
            ],
            "pareto": {"budgets": 2},
            "evaluate": {
                "prompts": str(folder / "evaluation.csv"),
                "samples": 2,
                "batch_size": 2,
                "judge": "none",
                "velocity_rows": 4,
                "bootstrap": 4,
                "latency_repeats": 1,
            },
        },
        name,
    )


@pytest.fixture(scope="module", params=SPECIMENS)
def made(request, tmp_path_factory):
    """(name, folder, config) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    yield request.param, folder, make(request.param, folder)
    shutil.rmtree(folder)


def stage(name: str, settings: dict, **paths) -> None:
    """Runs a stage's program; a refusal fails the test."""
    try:
        tiny.stage(name, settings, **paths)
    except SystemExit as stopped:
        pytest.fail(f"{name} ended with {stopped.code}")


def search(folder: Path, settings: dict) -> dict[str, Path]:
    """The stages up to the selection, one program after the other."""
    names = {
        "calls": "calls.parquet",
        "tokens": "tokens.parquet",
        "moments": "moments.safetensors",
        "conditioning": "conditioning.safetensors",
        "probes": "probes.safetensors",
        "probes_table": "probes.parquet",
        "cka": "cka.parquet",
        "blocks": "blocks.parquet",
        "sensitivity": "sensitivity.parquet",
        "width": "width.parquet",
        "maps": "maps.safetensors",
        "intervals": "intervals.parquet",
        "candidates": "candidates.parquet",
        "block_facts": "block-facts.parquet",
        "selection": "selection.json",
        "students": "students.safetensors",
        "state": "state",
    }
    at = {name: folder / path for name, path in names.items()}

    def run(name: str, *keys: str, **more: Path) -> None:
        stage(name, settings, **{key: at[key] for key in keys}, **more)

    wide = settings["width"]["enabled"]
    run("record", "calls", "block_facts", "state")
    run("extract", "calls", "state", "tokens", "moments", "conditioning")
    run("probe", "moments", "tokens", "probes_table", "probes")
    run("similarity", "probes", "tokens", "cka", "blocks")
    run("sensitivity", "calls", "state", table=at["sensitivity"])
    compared = ["blocks"] if wide else []
    run("width", "calls", *compared, "conditioning", "state", "maps", table=at["width"])
    run("intervals", "block_facts", "cka", "sensitivity", "intervals", "width", "candidates")
    run("prune", "intervals", "calls", "selection", "students", "candidates")
    return at


def train(folder: Path, settings: dict, at: dict[str, Path]) -> dict[str, Path]:
    """The stages from distill to assemble."""
    before = at["students"]
    for name in ("distill", "subsets"):
        outputs = {
            "output": folder / f"{name}.safetensors",
            "log_table": folder / f"{name}-log.parquet",
            "unit_costs": folder / f"{name}-unit_costs.parquet",
        }
        common = {key: at[key] for key in ("calls", "selection", "state")}
        stage(name, settings, students=before, **common, **outputs)
        before = outputs["output"]
    at |= {"unit_costs": outputs["unit_costs"], "model": folder / "spare"}
    sets = tiny.chosen(folder / "sets.json", at["selection"], "subsets", "spare")
    of_variant = {"calls": at["calls"], "sets": sets, "variant": "spare", "subsets": before}
    tuned, log = folder / "tuned.safetensors", folder / "tuned.parquet"
    stage("finetune", settings, **of_variant, state=at["state"], output=tuned, log_table=log)
    stage("assemble", settings, **of_variant, finetuned=tuned, output=at["model"])
    return at


def gate_here(arguments, **_options) -> subprocess.CompletedProcess:
    """The reload gate in this process."""
    problems = reload_gate.check(*map(Path, arguments[-2:]))
    return subprocess.CompletedProcess(arguments, bool(problems), "\n".join(problems), "")


@pytest.fixture(scope="module")
def ran(made):
    """(name, folder, config, paths) of one family after all stages, in this process."""
    name, folder, settings = made
    with pytest.MonkeyPatch.context() as patch:
        # A fresh process for every family would take minutes; three families have theirs below.
        patch.setattr(assembly.subprocess, "run", gate_here)
        at = train(folder, settings, search(folder, settings))
    return name, folder, settings, at


def source(settings: dict) -> TeacherSettings:
    return TeacherSettings.of(settings["teacher"])


def close(settings: dict) -> dict[str, float]:
    """How close answers in batches of other sizes are."""
    low = settings["teacher"]["dtype"] == "bfloat16"
    return {"rtol": 0.05, "atol": 0.02} if low else {"rtol": 1e-3, "atol": 1e-5}


def recorded(at: dict[str, Path]) -> calls.Batch:
    reader = calls.Reader(at["calls"])
    return reader.batch(reader.buckets[0][:2])


@torch.no_grad()
def test_recorded_calls_replay_to_the_bit(ran):
    _, _, settings, at = ran
    transformer = pipelines.load_transformer(source(settings), torch.device("cpu"))
    reader = calls.Reader(at["calls"])
    for batch in reader.batches(reader.rows(), 2):
        claims.verify(transformer, batch.arguments)
        torch.testing.assert_close(
            blocks.answer(transformer, batch.arguments), batch.output, **close(settings)
        )


def test_planted_redundant_blocks_are_found_and_cost_nothing(ran):
    name, _, settings, at = ran
    transformer = pipelines.load_transformer(source(settings), torch.device("cpu"))
    candidates = tables.read(at["intervals"], schemas.INTERVALS).to_pandas()
    chosen = candidates[candidates["selected"]]
    spare = len(blocks.block_sequence(transformer)) - settings["variants"][0]["budget"]["blocks"]
    assert chosen["removed_blocks"].sum() == spare
    ends = [
        seam + index
        for seam, listed in zip(starts(transformer), blocks.family(transformer).lists, strict=True)
        for index in (PLANTED if len(getattr(transformer, listed.attribute)) == DEPTH else ())
    ]
    for row in chosen.itertuples():
        removed = set(range(row.first, row.last + 1))
        assert len(removed - set(ends)) <= 1 and len(removed) > 1, (name, row)
    errors = tables.read(at["unit_costs"], schemas.UNIT_COSTS).to_pandas()
    depth = errors[errors["removed_blocks"] > 0]
    assert len(depth) and depth["velocity_error"].max() < 1e-7


def starts(transformer) -> list[int]:
    """Index of the first block of every list."""
    sizes = [len(getattr(transformer, b.attribute)) for b in blocks.family(transformer).lists]
    return [sum(sizes[:i]) for i in range(len(sizes))]


@torch.no_grad()
def test_all_teachers_plugged_back_equal_the_teacher_to_the_bit(ran):
    _, folder, settings, at = ran
    pipe = pipelines.load(source(settings), torch.device("cpu"))
    component = settings["teacher"]["component"]
    transformer = getattr(pipe, component)
    batch = recorded(at)
    before = blocks.answer(transformer, batch.arguments)
    back = {(b.index, b.index): copy.deepcopy(b.module) for b in blocks.block_sequence(transformer)}
    whole, block_map = blocks.assembled(transformer, back)
    assert torch.equal(blocks.answer(whole, batch.arguments), before)
    assert block_map == [[b.index] for b in blocks.block_sequence(transformer)]
    whole.save_pretrained(folder / "back")
    again = type(transformer).from_pretrained(folder / "back", dtype=pipe.dtype)
    assert torch.equal(blocks.answer(again, batch.arguments), before)
    assert dict(again.config) == dict(transformer.config) | {
        "_name_or_path": again.config._name_or_path
    }


@torch.no_grad()
def test_a_teacher_that_starts_at_a_block_equals_it_to_the_bit(ran):
    """Behind the first block, where a list of blocks of another kind begins, at the last, and
    behind it."""
    _, _, settings, at = ran
    transformer = pipelines.load_transformer(source(settings), torch.device("cpu"))
    batch = recorded(at)
    whole = blocks.answer(transformer, batch.arguments)
    last = len(blocks.block_sequence(transformer)) - 1
    for first in {1, *starts(transformer), last, last + 1} - {0}:
        streams = tail.streams_before(transformer, first, batch.arguments)
        model = tail.Tail(transformer, first).model(streams)
        assert torch.equal(blocks.answer(model, batch.arguments), whole), first
        wrong = {stream: value + 1 for stream, value in streams.items()}
        model = tail.Tail(transformer, first).model(wrong)
        assert not torch.equal(blocks.answer(model, batch.arguments), whole), first


@torch.no_grad()
def test_stock_diffusers_loads_the_pruned_pipeline(ran):
    """As few blocks as asked for, no answer changed, pictures as the teacher's."""
    name, _, settings, at = ran
    trust = assembly.own_code(at["model"], ZOO[name].component)
    dtype = getattr(torch, settings["teacher"]["dtype"])
    pipe = DiffusionPipeline.from_pretrained(at["model"], dtype=dtype, trust_remote_code=trust)
    transformer = getattr(pipe, ZOO[name].component)
    assert len(blocks.block_sequence(transformer)) == settings["variants"][0]["budget"]["blocks"]
    batch = recorded(at)
    torch.testing.assert_close(
        blocks.answer(transformer, batch.arguments), batch.output, **close(settings)
    )
    models = model_folders.models(source(settings), [at["model"]])
    loaded = {m.name: m.transformer(torch.device("cpu")) for m in models}
    reader = calls.Reader(at["calls"])
    timed = reader.draw(reader.heldout_rows("report"), 2, (0,))
    estimates = measuring.measure_transformers(
        loaded, reader, timed, Settings.of(settings), torch.device("cpu")
    )
    assert estimates["spare"]["velocity_error"].value < (1e-4 if name in LOW else 1e-6)
    assert estimates["spare"]["parameter_fraction"].value < 1
    item = {"sample": 0, "prompt_index": 0, "prompt": "a red 1 on blue", "seed": 5}
    if ZOO[name].image:
        item["image"] = str(Path(settings["teacher"]["path"]).parent / "picture.png")
    pictures = []
    for model in models:
        part = at["model"].parent / f"{model.name}.parquet"
        generation.generate(model, torch.device("cpu"), settings["pipeline"], [item], part)
        png = tables.read(part, schemas.IMAGES).column("png")[0].as_py()
        pictures.append(generation.from_png(png).astype(int))
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def narrowed(transformer) -> tuple[torch.nn.Module, list[list[int]]]:
    """A text run in the first two blocks that can have one, and all FFNs of block 5 linear; maps
    drawn at random."""
    specs = {}
    sequence = blocks.block_sequence(transformer)
    runs = [a.index for a, b in pairwise(sequence) if a.width.text and b.width.text]
    if runs:
        specs = {runs[0]: {"text": "source"}, runs[0] + 1: {"text": "close"}}
    wide = [b for b in sequence if b.width.ffn and b.index not in specs][-1]
    specs[wide.index] = {"linear_ffn": list(wide.width.ffn)}
    made, generator = {}, torch.Generator().manual_seed(0)
    for index, spec in specs.items():
        block = sequence[index]
        one = narrow.narrow(copy.deepcopy(block.module), block.list.layout(), spec)
        for linear in narrow.maps(one).values():
            linear.weight.data = 0.2 * torch.randn(linear.weight.shape, generator=generator)
        made[index, index] = one
    return blocks.assembled(transformer, made)


@torch.no_grad()
@pytest.mark.parametrize("name", WIDE)
def test_a_narrow_pipeline_brings_its_code(name, tmp_path, modules, monkeypatch):
    one = ZOO[name]
    folder = tmp_path / "teacher"
    one.make(DEPTH).save_pretrained(folder)
    at = tiny.source(folder).replace(component=one.component)
    pipe = pipelines.load(at, torch.device("cpu"))
    recorder, seen = getattr(pipe, one.component), []

    def look(module, args, kwargs):
        seen.append(blocks.signature_arguments(module, args, kwargs))

    handle = recorder.register_forward_pre_hook(look, with_kwargs=True)
    image = {"image": Image.new("RGB", (64, 64))} if one.image else {}
    noise = [torch.Generator().manual_seed(0)]
    pipe(prompt=["a red 1"], generator=noise, output_type="latent", **one.settings, **image)
    handle.remove()
    call = seen[0] | {"return_dict": False}
    model, block_map = narrowed(recorder)
    before = blocks.answer(recorder, call)
    expected = blocks.answer(model, call)
    assert not torch.allclose(before, expected)
    monkeypatch.setattr(assembly.subprocess, "run", gate_here)
    assembly.export(
        assembly.TeacherPipeline(pipe, one.component), model, block_map, tmp_path / "p50", {}, call
    )
    assert assembly.own_code(tmp_path / "p50", one.component)
    again = DiffusionPipeline.from_pretrained(tmp_path / "p50", trust_remote_code=True)
    answer = blocks.answer(getattr(again, one.component), call)
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


def through_snakemake(folder: Path, settings: dict, *targets: str) -> Path:
    """Runs the workflow in a folder of its own, all of it or what targets need; returns that of
    the results."""
    config_file = folder / "config.yaml"
    config_file.write_text(yaml.safe_dump(settings))
    words = ["-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    words += ["--configfile", config_file, "--cores", "2", "--quiet", "all", "--", *targets]
    quick = os.environ | {"OMP_NUM_THREADS": "1"}
    done = fresh.run(fresh.SNAKEMAKE, *words, env=quick, merged=True)
    assert done.returncode == 0, done.stdout[-5000:]
    return folder / "results" / settings["run"]


IN_CI = SPECIMENS if os.environ.get("PPCL_ALL_FAMILIES") else FRESH


@pytest.mark.parametrize("name", IN_CI)
def test_snakemake_prunes_a_family_and_a_fresh_process_loads_it(name, tmp_path):
    """`assemble` itself reloads in a fresh process, and compares answers; here stock diffusers
    makes pictures of the pruned folder in another."""
    settings = make(name, tmp_path)
    targets = [f"results/{name}/evaluation/metrics.parquet"]
    if name == FRESH[0]:
        targets = ["all"]  # figures too
    else:
        settings["width"]["enabled"], settings["subsets"]["steps"] = False, 0
    results = through_snakemake(tmp_path, settings, *targets)
    model = results / "models" / "spare"
    metrics = tables.read(results / "evaluation/metrics.parquet", schemas.METRICS).to_pandas()
    values = metrics[metrics["variant"] == "spare"].set_index("metric")["value"]
    assert values["velocity_error"] < 1e-6
    assert values["ssim"] > 0.99
    index = json.loads((model / "model_index.json").read_text())
    assert index[ZOO[name].component][0] == "diffusers"  # depth alone: a stock class
    program = (
        "import sys, json, torch, diffusers\n"
        "folder, settings = sys.argv[1], json.loads(sys.argv[2])\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(folder)\n"
        "from PIL import Image\n"
        "given = {'image': Image.open(sys.argv[3])} if len(sys.argv) > 3 else {}\n"
        "made = pipe(prompt=['a red 1 on blue'], generator=[torch.Generator().manual_seed(0)],\n"
        "            output_type='np', **given, **settings)[0]\n"
        "assert torch.isfinite(torch.as_tensor(made)).all()\n"
    )
    given = [model, json.dumps(settings["pipeline"])]
    given += [Path(settings["teacher"]["path"]).parent / "picture.png"] * ZOO[name].image
    done = fresh.run(fresh.MODELS, "-I", "-c", program, *given)
    assert done.returncode == 0, done.stderr[-3000:]
