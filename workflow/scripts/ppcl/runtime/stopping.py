"""SIGTERM, with which a scheduler warns before it kills: keep what can be kept, then exit code 75.

Exit code 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again. Trainings
write a checkpoint at the end of the step that they are in; programs whose results come in parts
finish the part that they are writing, and lose the one that they are making, which can take a large
teacher minutes; extraction, whose checkpoint can be larger than what may be written meanwhile,
falls back on its last one; all others have nothing to keep and end at once. All that a program
reads or writes is whole before and after, so ending anywhere is safe; this only saves time. A
program that has begun to write its outputs goes on and ends as if nothing had been: what it keeps
to resume from stays until another stage reads them (forget.py).

launch.py can handle the signal from its first moment and keeps it for its programs until they can.
One that is started without it, and has not imported its modules yet, ends by the signal itself.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 75
"""What a program ends with that was warned; a profile may submit such a job again."""

_state = {"warned": False, "busy": 0, "worker": False, "done": False}


def heed(worker: bool = False):
    """From now on SIGTERM ends this process as told above; returns what it did before.

    Args:
        worker: the process belongs to a pool, which would send a SystemExit to its parent instead.
    """
    _state.update(warned=False, busy=0, worker=worker, done=False)

    def warn(_signal, _frame) -> None:
        _state["warned"] = True
        if not _state["busy"]:
            end()

    before = signal.signal(signal.SIGTERM, warn)
    # launch.py blocks the signal until somebody can handle it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return before


@contextmanager
def heeded() -> Iterator[None]:
    """As `heed`, but only within (and in a thread that may handle signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = heed()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if _state["done"] else before)
        _state.update(warned=False, busy=0)


def warned() -> bool:
    """Whether SIGTERM came."""
    return bool(_state["warned"])


def end() -> None:
    """Ends the process with the exit code that says so."""
    if _state["worker"]:
        os._exit(EXIT_CODE)
    sys.exit(EXIT_CODE)


@contextmanager
def part() -> Iterator[None]:
    """Around work that would be lost: a warned process ends after it, not within."""
    _state["busy"] += 1
    try:
        yield
    finally:
        _state["busy"] -= 1
    if _state["warned"] and not _state["busy"]:
        end()


def ignore() -> None:
    """From now on the program ends as if unwarned: all that is left is to write its outputs.

    Snakemake deletes the outputs of a job that fails, so a warning after the last of them would
    cost them all.
    """
    _state["busy"] += 1


def done() -> None:
    """How the program ends is decided: SIGTERM does nothing even after `heeded`.

    The interpreter takes seconds to go, and what dies of a signal then has failed.
    """
    _state["done"] = True
