"""Which teacher it is, so that a run that began with one does not go on with another.

A folder can be replaced in place, by mv, rsync, or a link that moves, and a branch on the Hub moves
whenever somebody pushes. `record` notes which teacher it has asked, and later stages load that one
or stop. Imports nothing heavy, so that Snakefiles can import it.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl import provenance
from ppcl.errors import UserError
from ppcl.settings import LoraSettings, TeacherSettings
from ppcl.teacher import hub, lora_files

_SAMPLE = 1 << 16  # bytes
_MARKS = {True: "revision", False: "fingerprint"}  # by whether the teacher is on the Hub
_LORAS = "teacher_loras"
_SCHEDULER = "teacher_scheduler"
_AGAIN = (
    "or rerun the workflow, which records the present one and makes all that follows again (a "
    "stage's program alone can't: delete record/calls.parquet first)"
)


def files(teacher: TeacherSettings) -> list[Path]:
    """What of a teacher is on this disk: its pipeline, and the LoRAs that are fused into it."""
    return pipeline_files(teacher) + sorted(lora_files.local(teacher))


def pipeline_files(teacher: TeacherSettings) -> list[Path]:
    """What a local pipeline consists of: its index, its code, and its components' files, sorted.

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
    """Digest of a local pipeline's files: their paths in its folder, sizes, times, and samples of
    their contents (weights are too large to read). Empty for a name on the Hub, where the commit
    identifies the teacher."""
    if hub.is_name(teacher.path):
        return ""
    folder = Path(teacher.path, teacher.subfolder or "")
    named = ((path.relative_to(folder).as_posix(), path) for path in pipeline_files(teacher))
    return provenance.digest([(name, *_looks(path)) for name, path in named])


def stamp(teacher: TeacherSettings) -> str:
    """Digest of all that is on this disk of a teacher, its LoRAs too; empty if nothing is."""
    if not teacher.loras:
        return fingerprint(teacher)
    return provenance.digest([fingerprint(teacher), *map(_looks, lora_files.local(teacher))])


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
    """The settings with what identifies the teacher and each of its LoRAs: the commit as `revision`
    for one on the Hub, else its `fingerprint`.

    Raises:
        UserError: one is on the Hub, which can't be reached; or a LoRA can't be read.
    """
    teacher = teacher.replace(loras=tuple(map(_resolved_lora, teacher.loras)))
    if hub.is_name(teacher.path):
        return teacher.replace(revision=hub.commit(teacher))
    return teacher.replace(fingerprint=fingerprint(teacher))


def _resolved_lora(lora: LoraSettings) -> LoraSettings:
    path = lora_files.file(lora)
    if lora_files.on_hub(lora):
        return lora.replace(revision=hub.commit_of(path, lora_files.KEY))
    return lora.replace(fingerprint=provenance.digest(_looks(path)))


def named(teacher: TeacherSettings) -> dict[str, str | None]:
    """What a `resolved` teacher is called in public, without a path of this machine.

    Returns:
        `name`: owner/name on the Hub, also of a folder that is a snapshot in the Hub's cache; of
        any other folder its last part. `repository`: that name if it is one on the Hub, else None.
        `revision`: the commit, or None. `fingerprint`: of a folder, else None.
    """
    place = Path(os.path.abspath(teacher.path))
    cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/(\w+)(/|$)", place.as_posix())
    if hub.is_name(teacher.path):
        repository, revision = teacher.path, teacher.revision
    elif cached:
        repository, revision = f"{cached[1]}/{cached[2]}", cached[3]
    else:
        repository, revision = None, None
    return {
        "name": repository or place.name,
        "repository": repository,
        "revision": revision,
        "fingerprint": teacher.fingerprint,
    }


def note(teacher: TeacherSettings) -> dict[str, str]:
    """What identifies a `resolved` teacher, for the provenance of calls.parquet."""
    name = _MARKS[hub.is_name(teacher.path)]
    noted = {f"teacher_{name}": getattr(teacher, name)}
    if teacher.loras:
        noted[_LORAS] = json.dumps(list(map(_noted_lora, teacher.loras)))
    if teacher.scheduler:
        noted[_SCHEDULER] = json.dumps(dict(teacher.scheduler), sort_keys=True)
    return noted


