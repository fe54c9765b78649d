"""Errors that a person can act on."""

import sys
from collections.abc import Callable

from ppcl import provenance, stopping


class UserError(Exception):
    """A problem that the user can solve: the message names the file or key and the fix."""


def run(main: Callable[[], None]) -> None:
    """Call `main` as a program.

    A UserError becomes one `error:` line and exit code 2; a program that SIGTERM ended has the exit
    code `stopping.EXIT_CODE`.
    """
    provenance.commit()
    with stopping.heeded():
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
