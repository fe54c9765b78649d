"""The planner: exact counts, FLOPs in closed form, memory against measured runs, the target."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ppcl.closed_forms import linear_map_candidates, linear_maps
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.planning import device_memory, footprint, planner, stages, weightless
from ppcl.pruning.units import units_of
from ppcl.runtime import processes
from ppcl.settings import Settings
from ppcl.storage import schemas, tables
from ppcl.training import distillation
from ppcl.transformer import blocks, calls, example_calls
from ppcl.transformer.families import FAMILIES
from ppcl.transformer.family import Size
from support import ROOT, SCRIPTS, tiny, zoo_images, zoo_videos

INTERVALS = [[3, 4], [5, 7], [8, 10], [11, 12], [15, 24], [25, 27], [29, 30], [42, 43], [45, 47]]
INTERVALS += [[48, 49], [52, 53], [54, 55], [56, 57]]
GROUPS = [[13, 14], [31, 32], [33, 34], [36, 37], [40, 41], [50, 59]]
QWEN, QWEN_DEPTH, FLUX = 20_430_401_088, 11_934_618_688, 11_901_408_320
SMALL = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 8}
SMALL |= {"joint_attention_dim": 256, "in_channels": 64, "axes_dims_rope": (16, 24, 24)}
QWEN_IMAGE = FAMILIES["QwenImageTransformer2DModel"].pipeline
SMALL_FLUX = SMALL | {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 64}


def architecture(path: Path, class_name: str, **values) -> Path:
    path.write_text(json.dumps({"_class_name": class_name, **values}))
    return path


def forecast(table: Path, settings: dict, **paths) -> pd.DataFrame:
    """forecast.parquet of a config, made by the program."""
    file = table.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    given = [f"--{name}={value}" for name, value in paths.items()]
    given.append(f"--resources={table.with_name('resources.json')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["forecast", f"--config={file}", f"--table={table}", *given])
        runpy.run_path(str(SCRIPTS / "forecast.py"), run_name="__main__")
    return tables.read(table, schemas.FORECAST).to_pandas()


def values(table: pd.DataFrame, item: str, measure: str) -> dict[str, float]:
    rows = table[(table["item"] == item) & (table["measure"] == measure)]
    return rows.set_index("name")["value"].to_dict()


# ---- counts


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[pd.DataFrame, Path]:
    """The published selection on Qwen-Image."""
    folder = tmp_path_factory.mktemp("forecast")
    settings = {
        "teacher": {"path": "nobody/nothing", "dtype": "bfloat16"},
        "forecast": {
            "transformer_config": str(
                architecture(folder / "config.json", "QwenImageTransformer2DModel")
            ),
            "gpus": [24, 80],
        },
        "intervals": {"require": INTERVALS},
        "modulation": {"rank": 16},
        "width": {
            "text": {"require": GROUPS},
            "ffn_image": {"require": [2, 58, 59]},
            "ffn_text": {"require": [2]},
            "batch_size": 1,
        },
        **{name: {"batch_size": 1} for name in ("record", "extract", "sensitivity", "evaluate")},
        # One of the trainings, for time; small models below have all.
        "subsets": {"steps": 0},
        "distill": {"batch_size": 1, "mixed_precision": "bf16"},
        "finetune": {"batch_size": 1, "mixed_precision": "bf16", "gradient_checkpointing": True},
    }
    return forecast(folder / "forecast.parquet", settings), folder / "forecast.parquet"


def test_published_counts(qwen):
    parameters = values(qwen[0], "variant", "parameters")
    assert (parameters["teacher"], parameters["depth"]) == (QWEN, QWEN_DEPTH)
    left = {"teacher": 60, "depth": 35, "depth+width": 35}
    left |= {"modulation": 60, "depth+modulation": 35, "depth+width+modulation": 35}
    assert values(qwen[0], "variant", "blocks") == left
    assert values(qwen[0], "variant", "size")["depth"] == 2 * QWEN_DEPTH


def test_width_counts_by_hand(qwen):
    d = 3072
    linear = d * d + d  # a square projection with its bias
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    # An FFN goes with the second half of its modulation, for one map.
    ffn = mlp + 3 * linear - linear
    # A borrowed text stream: modulation, MLP, projections of output and query with its norm go, for
    # the map of its input.
    query = linear + 128
    text = 6 * linear + mlp + linear + query - linear
    # Nothing reads text after [50,59], so its source has none but what it lends: a third of its
    # modulation stays.
    lent = mlp + linear + query + 4 * linear
    assert 11 * query == 103_844_224 and lent == 84_953_088 + 9_440_384 + 37_761_024
    # Students and kept blocks in each group, less its source; [50,59] holds four students and two
    # kept blocks, and ends where nothing reads the text stream.
    borrowers = {(13, 14): 1, (31, 32): 1, (33, 34): 1, (36, 37): 1, (40, 41): 1, (50, 59): 6}
    closing = 5 * linear  # all groups but the last make a text stream again
    saved = 4 * ffn + sum(borrowers.values()) * text - closing + lent
    parameters = values(qwen[0], "variant", "parameters")
    assert parameters["depth+width"] == QWEN_DEPTH - saved == 9_914_549_824


# Text groups, FFNs, and parameters with every modulation and the last AdaLN at rank 16, before dead
# weights go.
RANK_16 = [
    ([], [], [], 13_658_189_376),
    (INTERVALS, [], [], 7_976_358_976),
    (INTERVALS, GROUPS[3:], [2, 58, 59], 7_123_319_872),
    (INTERVALS, GROUPS, [2, 58, 59], 6_924_014_656),
]


@pytest.mark.parametrize(("intervals", "groups", "ffns", "with_dead"), RANK_16)
def test_counts_with_modulations_of_rank_16(intervals, groups, ffns, with_dead):
    made = weightless.on_meta(
        {"_class_name": "QwenImageTransformer2DModel"}, torch.bfloat16, "here"
    )
    every = units_of(
        [tuple(ends) for ends in intervals],
        [tuple(ends) for ends in groups],
        [(block, stream) for block in ffns for stream in ("image", "text")],
        linear_maps.unread_after(made),
    )
    model, block_map = weightless.plugged(made, weightless.new_blocks(made, every))
    settings = Settings.of(config.complete({"modulation": {"rank": 16}}, "test"))
    ranks = {matrix: rank for matrix, (rank,) in weightless.matrices(settings, made).items()}
    assert len(ranks) == 121
    low = weightless.low_rank(model, block_map, ranks)
    d, borrowers = 3072, sum(part.borrows for unit in every for part in unit.new_blocks)
    dead = borrowers * (d * d + d + 128)  # text queries, and of the source of [50,59] all but a
    if groups:  # third of its modulation, whose product loses rows of `up` and of the bias
        dead += 84_953_088 + (d * d + d + 128) + 4 * d * (16 + 1)
    assert blocks.parameter_count(low) == with_dead - dead


def test_flux_count():
    config_ = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    made = weightless.on_meta(config_, torch.bfloat16, "here")
    assert blocks.parameter_count(made) == FLUX
    assert {p.device.type for p in made.parameters()} == {"meta"}


def test_counts_are_those_of_the_code_that_prunes():
    made = weightless.on_meta(
        {"_class_name": "QwenImageTransformer2DModel"}, torch.bfloat16, "here"
    )
    settings = config.complete({"intervals": {"require": [[3, 4]]}, "width": {}}, "test")
    settings["width"] |= {"text": {"require": [[13, 14]], "forbid": []}}
    _, every = weightless.selection(Settings.of(settings), made)
    model, block_map = weightless.plugged(made, weightless.new_blocks(made, every))
    saved = sum(linear_map_candidates.saved_parameters(made, unit) for unit in every)
    assert blocks.parameter_count(model) == QWEN - saved
    assert len(block_map) == 59 and blocks.parameter_count(made) == QWEN


# ---- FLOPs


def test_flops_of_qwen_in_closed_form(qwen):
    image, text, d = 4096, 512, 3072
    tokens = image + text
    per_block = 2 * tokens * (4 * d * d + 8 * d * d)  # q, k, v, out, and the MLP
    per_block += 2 * 2 * 6 * d * d  # both modulations, of one vector
    per_block += 4 * tokens**2 * d  # attention: scores, and their sum over values
    ends = 2 * (image * 64 * d + text * 3584 * d + image * d * 64)
    ends += 2 * (256 * d + d * d + 2 * d * d)  # timestep, and the last norm
    table = qwen[0]
    rows = table[(table["item"] == "block") & (table["name"] == "teacher")]
    assert (rows[rows["measure"] == "flops"]["value"] == per_block).all()
    total = values(table, "variant", "flops")["teacher"]
    assert total == 60 * per_block + ends
    shares = rows[rows["measure"] == "latency share"]["value"]
    assert np.isclose(shares.sum(), 60 * per_block / total)
    assert values(table, "variant", "latency share")["depth"] == pytest.approx(
        (35 * per_block + ends) / total
    )


# ---- memory


def measured(step) -> int:
    """Most bytes that the CPU's allocator had given at once since the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


