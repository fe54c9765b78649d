"""Distillation in several jobs: which job teaches which units.

Students of Eq. 6 never see each other, so any job may teach any of them, and they end the same.
But every job runs the teacher anew: in each step, up to the last block of the job's units, from the
first block on, or, if streams are cached (ppcl/training/input_cache.py), from the first block that
the job needs. So a job owns units that are next to each other in depth, and a job of deep units
owns fewer of them, unless its teacher starts late.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppcl.errors import UserError
from ppcl.pruning.units import NewBlock, Unit
from ppcl.storage import texts

# Cost of one student's step, in forward passes of a teacher's block: a forward pass, and a backward
# pass of about twice its time. Narrow students count the same.
STUDENT = 3.0
# `auto` takes the fewest jobs whose slowest takes at most SLACK times the least time possible.
SLACK = 1.1


# `auto` caches streams only if a job's step would cost at least GAIN times as much without: reading
# is not free either.
GAIN = 1.1


@dataclass(frozen=True)
class Caching:
    """How streams at a job's first block are kept. Nothing in it depends on the machine.

    Attributes:
        mode: `distill.cache_inputs`.
        fill: distinct rows, whose streams are computed once, over all rows that the steps draw,
            repeated ones included.
    """

    mode: str
    fill: float


NEVER = Caching("never", 1.0)


def first_needed(new_blocks: Sequence[NewBlock]) -> int:
    """The first block that the teacher must run for these new blocks if it is given the streams
    before it."""
    return min(
        first
        for new_block in new_blocks
        for first, _ in (new_block.ends, new_block.source or new_block.ends)
    )


def _costs(units: Sequence[Unit], fill: float) -> tuple[float, float]:
    """Costs of a step, in forward passes of a block: with the teacher run from its first block on,
    and from the first needed one, with the step's share of filling the cache."""
    new_blocks = [new_block for unit in units for new_block in unit.new_blocks]
    whole = max(unit.last for unit in units) + 1 + STUDENT * len(new_blocks)
    return whole, whole - first_needed(new_blocks) * (1 - fill)


def cached(units: Sequence[Unit], caching: Caching) -> bool:
    """Whether a job that owns these units keeps streams, if its disk has room."""
    if not units or caching.mode == "never":
        return False
    whole, less = _costs(units, caching.fill)
    if caching.mode == "always":
        return first_needed([new_block for unit in units for new_block in unit.new_blocks]) > 0
    return whole >= GAIN * less


def cost(units: Sequence[Unit], caching: Caching = NEVER) -> float:
    """Cost of a step of the job that owns these units, in forward passes of a teacher's block."""
    whole, less = _costs(units, caching.fill)
    return less if cached(units, caching) else whole


def explain(units: Sequence[Unit], caching: Caching) -> str:
    """One line on where the teacher starts in the job of these units, and why."""
    first = first_needed([new_block for unit in units for new_block in unit.new_blocks])
    whole, less = _costs(units, caching.fill)
    if cached(units, caching):
        return (
            f"the teacher starts at block {first}, from streams that are kept: a step takes "
            f"{less:.4g} block passes instead of {whole:g}; {caching.fill:.0%} of the rows drawn "
            "are computed once"
        )
    if not first:
        return "the teacher starts at block 0, which the job needs"
    return (
        f"the teacher starts at block 0: keeping its streams before block {first} would make a "
        f"step {less:.4g} block passes instead of {whole:g} (cache_inputs: {caching.mode})"
    )


def _split(units: Sequence[Unit], count: int, caching: Caching) -> list[list[Unit]]:
    """The units, in order of depth, in at most `count` runs of which the costliest costs least."""
    ends = range(len(units) + 1)
    # best[k][i]: least cost of the first i units in at most k runs, and where the last run starts.
    best = [[(0.0 if i == 0 else float("inf"), 0) for i in ends]]
    for _ in range(count):
        before = best[-1]
        best.append([(0.0, 0)])
        for end in ends[1:]:
            options = [
                (max(before[start][0], cost(units[start:end], caching)), start)
                for start in range(end)
            ]
            best[-1].append(min(options, key=lambda option: option[0]))
    runs, end = [], len(units)
    for row in reversed(best[1:]):
        if end:
            start = row[end][1]
            runs.append(list(units[start:end]))
            end = start
    return runs[::-1]


def assign(units: Sequence[Unit], wanted: int | str, caching: Caching = NEVER) -> list[list[Unit]]:
    """Shares the units out over jobs so that the slowest job's step takes as little as can be.

    Args:
        units: disjoint, in order of depth.
        wanted: number of jobs, or `auto`: the fewest with which the slowest takes at most `SLACK`
            times as long as with a job for every unit.
        caching: how streams are cached, which decides a job's cost. A job without room on its disk
            is slower than its cost says, but owns the same units.

    Returns:
        The jobs' units, in order of depth; every unit is in exactly one job, and no job is empty,
        so there are no more jobs than units. With no units at all, one empty job.
    """
    if not units:
        return [[]]
    if isinstance(wanted, int):
        return _split(units, min(wanted, len(units)), caching)
    fastest = max(cost([unit], caching) for unit in units)
    for count in range(1, len(units) + 1):
        jobs = _split(units, count, caching)
        if max(cost(job, caching) for job in jobs) <= SLACK * fastest:
            break
    return jobs


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
