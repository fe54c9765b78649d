"""The workflow itself: a dry run of what is finished, a stage's start-up, the figures."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import material
from benchmarks.material import Size
from benchmarks.measuring import Ratio, least
from ppcl.storage import schemas, tables

NAME = "workflow"
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow" / "scripts"
SNAKEMAKE = Path(sys.executable).parent / "snakemake"
PLOTS_SECONDS = 10.0  # docs/options.md: in seconds
# The last commit at which every pruning trained, to which a run without is compared.
BEFORE = "39317bf"
FREE_SHARE = 0.4  # promised in the issue
FIGURES = {"cka": "similarity", "blocks": "similarity", "probes": "probes"}


def start_up(size: Size, folder: Path) -> list[Ratio]:
    """A stage's seconds before useful work, over those of its libraries and its teacher alone.

    Both end at that moment (`os._exit`): to tear a process down takes torch most of a second.
    """
    where = folder / "teacher" / "transformer"
    material.transformer(size).save_pretrained(where)
    source = {"path": str(folder / "teacher")}
    index = {"_class_name": "QwenImagePipeline"}
    index["transformer"] = ["diffusers", "QwenImageTransformer2DModel"]
    (folder / "teacher" / "model_index.json").write_text(json.dumps(index))
    theirs = (
        "import os, torch, pandas, pyarrow.parquet\n"
        "from diffusers import QwenImageTransformer2DModel as Model\n"
        f"Model.from_pretrained({str(where)!r})\nos._exit(0)"
    )
    # What extract.py does before its first forward.
    ours = (
        f"import os, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nimport torch, extract\n"
        "from ppcl.settings import TeacherSettings\n"
        f"teacher = TeacherSettings.of({source!r})\n"
        "extract.pipelines.load_transformer(teacher, torch.device('cpu'), compiled=True)\n"
        "os._exit(0)"
    )
    runs = {"theirs": [sys.executable, "-c", theirs], "ours": [sys.executable, "-c", ours]}
    seconds = _processes({name: lambda c=command: _run(c) for name, command in runs.items()}, size)
    return [
        Ratio(
            NAME,
            "stage start-up / its libraries and teacher",
            seconds["ours"],
            seconds["theirs"],
            "s",
            1.10,
            note="extract.py up to its first forward; torch, diffusers, pandas, Arrow, the model",
        )
    ]


def dry_run(size: Size, folder: Path) -> list[Ratio]:
    """`snakemake -n` on a run whose files are all there, over starting snakemake at all."""
    command = _finished(folder)
    printed = _run([*command, "-n"])
    if "Nothing to be done" not in printed:
        raise RuntimeError(f"the stand-in of a finished run is none:\n{printed}")
    empty = folder / "empty"
    empty.write_text("rule all:\n    output: touch('never')\n")
    bare = [SNAKEMAKE, "-s", empty, "--directory", folder, "--cores", "1", "-n"]
    runs = {"ours": lambda: _run([*command, "-n"]), "bare": lambda: _run(bare)}
    seconds = _processes(runs, size)
    return [
        Ratio(
            NAME,
            "snakemake -n, finished / one rule",
            seconds["ours"],
            seconds["bare"],
            "s",
            note="no bar in the issue; one rule is snakemake's own start",
        )
    ]


def interval_plots(size: Size, folder: Path) -> list[Ratio]:
    """The figures of a search of 60 blocks from their tables, over the 10 seconds promised."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.plotting import search_tables, width_table

    work, found = folder / "work", search_tables(60, 15)
    for name, frame in found.items():
        place = work / f"results/digits/{FIGURES.get(name, 'intervals')}/{name}.parquet"
        tables.write(place, frame, getattr(schemas, name.upper()), {})
    candidates = work / "results/digits/width/candidates.parquet"
    width = width_table(found["intervals"], 60)
    tables.write(candidates, width, schemas.WIDTH_CANDIDATES, {"blocks": "60"})
    command = [SNAKEMAKE, "interval_plots", "--forceall", "-s", ROOT / "Snakefile", "--nolock"]
    command += ["--directory", work, "--cores", "1", "--configfile", ROOT / "config/digits.yaml"]
    seconds = _processes({"ours": lambda: _run(command)}, size)["ours"]
    note = "all figures of the search, with snakemake's own start"
    return [Ratio(NAME, "interval_plots / 10 s", seconds, PLOTS_SECONDS, "s", 1.0, note=note)]


def free(size: Size, folder: Path) -> list[Ratio]:
    """A whole run without training over `make run` as it was at BEFORE, of any size.

    Each in a checkout of its own, in turns, with all cores and nothing kept from before.
    """
    commits = {"ours": "HEAD", "theirs": BEFORE}
    configs = {"ours": ["--configfile", "config/digits-free.yaml"], "theirs": []}
    seconds: dict[str, float] = {}
    for name, commit in commits.items():
        place = folder / name
        place.mkdir()
        archive = folder / f"{name}.tar"
        _run(["git", "-C", ROOT, "archive", "--output", archive, commit])
        _run(["tar", "-xf", archive, "-C", place])
        command = [SNAKEMAKE, "--cores", "all", *configs[name]]
        start = time.perf_counter()
        done = subprocess.run(
            list(map(str, command)), cwd=place, env=_all_cores(), capture_output=True, text=True
        )
        seconds[name] = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"the run at {commit} failed:\n{done.stdout}{done.stderr}")
    return [
        Ratio(
            NAME,
            "a run without training / make run before",
            seconds["ours"],
            seconds["theirs"],
            "s",
            FREE_SHARE,
            note=f"config/digits-free.yaml at HEAD, config/digits.yaml at {BEFORE}; all cores",
        )
    ]


def _all_cores() -> dict[str, str]:
    """The environment without the one thread of benchmarks: jobs count their own."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def _finished(folder: Path) -> list:
    """A folder in which every file of the digits run is there (empty), and the command for it."""
    work = folder / "finished"
    work.mkdir()
    for name in ("resources", "config"):
        (work / name).symlink_to(ROOT / name)
    command = [SNAKEMAKE, "-s", ROOT / "Snakefile", "--directory", work, "--nolock"]
    command += ["--cores", "1", "--configfile", ROOT / "config/digits.yaml"]
    listed = _run([*command, "--summary"]).splitlines()
    rows = [line.split("\t") for line in listed if line.count("\t") >= 4]
    past = time.time() - 60
    for path in (work / row[0] for row in rows[1:]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (past, past))
    _run([*command, "--touch"])
    return command


def _processes(runs: dict[str, Callable[[], object]], size: Size) -> dict[str, float]:
    """Least seconds of commands, in turn; the first round reads the disk for the others."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(1, min(3, size.repeats))):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: least(np.array(seconds)) for name, seconds in times.items()}


def _run(command: list) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the libraries' modules are compiled already
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}")
    return done.stdout
