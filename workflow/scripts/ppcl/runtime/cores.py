"""How many CPU cores a job has, and how many threads its work is worth.

Threads that share a matrix product wait for each other after every product. Measured on two cores:
with two threads, blocks of 64 and 128 channels run at 0.5 to 1.0 times the speed of one thread,
whether the threads wait busily or not; from 256 channels and a thousand tokens on, at 1.2 to 1.5
times. Beside another busy process the small blocks lose far more. So models of small matrices get
one thread, and their stages use the other cores by more processes, or leave them to other stages.

Imports nothing heavy, so that Snakefiles can.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ppcl.runtime.endings import GROUPS, OWN, read

# Elements of a typical weight matrix from which several threads are faster: blocks of 128 channels
# have smaller ones, blocks of 256 channels larger ones.
WORTH = 1 << 17
# More processes than this help no stage.
MOST = 8


def available() -> int:
    """Cores that this process may use, at least 1: the least of its CPU affinity, the quotas of its
    control groups (a container's, a batch job's), and OMP_NUM_THREADS, which Snakemake sets to the
    threads of a job."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows has it
        allowed = os.cpu_count() or 1
    limits = [allowed, *_quotas()]
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first):
        limits.append(int(first))
    return max(1, min(limits))


def _quotas() -> list[int]:
    """Whole cores that the quotas of this process's control groups leave, of version 1 and 2."""
    quotas = []
    for kind, path in re.findall(r"^\d+:(|[^:]*\bcpu\b[^:]*):/(.*)$", read(OWN), re.M):
        # A group's quota holds for all below it. In a container the group itself is the root.
        group = Path(path)
        for place in (group, *group.parents):
            if kind:
                folder = GROUPS / "cpu" / place
                quota = [read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                quota = read(GROUPS / place / "cpu.max").split()
            if len(quota) == 2 and all(re.fullmatch(r"[1-9]\d*\s*", part) for part in quota):
                quotas.append(math.ceil(int(quota[0]) / int(quota[1])))
    return quotas


def worth_threads(shapes: Iterable[Sequence[int]]) -> bool:
    """Whether a model computes faster with several threads than with one.

    Args:
        shapes: of its weights. What counts is the matrix to which a typical weight belongs: each
            matrix's number of elements, averaged over all elements.
    """
    sizes = [math.prod(shape) for shape in shapes if len(shape) == 2]
    return sum(size * size for size in sizes) >= WORTH * sum(sizes) > 0
