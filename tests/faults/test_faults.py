"""A fault at a random moment of every stage: nothing half is taken for whole, what a disk is to
blame for ends in one line, and after a plain rerun the artifacts are those of an uninterrupted run,
to the bit.

PPCL_FAULTS=<trials> runs more of them, of all stages; PPCL_FAULTS_SEED=<number> other ones.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ppcl.runtime import stopping
from support import faulting, tiny_run
from support.artifacts import content

TRIALS = int(os.environ.get("PPCL_FAULTS", "14"))
SEED = int(os.environ.get("PPCL_FAULTS_SEED", "0"))
FAULTS = [
    "SIGTERM",
    "SIGKILL",
    "disk full",
    "failing write",
    "failing disk",
    "vanished input",
    "two at once",
]
# These take too long for a few trials: evaluate starts processes that import everything anew, and
# gather_metrics and describe read what it leaves.
LONG = ("evaluate", "gather_metrics", "describe", "calibrate", "ablate", "gather_ablation")
EVERY = [*tiny_run.STAGES, *tiny_run.MORE]
PLAYED = [s for s in EVERY if s.program not in LONG or "PPCL_FAULTS" in os.environ]


def whole(actual, expected) -> bool:
    """Whether content is as expected; of figures, so far as they are there."""
    if isinstance(actual, dict) and actual.get("") == "figures":
        return actual.items() <= expected.items()
    return actual == expected


@contextlib.contextmanager
def own_disk(folder: Path):
    """Puts a folder on a disk of its own; yields what sets how many bytes of it are free, or None
    if we may not have one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False

    def leave(free: int) -> None:
        size = shutil.disk_usage(folder).used + free
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    try:
        yield leave if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


class World:
    """An uninterrupted run, and how long its stages took."""

    def __init__(self, teacher: Path, folder: Path):
        self.folder, self.settings = folder / "whole", tiny_run.settings(teacher, folder)
        self.folder.mkdir()
        self.zygote, self.seconds, self.changes, self.contents = faulting.Zygote(), {}, {}, {}
        self.zygote.run()  # it has imported everything then
        for stage in PLAYED:
            count, began = folder / "count", time.monotonic()
            assert self.run(stage, self.folder, {"count": str(count)}) == [0], self.printed()
            self.seconds[stage.program] = time.monotonic() - began
            self.changes[stage.program] = int(count.read_text())
            for name in stage.writes.values():
                self.contents[name] = content(self.folder / name)

    def job(self, stage, folder: Path, fault: dict) -> dict:
        options = stage.options(self.settings, folder)
        log = str(self.folder.parent / "log")
        return {"program": stage.program, "options": options, "log": log, "fault": fault}

    def run(self, stage, folder: Path, *faults: dict) -> list[int]:
        """Runs a stage as often as there are faults, at once; exit codes."""
        (self.folder.parent / "log").unlink(missing_ok=True)
        return self.zygote.run(*(self.job(stage, folder, fault) for fault in faults))

    def printed(self) -> str:
        """By the last run."""
        return (self.folder.parent / "log").read_text()


@pytest.fixture(scope="module")
def world(tiny_teacher, tmp_path_factory):
    made = World(tiny_teacher, tmp_path_factory.mktemp("faults"))
    yield made
    made.zygote.stop()


def give(stage, world, folder: Path) -> None:
    """Puts what a stage reads into a folder."""
    for name in stage.reads.values():
        source, target = world.folder / name, folder / name
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target)
        elif not target.exists():
            shutil.copy(source, target)


