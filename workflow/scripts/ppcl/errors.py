"""Errors that a person can act on."""

import errno
import re
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
        except Exception as error:
            if not disk_is_full(error):
                raise
            print(f"error: {error}; make room on this disk and rerun", file=sys.stderr, flush=True)
            sys.exit(2)


def disk_is_full(error: Exception) -> bool:
    """Whether a write failed for lack of room, or of the right to more of it."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors tells the number in its message only.
    named = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) in codes or bool(named and int(named[1]) in codes)
