"""Errors that a person can act on."""

import sys
from collections.abc import Callable

from ppcl import provenance


class UserError(Exception):
    """A problem that the user can solve: the message names the file or key and the fix."""


def run(main: Callable[[], None]) -> None:
    """Call `main` as a program; a UserError becomes one `error:` line and exit code 2."""
    provenance.commit()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
