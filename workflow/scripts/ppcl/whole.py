"""Files and folders that appear whole or not at all, whatever ends the program that writes them.

Each is written under a name that nobody else has, and renamed when it is done and on the disk. What
a killed program left under such a name goes when the next one writes the same file. Their modes are
those that the system gives to new files, whatever made them.
"""

import contextlib
import errno
import hashlib
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ppcl import errors


def _machine() -> str:
    """What tells machines, and containers on one, apart: only here do process ids mean anything."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


_MACHINE = _machine()
_mine: set[str] = set()  # names that this process writes under at the moment


@contextlib.contextmanager
def writing(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Yields an empty file or folder to write to; it gets its name, `path`, afterwards.

    Raises:
        UserError: the disk is full, fails, or may not be written to.
    """
    path = Path(path)
    name = f".{path.name[:100]}.{os.getpid()}-{_MACHINE}-{secrets.token_hex(4)}.part"
    temporary = path.with_name(name)
    _mine.add(name)
    try:
        _begin(temporary, folder)
        for left in path.parent.glob(f".{_escaped(path.name[:100])}.*.part"):
            if _is_left(left.name):
                _remove(left)
        modes = _modes(temporary)
        yield temporary
        _settle(temporary, *modes)
        _put(temporary, path)
        _sync_folder(path.parent)
    except errors.UserError:
        raise
    except Exception as error:
        own = str(getattr(error, "filename", None) or temporary)
        trouble = errors.trouble(error, path)
        if trouble and own.startswith(str(temporary)):
            trouble = trouble.replace(own, str(path), 1)  # a name that tells nobody anything
        if trouble is None:
            raise
        raise errors.UserError(trouble) from error
    finally:
        _remove(temporary)
        _mine.discard(name)


def forget(folder: Path) -> None:
    """Removes a folder, but for what somebody else is writing into it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not name.endswith(".part") or _is_left(name):
                _remove(Path(place, name))
        with contextlib.suppress(OSError):
            os.rmdir(place)


def _begin(temporary: Path, folder: bool) -> None:
    """Makes an empty file or folder, whose parent may be forgotten by another run at any moment."""
    for left in reversed(range(100)):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir() if folder else temporary.touch(exist_ok=False)
            return
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise


def _modes(temporary: Path) -> tuple[int, int]:
    """Modes of a new file and of a new folder, as the umask and the place make them."""
    if temporary.is_file():
        return stat.S_IMODE(temporary.stat().st_mode), 0
    probe = temporary / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode, stat.S_IMODE(temporary.stat().st_mode)


def _settle(temporary: Path, file_mode: int, folder_mode: int) -> None:
    """Sets the modes of all that was written, since libraries write files that only we can read,
    and copy modes; and waits until it is on the disk."""
    if temporary.is_file():
        _settle_file(temporary, file_mode)
        return
    for place, _, names in os.walk(temporary, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(place, name)):
                _settle_file(Path(place, name), file_mode)
        _set_mode(Path(place), folder_mode)
        _sync_folder(Path(place))


def _settle_file(path: Path, mode: int) -> None:
    _set_mode(path, mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:  # some disks know no others
        os.chmod(path, mode)


def _sync_folder(path: Path) -> None:
    """So that names are on the disk, too."""
    with contextlib.suppress(FileNotFoundError):  # another run may forget the folder
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some disks can't
                raise
        finally:
            os.close(opened)


def _put(temporary: Path, path: Path) -> None:
    if temporary.is_file():
        os.replace(temporary, path)
        return
    while True:  # until no other run puts its own folder there in between
        if path.is_dir():
            aside = path.with_name(f"{temporary.name.removesuffix('.part')}-old.part")
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, aside)
            _remove(aside)
        try:
            os.replace(temporary, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _is_left(name: str) -> bool:
    """Whether a program of this machine wrote under this name that runs no more."""
    process, _, rest = name.split(".")[-2].partition("-")
    if name in _mine or not rest.startswith(_MACHINE) or not process.isdecimal():
        return False
    if int(process) == os.getpid():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _remove(path: Path) -> None:
    """As far as that is possible: whatever is in the way of it has been told, or will be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _escaped(name: str) -> str:
    """A name as a pattern that it alone matches."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
