"""Which teacher it is, so that a run that began with one does not go on with another.

A folder can be replaced in place, by mv, rsync, or a link that moves, and a branch on the Hub moves
whenever somebody pushes. `record` notes which teacher it has asked, and later stages load that one
or stop. Imports nothing heavy, so that Snakefiles can import it.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from ppcl import provenance
from ppcl.errors import UserError
from ppcl.settings import TeacherSettings
from ppcl.teacher import hub

_SAMPLE = 1 << 16  # bytes
_MARKS = {True: "revision", False: "fingerprint"}  # by whether the teacher is on the Hub


def files(teacher: TeacherSettings) -> list[Path]:
    """What a local teacher consists of: its index, its code, and its components' files, sorted.

    Links are followed. Hidden files belong to other tools (.git, .cache, .snakemake_timestamp) and
    are left out. Empty for a name on the Hub, or if there is no pipeline.
    """
    folder = Path(teacher.path, teacher.subfolder or "")
    try:
        index = hub.read_index(folder)
    except UserError:
        return []  # loading, and the checks before a run, report it
    paths = [folder / hub.INDEX, *folder.glob("[!.]*.py")]
    for name, made_as in index.items():
        if isinstance(made_as, list):
            paths += _below(folder / name)
    return sorted(path for path in paths if path.is_file())


def _below(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones. A folder that links lead to again is read once."""
    paths, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(place, name) for name in names if not name.startswith(".")]
    return paths


def fingerprint(teacher: TeacherSettings) -> str:
    """Digest of a local teacher's files: their paths in its folder, sizes, times, and samples of
    their contents (weights are too large to read). Empty for a name on the Hub, where the commit
    identifies the teacher."""
    if hub.is_name(teacher.path):
        return ""
    folder = Path(teacher.path, teacher.subfolder or "")
    named = ((path.relative_to(folder).as_posix(), path) for path in files(teacher))
    return provenance.digest([(name, *_looks(path)) for name, path in named])


def _looks(path: Path) -> tuple[int, int, str]:
    """Size, modification time (ns), and digest of the beginning, middle and end of a file. Teachers
    of one architecture have equal sizes, and unpacking or copying may set one time for all."""
    seen, read = path.stat(), hashlib.sha256()
    # Loading the teacher reports a file that may not be read.
    with contextlib.suppress(PermissionError), path.open("rb") as file:
        for place in sorted({0, seen.st_size // 2, max(0, seen.st_size - _SAMPLE)}):
            file.seek(place)
            read.update(file.read(_SAMPLE))
    return seen.st_size, seen.st_mtime_ns, read.hexdigest()


def resolved(teacher: TeacherSettings) -> TeacherSettings:
    """The settings with what identifies the teacher: the commit as `revision` for one on the Hub,
    else its `fingerprint`.

    Raises:
        UserError: it is on the Hub, which can't be reached.
    """
    if hub.is_name(teacher.path):
        return teacher.replace(revision=hub.commit(teacher))
    return teacher.replace(fingerprint=fingerprint(teacher))


def note(teacher: TeacherSettings) -> dict[str, str]:
    """What identifies a `resolved` teacher, for the provenance of calls.parquet."""
    name = _MARKS[hub.is_name(teacher.path)]
    return {f"teacher_{name}": getattr(teacher, name)}


def recorded(teacher: TeacherSettings, noted: Mapping[str, str]) -> TeacherSettings:
    """The settings, `resolved` to the teacher whose calls were recorded.

    Args:
        noted: the provenance of calls.parquet. Without a `note` in it, the calls are taken to be
            the present teacher's.

    Raises:
        UserError: that teacher is gone, or was changed.
    """
    on_hub = hub.is_name(teacher.path)
    name, other = _MARKS[on_hub], _MARKS[not on_hub]
    if f"teacher_{other}" in noted:
        _refuse(teacher)
    if f"teacher_{name}" in noted:
        teacher = teacher.replace(**{name: noted[f"teacher_{name}"]})
    refuse_changed(teacher)
    return teacher


def refuse_changed(teacher: TeacherSettings) -> None:
    """Raises UserError if a `resolved` teacher's files have changed since."""
    known = teacher.fingerprint
    # A folder without files is no teacher at all; loading it reports that better.
    if known and files(teacher) and known != fingerprint(teacher):
        _refuse(teacher)


def _refuse(teacher: TeacherSettings) -> None:
    raise UserError(
        f"teacher.path: {teacher.path} was changed since its calls were recorded, or began to "
        "be: its files have other names, sizes, times or contents. Put the teacher back as it was, "
        "or rerun the workflow, which records the present one and makes all that follows again (a "
        "stage's program alone can't: delete record/calls.parquet first)"
    )
