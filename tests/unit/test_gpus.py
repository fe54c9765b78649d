"""GPUs that jobs take: different ones, as long as they live, and only what a scheduler gave."""

import os
import subprocess
import sys

import pytest

from ppcl.runtime import gpus, surroundings
from support import SCRIPTS

NAMES = [f"GPU-{n}{n}-aa" for n in range(4)]
LISTED = "".join(f"GPU {n}: NVIDIA H200 (UUID: {name})\n" for n, name in enumerate(NAMES))
PARTED = (
    "GPU 0: NVIDIA H200 (UUID: GPU-00-aa)\n"
    "  MIG 1g.18gb     Device  0: (UUID: MIG-a1)\n"
    "  MIG 1g.18gb     Device  1: (UUID: MIG-a2)\n"
    "GPU 1: NVIDIA H200 (UUID: GPU-11-aa)\n"
)
TAKER = """
import os, sys
from pathlib import Path
from ppcl.runtime import gpus, surroundings
gpus.FOLDER, gpus.PATIENCE = Path(sys.argv[1]), 0.01
gpus.take(int(sys.argv[2]))
print(os.environ.get(gpus.VISIBLE), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose nvidia-smi lists what it is told, and jobs that take GPUs of it."""
    for name in (gpus.VISIBLE, gpus.HELD, *gpus.SCHEDULERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    tool, started = tmp_path / "nvidia-smi", []

    def has(text: str) -> None:
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        tool.chmod(0o755)

    def job(count: int = 1, **variables) -> subprocess.Popen:
        command = [sys.executable, "-c", TAKER, tmp_path / "locks", str(count)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(
            subprocess.Popen(command, env={**os.environ, **variables}, text=True, **pipes)
        )
        return started[-1]

    has(LISTED)
    yield job, has
    for process in started:
        process.kill()
        process.communicate()


def sees(process: subprocess.Popen) -> list[str]:
    """What CUDA_VISIBLE_DEVICES holds in a job; waits until it has taken its GPUs."""
    return process.stdout.readline().strip().split(",")


def test_jobs_take_different_gpus_and_a_killed_one_frees_its_own(machine):
    job, _ = machine
    first = job(3)
    assert sees(first) == NAMES[:3]
    assert sees(job()) == NAMES[3:]
    third = job(2)
    # Until both are free, and one line tells whom it waits for.
    assert f"waiting for 2 of 4 GPUs, which other jobs have (processes {first.pid}, " in (
        third.stderr.readline()
    )
    first.kill()
    assert sees(third) == NAMES[:2]
    assert sees(job()) == NAMES[2:3]


def test_processes_that_a_job_starts_keep_its_gpus(machine, tmp_path):
    job, _ = machine
    launcher = job(4)
    assert sees(launcher) == NAMES
    files = os.pathsep.join(str(tmp_path / "locks" / f"{name}.lock") for name in NAMES)
    rank = job(**{gpus.HELD: files, gpus.VISIBLE: ",".join(NAMES)})
    assert sees(rank) == NAMES
    launcher.kill()
    waiting = job()
    assert "waiting for 1 of 4 GPUs" in waiting.stderr.readline()
    rank.kill()
    assert sees(waiting) == NAMES[:1]


def test_of_what_is_visible_a_part_is_taken_under_its_own_name(machine):
    job, has = machine
    assert sees(job(**{gpus.VISIBLE: "3,1"})) == ["3"]
    assert sees(job(**{gpus.VISIBLE: "GPU-33,1"})) == ["1"]
    assert sees(job(**{gpus.VISIBLE: ""})) == [""]
    # A scheduler's are the job's own, even if another job has them too; of more, one is enough.
    assert sees(job(SLURM_JOB_ID="7", **{gpus.VISIBLE: "3"})) == ["3"]
    assert sees(job(SLURM_JOB_ID="7", **{gpus.VISIBLE: "3,2"})) == ["2"]
    has("No devices were found\n")
    assert sees(job()) == ["None"]


def test_parts_of_a_gpu_are_taken_by_their_names(machine):
    job, has = machine
    has(PARTED)
    assert sees(job()) == ["MIG-a1"]
    assert sees(job(5, **{gpus.VISIBLE: "MIG-a2,1"})) == ["MIG-a2", "1"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["MIG-a1", "MIG-a2", "GPU-11-aa"]),
        ("1", ["GPU-11-aa"]),
        ("0, 1", ["MIG-a1", "GPU-11-aa"]),
        ("1,GPU-11-aa,GPU-1", ["GPU-11-aa"]),
        ("MIG-GPU-00-aa/1/0", ["MIG-GPU-00-aa/1/0"]),
        ("1,-1,0", ["GPU-11-aa"]),
        ("7,0", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(given, expected):
    devices = [["GPU-00-aa", "MIG-a1", "MIG-a2"], ["GPU-11-aa"]]
    assert list(gpus.usable(given, devices).values()) == expected


def test_without_a_folder_for_locks_a_job_says_so_and_goes_on(machine, tmp_path):
    job, _ = machine
    (tmp_path / "locks").write_text("")
    process = job()
    assert "no locks on GPUs (" in process.stderr.readline() and sees(process) == ["None"]


def test_a_process_of_several_uses_what_all_of_them_see(machine):
    """As where a scheduler gave as many as there are processes, or torchrun started them."""
    job, _ = machine
    place = {gpus.RANK: "1", surroundings.RUN: "a", gpus.VISIBLE: "3,2"}
    assert sees(job(SLURM_JOB_ID="7", **place)) == ["3", "2"]