def real(arguments: dict) -> dict:
    """The same call with content."""
    return {
        k: torch.rand(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }


def step_of(model: nn.Module, arguments: dict):
    def step():
        output = model(**arguments)[0].float()
        torch.autograd.backward((output - torch.zeros_like(output)).square().mean())

    return step


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "made_by, shape", [(QwenImageTransformer2DModel, SMALL), (FluxTransformer2DModel, SMALL_FLUX)]
)
def test_memory_of_a_training_step_is_as_measured(made_by, shape, recompute):
    pipeline = FAMILIES[made_by.__name__].pipeline
    model = made_by(**shape).requires_grad_(True).train()
    with torch.device("meta"):
        empty = made_by(**shape).requires_grad_(True).train()
    for one in (model, empty):
        if recompute:
            one.enable_gradient_checkpointing()
    size = Size(384, 384, 1, 64)
    arguments = example_calls.made(pipeline, empty.config, size, 2, torch.float32)
    expected = footprint.measured(step_of(empty, arguments), [empty])
    peak = measured(step_of(model, real(arguments)))
    assert expected.peak == pytest.approx(peak, rel=0.15)
    gradients = 4 * blocks.parameter_count(model)
    assert expected.peak > expected.activations > 0.2 * gradients
    assert all(p.grad is None for p in empty.parameters())


