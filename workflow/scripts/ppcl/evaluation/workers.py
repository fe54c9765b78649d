"""Processes that make pictures in parallel, or measure memory afresh."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ppcl.errors import UserError
from ppcl.runtime import collector, cores, stopping

# Imported once by the fork server, so that no worker spends seconds on it: what this module and
# evaluate.py import (a worker imports the program that it belongs to). Nothing of this package: in
# Python 3.11 the fork server does not find it, and silently goes on without.
PRELOADED = [
    "diffusers.pipelines.pipeline_utils",
    "jsonschema",
    "pandas",
    "skimage.metrics._structural_similarity",
]


def process_count(setting: str | int, device: torch.device) -> int:
    """Processes that make pictures: as configured or one per core on a CPU, up to cores.MOST; one
    on a GPU."""
    if device.type != "cpu":
        return 1
    return min(cores.available(), cores.MOST) if setting == "auto" else int(setting)


def _fork_server() -> multiprocessing.context.BaseContext:
    """The context of a fork server. This starts small and never computes, so its children inherit
    neither memory, nor threads, nor a CUDA context; and it imports once what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def prepare_workers() -> None:
    """Starts the fork server, whose imports take seconds, while the caller goes on.

    To be called after the device is chosen: workers see the GPUs that this process sees now.
    """
    _fork_server()
    forkserver.ensure_running()


@contextmanager
def pool(count: int, fresh: bool = False) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that share this job's cores.

    Args:
        fresh: every task gets a process of its own, in which nothing has run before.

    Raises:
        UserError: a process was killed, most likely for lack of memory.
    """
    made = ProcessPoolExecutor(
        count,
        mp_context=_fork_server(),
        initializer=_start_worker,
        initargs=(max(1, cores.available() // count),),
        max_tasks_per_child=1 if fresh else None,
    )
    try:
        yield made
    except BrokenProcessPool as error:
        if stopping.warned():  # and so were the workers, which end
            stopping.end()
        raise UserError(
            "a process of the evaluation was killed, most likely for lack of memory; lower "
            "evaluate.batch_size or processes, and rerun: finished pictures are kept"
        ) from error
    finally:
        made.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    stopping.heed(worker=True)
    collector.work()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by cores.available
    torch.set_num_threads(threads)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"

    def follow() -> None:
        parent.join()  # also returns when the parent was killed, which nothing else would tell us
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
