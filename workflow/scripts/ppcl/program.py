"""A stage's program: how it runs and ends."""

import sys
from collections.abc import Callable

from ppcl import provenance
from ppcl.errors import UserError, trouble
from ppcl.runtime import collector, stopping


def run(main: Callable[[], None]) -> None:
    """Call `main` as a program.

    A UserError, and what a disk or the system is to blame for, becomes one `error:` line and exit
    code 2; a program that SIGTERM ended has the exit code `stopping.EXIT_CODE`.
    """
    collector.work()
    provenance.commit()
    with stopping.heeded():
        try:
            main()
            stopping.done()
        except SystemExit:
            stopping.done()
            raise
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else trouble(error)
            if message is None:
                raise
            # A line of its own: an open progress bar has ended none, and would come once more.
            bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
            for bar in list(getattr(bars, "_instances", ())):
                bar.close()
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(2)
