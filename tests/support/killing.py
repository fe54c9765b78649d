"""Programs that are killed while they train, and what they end with when they are run again."""

import signal

import pandas as pd
import torch

from ppcl.storage import tables, tensors
from support import SCRIPTS, fresh, tiny

TRAINING = {"batch_size": 4, "lr": 0.003, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 2}

# Ends the process with SIGKILL when it is about to put its second checkpoint in place, so the
# first one, and half a file beside it, are what the next run finds.
KILLER = """
import os, runpy, signal, sys
replace, seen = os.replace, []
def kill(source, target):
    if "checkpoint" in str(target):
        seen.append(target)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_and_resume(program, settings, paths):
    """Runs a program until the kill, then again to its end in this process."""
    script = str(SCRIPTS / f"{program}.py")
    done = fresh.run(fresh.MODELS, "-c", KILLER, script, *tiny.options(settings, paths))
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {file.name for file in paths["state"].iterdir()} - {"inputs"}
    assert "checkpoint.safetensors" in left and len(left) == 2  # and half of the second one
    assert tensors.read(paths["state"] / "checkpoint.safetensors")[1]["step"] == "2"
    assert not paths["output"].exists() and not paths["log_table"].exists()
    tiny.stage(program, settings, **paths)


def equal(one, other):
    one, other = tensors.read(one)[0], tensors.read(other)[0]
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def assert_same_log(one, other, schema):
    one, other = (tables.read(p, schema).to_pandas().drop(columns="seconds") for p in (one, other))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def distill_paths(world, name):
    folder, _, recorded = world
    return {
        "calls": recorded,
        "selection": folder / "selection.json",
        "students": folder / "start.safetensors",
        "state": folder / name / "state",
        "output": folder / name / "students.safetensors",
        "log_table": folder / name / "log.parquet",
        "unit_costs": folder / name / "unit_costs.parquet",
    }


def finetune_paths(world, distilled, name):
    folder, _, recorded = world
    return {
        "variant": "p70",
        "calls": recorded,
        "sets": tiny.chosen(folder / "sets.json", folder / "selection.json", "distill"),
        "distill": distilled["output"],
        "state": folder / name / "state",
        "output": folder / name / "p70.safetensors",
        "log_table": folder / name / "p70.parquet",
    }
