"""Files and folders that appear whole or not at all, whatever ends the program that writes them.

Each is written in a temporary folder of its own, called its part. Once it is complete and on the
disk, it is moved to its place, and the part is removed. The next program that writes the same file
removes the parts of killed programs. A writer locks its part; the system frees the lock when the
process ends, on whatever node of a cluster. Where nodes do not see each other's locks, a part is
removed only by the machine that made it. Modes are those that the system gives to new files, even
if a library set others.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ppcl import errors


def _machine() -> str:
    """An id of this machine, or of this container on it: process ids mean something only here."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


_MACHINE = _machine()
_mine: set[str] = set()  # names of the parts that this process writes at the moment
_LOCK = ".lock"  # in every part, where the disk has locks
# Filesystems on which a lock (of POSIX, which NFS servers share with their clients) is seen by all
# who can write there: those of one kernel, and those that carry locks from node to node.
_ONE_KERNEL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}
_CARRIED = {"nfs", "nfs4", "lustre", "gpfs", "ceph", "ocfs2", "gfs2"}
_NOT_CARRIED = {"nolock", "local_lock=all", "local_lock=posix", "localflock"}  # options of a mount


@contextlib.contextmanager
def writing(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Yields the path of an empty file or `folder` to write to; it is moved to `path` in the end.

    Raises:
        UserError: the disk is full, fails, or may not be written to.
    """
    path = Path(path)
    name = f".{path.name[:100]}.{os.getpid()}-{_MACHINE}-{secrets.token_hex(4)}.part"
    part = path.with_name(name)
    temporary = part / path.name
    lock = None
    _mine.add(name)
    try:
        lock = _begin(part)
        temporary.mkdir() if folder else temporary.touch()
        for left in path.parent.glob(f".{_escaped(path.name[:100])}.*.part"):
            _remove_left(left)
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
        if trouble and own.startswith(str(part)):
            trouble = trouble.replace(own, str(path), 1)  # the temporary name helps nobody
        if trouble is None:
            raise
        raise errors.UserError(trouble) from error
    finally:
        if lock is not None:
            os.close(lock)  # first: NFS does not remove open files
        _remove(part)
        _mine.discard(name)


def forget(folder: Path) -> None:
    """Removes a folder, but for what somebody else is writing into it."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name.startswith(".") and path.name.endswith(".part"):
                _remove_left(path)
            elif path.is_dir() and not path.is_symlink():
                forget(path)
            else:
                _remove(path)
        folder.rmdir()


def _begin(part: Path) -> int | None:
    """Makes and locks a part, again if another run removes the parent folder in between.

    Returns the lock's open file, to be closed in the end; None where there are no locks.
    """
    left = 100
    while True:
        left -= 1
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
            return _lock(part)
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise


def _lock(part: Path) -> int | None:
    new = part / f"{_LOCK}.new"
    file = os.open(new, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        new.unlink()
        return None
    os.rename(new, part / _LOCK)  # so that it is locked from the moment that others see it
    return file


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
    if stat.S_IMODE(path.stat().st_mode) != mode:  # some disks can't change modes
        os.chmod(path, mode)


def _sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk, too."""
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
            aside = temporary.with_name(f"{path.name}-old")
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, aside)
            _remove(aside)
        try:
            os.replace(temporary, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _remove_left(part: Path) -> None:
    """Removes a part if whoever wrote it is gone."""
    if part.name in _mine:
        return
    process, _, rest = part.name.split(".")[-2].partition("-")
    here = rest.startswith(_MACHINE) and process.isdecimal()
    if here and not _runs(int(process)):
        _remove(part)
    elif here or _locks_are_seen_by_all(part.parent):  # a process may have a dead one's number
        with contextlib.suppress(OSError):  # it is locked, or can't be
            file = os.open(part / _LOCK, os.O_RDWR)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(part)
            finally:
                os.close(file)
            _remove(part)  # what NFS kept of it


def _runs(process: int) -> bool:
    """Whether there is such a process on this machine, other than this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _locks_are_seen_by_all(folder: Path) -> bool:
    """Whether a lock in this folder is one for everybody who can write there, on any machine."""
    place = os.path.realpath(folder)
    around: list[tuple[int, int, list[str]]] = []
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for mount in map(str.split, mounts):
                point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount[4])
                if f"{place}/".startswith(f"{point.rstrip('/')}/"):
                    around.append((len(point), len(around), mount))
    except OSError:
        return False  # not Linux
    if not around:
        return False
    mount = max(around)[2]  # the deepest one, and of those at one place the last
    kind, options = mount[mount.index("-") + 1], {*mount[5].split(","), *mount[-1].split(",")}
    if kind == "lustre" and "flock" not in options:
        return False
    return kind in _ONE_KERNEL or kind in _CARRIED and not options & _NOT_CARRIED


def _remove(path: Path) -> None:
    """Removes a file or folder as far as possible: what prevents it is reported elsewhere."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _escaped(name: str) -> str:
    """A name as a pattern that it alone matches."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
