"""Distillation in several jobs: which job teaches which units.

Students of Eq. 6 never see each other, so any job may teach any of them, and they end the same.
What every job pays anew is the teacher: it runs from the first block to the end of the last unit
that the job owns, in every step. So a job owns units that are next to each other in depth, and a
deep one owns fewer.
"""

from collections.abc import Sequence
from pathlib import Path

from ppcl import texts
from ppcl.errors import UserError
from ppcl.plans import Unit

# A step of one student, in forward passes of a teacher's block: one forward, and a backward pass,
# which takes about twice that. What it takes is the same for all here, be a student narrow or not.
STUDENT = 3.0
# `auto` takes no more jobs than it needs for the slowest to be this near to the fastest possible.
SLACK = 1.1


def cost(units: Sequence[Unit]) -> float:
    """What a step of a job takes that owns these units, in forward passes of a teacher's block."""
    students = sum(len(unit.parts) for unit in units)
    return max(unit.last for unit in units) + 1 + STUDENT * students


def _split(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """The units, in order of depth, in at most `count` runs of which the costliest costs least."""
    ends = range(len(units) + 1)
    # best[k][i]: least cost of the first i units in at most k runs, and where the last run starts.
    best = [[(0.0 if i == 0 else float("inf"), 0) for i in ends]]
    for _ in range(count):
        before = best[-1]
        best.append([(0.0, 0)])
        for end in ends[1:]:
            options = [
                (max(before[start][0], cost(units[start:end])), start) for start in range(end)
            ]
            best[-1].append(min(options, key=lambda option: option[0]))
    found, end = [], len(units)
    for row in reversed(best[1:]):
        if end:
            start = row[end][1]
            found.append(list(units[start:end]))
            end = start
    return found[::-1]


def allot(units: Sequence[Unit], wanted: int | str) -> list[list[Unit]]:
    """Shares the units out over jobs so that the slowest job's step takes as little as can be.

    Args:
        units: disjoint, in order of depth.
        wanted: number of jobs, or `auto`: as few as bring the slowest within `SLACK` of what a job
            for every unit would take.

    Returns:
        The jobs' units, in order of depth; every unit is in exactly one job, and no job is without,
        so there are no more jobs than units. With no units at all, one empty job.
    """
    if not units:
        return [[]]
    if wanted != "auto":
        return _split(units, min(wanted, len(units)))
    fastest = max(cost([unit]) for unit in units)
    for count in range(1, len(units) + 1):
        found = _split(units, count)
        if max(map(cost, found)) <= SLACK * fastest:
            break
    return found


def write(path: Path, jobs: Sequence[Sequence[Unit]]) -> None:
    """Writes the names of every job's units."""
    texts.write_sealed(path, {"jobs": [[unit.name for unit in job] for job in jobs]})


def read(path: Path) -> list[list[str]]:
    """Names of every job's units.

    Raises:
        UserError: the file is missing, or not what `write` leaves.
    """
    try:
        return [[str(name) for name in job] for job in texts.read_sealed(path)["jobs"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no table of shards ({error}); delete it and rerun") from error
