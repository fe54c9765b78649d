"""Python's garbage collector while a program starts.

Libraries make a million objects as they are imported, of which next to nothing is garbage. Looking
for it again and again takes a sixth of the time that diffusers needs. Importing this package makes
it rest; what never has it `work` again, such as a notebook, is left with a rarer collector.
"""

import functools
import gc

USUAL = gc.get_threshold()
# Objects more than before, for a look at them: Python's own number is 700. Looks at older ones, of
# which Python has one in 10 and one in 100, come at every second look and every fourth.
STARTING = 1_000_000


def rest() -> None:
    """From now on it looks seldom: to be called before libraries are imported."""
    gc.set_threshold(STARTING, 1, 1)


@functools.cache  # a later call would keep what is garbage by then
def work() -> None:
    """From now on it looks as often as ever, but not at what was imported."""
    gc.freeze()
    gc.set_threshold(*USUAL)
