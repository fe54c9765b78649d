"""What other launchers leave in the environment changes nothing."""

import os
import shlex
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState

from ppcl.runtime import processes, surroundings
from support import SCRIPTS

PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
LEFT = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "MEGATRON_LM_TP_DEGREE": "2",
    "NVIDIA_TF32_OVERRIDE": "1",
    "DIFFUSERS_ATTN_BACKEND": "_native_math",
}
OTHERS = {"PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"}
KEPT = {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "1", "HF_HOME": "/nowhere"}
SHOWS = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import ppcl, os
print(*sorted(set({[*PLACE, *LEFT, *OTHERS, *KEPT, surroundings.RUN]!r}) & set(os.environ)))
"""


def seen(given, *, further_up=False):
    """Names of the variables that a program sees; further_up: they were set for its parent."""
    command = [sys.executable, "-c", SHOWS]
    if further_up:
        command = ["sh", "-c", f"{shlex.join(command)}; true"]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_every_program_forgets_them_and_keeps_what_is_no_result():
    kept, said = seen(LEFT | PLACE | OTHERS | KEPT)
    assert kept == sorted(KEPT)
    assert [line.split("=")[0] for line in sorted(said.splitlines())] == [
        "DIFFUSERS_ATTN_BACKEND",
        "NVIDIA_TF32_OVERRIDE",
    ]


@pytest.mark.parametrize("further_up", [False, True])
def test_a_process_of_several_keeps_its_place_unless_it_was_that_of_another(further_up):
    given = PLACE | {surroundings.RUN: "a"}
    kept, _ = seen(given | LEFT, further_up=further_up)
    assert set(given) & set(kept) == (set() if further_up else set(given))
    assert not set(LEFT) & set(kept)


def test_accelerate_is_as_it_was_asked_for(monkeypatch):
    for name, value in (LEFT | PLACE | OTHERS).items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = processes.accelerator("cpu")
        assert (accelerator.num_processes, accelerator.mixed_precision) == (1, "no")
        assert accelerator.gradient_accumulation_steps == 1 and accelerator.distributed_type == "NO"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
