"""Distill, subsets and finetune as real processes: killed, resumed, and two of them at once."""

import json
import os
import signal
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ppcl.pruning import selection_file
from ppcl.storage import schemas, tables, tensors
from support import SCRIPTS, fresh, tiny
from support.killing import (
    KILLER,
    assert_same_log,
    distill_paths,
    equal,
    finetune_paths,
    kill_and_resume,
)


def kept(world):
    """Settings with which the teacher starts at block 1."""
    return world[1] | {"distill": world[1]["distill"] | {"cache_inputs": "always"}}


def test_a_killed_distillation_ends_with_the_same_students(world, distilled):
    """To the bit, and from streams that are kept."""
    paths = distill_paths(world, "killed")
    kill_and_resume("distill", kept(world), paths)
    assert equal(paths["output"], distilled["output"])
    assert not equal(paths["output"], paths["students"])
    assert_same_log(paths["log_table"], distilled["log_table"], schemas.DISTILL_LOG)
    errors = tables.read(paths["unit_costs"], schemas.UNIT_COSTS).to_pandas()
    assert errors.equals(tables.read(distilled["unit_costs"], schemas.UNIT_COSTS).to_pandas())


def test_a_killed_training_of_subsets_ends_with_the_same_students(world, distilled):
    whole, paths = (
        distill_paths(world, name) | {"students": distilled["output"]}
        for name in ("subsets", "subsets-killed")
    )
    tiny.stage("subsets", world[1], **whole)
    kill_and_resume("subsets", world[1], paths)
    assert equal(paths["output"], whole["output"])
    trained, start = tensors.read(whole["output"])[0], tensors.read(distilled["output"])[0]
    assert trained.keys() == start.keys()
    for name in ("01-02", "03-04"):
        assert not torch.equal(trained[f"{name}/img_mod.1.bias"], start[f"{name}/img_mod.1.bias"])
    assert_same_log(paths["log_table"], whole["log_table"], schemas.VELOCITY_LOG)
    log = tables.read(whole["log_table"], schemas.VELOCITY_LOG).to_pandas()
    assert log["step"].tolist() == [2, 4, 6] and log["loss"].equals(log["velocity_error"])
    one, other, before = (
        tables.read(p["unit_costs"], schemas.UNIT_COSTS).to_pandas()
        for p in (paths, whole, distilled)
    )
    assert one.equals(other) and (one["velocity_error"] != before["velocity_error"]).all()


def test_a_killed_finetune_ends_with_the_same_weights(world, distilled):
    whole = finetune_paths(world, distilled, "finetuned")
    tiny.stage("finetune", world[1], **whole)
    paths = finetune_paths(world, distilled, "finetune-killed")
    kill_and_resume("finetune", world[1], paths)
    assert equal(paths["output"], whole["output"])
    assert_same_log(paths["log_table"], whole["log_table"], schemas.VELOCITY_LOG)


def test_distill_tables(world, distilled):
    log = tables.read(distilled["log_table"], schemas.DISTILL_LOG).to_pandas()
    assert log.groupby("step").size().to_dict() == {2: 3, 4: 3, 6: 3}
    # Nothing reads the text that the last student makes, so it learns none.
    streams = {("01-02", "image"), ("01-02", "text"), ("03-04", "image")}
    assert set(zip(log["interval"], log["stream"], strict=True)) == streams
    errors = tables.read(distilled["unit_costs"], schemas.UNIT_COSTS).to_pandas()
    assert errors["first"].tolist() == [1, 3] and (errors["velocity_error"] > 0).all()
    selection = selection_file.read(world[0] / "selection.json")
    saved = [entry["saved_parameters"] for entry in selection.facts["distilled"]]
    assert errors["saved_parameters"].tolist() == saved and selection.units == selection.distilled
    assert 5 * saved[0] < selection.facts["transformer_parameters"] < 7 * saved[0]


