"""Time and main memory that the jobs of stages ask for: what a scheduler wants to know."""

import math
from collections.abc import Iterable, Mapping

from ppcl.planning import durations, workloads
from ppcl.planning.device_memory import Stage
from ppcl.planning.planner import Planner
from ppcl.planning.workloads import Work
from ppcl.search import similarity
from ppcl.settings import Settings


def main_memory(stage: Stage | None, settings: Settings, weights: int) -> int:
    """Bytes of main memory for a stage's models, beside what its program needs in any case.

    The teacher's weights pass through it on their way to a GPU: a copy per process, and one more.
    What is trained counts once per process, with its gradients and optimizer states, for the sake
    of checkpoints. On a CPU everything is in main memory.

    Args:
        stage: the stage's memory on a device; None if it is not known.
        weights: bytes of the teacher's transformer.
    """
    processes = 1 if settings.processes == "auto" else settings.processes
    passing = (processes + 1) * weights
    if stage is None:
        return passing
    kinds = ("students", "gradients", "optimizer 32-bit")
    needed = passing + processes * sum(stage.parts.get(kind) or 0 for kind in kinds)
    needed += stage.parts.get("main memory") or 0
    on_cpu = processes * (stage.resident or 0) if settings.device == "cpu" else 0
    return math.ceil(max(needed, on_cpu))


def resources(
    planner: Planner, every: Iterable[Stage], works: Mapping[str, Work]
) -> dict[str, dict[str, int]]:
    """Stage -> `runtime` in minutes, `mem_mb` beside what its rule asks for in any case."""
    settings, weights = planner.settings, planner.weights
    known = {stage.name: stage for stage in every}

    def memory(name: str, work: Work) -> int:
        if not work.float64:
            return main_memory(known.get(name), settings, weights)
        # Also for a stage on a GPU: without room there, it computes on the CPU.
        tokens = workloads.heldout_tokens(settings)
        return max(
            similarity.memory((tokens, channels), depth, settings.similarity)
            for depth, channels in workloads.streams_of(planner).values()
        )

    return {
        name: {
            "runtime": durations.minutes(durations.seconds(work, settings, weights)),
            "mem_mb": math.ceil(memory(name, work) / 10**6),
        }
        for name, work in works.items()
    }
