"""How many cores a job has, and how many threads a model is worth."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from ppcl.errors import UserError
from ppcl.evaluation import workers
from ppcl.runtime import cores, devices
from ppcl.settings import Settings
from ppcl.teacher import hub, weights
from support import ROOT, tiny

AFFINITY = 6


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Control groups of this process: what /proc/self/cgroup says, and files below the root."""

    def make(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(cores, "OWN", tmp_path / "own")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(AFFINITY)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return make


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        ("", {}, AFFINITY),
        ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
        # A container's own group is the root; half cores are rounded up.
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        # Version 1, where every controller has its own tree; cpuset is another one.
        (
            "5:cpuset:/j\n4:cpu,cpuacct:/j\n0::/x\n",
            {"cpu/j/cpu.cfs_quota_us": "200000\n", "cpu/j/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        (
            "4:cpu:/j\n",
            {"cpu/j/cpu.cfs_quota_us": "-1\n", "cpu/j/cpu.cfs_period_us": "100000\n"},
            AFFINITY,
        ),
        # More than there is, and nonsense.
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, AFFINITY),
        ("0::/\n", {"cpu.max": "0 0\n"}, AFFINITY),
        ("nonsense", {"cpu.max": "100000\n"}, AFFINITY),
    ],
)
def test_no_more_cores_than_quotas_leave(groups, own, files, count):
    groups(own, files)
    assert cores.available() == count


@pytest.mark.parametrize(
    ("said", "count"),
    [("2", 2), ("3,1", 3), ("99", AFFINITY), ("0", AFFINITY), ("", AFFINITY), ("x", AFFINITY)],
)
def test_no_more_cores_than_the_job_has(groups, monkeypatch, said, count):
    groups("", {})
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert cores.available() == count
    assert workers.process_count("auto", torch.device("cpu")) == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="of Linux")