def distill(settings, paths, processes, kill=False):
    """Runs it in some processes, or until one of them is killed."""
    script = [str(SCRIPTS / "distill.py")]
    if kill:
        killer = paths["state"].parent.parent / "killer.py"
        killer.write_text(KILLER)
        script.insert(0, str(killer))
    command = [fresh.python(fresh.MODELS)]
    if processes > 1:
        command += [str(SCRIPTS / "launch.py"), "--processes", str(processes)]
        command += ["--threads", "2", "--device", "cpu"]
    command += [*script, *tiny.options(settings, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode != 0) == kill, done.stderr
    if kill:
        assert tensors.read(paths["state"] / "checkpoint.safetensors")[1]["step"] == "2"
    return done.stdout + done.stderr


def assert_alike(paths, distilled):
    """Gradients of several processes are sums in another order, and AdamW magnifies the rounding of
    small ones: after six steps of up to 3e-3 the weights may differ by 1e-4, and on average by
    1e-6; the losses by 1e-4 of themselves."""
    one, two = tensors.read(distilled["output"])[0], tensors.read(paths["output"])[0]
    start = tensors.read(paths["students"])[0]

    def distances(a, b):
        return torch.cat([(a[key] - b[key]).abs().flatten() for key in a])

    assert distances(one, start).mean() > 1e-3
    assert distances(one, two).max() < 1e-4 and distances(one, two).mean() < 1e-6
    logs = [
        tables.read(p["log_table"], schemas.DISTILL_LOG).to_pandas() for p in (paths, distilled)
    ]
    for key in ("step", "interval", "stream"):
        assert logs[0][key].tolist() == logs[1][key].tolist()
    np.testing.assert_allclose(logs[0]["loss_normalised"], logs[1]["loss_normalised"], rtol=1e-4)
    costs = [
        tables.read(p["unit_costs"], schemas.UNIT_COSTS).to_pandas() for p in (paths, distilled)
    ]
    pd.testing.assert_frame_equal(*costs, rtol=1e-3)


def test_killed_with_one_process_goes_on_with_two(world, distilled):
    """Which share out what is left, the filling of streams, and the two students' costs."""
    paths = distill_paths(world, "one-two")
    distill(kept(world), paths, 1, kill=True)
    printed = distill(kept(world), paths, 2)
    assert "belong to other settings or inputs; they are made again" in printed
    assert "resuming" in printed and not (paths["state"] / "inputs").exists()
    assert_alike(paths, distilled)


def test_killed_with_two_processes_goes_on_with_one(world, distilled):
    paths = distill_paths(world, "two-one")
    distill(kept(world), paths, 2, kill=True)
    tiny.stage("distill", kept(world), **paths)
    assert_alike(paths, distilled)


def test_missing_and_truncated_inputs_end_with_one_message(world, distilled, tmp_path, capsys):
    broken = tmp_path / "start.safetensors"
    broken.write_bytes(distilled["students"].read_bytes()[:-1])
    for given, message in (
        ({"students": broken}, f"{broken} is not a whole safetensors file"),
        ({"selection": tmp_path / "no.json"}, "no.json can't be read"),
        ({"calls": tmp_path / "no.parquet"}, "no.parquet: no such file"),
    ):
        paths = distill_paths(world, "refused") | given
        with pytest.raises(SystemExit) as stopped:
            tiny.stage("distill", world[1], **paths)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and message in printed
        assert "Traceback" not in printed and not paths["output"].exists()
    nowhere = world[1] | {"teacher": {"path": str(tmp_path)}}
    with pytest.raises(SystemExit):
        tiny.stage("distill", nowhere, **distill_paths(world, "refused"))
    assert f"teacher.path: {tmp_path} is not a diffusers pipeline" in capsys.readouterr().err


def test_killed_encoding_and_fine_tuning_with_pictures_end_with_the_same(
    world, distilled, tmp_path
):
    """Encoding is killed when it is about to put its second batch in place."""
    own = tmp_path / "own"
    own.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(own / f"{number:02d}.png")
        (own / f"{number:02d}.txt").write_text(f"picture {number % 2}")
    settings = world[1] | {"pipeline": {"height": 32, "width": 32, "num_inference_steps": 2}}
    made = {
        name: {"data": str(own), "encoded": tmp_path / f"{name}.parquet", "state": tmp_path / name}
        for name in ("whole", "killed")
    }
    tiny.stage("encode", settings, **made["whole"])
    killer = KILLER.replace('"checkpoint" in', '".parquet" in')
    script = str(SCRIPTS / "encode.py")
    done = fresh.run(fresh.MODELS, "-c", killer, script, *tiny.options(settings, made["killed"]))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(made["killed"]["state"].glob("*/??????.parquet"))) == 1
    tiny.stage("encode", settings, **made["killed"])
    one, other = (tables.read(paths["encoded"]).to_pandas() for paths in made.values())
    assert len(one) == 24 and one["heldout"].any()
    pd.testing.assert_frame_equal(one, other, check_exact=True)

    encoded = {"encoded": made["whole"]["encoded"]}
    whole = finetune_paths(world, distilled, "pictures") | encoded
    tiny.stage("finetune", settings, **whole)
    paths = finetune_paths(world, distilled, "pictures-killed") | encoded
    kill_and_resume("finetune", settings, paths)
    assert equal(paths["output"], whole["output"])
    assert_same_log(paths["log_table"], whole["log_table"], schemas.FINETUNE_LOG)
    told = json.loads(tables.provenance(whole["log_table"])["heldout"])
    assert told["kept"] == "trained" and told["after"]["sum"] < told["before"]["sum"]

    # Steps that are far too long make the loss on what is held out worse.
    worse = settings | {"finetune": settings["finetune"] | {"lr": 1.0}}
    kept = finetune_paths(world, distilled, "pictures-worse") | encoded
    tiny.stage("finetune", worse, **kept)
    told = json.loads(tables.provenance(kept["log_table"])["heldout"])
    assert told["kept"] == "start" and not told["after"]["sum"] < told["before"]["sum"]
    start = tensors.read(kept["output"])[0]
    assert all(torch.isfinite(tensor).all() for tensor in start.values())
    assert not equal(kept["output"], whole["output"])
