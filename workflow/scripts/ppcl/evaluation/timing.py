"""Seconds of a call, of several models in turn, so that all share the machine's ups and downs."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ppcl.evaluation import metrics
from ppcl.evaluation.metrics import TEACHER, Estimates
from ppcl.runtime import cores, devices
from ppcl.settings import Settings
from ppcl.transformer import calls


def latencies(
    transformers: Mapping[str, nn.Module],
    reader: calls.Reader,
    timed: np.ndarray,
    settings: Settings,
    device: torch.device,
) -> Estimates:
    """Seconds of a batch of recorded calls through each transformer, and over the teacher's.

    Args:
        transformers: by name; one is the teacher.
        timed: rows of the batch.
    """
    options, seed = settings.evaluate, settings.seed
    arguments = reader.batch(timed).to(device).arguments
    with torch.no_grad():
        runs = {n: lambda t=t: t(**arguments) for n, t in transformers.items()}
        times = interleaved_times(runs, options.latency_repeats, device)
    how = options.bootstrap, seed
    return {
        name: {
            "latency_seconds": metrics.median_ratio(seconds, np.ones_like(seconds), *how),
            "latency_ratio": metrics.median_ratio(seconds, times[TEACHER], *how),
        }
        for name, seconds in times.items()
    }


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of every run [repeats], measured in rounds: each run once, in order, then again.

    So all share the machine's ups and downs. An unmeasured round comes first.
    """
    rounds = list(timed_rounds(runs, repeats, device))
    return {name: np.array([times[name] for times in rounds]) for name in runs}


def timed_rounds(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> Iterator[dict[str, float]]:
    """As `interleaved_times`, round by round: seconds by run."""
    for round_ in range(repeats + 1):
        times = {}
        for name, run in runs.items():
            devices.synchronise(device)
            start = time.perf_counter()
            run()
            devices.synchronise(device)
            times[name] = time.perf_counter() - start
        if round_:
            yield times


@contextmanager
def all_cores(processes: int) -> Iterator[None]:
    """Within, this process computes with the cores of all processes, while the others wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(processes * cores.available())
    try:
        yield
    finally:
        torch.set_num_threads(before)