def test_memory_without_gradients_is_as_measured():
    model = QwenImageTransformer2DModel(**SMALL).eval()
    with torch.device("meta"):
        empty = QwenImageTransformer2DModel(**SMALL).eval()
    size = Size(384, 384, 1, 64)
    arguments = example_calls.made(QWEN_IMAGE, empty.config, size, 2, torch.float32)
    given = real(arguments)
    with torch.no_grad():
        expected = footprint.measured(lambda: empty(**arguments))
        assert expected.peak == pytest.approx(measured(lambda: model(**given)), rel=0.15)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny pipeline and calls of it."""
    folder = tmp_path_factory.mktemp("recorded")
    return (
        tiny.pipeline(folder / "teacher", blocks=6),
        tiny.record(folder / "teacher", folder / "calls.parquet"),
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_the_trainings_is_as_measured(recorded, recompute):
    reader = calls.Reader(recorded[1])
    transformer = tiny.load(recorded[0]).transformer.requires_grad_(False)
    options = {"batch_size": 32, "mixed_precision": "no", "gradient_checkpointing": recompute}
    given = {
        "intervals": {"require": [[1, 2]]},
        "width": {
            "text": {"require": [[3, 4]]},
            "ffn_image": {"require": [0]},
            "linear_weight": 1.0,
        },
        **{name: options for name in ("distill", "subsets", "finetune")},
    }
    settings = Settings.of(config.complete(given, "test"))
    empty = weightless.on_meta(dict(transformer.config), torch.float32, "here")
    depth, every = weightless.selection(settings, empty)
    # Steps draw calls of any length; so that this does not matter, they draw the same one.
    row = reader.rows(heldout=False)[0]
    reader.draw = lambda _rows, count, _seed: np.array([row] * count)
    example = example_calls.recorded(recorded[1])
    made = planner.Planner(settings, empty, depth, every, example, None)
    accelerator = processes.accelerator("cpu")

    students = weightless.new_blocks(transformer, every, torch.float32)
    for student in students.values():
        student.requires_grad_(True).train()
    whole = weightless.plugged(transformer, weightless.new_blocks(transformer, every))[0]
    whole.requires_grad_(True).train()
    if recompute:
        whole.enable_gradient_checkpointing()
    losses = {
        "distill": distillation.independent(
            tiny.context(transformer, reader, 0, accelerator), students, settings.distill
        ),
        "subsets": distillation.any_subset(
            tiny.context(transformer, reader, 0, accelerator),
            every,
            students,
            settings.subsets,
            lambda _: every,
        ),
        "finetune": distillation.output_distillation(
            tiny.context(whole, reader, 0, accelerator),
            lambda _: whole,
            "",
            settings.finetune,
            in_float32=True,
        ),
    }
    of_name = {stage.name: stage for stage in stages.every(made)}
    for name, of_step in losses.items():
        trained = [whole] if name == "finetune" else list(students.values())

        def step(of_step=of_step):
            for _, loss, _ in of_step(0):
                torch.autograd.backward(loss)

        peak = measured(step)
        for module in trained:
            module.zero_grad(set_to_none=True)
        parts = of_name[name].parts
        predicted = (
            of_name[name].resident
            - parts["teacher"]
            - parts["students"]
            - parts["optimizer 32-bit"]
        )
        assert predicted == pytest.approx(peak, rel=0.15), name


def test_optimizer_states_are_those_of_adamw():
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 64)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    count = blocks.parameter_count(model)
    moments = sum(t.nbytes for t in states if t.ndim)
    assert weightless.optimizer_bytes(count, "adamw") == moments
    assert weightless.optimizer_bytes(count, "adamw", 0.9) == moments + 4 * count
    assert 2 * count < weightless.optimizer_bytes(count, "adamw8bit") < 0.26 * moments


def test_stages_and_gpus(qwen):
    table = qwen[0]
    parts = table[table["item"] == "stage"].pivot(index="name", columns="measure", values="value")
    stages = {"record", "extract", "sensitivity", "width", "distill", "choose", "finetune"}
    stages.add("evaluate")
    assert set(parts.index) == stages
    distill = parts.loc["distill"]
    assert distill["teacher"] == 2 * QWEN
    assert distill["optimizer 32-bit"] == 2 * distill["gradients"] == 2 * distill["students"]
    assert distill["teacher offloaded"] < 0.1 * distill["teacher"]
    assert distill["peak least"] < distill["peak offloaded"] < distill["peak resident"]
    # One block at a time: to compute all of it again takes what keeping it took.
    assert distill["activations checkpointed"] <= distill["activations"]
    finetune = parts.loc["finetune"]
    assert finetune["activations checkpointed"] < 0.1 * finetune["activations"]
    assert (
        parts.loc["finetune", "students"]
        == 4 * values(table, "variant", "parameters")["depth+width+modulation"]
    )
    assert finetune["casts"] == 0.5 * finetune["students"]
    assert finetune["peak offloaded"] == finetune["peak resident"]
    assert finetune["teacher"] == 0  # it never runs
    fits = table[table["item"] == "gpu"].set_index(["name", "gpu_gib", "measure"])["value"]
    for name in stages:
        for gpu in (24, 80):
            for kind in ("resident", "offloaded"):
                free = gpu * 2**30 - device_memory.RESERVED
                expected = parts.loc[name, f"peak {kind}"] <= free
                assert fits[name, gpu, f"fits {kind}"] == expected
    assert not fits["record", 24, "fits resident"] and fits["record", 24, "fits offloaded"]


def test_many_devices_and_8_bit_moments(tmp_path):
    """Against the forecast of the same run in one process, one job, and with float32 moments."""
    file = architecture(
        tmp_path / "c.json", "QwenImageTransformer2DModel", **SMALL | {"num_layers": 9}
    )
    common = {
        "forecast": {"transformer_config": str(file)},
        "pipeline": {"height": 64, "width": 64},
        "intervals": {"require": [[0, 1], [2, 3], [7, 8]]},
        "width": {"enabled": False},
        "subsets": {"steps": 0},
        "processes": 2,
    }

    def planned(name, **keys):
        table = forecast(tmp_path / f"{name}.parquet", common | keys)
        stages = table[table["item"] == "stage"]
        notes = stages.groupby("name")["note"].first()
        parts = stages.pivot(index="name", columns="measure", values="value")
        return parts, notes, values(table, "artifact", "size")

    one, _, disk = planned("one")
    parts, notes, _ = planned("jobs", distill={"shards": 2, "cache_inputs": "never"})
    assert {"distill/0", "distill/1"} <= set(parts.index) and "distill" not in parts.index
    ran = "; {} students, teacher from block {} to {}: {} block passes a step"
    assert notes["distill/0"].endswith(ran.format(2, 0, 3, 10))
    assert notes["distill/1"].endswith(ran.format(1, 0, 8, 12))
    assert not any("inputs" in path for path in disk)

    # 200 times 64 draws of the defaults, from 9 in 10 of the rows of 640 samples, of 22 calls:
    # many draw a row again. The second job starts at block 7, and has one student.
    calls = {"height": 64, "width": 64, "num_inference_steps": 10}
    _, notes, _ = planned("drawn", distill={"shards": 2}, pipeline=calls)
    drawn = np.unique(np.random.default_rng(0).integers(0, 576 * 22, 200 * 64)).size
    passes = float(notes["distill/1"].removesuffix(" block passes a step").split()[-1])
    assert passes == pytest.approx(5 + 7 * drawn / (200 * 64), rel=0.01)

    # 4 of 5 samples are taught, each of 10 calls: 40 rows, drawn 12,800 times. The second job
    # starts at block 5, and keeps 8 x 8 image and 512 text tokens, of 512 channels, of each row. It
    # has two of three students for that, and so has its time limit.
    few = {"samples": 5, "renoised_per_sample": 0, "heldout_fraction": 0.2}
    kept_intervals = {"require": [[0, 1], [5, 6], [7, 8]]}
    _, notes, kept = planned(
        "kept", distill={"shards": 2}, record=few, pipeline=calls, intervals=kept_intervals
    )
    assert notes["distill/1"].endswith(ran.format(2, 5, 8, round(10 + 5 * 40 / 12_800, 2)))
    table = pd.read_parquet(tmp_path / "kept.parquet")
    jobs = table[table["item"] == "job"].set_index("name")["note"]
    flops = [float(jobs[f"distill/{number}"].split()[0]) for number in range(2)]
    assert flops[1] > 2 * flops[0]  # 15 block passes a step, and 5
    inputs = {path: size for path, size in kept.items() if "inputs" in path}
    assert inputs == {"state/distill-1/inputs/": 40 * (64 + 512) * 512 * 4}
    for measure, shares in (("students", (2, 1)), ("optimizer 32-bit", (2, 1))):
        whole = one.loc["distill", measure]
        sizes = [parts.loc[f"distill/{number}", measure] for number in range(2)]
        assert sizes == [pytest.approx(whole * share / 3) for share in shares]

    small, notes, less = planned("small", distill={"optimizer": "adamw8bit"})
    saved = one.loc["distill", "optimizer 32-bit"] - one.loc["distill", "optimizer 8-bit"]
    peaks = [table.loc["distill", "peak resident"] for table in (one, small)]
    assert peaks[0] - peaks[1] == saved > 0 and "8-bit AdamW" in notes["distill"]
    # A checkpoint has weights and both moments.
    assert disk["state/distill/"] - less["state/distill/"] == saved

    shared, notes, _ = planned("shared", finetune={"sharding": "fsdp"})
    assert "shared out over 2 processes" in notes["finetune"]
    before, after = one.loc["finetune"], shared.loc["finetune"]
    for measure in ("students", "gradients", "optimizer 32-bit"):
        assert after[measure] == math.ceil(before[measure] / 2)
    assert after["activations"] == before["activations"]
    resting = 4 * before["students"] / 2  # weights, gradients and two moments
    expected = resting + after["gathered"] + after["activations"]
    assert after["peak resident"] == pytest.approx(expected)
    # 9 blocks less 3; three of a block's size are whole at once, and what is not of blocks.
    assert 3 / 6 < after["gathered"] / before["students"] < 0.6
    options = {"sharding": "fsdp", "cpu_offload": True}
    offloaded, notes, _ = planned("offloaded", finetune=options)
    assert "shares in CPU memory" in notes["finetune"]
    fewer = after["peak resident"] - offloaded.loc["finetune", "peak resident"]
    assert fewer == pytest.approx(resting)


def test_disk(qwen, recorded, tmp_path):
    sizes = values(qwen[0], "artifact", "size")
    d, blocks_, streams = 3072, 60, 2
    assert sizes["activations/moments.safetensors"] == (
        8 * blocks_ * streams * (2 * d * d + 2 * d + 2)
    )
    # 640 samples, 50 steps and 12 renoised states; no negative prompt, so one branch.
    row = 2 * (2 * 4096 * 64 + 512 * 3584 + 1)
    assert sizes["record/calls.parquet"] == 640 * 62 * row
    # Closed forms alone leave less than this selection: every FFN with its part of the modulation.
    least = RANK_16[0][3] - 120 * (8 * d * d + 5 * d + 3 * d * 17 - (d * d + d))
    assert sizes["models/p27/"] == 2 * max(least, int(0.27 * QWEN))
    assert sizes["models/p50/"] == 2 * int(0.5 * QWEN)
    students = sizes["distill/students.safetensors"]
    assert sizes["state/distill/"] == 3 * students


# ---- time


def test_time_by_hand(tmp_path):
    """FLOPs in closed form, of one block of a teacher of three, then every stage's multiple."""
    file = architecture(tmp_path / "c.json", "QwenImageTransformer2DModel", **SMALL)
    settings = {
        "device": "cuda",
        "processes": 2,
        "teacher": {"path": "nobody/nothing", "dtype": "bfloat16"},
        "pipeline": {"height": 64, "width": 64, "num_inference_steps": 5},
        "forecast": {"transformer_config": str(file), "tflops": 1e-3},
        "record": {"samples": 12, "batch_size": 4, "renoised_per_sample": 3},
        "extract": {"rows": 50, "batch_size": 8},
        "sensitivity": {"rows": 6, "batch_size": 6, "longest": 2},
        "width": {"enabled": False, "rows": 6, "batch_size": 6},
        "modulation": {"rank": 2},
        "choose": {"rows": 6, "batch_size": 6},
        "intervals": {"require": [[0, 1]]},
        "distill": {"steps": 100, "batch_size": 10, "heldout_rows": 20, "mixed_precision": "bf16"},
        "subsets": {"steps": 30, "batch_size": 6, "heldout_rows": 20, "mixed_precision": "bf16"},
        "finetune": {"batch_size": 4, "mixed_precision": "no", "gradient_checkpointing": True},
        "variants": [{"name": "p", "budget": {"latency": 0.7}, "finetune_steps": 40}],
        "pareto": {"budgets": 2},
        "evaluate": {
            "judge": "none",
            "samples": 9,
            "batch_size": 3,
            "velocity_rows": 7,
            "latency_repeats": 4,
        },
    }
    table = forecast(tmp_path / "forecast.parquet", settings)
    # A picture of 64 pixels has 4 x 4 tokens, after text of 512; width 512, FFN four times that.
    image, text, d, given = 16, 512, 512, 256
    tokens = image + text
    modulation = 2 * 2 * d * 6 * d
    block = modulation + 2 * tokens * (4 * d * d + 8 * d * d) + 2 * 2 * tokens**2 * d
    # In and out of the streams; the timestep's two layers; the last norm's scale and shift.
    rest = 2 * (image * 64 * d + text * given * d + image * d * 64) + 2 * (256 * d + d * d)
    rest += 2 * d * 2 * d
    whole = 3 * block + rest
    assert values(table, "variant", "flops")["teacher"] == whole
    # Runs of two blocks: 0-1, 1-2. One unit, to block 1.
    rows = {
        "record": 12 * (5 + 3) / 2,  # shared by two processes
        "extract": 50,
        "latency": 4 * (2 * 4 + 1) * 3,
        "pareto": (2 + 1) * (7 + 5 * 3),
        "evaluate": 2 * (9 * 5 + 7 + 5 * 3),
    }
    flops = {name: count * whole for name, count in rows.items()}
    # Float32 is 16 times slower, TensorFloat-32 twice. Prices are of the blocks from the change on,
    # and of the teacher twice: runs begin at blocks 0 and 1, two matrices each in three blocks, one
    # after them.
    flops["sensitivity"] = 6 * (2 * whole + 2 * whole - block) / 2 * 2
    flops["width"] = 6 * (2 * whole + 7 * whole - (2 * 1 + 2 * 2 + 3) * block) / 2 * 2
    # The unit alone; one set; the unit from the start, from distill, from subsets.
    flops["choose"] = 6 * (2 + 1 + 1 + 3) * whole / 2 * 2
    flops["pareto"] += (2 + 1) * 6 * whole * 2
    flops["distill"] = (100 * 10 * (2 * block + 3 * block) + 2 * 20 * whole) / 2
    flops["subsets"] = (30 * 6 * 3 * whole + 2 * 20 * whole) / 2
    flops["finetune"] = 40 * 4 * 4 * whole / 2 * 16
    # Six runs of three blocks, two streams, 4 products of n d^2 each, of half the calls' tokens.
    flops["similarity"] = 2 * 6 * 4 * 2 * (25 * 4) * d**2 * 200
    passes = {
        "similarity": 0,
        "record": 24 / 2,
        "extract": 7,
        "sensitivity": 4 / 2,
        "width": 9 / 2,
        "choose": 7 / 2,
        "latency": 36,
        "pareto": 22,
    }
    passes |= {"evaluate": math.ceil(134 / 3), "distill": 100 + 2 / 2, "finetune": 40}
    passes["subsets"] = 30 + 4 / 2
    size = values(table, "variant", "size")["teacher"]
    for name, spent in values(table, "job", "time").items():
        models = {"evaluate": 2, "similarity": 0}.get(name, 1)
        pictures = {"record": 12, "evaluate": 18}.get(name, 0)
        beside = 0.1 * passes[name] + 2 * pictures + models * size / 0.2e9
        assert spent == pytest.approx(flops.pop(name) / 1e9 + beside), name
    assert not flops
    asked = json.loads((tmp_path / "resources.json").read_text())
    for name, spent in values(table, "job", "time").items():
        assert asked[name]["runtime"] == min(2880, max(10, math.ceil(3 * spent / 60)))
    # Of extraction: sums of six [d, d], and as many tokens before and after a block as channels,
    # and those of a call, that wait for them.
    sums, waiting = 8 * (2 * d * d + 2 * d + 2), 2 * 2 * (d + 8 * 64) * d  # a power of two each
    apart = values(table, "stage", "main memory")["extract"]
    assert apart == 2 * 3 * (sums + waiting)
    assert asked["extract"]["mem_mb"] == math.ceil((3 * size + apart) / 1e6)
    # Tokens of three boundaries, and five times those of a pair with its sums over 32 groups of
    # prompts and their products; two slabs.
    kept = 8 * ((3 + 5) * 100 * d + 2 * 32 * (100 + d) + 32**3) + 2 * 8 * 2**20
    assert asked["similarity"]["mem_mb"] == math.ceil(kept / 1e6)
    students = values(table, "stage", "students")["distill"]
    held = 3 * size + 2 * 4 * students  # weights, gradients and two moments, in two processes
    assert asked["distill"]["mem_mb"] == math.ceil(held / 1e6)


