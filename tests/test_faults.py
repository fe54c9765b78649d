"""A fault at a random moment of every stage: nothing half is taken for whole, and after a plain
rerun the artifacts are those of an uninterrupted run, to the bit.

PPCL_FAULTS=<trials> runs more of them, of all stages; PPCL_FAULTS_SEED=<number> other ones.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import faulting
import pytest
import stages
import tiny
import torch

from ppcl import assembly, stopping, tables, tensors, texts

TRIALS = int(os.environ.get("PPCL_FAULTS", "14"))
SEED = int(os.environ.get("PPCL_FAULTS_SEED", "0"))
FAULTS = ["SIGTERM", "SIGKILL", "disk full", "failing write", "vanished input", "two at once"]
# It starts processes that import everything anew, which takes too long for a few trials.
PLAYED = [s for s in stages.STAGES if s.program != "evaluate" or "PPCL_FAULTS" in os.environ]
MEASURED = ("seconds", "latency", "peak_memory")


def content(path: Path):
    """What an artifact says, without times and what is measured in seconds and bytes.

    Raises UserError unless it is whole.
    """
    if path.is_dir():
        assembly.verify(path)
        card = texts.read_sealed(path / assembly.CARD)
        return {**card["files"], "units": card["units"]}
    if path.suffix == ".safetensors":
        found, about = tensors.read(path)
        # Views of bytes: NaN equals itself.
        found = {k: t.contiguous().flatten().view(torch.uint8).tolist() for k, t in found.items()}
        return found | {"": _undated(about)}
    if path.suffix == ".json":
        plan = texts.read_sealed(path)
        return plan | {"provenance": _undated(plan["provenance"])}
    table = tables.read(path)
    if "metric" in table.column_names:
        kept = [not any(m in name for m in MEASURED) for name in table["metric"].to_pylist()]
        table = table.filter(kept)
    names = [name for name in table.column_names if not any(m in name for m in MEASURED)]
    return repr(table.select(names).to_pylist()), _undated(tables.provenance(path))


def _undated(stamp: dict) -> dict:
    # Nor by the commit, for somebody may work on this repository meanwhile.
    return {key: value for key, value in stamp.items() if key not in ("created", "commit")}


@contextlib.contextmanager
def small_disk(folder: Path, free: int):
    """A folder on a disk of its own with so many bytes free; yields None if we may not have one."""
    options = f"size={max(free, 4096)}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield (
            (lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True))
            if (mounted)
            else None
        )
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class World:
    """An uninterrupted run, and how long its stages took."""

    def __init__(self, teacher: Path, folder: Path):
        self.folder, self.settings = folder / "whole", stages.settings(teacher, folder)
        self.folder.mkdir()
        self.zygote, self.seconds, self.changes, self.contents = faulting.Zygote(), {}, {}, {}
        self.zygote.run()  # it has imported everything then
        for stage in PLAYED:
            count, began = folder / "count", time.monotonic()
            assert self.run(stage, self.folder, {"count": str(count)}) == 0, self.printed()
            self.seconds[stage.program] = time.monotonic() - began
            self.changes[stage.program] = int(count.read_text())
            for name in stage.writes.values():
                self.contents[name] = content(self.folder / name)

    def job(self, stage, folder: Path, fault: dict) -> dict:
        options = tiny.options(self.settings, stage.paths(folder))
        log = str(self.folder.parent / "log")
        return {"program": stage.program, "options": options, "log": log, "fault": fault}

    def run(self, stage, folder: Path, fault: dict) -> int:
        return self.zygote.run(self.job(stage, folder, fault))[0]

    def printed(self) -> str:
        return (self.folder.parent / "log").read_text()[-3000:]


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


def suffer(kind: str, stage, world, folder: Path, chance: random.Random, enlarge) -> list[int]:
    """Runs a stage with a fault; exit codes."""
    seconds = chance.uniform(0, 1) * world.seconds[stage.program]
    outputs = [world.folder / name for name in stage.writes.values()]
    largest = max(path.stat().st_size for path in outputs)
    if kind in ("SIGTERM", "SIGKILL"):
        fault = {"signal": int(getattr(signal, kind)), "seconds": seconds}
    elif kind == "failing write":
        fault = {"fail": chance.randint(1, world.changes[stage.program])}
    elif kind == "vanished input" and stage.reads:
        name = chance.choice([n for n in stage.reads.values() if (folder / n).is_file()])
        fault = {"vanish": str(folder / name), "opened": chance.randint(1, 60)}
    elif kind == "two at once":
        return world.zygote.run(*[world.job(stage, folder, {})] * 2)
    else:
        fault = {} if enlarge else {"limit": chance.randint(1, largest)}
    return [world.run(stage, folder, fault)]


def trial(number: int, world, folder: Path) -> str:
    """One stage, one fault, and a plain rerun; returns what happened."""
    chance = random.Random(SEED * 1_000_003 + number)
    order = random.Random(SEED).sample(PLAYED, len(PLAYED))
    turn, place = divmod(number, len(order))
    kind, stage = FAULTS[(place + turn) % len(FAULTS)], order[place]
    outputs = {name: folder / name for name in stage.writes.values()}
    needed = sum((world.folder / n).stat().st_size for n in stage.reads.values())
    if (world.folder / "small").is_dir() and "small" in (*stage.reads.values(),):
        needed += sum(p.stat().st_size for p in (world.folder / "small").rglob("*"))
    size = needed + 65536 * (1 + len(stage.reads)) + chance.randint(4096, 200_000)
    disk = small_disk(folder, size) if kind == "disk full" else contextlib.nullcontext()
    with disk as enlarge:
        give(stage, world, folder)
        codes = suffer(kind, stage, world, folder, chance, enlarge)
        what = f"{kind} in {stage.program} ({SEED}, {number}): ended with {codes}"
        for name, path in outputs.items():
            if path.exists():
                assert content(path) == world.contents[name], f"{what}: {name} is another"
        if kind == "SIGTERM":
            assert set(codes) <= {0, stopping.EXIT_CODE}, f"{what}\n{world.printed()}"
        if kind == "SIGKILL":
            assert set(codes) <= {0, -signal.SIGKILL}, f"{what}\n{world.printed()}"
        if enlarge:
            enlarge()
        give(stage, world, folder)  # what vanished is made again
        assert world.run(stage, folder, {}) == 0, f"{what}\n{world.printed()}"
        for name, path in outputs.items():
            assert content(path) == world.contents[name], f"{what}: {name} differs after the rerun"
        assert not (folder / "state" / stage.program).exists()
    return what


@pytest.mark.parametrize("number", range(TRIALS))
def test_a_rerun_after_a_fault_ends_as_if_nothing_had_happened(world, tmp_path, number):
    print(trial(number, world, tmp_path))


def test_the_faults_are_faults(world, tmp_path):
    """So that the trials above are not of stages that end before anything happens to them."""
    stage = stages.NAMED["distill"]
    give(stage, world, tmp_path)
    assert world.run(stage, tmp_path, {"fail": 1}) == 1
    assert world.run(stage, tmp_path, {"limit": 100}) != 0
    assert world.run(stage, tmp_path, {"vanish": str(tmp_path / "plan.json"), "opened": 1}) == 2
    give(stage, world, tmp_path)
    begun = {"signal": int(signal.SIGKILL), "seconds": world.seconds["distill"] * 0.6}
    assert world.run(stage, tmp_path, begun) in (-signal.SIGKILL, 0)
    assert not json.dumps(sorted(p.name for p in tmp_path.iterdir())).count("distill.safetensors")
