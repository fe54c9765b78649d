"""Fine-tuning with the model shared out over processes: the curve of one process, and resuming."""

import os
import subprocess

import numpy as np
import pytest
import torch

from ppcl.storage import schemas, tables, tensors
from support import ROOT, SCRIPTS, fresh, tiny
from support.killing import KILLER, assert_same_log

TRAINING = {"batch_size": 5, "lr": 0.003, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 2}
TRAINING |= {"ema": 0.5}  # an average is shared out, saved and resumed as weights are


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls, tmp_path_factory):
    """Settings, a selection and its students, as finetune takes them."""
    folder = tmp_path_factory.mktemp("fsdp")
    options = {"distill": TRAINING | {"steps": 1, "heldout_rows": 4}, "finetune": TRAINING}
    settings, given = tiny.pruned(folder, tiny_teacher, tiny_calls, **options)
    trained = {
        "output": folder / "students.safetensors",
        "unit_costs": folder / "unit_costs.parquet",
    }
    more = {"state": folder / "state", "log_table": folder / "log.parquet"}
    tiny.stage("distill", settings, **given, **trained, **more)
    sets = tiny.chosen(folder / "sets.json", given["selection"], "distill")
    return folder, settings, {"calls": tiny_calls, "sets": sets, "distill": trained["output"]}


def finetune(world, name, processes=1, kill=False, **options):
    """Runs finetune in some processes, or until a kill; options: of the config's finetune."""
    folder, settings, given = world
    settings = settings | {"finetune": settings["finetune"] | options}
    paths = given | {
        "variant": "p70",
        "state": folder / name / "state",
        "output": folder / name / "p70.safetensors",
        "log_table": folder / name / "p70.parquet",
    }
    if processes == 1 and not kill and not options.get("cpu_offload"):
        tiny.stage("finetune", settings, **paths)
        return paths
    script, launcher = (str(SCRIPTS / f"{name}.py") for name in ("finetune", "launch"))
    if kill:
        (folder / "killer.py").write_text(KILLER)
        script = f"{folder / 'killer.py'} {script}"
    command = [fresh.python(fresh.MODELS), launcher, "--processes", str(processes)]
    command += [
        "--threads",
        "2",
        "--device",
        "cpu",
        *script.split(" "),
        *tiny.options(settings, paths),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode != 0) == kill, done.stderr
    if kill:
        assert tensors.read(paths["state"] / "checkpoint.safetensors")[1]["step"] == "2"
        assert not paths["output"].exists()
    return paths


def distances(one, other):
    one, other = tensors.read(one["output"])[0], tensors.read(other["output"])[0]
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    assert {v.dtype for v in one.values()} == {torch.float32}
    return torch.cat([(one[key] - other[key]).abs().flatten() for key in one])


def curves(*paths):
    return [tables.read(p["log_table"], schemas.VELOCITY_LOG).to_pandas() for p in paths]


def assert_alike(one, other, rtol=1e-4, largest=2e-4):
    """Sums in another order: as in test_kill.py, but over all of a model's parameters."""
    assert distances(one, other).max() < largest and distances(one, other).mean() < largest / 50
    first, second = curves(one, other)
    assert first["step"].tolist() == second["step"].tolist() == [2, 4, 6]
    for column in ("loss", "velocity_error", "gradient_norm"):
        if column in first:
            np.testing.assert_allclose(first[column], second[column], rtol=rtol)


@pytest.fixture(scope="module")
def alone(world):
    return finetune(world, "alone")


@pytest.fixture(scope="module")
def shared(world):
    return finetune(world, "shared", processes=2, sharding="fsdp")


def test_shared_out_over_two_processes_is_one_process(world, alone, shared):
    assert_alike(alone, shared)
    (loss,) = (curve["loss"] for curve in curves(alone))
    assert loss.iloc[-1] < 0.99 * loss.iloc[0]


