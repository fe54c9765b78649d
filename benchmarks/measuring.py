"""Ratios, and how they are measured: interleaved seconds, bytes of torch, peaks of processes."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ppcl.evaluation import timing


@dataclass(frozen=True)
class Ratio:
    """One measured ratio.

    Attributes:
        value: `measured` / `against`.
        unit: of `measured` and `against`.
        bar: what is promised of `value`; None where it is only reported.
        least: the bar is a least value, not a greatest.
        note: how it was measured, where that is not plain.
    """

    benchmark: str
    name: str
    measured: float
    against: float
    unit: str
    bar: float | None = None
    least: bool = False
    note: str = ""

    @property
    def value(self) -> float:
        return self.measured / self.against

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `reported`."""
        if self.bar is None:
            return "reported"
        met = self.value >= self.bar if self.least else self.value <= self.bar
        return "pass" if met else "fail"

    def row(self) -> dict:
        """As the table holds it."""
        names = ("benchmark", "name", "measured", "against", "unit", "bar", "least", "note")
        row = {name: getattr(self, name) for name in names}
        row["bar"] = np.nan if self.bar is None else self.bar
        return row | {"ratio": self.value, "verdict": self.verdict}

    def __str__(self) -> str:
        sign = ">=" if self.least else "<="
        bar = "" if self.bar is None else f"bar {sign} {self.bar:g}"
        sides = f"{self.measured:.4g} / {self.against:.4g} {self.unit}"
        return (
            f"{self.benchmark:<11} {self.name:<46} {self.value:>9.4g}  {bar:<12} "
            f"{self.verdict:<8}  ({sides})"
        )


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds [repeats] of every run on the CPU, round after round: as the stages measure."""
    return timing.interleaved_times(runs, repeats, torch.device("cpu"))


def least(seconds: np.ndarray) -> float:
    """What a run takes when nothing disturbs it: other work on a machine only ever adds time."""
    return float(seconds.min())


def torch_peak(run: Callable[[], object]) -> int:
    """Bytes of tensors on the CPU that a run adds at most, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(max(0, np.cumsum(steps).max(initial=0)))


def process_peak(run: Callable[[], object]) -> int:
    """Bytes by which a run raises this process's resident memory at most (Linux).

    To be called in a fresh process. The kernel's high-water mark starts again before the run;
    `ru_maxrss` would not do, as a child starts with its parent's.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


# glibc gives freed memory back at once. As it comes, it keeps what it thinks will be asked for
# again, and twice the same run differs by a sixth of the peak.
TIDY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def fresh(function: Callable, *arguments, environment: Mapping[str, str] = TIDY):
    """What a module's function returns, called in a process of its own, with these variables."""
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment):
        pool = context.Pool(1, initializer=torch.set_num_threads, initargs=[1])
    with pool:
        return pool.apply(function, arguments)
