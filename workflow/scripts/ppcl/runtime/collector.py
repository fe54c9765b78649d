"""Python's garbage collector while a program starts.

Libraries make a million objects as they are imported, of which next to nothing is garbage. Looking
for it again and again takes a sixth of the time that diffusers needs. Importing this package makes
it rest; a process that never calls `work`, such as a notebook, keeps a collector that runs seldom.
"""

import functools
import gc

USUAL = gc.get_threshold()
# New objects that start a collection; Python's own number is 700. Of the collections, every second
# and every fourth includes older objects: in Python's own, every 10th and every 100th.
STARTING = 1_000_000


def rest() -> None:
    """From now on the collector runs seldom: to be called before libraries are imported."""
    gc.set_threshold(STARTING, 1, 1)


@functools.cache  # a later call would exempt what is garbage by then
def work() -> None:
    """From now on the collector runs as often as ever, but not over what was imported."""
    gc.freeze()
    gc.set_threshold(*USUAL)
