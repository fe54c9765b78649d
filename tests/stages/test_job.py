"""The shell of a job: the log fails no stage, and what a signal ended is told."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppcl.runtime import endings
from support import ROOT

BEGIN = f"set -euo pipefail; source {ROOT}/workflow/scripts/job.sh; "


def job(program: str, log: str, then: str = "", **options) -> subprocess.CompletedProcess:
    """A job's command as rules write it; the program is Python code."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f'{BEGIN} python -c "$0" 2>&1 | tee {log} {then}', program],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(params=["/dev/full", "{}", "{}/missing/log"])
def impossible(request, tmp_path):
    """A log that can't be written: on a full disk, a folder, in no folder."""
    return request.param.format(tmp_path)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_log_that_cannot_be_written_is_told_once_and_fails_nothing(impossible, code):
    program = f"import sys; print('a' * 99999, flush=True); print('b'); sys.exit({code})"
    done = job(program, impossible)
    assert done.returncode == code and done.stdout == "a" * 99999 + "\nb\n"
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"tee: {impossible}: ")


@pytest.mark.parametrize("log", ["log", "/dev/full"])
def test_a_screen_that_is_gone_fails_nothing(tmp_path, log):
    # More than a pipe holds, after its other end was closed.
    program = "import sys; [print('x' * 999, flush=True) for _ in range(200)]; open('done', 'w')"
    done = job(program, log, "| true; exit ${PIPESTATUS[0]}", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "done").exists()
    assert log != "log" or (tmp_path / "log").stat().st_size == 200 * 1000


def test_the_log_of_a_killed_program_tells_why(tmp_path):
    program = "import os; print('at work', flush=True); os.kill(os.getpid(), 9)"
    done = job(program, tmp_path / "log")
    said = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == 128 + 9 and done.stdout.splitlines() == said
    assert said[0] == "at work" and len(said) == 2
    assert said[1].startswith("error: the program was ended by signal 9 (SIGKILL), most likely for")


def test_every_signal_has_a_line_of_its_own(monkeypatch, tmp_path):
    for number in range(1, 65):
        said = endings.explain(number, "process 1 of 2")
        assert said.startswith(f"process 1 of 2 was ended by signal {number}")
        assert "\n" not in said and "{" not in said
    assert "/dev/shm" in endings.explain(signal.SIGBUS)
    monkeypatch.setattr(endings, "GROUPS", tmp_path)
    monkeypatch.setattr(endings, "OWN", tmp_path / "own")
    assert "kernel" not in endings.explain(9)
    for own, file, text in (
        ("0::/user/job\n", "user/job/memory.events", "low 0\noom 1\noom_kill 3\n"),
        ("0::/gone\n", "memory.events", "oom_kill 3\noom_group_kill 0\n"),
        ("9:name=x:/\n4:memory:/j\n0::/\n", "memory/j/memory.oom_control", "oom_kill 3\n"),
    ):
        (tmp_path / "own").write_text(own)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
        assert "the kernel has ended 3 of this job's processes" in endings.explain(9)
        (tmp_path / file).write_text(text.replace("3", "0"))
        assert "kernel" not in endings.explain(9)


CONDA = """#!/bin/sh
case "$*" in
    "info --json") printf '{"conda_prefix": "%s", "platform": "any"}' "$HERE" ;;
    --version) echo conda 99.0.0 ;;
    "config "*) echo '{"get": {"channel_priority": "strict"}}' ;;
    "env create "*)
        for last; do :; done
        mkdir -p "$last/bin"
        printf '#!/bin/sh\\necho python of conda' > "$last/bin/python"
        chmod +x "$last/bin/python" ;;
esac
"""
SNAKEFILE = """
configfile: "config/test.yaml"
include: "workflow/rules/common/setup.smk"
rule ask:
    output: "out"
    conda: "environment.yml"
    shell: "python -c 'import sys; print(sys.executable)' | tee {output}"
"""


def test_jobs_use_the_python_of_conda_if_that_is_asked_for(tmp_path):
    for name in ("config", "workflow", "resources", "environment.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/conda").write_text(CONDA)
    (tmp_path / "bin/activate").write_text('PATH="$1/bin:$PATH"\n')
    (tmp_path / "bin/conda").chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HERE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "ask", "--cores", "1", "--sdm", "conda"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out").read_text() == "python of conda\n"


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="of glibc alone")
def test_memory_of_tensors_is_used_again(tmp_path, monkeypatch):
    """Else every page of it is asked of the kernel anew: 245 of a MB."""
    program = (
        "import resource, torch; one = lambda: torch.ones(2 ** 18); two = one(), one(); del two\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; before = faults()\n"
        "for _ in range(100): two = one(), one(); del two\n"
        "print(faults() - before)"
    )
    assert int(job(program, tmp_path / "log").stdout) < 5000
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # one's own wish counts
    assert int(job(program, tmp_path / "log").stdout) > 20000
