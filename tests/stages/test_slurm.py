"""The whole workflow through a real SLURM of one node: resources, groups, cancel, resume, failure.

The cluster is private to a temporary folder (slurm/cluster.py). Without SLURM's programs or
Snakemake's executor for it, these tests are skipped. GPUs are declared ones without hardware.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ppcl.storage import schemas, tables, texts
from support import ROOT, fresh
from support.slurm import cluster

RUN = Path("results/test")
# Seconds for a run, and for one command: many times what a quiet machine needs. The executor waits
# for ever if it loses its jobs.
PATIENCE, COMMAND = 900, 120
# What a forecast says; the run asks for another limit of extract, and there is none of prune.
PLANNED = {name: {"runtime": 77, "mem_mb": 1234} for name in ("extract", "subsets")}

absent = cluster.missing()
on_a_cluster = pytest.mark.skipif(
    bool(absent), reason=f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
)
with_executor = pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
    reason="no snakemake-executor-plugin-slurm: pip install -r requirements.txt",
)


# ---- the profile, without a cluster


def test_the_profile_names_rules_that_exist_and_groups_reach_around_no_gpu():
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    text = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    # Rules that only some runs have are indented.
    rule = r"^ *(?:rule|checkpoint) "
    rules = dict(re.findall(rf"{rule}(\w+):\n(.*?)(?={rule}|^\S|\Z)", text, re.M | re.S))
    assert {*profile["preemptible-rules"], *profile["groups"]} <= rules.keys()
    for name, body in rules.items():
        # What keeps its progress in a folder is what may be submitted again and again.
        assert ("state=" in body) == (name in profile["preemptible-rules"]), name
        assert "mem_mb=" in body and "runtime=" in body, name
        # Which partition and account is a matter of the site.
        assert "slurm_" not in body, name
        if name in profile["groups"]:
            assert "gpu=" not in body and "limits(" not in body, name


@with_executor
@on_a_cluster
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, set()),
        ({"SBATCH_ACCOUNT": "lab"}, {"slurm_account=lab"}),
        (
            {"SBATCH_ACCOUNT": "lab", "SBATCH_PARTITION": "a100"},
            {"slurm_account=lab", "slurm_partition=a100"},
        ),
        # What the user's own profile says is passed on where the environment says nothing.
        (None, {"slurm_account=mine", "slurm_partition=v100"}),
    ],
)
def test_partition_and_account_are_those_of_the_environment_or_of_the_users_profile(
    tmp_path, variables, expected
):
    own = []
    if variables is None:
        mine = "default-resources:\n  slurm_account: mine\n  slurm_partition: v100\n"
        (tmp_path / "config.yaml").write_text(mine)
        own = ["--profile", str(tmp_path)]
    words = ["-m", "snakemake", "--nolock", "-n", "-F", *own]
    words += ["--workflow-profile", "profiles/slurm", "--configfile", "config/test.yaml"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SBATCH_")}
    env = kept | (variables or {})
    done = fresh.run(fresh.SNAKEMAKE, *words, cwd=ROOT, env=env, timeout=COMMAND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"slurm_\w+=\w+", done.stdout + done.stderr)) == expected


SAVING = """
import signal, sys, time
def save(*_):
    print("saving", flush=True)
    time.sleep(2)
    open("saved", "w").close()
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
SNAKEFILE = """
configfile: "config/test.yaml"
include: "workflow/rules/common/setup.smk"
rule train:
    output: "out"
    log: "log"
    shell: "python program.py 2>&1 | tee {log}"
"""


