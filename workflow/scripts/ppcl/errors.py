"""Errors that a person can act on."""

import errno
import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


class UserError(Exception):
    """A problem that the user can solve: the message names the file or key and the fix."""


def warn_of_fewer(key: str, asked: int, there: int, what: str) -> None:
    """Warns once if there is less of something than the config asks for.

    Args:
        key: the dotted key that asks for it.
        asked, there: how many it asks for, and how many there are.
        what: what is counted, in the plural, such as "recorded calls to fit on".
    """
    if there < asked:
        warn_once(
            f"{key} asks for {asked}, and there are {there} {what}: all are taken. record.samples, "
            "record.heldout_fraction and more prompts make more of them"
        )


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, unless this process has before; one of several processes does."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", text)


_FAILS = "this disk or the way to it fails (dmesg may tell more): mend that and rerun"
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on this disk and rerun"),
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT), _FAILS),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f, or the disk's own) and rerun",
    errno.EROFS: "use a disk that can be written to, or mount this one so, and rerun",
}
# These count in the error itself, not in its causes: programs try such things, fail and go on.
_FILES = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "give yourself the right to it (chmod, chown) and rerun"
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be: move it away and rerun"
    ),
    errno.EISDIR: "a folder is where a file should be: move it away and rerun",
    errno.ENAMETOOLONG: "shorten the names in the config, or the folder's, and rerun",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENOENT: "it was removed while this program ran: restore what is yours, and rerun",
}
_NUMBER = re.compile(r"(?:\(os error |\[[Ee]rrno )(\d+)")


def trouble(error: BaseException, path: str | Path | None = None) -> str | None:
    """The message for an error that a disk, a folder or a limit of the system caused, else None.

    Arrow raises OSError; safetensors and shutil give the system's errno in their text alone.

    Args:
        path: the file that was read or written, to be named if the error names none.
    """
    for cause in _causes(error):
        number = _number(cause)
        fixes = _DISK | _FILES if cause is error else _DISK
        own = getattr(cause, "filename", None)
        place = os.fsdecode(own) if isinstance(own, (str, bytes, os.PathLike)) else path
        if number in fixes and (place or number in _DISK):
            reason = os.strerror(number) if place else str(cause).strip().splitlines()[0]
            return f"{place or os.getcwd()}: {reason}; {fixes[number]}"
    return None


def _number(error: BaseException) -> int | None:
    """The errno of an error, or None if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    named = _NUMBER.search(str(error))
    return int(named[1]) if named else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, then the errors that caused it."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def disk_is_full(error: BaseException) -> bool:
    """Whether a full disk, a quota or the limit of a file's size made a write fail."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(_number(cause) in full for cause in _causes(error))