def had_loras(noted: Mapping[str, str]) -> bool:
    """Whether LoRAs were fused into the teacher that a `note` is of."""
    return _LORAS in noted


def _noted_lora(lora: LoraSettings) -> list:
    """What identifies a LoRA of a `resolved` teacher, and its use."""
    name = _MARKS[lora_files.on_hub(lora)]
    return [name, getattr(lora, name), *_use(lora)]


def _use(lora: LoraSettings) -> list:
    """Scale and component; and of one on the Hub, whose commit stands for many files, which."""
    which = [lora.path, lora.weight_name] if lora_files.on_hub(lora) else []
    return [lora.scale, lora.component, *which]


def recorded(teacher: TeacherSettings, noted: Mapping[str, str]) -> TeacherSettings:
    """The settings, `resolved` to the teacher whose calls were recorded.

    Args:
        noted: the provenance of calls.parquet. Without a `note` in it, the calls are taken to be
            the present teacher's.

    Raises:
        UserError: that teacher is gone, or was changed, or is used otherwise.
    """
    on_hub = hub.is_name(teacher.path)
    name, other = _MARKS[on_hub], _MARKS[not on_hub]
    if f"teacher_{other}" in noted:
        _refuse(teacher)
    if f"teacher_{name}" in noted:
        teacher = teacher.replace(**{name: noted[f"teacher_{name}"]})
        known = json.loads(noted.get(_LORAS, "[]"))
        if len(known) != len(teacher.loras):
            _refuse_loras(f"{len(known)} of them were fused then, and {len(teacher.loras)} now")
        pairs = zip(teacher.loras, known, strict=True)
        teacher = teacher.replace(loras=tuple(_recorded_lora(*pair) for pair in pairs))
        scheduler = recorded_scheduler(noted)
        if scheduler != json.loads(json.dumps(dict(teacher.scheduler))):
            raise UserError(
                f"teacher.scheduler: it is {json.dumps(dict(teacher.scheduler))}, and was "
                f"{json.dumps(scheduler)} when the teacher's calls were recorded. Put it back as "
                f"it was, {_AGAIN}"
            )
    refuse_changed(teacher)
    return teacher


def refuse_other(noted: Mapping[str, str], recorded_by: Mapping[str, str]) -> None:
    """Raises UserError if pictures were encoded by another teacher than the one that was recorded.

    Args:
        noted, recorded_by: the provenance of encoded.parquet and of calls.parquet.
    """
    for mark in (*(f"teacher_{name}" for name in _MARKS), _LORAS):
        if noted.get(mark) != recorded_by.get(mark):
            raise UserError(
                "the pictures of finetune.data were encoded by another teacher than the one whose "
                "calls were recorded; delete results/<run>/encode, and run again"
            )


def recorded_scheduler(noted: Mapping[str, str]) -> dict[str, Any]:
    """`teacher.scheduler` as it was when calls were recorded.

    Args:
        noted: the provenance of calls.parquet.
    """
    made: dict[str, Any] = json.loads(noted.get(_SCHEDULER, "{}"))
    return made


def _recorded_lora(lora: LoraSettings, known: list) -> LoraSettings:
    name, mark, *use = known
    if use != _use(lora) or name != _MARKS[lora_files.on_hub(lora)]:
        _refuse_loras(f"{lora.path} has another place, file, scale or component now")
    return lora.replace(**{name: mark})


def refuse_changed(teacher: TeacherSettings) -> None:
    """Raises UserError if a `resolved` teacher's files have changed since."""
    known = teacher.fingerprint
    # A folder without files is no teacher at all; loading it reports that better.
    if known and pipeline_files(teacher) and known != fingerprint(teacher):
        _refuse(teacher)
    for lora in teacher.loras:
        known = lora.fingerprint
        if known and known != provenance.digest(_looks(lora_files.file(lora))):
            _refuse_loras(f"{lora.path} has another size, time or contents now")


def _refuse(teacher: TeacherSettings) -> None:
    raise UserError(
        f"teacher.path: {teacher.path} was changed since its calls were recorded, or began to "
        "be: its files have other names, sizes, times or contents. Put the teacher back as it was, "
        + _AGAIN
    )


def _refuse_loras(what: str) -> None:
    raise UserError(
        f"{lora_files.KEY}: they are others than when the teacher's calls were recorded: {what}. "
        f"Put them back as they were, {_AGAIN}"
    )