def test_a_job_stays_until_its_program_has_saved_what_sigterm_asked_for(tmp_path):
    for name in ("config", "workflow", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "program.py").write_text(SAVING)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--show-failed-logs", "train"]
    with open(tmp_path / "printed", "wb") as out:
        running = subprocess.Popen(
            command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
    log = tmp_path / "log"
    until(lambda: log.is_file() and "ready" in log.read_text(), running)
    # As a scheduler does it: Snakemake, the shell, the program and tee, all at once.
    os.killpg(running.pid, signal.SIGTERM)
    running.wait(COMMAND)
    assert (tmp_path / "saved").exists(), (tmp_path / "printed").read_text()
    assert log.read_text().splitlines() == ["ready", "saving", "saved"]


# ---- a run


@dataclass
class Site:
    """A copy of the repository beside a running cluster.

    Attributes:
        folder: the copy.
        env: variables of every command.
        printed: what the run that was interrupted, and the one that finished, said.
        cancelled: exit code of the interrupted run, after which SLURM had no job left.
        running: the run that was started last.
    """

    folder: Path
    env: dict[str, str]
    printed: dict[str, str]
    cancelled: int | None = None
    running: subprocess.Popen | None = None

    def slurm(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=True, timeout=COMMAND
        ).stdout

    def jobs(self) -> list[dict[str, str]]:
        """All jobs that the cluster has had, in order."""
        lines = self.slurm("scontrol", "show", "job", "-o").splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if "JobId=" in line]

    def start(self, name: str, *arguments: str, patient: bool = False) -> subprocess.Popen:
        """Snakemake with the profile, asking its jobs' state more often than it does by itself,
        unless it is to be `patient`."""
        polling = ["-m", "snakemake"] if patient else [str(ROOT / "tests/support/slurm/polling.py")]
        # What a script starts in the background ignores Ctrl-C, and so would all that it starts.
        command = ["env", "--default-signal=INT", sys.executable, *polling, *arguments]
        command += ["--workflow-profile", "profiles/slurm", "--latency-wait", "5"]
        # Fewer GPUs than there are, so that the cap shows. One thread per job, for the sake of two
        # cores: --cores would not do, as it is not handed on to the jobs.
        command += ["--resources", "gpu=1", "--max-threads", "1"]
        command += ["--set-resources", "extract:runtime=44"]
        command += ["--configfile", "config/test.yaml", "tests/support/slurm/config.yaml"]
        with open(self.folder / f"{name}.log", "wb") as log:
            self.running = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.running

    def kill(self) -> None:
        """Ends what `start` started, if it still runs, and all its jobs."""
        if self.running and self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()
        numbers = self.slurm("squeue", "-h", "-o", "%A").split()
        if numbers:
            self.slurm("scancel", "--full", *numbers)

    def end(self, name: str, running: subprocess.Popen, code: int) -> str:
        """Waits for a run's end; what it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(PATIENCE)
        self.printed[name] = (self.folder / f"{name}.log").read_text()
        assert running.poll() == code, self.printed[name][-6000:]
        return self.printed[name]


def until(condition: Callable, running: subprocess.Popen | None = None):
    """What `condition` gives once it gives something, while a run goes on if one is given."""
    deadline = time.monotonic() + (PATIENCE if running else COMMAND)
    while time.monotonic() < deadline and (running is None or running.poll() is None):
        if value := condition():
            return value
        time.sleep(0.05)
    ended = running and running.poll() is not None
    raise AssertionError(f"the run ended with {running.returncode}" if ended else "waited in vain")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """A cluster; the run on it that was interrupted, then finished in spite of a time limit."""
    folder = tmp_path_factory.mktemp("slurm") / "repo"
    made = (".git", ".venv", ".snakemake", "results", "__pycache__", ".*_cache")
    ignore = shutil.ignore_patterns(*made)
    shutil.copytree(ROOT, folder, ignore=ignore)
    # Not pytest's own folder: its path is long, and closed to the user as whom munged answers.
    place = Path(tempfile.mkdtemp(prefix="slurm-"))
    place.chmod(0o755)
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env = os.environ | quiet | {"SBATCH_PARTITION": "gpu"} | cluster.up(place)
    made = Site(folder, env, {})
    needs = folder / RUN / "forecast/resources.json"
    needs.parent.mkdir(parents=True)
    texts.write_sealed(needs, PLANNED)
    try:
        interrupt(made)
        finish(made)
        yield made
    finally:
        try:
            made.kill()
        finally:
            cluster.down(place)
            shutil.rmtree(place, ignore_errors=True)


def interrupt(site: Site) -> None:
    """A run that the user stops with Ctrl-C while its first job runs."""
    # While it asks how its jobs are, Snakemake knows of none, and would cancel none.
    running = site.start("interrupted", patient=True)
    hold(site, "record", running)
    said = site.folder / "interrupted.log"
    until(lambda: "has been submitted with SLURM jobid" in said.read_text(), running)
    running.send_signal(signal.SIGINT)
    site.end("interrupted", running, code=1)
    # A cancelled job may take a while to end, though no longer than until it is killed.
    until(lambda: not site.slurm("squeue", "-h"))
    site.cancelled = running.returncode


def finish(site: Site) -> None:
    """The same run again, with a distillation whose time is up after its first checkpoint."""
    running = site.start("finished")
    checkpoint = site.folder / RUN / "state/distill/checkpoint.safetensors"
    until(checkpoint.is_file, running)
    hold(site, "distill", running)
    job = next(job for job in site.jobs() if is_rule(job, "distill"))
    site.slurm("scontrol", "update", f"JobId={job['JobId']}", "EndTime=now")
    site.end("finished", running, code=0)


def hold(site: Site, stage: str, running: subprocess.Popen) -> None:
    """Puts a stage's program to sleep once it is there, so that no test depends on its speed.

    SLURM wakes what it ends.
    """
    for number in until(lambda: processes(site.folder, f"scripts/{stage}.py"), running):
        os.kill(number, signal.SIGSTOP)


def processes(folder: Path, program: str) -> list[int]:
    """Numbers of the Python processes that run a program in a folder."""
    numbers = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            # Not the shells around it, in whose command line it is one word among others.
            python = b"python" in Path(os.fsdecode(words[0])).name.encode()
            named = any(word.decode().endswith(program) for word in words[1:4])
            if python and named and (place / "cwd").resolve() == folder.resolve():
                numbers.append(int(place.name))
    return numbers


def is_rule(job: dict[str, str], name: str) -> bool:
    return job.get("Comment", "").split("_wildcards_")[0] == f"rule_{name}"


@with_executor
@on_a_cluster
def test_an_interrupted_run_leaves_no_job_and_goes_on(site):
    assert site.cancelled == 1
    assert site.jobs()[0]["JobState"] == "CANCELLED"
    for name, schema in schemas.TABLES.items():
        if not name.startswith(("latency/", "narrow/", "ablation/", "forecast/", "encode/")):
            path = site.folder / RUN / name.replace("<variant>", "p55")
            assert len(tables.read(path, None if "tokens" in name else schema)), name
    for variant in ("p55", "p85"):
        assert (site.folder / RUN / "models" / variant / "model_index.json").is_file()
    for figure in ("intervals/search", "training/subsets", "quality/images"):
        assert (site.folder / RUN / f"plots/{figure}.svg").stat().st_size > 1000


@with_executor
@on_a_cluster
def test_jobs_ask_for_what_their_rules_say(site):
    jobs = [job for job in site.jobs() if job["JobState"] == "COMPLETED"]
    assert {job["Partition"] for job in jobs} == {"gpu"}  # of the environment
    assert all(job["Account"] == "(null)" for job in jobs)
    names = {job["Comment"] for job in jobs}
    gpus = {job["Comment"] for job in jobs if job.get("TresPerJob") == "gres:gpu:1"}
    stages = ("record", "extract", "similarity", "sensitivity", "width", "prune", "distill")
    assert gpus == {
        *(f"rule_{name}" for name in (*stages, "subsets", "choose", "pareto", "evaluate")),
        "rule_finetune_wildcards_p55",
    }
    # Small CPU stages that follow each other share a job; assembling loads the teacher, and figures
    # that do not need each other would be one group that a checkpoint confuses.
    assert names - gpus == {
        "rule_probe",
        "rule_gather_metrics",
        "rule_choice_intervals_plot_intervals",
        *(f"rule_{n}_wildcards_{v}" for n in ("assemble", "describe") for v in ("p55", "p85")),
        *(f"rule_plot_{figures}" for figures in ("training", "quality")),
    }
    limits = {job["Comment"]: job["TimeLimit"] for job in jobs}
    assert limits["rule_distill"] == "2-00:00:00" and limits["rule_prune"] == "00:30:00"
    # The forecast's where it has some, unless the user says otherwise.
    assert limits["rule_subsets"] == "01:17:00" and limits["rule_extract"] == "00:44:00"
    memory = {job["Comment"]: job["MinMemoryNode"] for job in jobs}
    assert (memory["rule_subsets"], memory["rule_extract"]) == ("33234M", "17234M")
    # The cap of one GPU held, though the cluster has two.
    spans = sorted((job["StartTime"], job["EndTime"]) for job in jobs if job["Comment"] in gpus)
    assert all(spans[i][1] <= spans[i + 1][0] for i in range(len(spans) - 1)), spans


@with_executor
@on_a_cluster
def test_a_job_at_its_time_limit_is_submitted_again_and_goes_on(site):
    states = [job["JobState"] for job in site.jobs() if is_rule(job, "distill")]
    assert states == ["TIMEOUT", "COMPLETED"]
    log = (site.folder / RUN / "logs/distill.log").read_text()
    step = int(re.search(r"resuming .*checkpoint.safetensors at step (\d+)", log).group(1))
    assert 2 <= step < 24
    steps = tables.read(site.folder / RUN / "distill/log.parquet", schemas.DISTILL_LOG)["step"]
    assert max(steps.to_pylist()) == 24 and min(steps.to_pylist()) <= 2
    # The failed attempt showed its own log.
    assert f"Logfile {RUN}/logs/distill.log:" in site.printed["finished"]


@with_executor
@on_a_cluster
def test_a_failing_job_shows_its_own_log(site):
    target = RUN / "plots/quality/pareto.svg"
    metrics = site.folder / RUN / "evaluation/metrics.parquet"
    kept = metrics.read_bytes()
    metrics.write_bytes(b"no table")
    running = site.start("failing", str(target), "--retries", "0")
    printed = site.end("failing", running, code=1)
    metrics.write_bytes(kept)
    assert f"Logfile {RUN}/logs/plot-quality.log:" in printed
    message = (site.folder / RUN / "logs/plot-quality.log").read_text().splitlines()[-1]
    assert message.startswith("error: ") and "metrics.parquet" in message
    assert message in printed.splitlines()