# ---- the program and the target


def test_provenance(qwen):
    stamp = tables.provenance(qwen[1])
    assert stamp["blocks"] == "60" and stamp["commit"] and stamp["seed"] == "0"
    assert {"torch", "diffusers", "settings", "created"} <= set(stamp)


def test_detected_selection_and_recorded_calls_are_taken(recorded, tmp_path, capsys):
    settings = {"teacher": {"path": str(recorded[0])}, "intervals": {"require": [[4, 5]]}}
    settings |= {name: {"batch_size": 2} for name in ("distill", "subsets", "finetune")}
    table = forecast(
        tmp_path / "forecast.parquet",
        settings,
        intervals=tiny.intervals(tmp_path / "intervals.parquet", [(1, 3)]),
        candidates=tiny.candidates(tmp_path / "candidates.parquet", [], [(0, "image")]),
        calls=recorded[1],
    )
    left = {"teacher": 6, "depth": 4, "depth+width": 4}
    assert values(table, "variant", "blocks") == left
    # The table of candidates knows of no rank.
    assert not any("modulation" in name for name in left)
    notes = table[(table["item"] == "block") & (table["name"] == "depth")]
    assert list(notes[notes["measure"] == "parameters"]["note"])[1] == "for 1 to 3"
    longest = max(b.arguments["encoder_hidden_states"].shape[1] for b in _batches(recorded[1]))
    _, total = footprint.flops(tiny.transformer(6).to("meta"), _call(longest))
    assert values(table, "variant", "flops")["teacher"] == total
    out = capsys.readouterr().out
    assert "teacher" in out and "finetune" in out and "80 GiB" in out