def test_the_affinity_of_this_process_counts(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores.available() == 1
    finally:
        os.sched_setaffinity(0, before)


def shapes(width: int) -> list[tuple[int, ...]]:
    """Weights of a stock block: attention, FFN, modulation, biases."""
    return [*[(width, width)] * 4, (width, 4 * width), (4 * width, width), (width,), (6 * width,)]


@pytest.mark.parametrize(
    ("width", "worth"), [(16, False), (64, False), (128, False), (256, True), (3072, True)]
)
def test_small_matrices_are_worth_one_thread(width, worth):
    assert cores.worth_threads(shapes(width) * 24) == worth
    assert not cores.worth_threads([])


def test_a_small_model_gets_one_thread_and_a_large_one_those_of_the_job(monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: 2)
    before = torch.get_num_threads()
    try:
        for width, threads in ((64, 1), (512, 2)):
            model = torch.nn.Linear(width, width)
            devices.use_threads(model.parameters(), torch.device("cpu"))
            assert torch.get_num_threads() == threads
        devices.use_threads(tiny.transformer(blocks=2).parameters(), torch.device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- what rules ask for


def rules(config: dict, total: int | None, local: bool, gpu: bool) -> SimpleNamespace:
    """Functions of workflow/rules/common/limits.smk as Snakemake has them on some machine."""
    text = (ROOT / "workflow/rules/common/limits.smk").read_text()
    part = text[text.index("def on_cpu()") : text.index("def forecast()")]
    workflow = SimpleNamespace(
        local_exec=local,
        non_local_exec=not local,
        resource_settings=SimpleNamespace(cores=total),
    )
    names = {"config": config, "workflow": workflow, "functools": functools, "THREADS": 8}
    names["settings"] = lambda: Settings.of(config)
    names |= {"cores": cores, "hub": hub, "weights": weights, "UserError": UserError}
    names["settings"] = lambda: Settings.of(config)
    names["gpus"] = SimpleNamespace(possible=lambda: gpu)
    exec(part, names)
    return SimpleNamespace(**names)


SMALL = {"path": str(ROOT / "resources/digits"), "component": "transformer", "variant": None}
SMALL |= {"subfolder": None}


@pytest.mark.parametrize(
    ("device", "teacher", "total", "local", "gpu", "asked"),
    [
        # GPUs of a job; threads of a stage of one process, of one beside it, and of a timing one.
        ("auto", {}, 2, True, False, (0, 1, 1, 2)),
        ("cpu", {}, 16, True, True, (0, 1, 8, 16)),
        ("cpu", {}, 4, True, False, (0, 1, 3, 4)),
        ("cpu", {}, 1, True, False, (0, 1, 1, 1)),
        ("auto", {}, 16, True, True, (1, 8, 8, 8)),
        ("cuda", {}, 16, True, False, (1, 8, 8, 8)),
        ("mps", {}, 16, True, False, (1, 8, 8, 8)),
        # On a cluster nodes may have GPUs that this machine lacks, and no number of cores is known.
        ("auto", {}, None, False, False, (1, 8, 8, 8)),
        ("cpu", {}, None, False, False, (0, 1, 8, 8)),
        ("cpu", {"path": "owner/name"}, None, False, False, (0, 8, 8, 8)),
        # Not known to be small: such stages take turns.
        ("cpu", {"path": "owner/name"}, 16, True, False, (1, 8, 8, 8)),
        ("cpu", {"path": "/nowhere"}, 16, True, False, (1, 8, 8, 8)),
        ("cpu", {"component": "vae"}, 16, True, False, (0, 1, 8, 16)),
    ],
)
def test_stages_of_small_teachers_share_the_cores(device, teacher, total, local, gpu, asked):
    config = {"device": device, "teacher": SMALL | teacher}
    made = rules(config, total, local, gpu)
    threads = (
        made.cores_of_one_process(None),
        made.cores_beside_one_process(None),
        made.every_core(None),
    )
    assert (made.gpu(None), *threads) == asked


def test_the_stages_of_a_large_teacher_take_turns(tmp_path):
    shutil.copytree(SMALL["path"], tmp_path / "teacher")
    (file,) = (tmp_path / "teacher/transformer").glob("*.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(512, 512)}, file)
    made = rules(
        {"device": "cpu", "teacher": SMALL | {"path": str(tmp_path / "teacher")}}, 16, True, False
    )
    assert made.gpu(None) == 1 and made.cores_of_one_process(None) == 8


# ---- beside a busy process


def _cpu_seconds(command: str, folder: Path) -> float:
    """Of the stages' programs and all that they start, run as rules do in a job of two cores."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}  # our own tests'
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = f"set -euo pipefail; source {ROOT}/workflow/scripts/job.sh; "
    subprocess.run(["bash", "-c", begin + command], check=True, env=inherited | given, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_busy_machine_costs_no_more_processor_time(tmp_path):
    """Of a stage of one process, and of one of two that wait for each other at every step."""
    scripts, digits = ROOT / "workflow/scripts", ROOT / "resources/digits"
    prompts = [f"the digit {number % 10} {number}" for number in range(64)]
    tiny.record(digits, tmp_path / "calls.parquet", prompts, batch=64)
    settings = {
        "teacher": {"path": str(digits)},
        "extract": {"batch_size": 64, "rows": 256, "sample_tokens": 4},
        "similarity": {"bootstrap": 100},
        "sensitivity": {"batch_size": 16, "rows": 16, "longest": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config, calls = "--config config.json", "--calls calls.parquet --state state"
    begin = (
        f"python {scripts}/extract.py {config} {calls} --tokens t.parquet --moments m.safetensors "
        f"--conditioning c.safetensors; python {scripts}/probe.py {config} --tokens t.parquet "
        "--moments m.safetensors --probes p.safetensors --probes-table p.parquet"
    )
    _cpu_seconds(begin, tmp_path)
    stages = (
        f"python {scripts}/similarity.py {config} --tokens t.parquet --probes p.safetensors "
        "--cka k.parquet --blocks b.parquet; "
        f"python {scripts}/launch.py --threads 2 {scripts}/sensitivity.py {config} {calls} "
        "--table s.parquet"
    )
    alone = _cpu_seconds(stages, tmp_path)
    # A session of its own: of those of one session, Linux lets none wait for long.
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = subprocess.Popen(spin, start_new_session=True)
    try:
        # Tests beside this one cost it more, too, so one quiet moment of three is enough.
        beside = [_cpu_seconds(stages, tmp_path)]
        while beside[-1] >= 1.5 * alone and len(beside) < 3:
            beside.append(_cpu_seconds(stages, tmp_path))
        assert spinning.poll() is None
    finally:
        spinning.kill()
        spinning.wait()
    assert min(beside) < 1.5 * alone, (alone, beside)
