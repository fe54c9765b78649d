"""SIGTERM, with which a scheduler warns before it kills: keep what can be kept, then exit code 75.

Exit code 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again. What a
program keeps when it is warned:

- A training writes a checkpoint at the end of its current step.
- A program whose results come in parts finishes the part that it is writing. It loses the part that
  it is computing, which can take minutes with a large teacher.
- Extraction keeps its last checkpoint: a new one may be too large to be written in time.
- All others have nothing to keep and end at once.

Files are whole or absent, so a program may end anywhere; keeping something only saves time. Once a
program has begun to write its outputs, it ignores the warning. Its state to resume from stays until
another stage reads those outputs (forget.py).

launch.py handles the signal from its start, and blocks it for its programs until they can handle
it. A program that is started without launch.py, and is still importing its modules, is ended by the
signal itself.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 75
"""The exit code after a warning; a profile of Snakemake may submit such a job again."""

_state = {"warned": False, "busy": 0, "worker": False, "done": False}


def heed(worker: bool = False):
    """From now on SIGTERM ends this process as told above. Returns the previous handler.

    Args:
        worker: whether the process belongs to a pool. It then ends by `os._exit`, since the pool
            would send a SystemExit to its parent.
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
    """As `heed`, but only within this context. Does nothing in threads but the main one."""
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
    """Ends the process with EXIT_CODE."""
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
    """To be called when the program's exit code is decided: after `heeded`, SIGTERM is ignored.

    The interpreter takes seconds to exit, and a signal then would turn success into failure.
    """
    _state["done"] = True