def _batches(path: Path):
    reader = calls.Reader(path)
    return [reader.batch(bucket[:1]) for bucket in reader.buckets]


def _call(tokens: int) -> dict:
    size = Size(32, 32, 1, tokens, scale=4)
    known = {"in_channels": 4 * tiny.Z_DIM, "joint_attention_dim": tiny.TEXT_WIDTH}
    return example_calls.made(QWEN_IMAGE, known, size, 1, torch.float32)


def test_resolution_of_the_config_and_of_the_teachers_autoencoder(recorded, tmp_path):
    settings = {"teacher": {"path": str(recorded[0])}}
    settings |= {"pipeline": {"height": 64, "width": 32, "max_sequence_length": 7}}
    table = forecast(tmp_path / "forecast.parquet", settings)
    given = _call(7) | {"hidden_states": torch.empty(1, 32, 16, device="meta")}
    given["img_shapes"] = [[(1, 8, 4)]]
    _, total = footprint.flops(tiny.transformer(6).to("meta"), given)
    assert values(table, "variant", "flops")["teacher"] == total
    assert {"record", "evaluate"} <= set(table[table["item"] == "stage"]["name"])
    assert "distill" not in set(table[table["item"] == "stage"]["name"])


def test_unknown_calls_leave_gaps(tmp_path, caplog, monkeypatch):
    name = "QwenImageTransformer2DModel"
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], pipeline=None))
    file = architecture(tmp_path / "c.json", "QwenImageTransformer2DModel", **SMALL)
    settings = {"forecast": {"transformer_config": str(file)}, "intervals": {"require": [[0, 1]]}}
    table = forecast(tmp_path / "forecast.parquet", settings)
    assert "calls of QwenImageTransformer2DModel are not known" in caplog.text
    assert values(table, "variant", "parameters")["depth"] > 0
    assert np.isnan(values(table, "variant", "flops")["depth"])
    assert np.isnan(values(table, "stage", "peak resident")["finetune"])
    assert values(table, "stage", "optimizer 32-bit")["finetune"] > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher": {"path": "owner/name"}}, "teacher.path: owner/name: its transformer/config"),
        ({"teacher": {"path": "."}}, "teacher.path: transformer/config.json can't be read"),
        ({"forecast": {"transformer_config": "gone.json"}}, "gone.json can't be read"),
        (
            {"forecast": {"transformer_config": "torn.json"}},
            "transformer_config: torn.json: not valid JSON",
        ),
        (
            {"forecast": {"transformer_config": "list.json"}},
            "list.json: not valid JSON of this kind",
        ),
        ({"forecast": {"transformer_config": "odd.json"}}, "has no model OddTransformer"),
        ({"forecast": {"transformer_config": "vae.json"}}, "AutoencoderKL"),
        ({"forecast": {"transformer_config": "bad.json"}}, "can't be made of this config"),
        (
            {"forecast": {"transformer_config": "ok.json"}, "intervals": {"require": [[2, 3]]}},
            "beyond this teacher's blocks 0 to 2",
        ),
    ],
)
def test_errors(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weightless.constants, "ENDPOINT", "http://localhost:9")
    Path("torn.json").write_text("{")
    Path("list.json").write_text("[1]")
    architecture(Path("odd.json"), "OddTransformer")
    architecture(Path("vae.json"), "AutoencoderKL")
    name = "QwenImageTransformer2DModel"
    architecture(Path("bad.json"), name, num_layers="many")
    architecture(Path("ok.json"), name, **SMALL)
    complete = Settings.of(config.complete(settings, "test"))
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        transformer_config, where = weightless.architecture(
            complete.teacher, complete.forecast.transformer_config
        )
        made = weightless.on_meta(transformer_config, torch.float32, where)
        weightless.selection(complete, made)


