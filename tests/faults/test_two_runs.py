"""Processes that see other files than their main process, as another run of the config writes or
removes them at that moment: one decides for all. (Whole runs at once are in test_dag.py.)"""

import subprocess

from support import ROOT, SCRIPTS, fresh

SCRIPT = f"""
import sys
sys.path[:0] = {[str(SCRIPTS), str(ROOT / "tests")]!r}
from pathlib import Path
from types import SimpleNamespace

import torch
import train_teacher
from ppcl.digits.recipe import Recipe
from torch import nn

from ppcl.runtime import processes
from ppcl.storage import texts
from ppcl.training import input_cache, loop, prices
from ppcl.errors import UserError
from ppcl.transformer.context import State

accelerator = processes.accelerator("cpu")
rank, here = accelerator.process_index, Path(sys.argv[1])

context = SimpleNamespace(accelerator=accelerator)
judged = SimpleNamespace(error=lambda *_: 2.0, together=1, context=context)
# Finished errors: seen by the main process alone, by the other one alone, and other ones by both.
asked = []
for seen in ([["a"], []], [[], ["a", "b"]], [["a", "b"], ["c"]]):
    prices._finished = lambda *_: dict.fromkeys(seen[rank], 2.0)
    changes = {{name: prices.Change(0, dict) for name in "abcde"}}
    found = prices.measure(judged, changes, State(here / "errors", ""))
    assert found == 5 * [2.0], (seen, found)

# A checkpoint that one of them finds.
how = loop.Optimisation(steps=4, lr=0.1, checkpoint_every=2)

def losses(_step):
    yield "m", module.weight.square().mean(), {{}}

def train(name):
    global module
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    loop.train({{"m": module}}, losses, how, accelerator, here / name, "i")

train("both")
state = here / ("both" if rank else "none")
for name in ("both" if rank else "none", "none" if rank else "both"):
    try:
        train(name)
    except UserError as error:
        assert "another run" in str(error)
    else:
        raise AssertionError("two processes went on from two steps")

# That streams are not to be kept, which one of them finds.
for giving_up in (0, 1):
    inputs = object.__new__(input_cache.InputCache)
    inputs._accelerator, inputs._identity = accelerator, "i"
    inputs._folder = here / f"{{giving_up}}-{{rank}}"
    if rank == giving_up:
        texts.write_sealed(inputs._folder / input_cache.CACHE_DISABLED, {{"identity": "i"}})
    assert inputs._disabled() == (giving_up == 0)

# A part of the teacher that the other one finds finished: all train it.
vae = {{"steps": 2, "lr": 0.1, "warmup_steps": 0}}
settings = Recipe.of({{"seed": 0, "vae": vae, "text_encoder": {{}}}})
module = nn.Linear(3, 3)
def part(_step):
    yield "vae", module.weight.square().mean(), {{}}
first = train_teacher.train_part("vae", module, part, settings, here / "parts", accelerator)
state = here / ("parts" if rank else "nothing")
again = train_teacher.train_part("vae", module, part, settings, state, accelerator)
assert [row["step"] for row in first] == [row["step"] for row in again]
processes.finish(accelerator)
"""


def test_one_process_decides_for_all(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [fresh.python(fresh.MODELS), str(SCRIPTS / "launch.py")]
    command += ["--processes", "2", "--threads"]
    command += ["2", "--device", "cpu", str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