def suffer(kind: str, stage, world, folder: Path, chance: random.Random, leave) -> list[int]:
    """Runs a stage with a fault; exit codes.

    Args:
        leave: of `own_disk`.
    """
    seconds = chance.uniform(0, 1) * world.seconds[stage.program]
    fault = {"seconds": seconds}
    if kind in ("SIGTERM", "SIGKILL"):
        fault |= {"signal": int(getattr(signal, kind))}
    elif kind == "failing write":
        fault = {"fail": chance.randint(1, world.changes[stage.program])}
    elif kind == "failing disk":
        fault |= {"calls": chance.choice(["write", "fsync"]), "error": errno.EIO}
    elif kind == "vanished input" and stage.reads:
        name = chance.choice([n for n in stage.reads.values() if (folder / n).is_file()])
        fault = {"vanish": str(folder / name), "opened": chance.randint(1, 60)}
    elif kind == "two at once":
        return world.run(stage, folder, {}, {"delay": seconds})
    elif leave:
        leave(chance.randint(0, sum(size_of(world.folder / n) for n in stage.writes.values())))
        fault = {}
    else:
        fault |= {"calls": "write", "error": errno.ENOSPC}
    return world.run(stage, folder, fault)


def refused(printed: str, folder: Path) -> bool:
    """Whether a program ended with one line that names a file and what to do."""
    told = [line for line in printed.splitlines() if line.startswith("error: ")]
    return len(told) == 1 and str(folder) in told[0] and "rerun" in told[0]


def trial(number: int, world, folder: Path) -> str:
    """One stage, one fault, and a plain rerun; returns what happened."""
    chance = random.Random(SEED * 1_000_003 + number)
    order = random.Random(SEED).sample(PLAYED, len(PLAYED))
    turn, place = divmod(number, len(order))
    kind, stage = FAULTS[(place + turn) % len(FAULTS)], order[place]
    outputs = {name: folder / name for name in stage.writes.values()}
    with own_disk(folder) if kind == "disk full" else contextlib.nullcontext() as leave:
        give(stage, world, folder)
        codes = suffer(kind, stage, world, folder, chance, leave)
        printed = world.printed()
        what = f"{kind} in {stage.program} ({SEED}, {number}): ended with {codes}"
        for name, path in outputs.items():
            if path.exists():
                assert whole(content(path), world.contents[name]), f"{what}: {name} is another"
        allowed = {"SIGTERM": stopping.EXIT_CODE, "SIGKILL": -signal.SIGKILL}.get(kind, 2)
        assert set(codes) <= {0, allowed}, f"{what}\n{printed}"
        assert "Traceback" not in printed, f"{what}\n{printed}"
        assert 2 not in codes or refused(printed, folder), f"{what}\n{printed}"
        if leave:
            leave(1 << 30)
        give(stage, world, folder)  # what vanished is made again
        assert world.run(stage, folder, {}) == [0], f"{what}\n{world.printed()}"
        for name, path in outputs.items():
            assert content(path) == world.contents[name], f"{what}: {name} differs after the rerun"
        left = [path.name for path in folder.rglob(".*.part")]
        assert not left, f"{what}: {left}"
    told = [line for line in printed.splitlines() if line.startswith("error: ")]
    return "\n".join([what, *told])


@pytest.mark.parametrize("number", range(TRIALS))
def test_a_rerun_after_a_fault_ends_as_if_nothing_had_happened(world, tmp_path, number):
    print(trial(number, world, tmp_path))


def test_the_faults_are_faults(world, tmp_path):
    """So that the trials above are not of stages that end before anything happens to them."""
    stage = tiny_run.NAMED["distill"]
    give(stage, world, tmp_path)
    at_once = {"seconds": 0, "calls": "write"}
    for fault in ({"fail": 1}, at_once | {"error": errno.ENOSPC}, at_once | {"error": errno.EIO}):
        assert world.run(stage, tmp_path, fault) == [2] and refused(world.printed(), tmp_path)
    assert world.run(
        stage, tmp_path, {"vanish": str(tmp_path / "selection.json"), "opened": 1}
    ) == [2]
    give(stage, world, tmp_path)
    # It took longer beside other work than it may take now.
    for share in (0.6, 0.3, 0.1):
        begun = {"signal": int(signal.SIGKILL), "seconds": world.seconds["distill"] * share}
        if world.run(stage, tmp_path, begun) == [-signal.SIGKILL]:
            break
        for name in stage.writes.values():
            (tmp_path / name).unlink()
    else:
        raise AssertionError("distill cannot be killed")
    assert not all((tmp_path / name).exists() for name in stage.writes.values())