EXAMPLES = {one.family: one for one in (zoo_images.SPECIMENS | zoo_videos.SPECIMENS).values()}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pipeline])
def test_every_example_runs(name):
    one = EXAMPLES[name]
    made = getattr(one.make(2), one.component).to("meta", torch.bfloat16)
    size = Size(64, 64, 5, 16)
    arguments = example_calls.made(FAMILIES[name].pipeline, made.config, size, 2, torch.bfloat16)
    with torch.no_grad():
        assert len(made(**arguments)[0]) == 2
    per_block, total = footprint.flops(made, arguments)
    assert 0 < sum(per_block) < total


def test_the_target_runs_without_weights(tmp_path):
    folder = tmp_path / "repo"
    ignore = shutil.ignore_patterns(".git", ".venv", ".snakemake", "results", "*cache*")
    for name in ("workflow", "Snakefile", "environment.yml", "config"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    architecture(folder / "config.json", "QwenImageTransformer2DModel", **SMALL)
    settings = {
        "run": "planned",
        "teacher": {"path": "no/weights"},
        "record": {"prompts": "none.txt"},
        "forecast": {"transformer_config": "config.json", "gpus": [8]},
        "pipeline": {"height": 64, "width": 64},
        "intervals": {"require": [[0, 1]]},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    command = [str(Path(sys.executable).with_name("snakemake")), "--cores", "1", "forecast"]
    command += ["--configfile", "mine.yaml"]

    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 GiB" in done.stdout + done.stderr
    table = folder / "results/planned/forecast/forecast.parquet"
    rows = tables.read(table, schemas.FORECAST).to_pandas()
    counts = values(rows, "variant", "blocks")
    low = {"modulation": 3, "depth+modulation": 2}
    assert counts == {"teacher": 3, "depth": 2} | low
    assert not (folder / "results/planned/record").exists()
    asked = json.loads((folder / "results/planned/forecast/resources.json").read_text())
    assert set(asked["distill"]) == {"runtime", "mem_mb"}
