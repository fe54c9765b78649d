"""Metrics against literal float64 computations, and the program `evaluate` on a tiny pipeline."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ppcl import errors
from ppcl.evaluation import generation, metrics, model_folders, timing, velocities, workers
from ppcl.storage import schemas, tables
from ppcl.transformer import calls
from support import SCRIPTS, fresh, tiny

SCRIPT = SCRIPTS / "evaluate.py"
CPU = torch.device("cpu")


# ---- metrics


def test_over_one_prompt_or_round_there_is_no_interval():
    one = metrics.ratio([1.0, 2.0], [2.0, 2.0], [7, 7], 50, 0)
    assert one.value == 0.75 and one.samples == 2 and np.isnan([one.low, one.high]).all()
    assert np.isnan(metrics.mean([1.0, 3.0], [0, 0], 50, 0).high)
    once = metrics.median_ratio(np.array([3.0]), np.array([2.0]), 50, 0)
    assert once.value == 1.5 and np.isnan([once.low, once.high]).all()
    two = metrics.mean([1.0, 3.0], [0, 1], 50, 0)
    assert two.low < two.value < two.high


def test_squared_errors_are_literal_sums():
    rng = np.random.default_rng(0)
    output = rng.normal(size=(3, 4, 5)).astype(np.float32)
    target = rng.normal(size=(3, 4, 5)).astype(np.float32)
    error, norm = metrics.squared_errors(output, target)
    for i in range(3):
        pairs = [
            (float(a), float(b)) for a, b in zip(output[i].ravel(), target[i].ravel(), strict=True)
        ]
        assert error[i] == pytest.approx(math.fsum((a - b) ** 2 for a, b in pairs), rel=1e-12)
        assert norm[i] == pytest.approx(math.fsum(b * b for _, b in pairs), rel=1e-12)


def pictures(seed, shape=(17, 14, 3)):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape).astype(np.uint8)
    return a, np.clip(a + rng.normal(0, 30, shape), 0, 255).astype(np.uint8)


def test_psnr_is_the_definition_and_bounded():
    a, b = pictures(1)
    squares = [(float(x) - float(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    expected = 10 * math.log10(255**2 / (math.fsum(squares) / len(squares)))
    assert metrics.psnr(a, b) == pytest.approx(expected, rel=1e-12)
    assert metrics.psnr(a, a) == pytest.approx(10 * math.log10(255**2 * 12))


def test_ssim_of_pictures_smaller_than_its_window():
    small = [p[:4, :5] for p in pictures(2)]
    mirrored = []
    for p in small:
        tall = np.concatenate([p, p[::-1], p])[:11]
        mirrored.append(np.concatenate([tall, tall[:, ::-1], tall], axis=1)[:, :11])
    assert metrics.ssim(*small) == pytest.approx(metrics.ssim(*mirrored))
    assert metrics.ssim(small[0], small[0]) == 1 > metrics.ssim(*small)


@pytest.mark.parametrize("side", [20, 7])
def test_ssim_of_a_video_is_the_mean_over_its_frames(side):
    """Frames of opposite brightness: a window over two of them would see an edge that none has."""
    rng = np.random.default_rng(4)
    levels = np.array([10, 240, 10, 240])[:, None, None, None]
    film = np.clip(levels + rng.normal(0, 6, (4, side, 18, 3)), 0, 255).astype(np.uint8)
    other = np.clip(levels + rng.normal(0, 6, (4, side, 18, 3)), 0, 255).astype(np.uint8)
    expected = np.mean([metrics.ssim(a, b) for a, b in zip(film, other, strict=True)])
    strips = [frames.reshape(-1, 18, 3) for frames in (film, other)]
    of_film = metrics.likeness(*strips, 4)
    assert of_film["ssim"] == pytest.approx(expected, rel=1e-12)
    assert abs(metrics.ssim(*strips) - expected) > 0.01
    assert of_film["psnr"] == metrics.psnr(film, other)  # which sees no neighbours


def test_ssim_is_the_formula_of_wang_et_al():
    a, b = pictures(2)
    x, y = a.astype(float), b.astype(float)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for i in range(5, a.shape[0] - 5):
            for j in range(5, a.shape[1] - 5):
                p, q = (v[i - 5 : i + 6, j - 5 : j + 6, channel] for v in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                luminance = (2 * mp * mq + c1) / (mp**2 + mq**2 + c1)
                values.append(luminance * (2 * cov + c2) / (vp + vq + c2))
    assert metrics.ssim(a, b) == pytest.approx(np.mean(values), rel=1e-10)
    assert metrics.ssim(a, a) == pytest.approx(1)


def test_ratio_is_a_bootstrap_of_whole_prompts():
    above, below = [1.0, 2.0, 4.0, 8.0, 3.0], [2.0, 2.0, 5.0, 9.0, 1.0]
    prompts = [7, 3, 7, 3, 11]
    ratio = metrics.ratio(above, below, prompts, resamples=40, seed=5)
    assert ratio.value == pytest.approx(18 / 19)
    assert ratio.samples == 5
    groups = [[1, 3], [0, 2], [4]]
    rng = np.random.default_rng(5)
    values = []
    for _ in range(40):
        rows = [row for group in rng.integers(3, size=3) for row in groups[group]]
        values.append(sum(above[r] for r in rows) / sum(below[r] for r in rows))
    expected = np.percentile(values, [2.5, 97.5])
    assert (ratio.low, ratio.high) == pytest.approx(tuple(expected))


def test_differences_are_of_pairs_and_their_interval_that_of_both_means_drawn_together():
    rng = np.random.default_rng(1)
    right = (rng.uniform(size=90) < 0.9).astype(float)
    other, prompts = np.where(rng.uniform(size=90) < 0.05, 1 - right, right), np.arange(90) // 2
    differences = metrics.differences({"a": other, "psnr": other}, {"a": right}, prompts, 60, 4)
    assert differences.keys() == {"a_difference"}
    drawn = np.random.default_rng(4)
    values = []
    for _ in range(60):
        rows = np.zeros(90)  # how often each sample is drawn
        for prompt in drawn.integers(45, size=45):
            rows[prompts == prompt] += 1
        values.append(np.average(other, weights=rows) - np.average(right, weights=rows))
    difference = differences["a_difference"]
    assert difference.value == pytest.approx(other.mean() - right.mean())
    assert (difference.low, difference.high) == pytest.approx(
        tuple(np.percentile(values, [2.5, 97.5]))
    )
    alone = metrics.mean(other, prompts, 60, 4)
    assert difference.high - difference.low < alone.high - alone.low
    same = metrics.differences({"a": right}, {"a": right}, prompts, 60, 4)
    assert same["a_difference"][:3] == (0, 0, 0)


def test_repeating_every_sample_of_a_prompt_promises_nothing_more():
    values = np.random.default_rng(0).normal(size=50)
    once = metrics.mean(values, np.arange(50), 200, 0)
    often = metrics.mean(np.repeat(values, 9), np.repeat(np.arange(50), 9), 200, 0)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        of_prompt = rng.normal(size=60)
        values = np.repeat(of_prompt, 4) + 0.5 * rng.normal(size=240)
        estimate = metrics.mean(values, np.repeat(np.arange(60), 4), 200, trial)
        covered += estimate.low <= 0 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_sigma_buckets_hold_every_level_once():
    sigma = np.array([0.0, 0.1, 0.25, 0.7499, 0.75, 1.0, np.nan, 14.6])
    buckets = metrics.sigma_buckets(sigma)
    assert {key: np.flatnonzero(mask).tolist() for key, mask in buckets.items()} == {
        "sigma_0.00_0.25": [0, 1],
        "sigma_0.25_0.50": [2],
        "sigma_0.50_0.75": [3],
        "sigma_0.75_1.00": [4, 5],
    }
    assert metrics.sigma_buckets(np.array([0.3])).keys() == {"sigma_0.25_0.50"}


def test_median_ratio_cancels_what_a_round_shares():
    machine = np.random.default_rng(0).uniform(1, 9, size=11)
    ratio = metrics.median_ratio(0.5 * machine, machine, 100, 0)
    assert ratio == pytest.approx((0.5, 0.5, 0.5, 11))
    times, reference = np.array([3.0, 1.0, 9.0]), np.array([4.0, 2.0, 2.0])
    assert metrics.median_ratio(times, reference, 100, 0).value == 1.5


def test_rows_compare_with_the_teacher():
    estimates = {
        "teacher": {
            "digit_accuracy": metrics.Estimate(0.8, 0.7, 0.9, 10),
            "velocity_error": metrics.Estimate(0.0),
        },
        "p": {
            "digit_accuracy": metrics.Estimate(0.6, 0.5, 0.7, 10),
            "velocity_error": metrics.Estimate(0.01),
            "psnr": metrics.Estimate(30.0),
        },
    }
    rows = {(r["variant"], r["metric"]): r for r in metrics.rows(estimates)}
    assert rows["p", "digit_accuracy"]["relative_change"] == pytest.approx(-0.25)
    assert rows["teacher", "digit_accuracy"]["relative_change"] == 0
    assert rows["p", "digit_accuracy"]["higher_is_better"]
    assert not rows["p", "velocity_error"]["higher_is_better"]
    assert math.isnan(rows["p", "velocity_error"]["relative_change"])
    assert math.isnan(rows["p", "psnr"]["teacher_value"])
    assert ("teacher", "psnr") not in rows


def test_a_metric_of_pictures_is_a_function_and_its_entry(monkeypatch):
    def distance(picture, reference):
        return float(np.abs(picture.astype(float) - reference.astype(float)).max())

    entry = metrics.PictureMetric(distance, higher_is_better=False, by_frame=True)
    monkeypatch.setitem(metrics.PICTURE_METRICS, "distance", entry)
    a, b = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)
    b[0], b[2] = 4, 8  # of two frames, each of two lines
    values = metrics.likeness(a, b, 2)
    assert list(values) == ["psnr", "ssim", "distance"] and values["distance"] == 6
    rows = metrics.rows({"teacher": {}, "p": {n: metrics.Estimate(v) for n, v in values.items()}})
    assert [row["higher_is_better"] for row in rows] == [True, True, False]


def test_times_are_measured_in_rounds_after_an_unmeasured_one():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in ("teacher", "a", "b")}
    times = timing.interleaved_times(runs, 2, CPU)
    assert order == ["teacher", "a", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(runs, 2)


# ---- the program


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, recorded calls, and two variants: the teacher itself and one with a block less."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.pipeline(folder / "teacher")
    tiny.pipeline(folder / "models" / "same")
    tiny.pipeline(folder / "models" / "short", blocks=2)
    tiny.record(folder / "teacher", folder / "calls.parquet")
    (folder / "prompts.csv").write_text(
        "prompt,digit,digit_color,background_color\n"
        "a black 3 on red,3,black,red\n"
        "the digit eight in green over white,8,green,white\n"
        "red 0,0,red,black\n"
    )
    settings = {
        "seed": 0,
        "device": "cpu",
        "processes": 2,
        "teacher": {"path": str(folder / "teacher")},
        "pipeline": tiny.SETTINGS,
        "evaluate": {
            "prompts": str(folder / "prompts.csv"),
            "samples": 5,
            "batch_size": 2,
            "bootstrap": 10,
            "latency_repeats": 2,
            "velocity_rows": 12,
        },
    }
    return folder, settings


def command(folder, settings):
    paths = {name: str(folder / f"{name}.parquet") for name in ("calls", "metrics", "images")}
    options = [part for name, path in paths.items() for part in (f"--{name}", path)]
    models = [str(folder / "models" / name) for name in ("same", "short")]
    return [
        *(fresh.python(fresh.MODELS), str(SCRIPT), "--config", json.dumps(settings)),
        *(*options, "--models", *models, "--state", str(folder / "state")),
    ]


def test_evaluate_resumes_after_a_kill_and_compares(world):
    folder, settings = world
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command(folder, settings), env=environment, stderr=subprocess.DEVNULL, text=True
    )
    while first.poll() is None and not list((folder / "state").glob("*/*/*.parquet")):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = next((folder / "state").glob("*/*/*.parquet"))
    assert not (folder / "metrics.parquet").exists()
    marked = tables.read(kept, schemas.IMAGES).to_pandas().assign(prompt="kept")
    tables.write(kept, marked, schemas.IMAGES, {})

    done = subprocess.run(
        command(folder, settings), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert kept.exists()  # until what is made of it has been taken

    images = tables.read(folder / "images.parquet", schemas.IMAGES).to_pandas()
    assert images["variant"].value_counts().to_dict() == dict.fromkeys(
        ("teacher", "same", "short"), 5
    )
    assert (images["prompt"] == "kept").sum() == len(marked)
    by_model = {name: part.set_index("seed")["png"] for name, part in images.groupby("variant")}
    assert set(by_model["teacher"].index) == {1_000_000_000 + i for i in range(5)}
    assert by_model["same"].equals(by_model["teacher"])
    assert not by_model["short"].equals(by_model["teacher"])
    read = json.loads(images["read"][0])
    assert read.keys() == {"digit", "digit_color", "background_color", "text", "correct"}
    right = [json.loads(text)["correct"] for text in images["read"][images["variant"] == "short"]]

    table = tables.read(folder / "metrics.parquet", schemas.METRICS).to_pandas()
    value = table.set_index(["variant", "metric"])["value"]
    shared = {"digit_accuracy", "all_correct", "parameters", "latency_ratio", "velocity_error"}
    for name in ("teacher", "same", "short"):
        assert shared <= set(value[name].index)
    assert value["same", "velocity_error"] < 1e-9 < value["short", "velocity_error"]
    assert value["same", "psnr"] == pytest.approx(58.92, abs=0.01) != value["short", "psnr"]
    assert value["same", "parameter_fraction"] == 1 > value["short", "parameter_fraction"]
    assert value["short", "peak_memory_bytes"] > 4 * value["short", "parameters"]
    assert value["teacher", "latency_ratio"] == 1
    assert value["teacher", "judge_digit_accuracy"] >= 0.98
    assert not {"psnr", "digit_accuracy_difference"} & set(value["teacher"].index)
    assert value["same", "all_correct_difference"] == 0
    assert value["short", "all_correct"] == np.mean(right)
    fall = value["short", "digit_accuracy"] - value["teacher", "digit_accuracy"]
    assert value["short", "digit_accuracy_difference"] == pytest.approx(fall)
    # A block less of five leaves the others' modulation whole, and what is around the blocks.
    rest = value["short", "parameters"] - value["short", "modulation_parameters"]
    whole = value["teacher", "parameters"] - value["teacher", "modulation_parameters"]
    share = value["short", "parameter_fraction_without_modulation"]
    assert share == rest / whole < 1 and value["teacher", "modulation_parameters"] > 0


def test_velocity_error_is_the_ratio_of_recorded_and_replayed(world):
    folder, _ = world
    short = model_folders.Model("short", tiny.source(folder / "models" / "short"))
    transformer, reader = short.transformer(CPU), calls.Reader(folder / "calls.parquet")
    rows = reader.rows(heldout=True)
    replayed = velocities.velocity_errors(short.name, transformer, reader, rows, 3, CPU)
    above = below = 0.0
    for row in rows:
        one = reader.batch(np.array([row]))
        with torch.no_grad():
            answer = transformer(**one.arguments)[0].double()
        above += (answer - one.output.double()).square().sum().item()
        below += one.output.double().square().sum().item()
    assert replayed["error"].sum() / replayed["norm"].sum() == pytest.approx(
        above / below, rel=1e-4
    )
    assert sorted(np.unique(replayed["prompt_index"])) == [1, 3]


def test_calibration_prompts_and_noise_are_refused(world):
    folder, _ = world
    choose = runpy.run_path(str(SCRIPT))["choose_samples"]
    reader = calls.Reader(folder / "calls.parquet")
    with pytest.raises(errors.UserError, match=r"evaluate.prompts: '4 in red' \(prompt 1\)"):
        choose([{"prompt": "new"}, {"prompt": "4 in red"}], 4, reader)
    reader.index["seed"] = reader.index["seed"] + 1_000_000_000
    seeds = {sample["seed"] for sample in choose([{"prompt": "new"}], 4, reader)}
    assert not seeds & set(reader.index["seed"])


def test_broken_variant_is_named(world, tmp_path, monkeypatch):
    folder, settings = world
    model = model_folders.Model("burst", tiny.source(folder / "models" / "short"))
    transformer = model.transformer(CPU)
    reader = calls.Reader(folder / "calls.parquet")

    class Late:
        @staticmethod
        def batches(rows, size, _device):
            first, second = reader.batches(rows, size)
            yield first
            with torch.no_grad():
                transformer.proj_out.weight.fill_(3e38)  # finite, so that only its answers are not
            yield second

    with pytest.raises(errors.UserError, match="'burst': the transformer's output holds NaN"):
        velocities.velocity_errors(model.name, transformer, Late, np.array([0, 0]), 1, CPU)
    pipe = model.pipeline(CPU)
    pipe.transformer = transformer
    monkeypatch.setitem(generation._loaded, "last", (model, pipe))
    batch = [{"prompt": "new", "seed": 1, "prompt_index": 0}]
    with pytest.raises(errors.UserError, match="'burst': a picture holds NaN"):
        generation.generate(model, CPU, settings["pipeline"], batch, tmp_path / "part.parquet")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_pipelines_are_refused(world, tmp_path):
    folder, _ = world
    with pytest.raises(errors.UserError, match="is not a pipeline folder"):
        model_folders.models(tiny.source(folder / "teacher"), [tmp_path])
    twice = [folder / "models" / "same"] * 2
    with pytest.raises(errors.UserError, match="two models are named 'same'"):
        model_folders.models(tiny.source(folder / "teacher"), twice)


def test_a_killed_process_is_explained(world):
    folder, _ = world
    missing = model_folders.Model("gone", tiny.source(folder / "nothing"))
    with workers.pool(1) as pool:
        task = pool.submit(generation.plan_batches, missing, CPU, {}, [], 1)
        with pytest.raises(errors.UserError, match="variant gone: .*nothing can't be loaded"):
            task.result()
    lost = pytest.raises(errors.UserError, match="was killed, most likely for lack of memory")
    with lost, workers.pool(1) as pool:
        pool.submit(os._exit, 1).result()


def test_workers_find_what_takes_long_imported():
    """A fork server says nothing of a name that it does not find, and each worker would import."""
    program = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
before = set(sys.modules)
import evaluate
print(*(name for name in set(sys.modules) - before if not name.startswith("ppcl")))
"""
    command = [sys.executable, "-c", program, str(SCRIPT.parent), *workers.PRELOADED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(name.startswith("ppcl") for name in workers.PRELOADED)
    assert len(done.stdout.split()) < 60, done.stdout