def test_with_cpu_offload_and_checkpointing_too(world, alone):
    options = {"sharding": "fsdp", "cpu_offload": True}
    assert_alike(alone, finetune(world, "offloaded", 2, gradient_checkpointing=True, **options))
    assert_alike(alone, finetune(world, "one-offloaded", 1, **options))


def test_mixed_precision_is_that_of_one_process(world):
    """bfloat16 has 8 bits, and sums come in another order."""
    one = finetune(world, "low", mixed_precision="bf16")
    shared = finetune(world, "low-shared", 2, mixed_precision="bf16", sharding="fsdp")
    first, second = curves(one, shared)
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=0.02)


SHARES = f"""
import sys
sys.path[:0] = {[str(SCRIPTS), str(ROOT / "tests")]!r}
from support import tiny
import torch
from ppcl.pruning import narrow
from ppcl.runtime import processes
from ppcl.training import fsdp
from ppcl.transformer import blocks

accelerator = processes.accelerator("cpu")
model = tiny.transformer(blocks=2)
narrow.lower(model.transformer_blocks[0], {{"img_mod.1": 4}})
narrow.lower(model.norm_out, {{"linear": 4}})
for product in (model.transformer_blocks[0].img_mod[1], model.norm_out.linear):
    torch.nn.init.constant_(product.down.weight, 0.1)
    torch.nn.init.constant_(product.up.weight, 0.1)
model.requires_grad_(True)
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
count = blocks.parameter_count(model)
fsdp.shard(model, list(model.transformer_blocks), accelerator, cpu_offload=False)
gathered = fsdp.gathered(dict(model.named_parameters()), keep=True)
assert gathered.keys() == before.keys() and all(torch.equal(gathered[n], before[n]) for n in before)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
model(**tiny.arguments())[0].square().mean().backward()
norm = fsdp.clip(model.parameters(), 1e-3, accelerator)
after = fsdp.clip(model.parameters(), 1.0, accelerator)
assert norm > 1e-3 and abs(after - 1e-3) < 1e-6
optimizer.step()
tensors = dict(model.named_parameters()) | {{"odd": model.proj_out.weight.grad}}
whole = {{name: tensor.detach().full_tensor() for name, tensor in tensors.items()}}
whole["seven rows"] = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
tensors["seven rows"] = fsdp.like(whole["seven rows"], model.proj_out.weight)
gathered = fsdp.gathered(tensors, keep=accelerator.is_main_process)
assert gathered.keys() == (tensors.keys() if accelerator.is_main_process else set())
assert all(torch.equal(gathered[name], whole[name]) for name in gathered)
assert all(t.untyped_storage().nbytes() == t.nbytes for t in gathered.values())
held = sum(p.to_local().numel() for p in model.parameters())
moments = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
assert 0.45 * count < held < 0.55 * count and 0 < moments <= held, (held, count)
processes.finish(accelerator)
"""


def test_a_process_keeps_half(tmp_path):
    (tmp_path / "shares.py").write_text(SHARES)
    command = [fresh.python(fresh.MODELS), str(SCRIPTS / "launch.py"), "--processes", "2"]
    command += ["--threads", "2", "--device", "cpu", str(tmp_path / "shares.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first, then, sharding", [(2, 1, "none"), (2, 1, "fsdp"), (1, 2, "fsdp")])
def test_killed_goes_on_with_another_number_of_processes(world, alone, first, then, sharding):
    """The checkpoint has whole tensors, and the batch of a step does not depend on the count."""
    name = f"killed-{sharding}-{first}"
    finetune(world, name, processes=first, kill=True, sharding=sharding)
    assert_alike(alone, finetune(world, name, processes=then, sharding=sharding))


def test_killed_and_resumed_is_uninterrupted_to_the_bit(world, shared):
    finetune(world, "killed", processes=2, kill=True, sharding="fsdp")
    resumed = finetune(world, "killed", processes=2, sharding="fsdp")
    assert distances(resumed, shared).max() == 0
    assert_same_log(resumed["log_table"], shared["log_table"], schemas.VELOCITY_LOG)
