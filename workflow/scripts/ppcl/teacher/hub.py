"""Where a teacher's files are: in a local folder, or in the local cache of the Hub.

Imports nothing heavy, so that Snakefiles can import it.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.settings import TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import weights
from ppcl.transformer import registry

PATIENCE = 10  # seconds to wait for the Hub
INDEX = "model_index.json"
CARD = "README.md"
TEXT_LIMIT = 256 << 20  # most bytes of a tokenizer's or config's file; the largest known has 33 MiB
_TEXT = re.compile(r"\.(json|jsonl|txt|model|jinja|spm|vocab|tiktoken)$")


def component(teacher: TeacherSettings) -> str:
    """Name of the pipeline's component that is pruned, such as `transformer_2` of Wan 2.2."""
    return teacher.component


def is_name(path: str) -> bool:
    """Whether a teacher's path is the name of a repository on the Hub and no local folder."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    return bool(named) and not Path(path).exists() and not Path(path).parent.exists()


def folder(
    teacher: TeacherSettings,
    key: str = "teacher.path",
    only: Collection[str] | None = None,
    without: Collection[str] = (),
) -> Path:
    """The pipeline's folder on this machine; a repository on the Hub is downloaded, if need be.

    A token is taken from HF_TOKEN or from `hf auth login`. Without a network, or with
    HF_HUB_OFFLINE=1, the local cache is used.

    Args:
        teacher: the config's `teacher` mapping: path, revision, variant, subfolder, ...
        key: the config key that names the folder, for messages.
        only: components to download; None for all.
        without: components not to download.

    Raises:
        UserError: there is no such folder or repository, or it can't be reached.
    """
    path, subfolder = teacher.path, teacher.subfolder or ""
    if not is_name(path):
        local = Path(path) / subfolder
        if not local.is_dir():
            raise UserError(
                f"{key}: {local} can't be loaded: there is no such folder; give the folder of a "
                "diffusers pipeline, or the name of a repository on the Hub (owner/name)"
            )
        refuse_strange(local, key)
        return local
    if subfolder.startswith("/") or ".." in Path(subfolder).parts:
        raise UserError(f"teacher.subfolder: {subfolder} is no folder inside of {path}; correct it")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    revision, prefix = teacher.revision, f"{subfolder}/" if subfolder else ""
    try:
        listed = HfApi().model_info(path, revision=revision, timeout=PATIENCE)
    except RevisionNotFoundError as error:
        raise UserError(f"teacher.revision: {path} on the Hub has no '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{key}: {path} is neither a local folder nor a repository that the Hub shows you; "
            "check the name, or, if it is private or gated, accept its terms there and set "
            "HF_TOKEN to your token"
        ) from error
    except Exception as error:  # all kinds of missing or broken connections
        return _cached(path, revision, prefix, key, error)
    files = [file.rfilename for file in listed.siblings or ()]
    names = wanted(files, prefix, only, without, teacher)
    try:
        # By what the config names, not by its commit: the cache then knows the branch without a
        # network, too.
        root = snapshot_download(path, revision=revision, allow_patterns=names)
    except Exception as error:
        raise UserError(
            f"{key}: {path} can't be downloaded: {error}. If it is gated, accept its terms on the "
            "Hub and set HF_TOKEN to your token"
        ) from error
    return Path(root) / subfolder


def commit(teacher: TeacherSettings) -> str:
    """The commit (hash) to which the revision of a teacher on the Hub, a branch or tag, leads now.

    Raises:
        UserError: as `folder`.
    """
    return commit_of(folder(teacher, only=()), "teacher.path")


def commit_of(place: Path, key: str) -> str:
    """The commit (hash) whose snapshot in the Hub's cache a file or folder belongs to."""
    for part in reversed(range(1, len(place.parts))):
        if place.parts[part - 1] == "snapshots":
            return place.parts[part]
    raise UserError(f"{key}: {place} is not in a cache of the Hub; set HF_HOME to one")


def file(path: str, name: str, revision: str | None, key: str) -> Path:
    """One file of a repository on the Hub, on this machine; it is downloaded, if need be.

    Args:
        path: the repository (owner/name). name: of the file in it.
        key: the config key that names it, for messages.

    Raises:
        UserError: there is no such repository, revision or file, or it can't be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name, revision=revision, etag_timeout=PATIENCE))
    except Exception as error:  # all kinds of missing files and broken connections
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}: {name} of {path} at revision {revision or 'main'} is not to be had from the "
            f"Hub or its cache on this machine ({reason}); check these names, set HF_TOKEN if the "
            "repository is gated, or download the file and give its path"
        ) from error


def _cached(path: str, revision: str | None, prefix: str, key: str, error: Exception) -> Path:
    """The snapshot in the local cache; UserError if there is none."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(path, f"{prefix}{INDEX}", revision=revision)
    if not isinstance(index, str):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}: {path} is no local folder, the Hub can't be reached ({reason}), and its cache "
            f"on this machine does not hold {path} at revision {revision or 'main'}; set {key} to "
            "a local folder, or download it where there is a network (`hf download "
            f"{path}`) and set HF_HOME to that cache here, with HF_HUB_OFFLINE=1"
        ) from error
    return Path(index).parent


def wanted(
    names: Collection[str],
    prefix: str,
    only: Collection[str] | None,
    without: Collection[str],
    teacher: TeacherSettings,
) -> list[str]:
    """Which files of a repository to download: one set of weights per component, its configs and
    tokenizers, and code only if `teacher.trust_remote_code`.

    Args:
        names: paths of all files of the repository.
        prefix: folder of the pipeline in it, empty or ending with a slash.
        only, without: as in `folder`.
    """
    chosen: list[str] = []
    beside: dict[str, list[str]] = {}
    # Its card, which a variant's card takes the licence from, is at the top.
    card = [CARD] if CARD in names else []
    for name in (n.removeprefix(prefix) for n in names if n.startswith(prefix)):
        part, _, file = name.partition("/")
        if not file:
            if name == INDEX or (name.endswith(".py") and teacher.trust_remote_code):
                chosen.append(name)
        elif part in without or (only is not None and part not in only):
            continue
        elif re.search(r"\.(safetensors|bin)(\.index(\.\w+)?\.json)?$", file):
            beside.setdefault(part, []).append(file)
        elif _TEXT.search(file):
            chosen.append(name)
        elif file.endswith(".py") and teacher.trust_remote_code:
            chosen.append(name)
    for part, files in beside.items():
        chosen += [f"{part}/{file}" for file in weights.wanted(files, teacher.variant)]
    return [prefix + name for name in chosen] + card


def read_index(path: Path, key: str = "teacher.path") -> dict:
    """model_index.json of a pipeline's folder, with the present diffusers names of classes.

    Raises:
        UserError: it is missing, not JSON, or has an entry that can't be a component.
    """
    try:
        index = untrusted.json_object(path / INDEX)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{key}: {path} is not a diffusers pipeline (it has no {INDEX}); give the folder that "
            "save_pretrained wrote, or set teacher.subfolder to where it is"
        ) from error
    for name, value in index.items():
        # Names become parts of paths.
        if not (name.isascii() and name.isidentifier() and len(name) <= 100):
            raise UserError(
                f"{path / INDEX}: {name[:100]!r} can't be the name of a component; restore the file"
            )
        if not _is_entry(name, value):
            raise UserError(
                f"{path / INDEX}: '{name}' is {str(value)[:100]!r}, but should be the library and "
                "the class of a component; restore the file"
            )
        config = path / name / weights.CONFIG
        if _is_named(value) and registry.was_split(value[1]) and config.is_file():
            value[1] = registry.today(value[1], untrusted.json_object(config))
    return index


def parts(folder: Path, key: str = "teacher.path") -> dict[str, tuple[str, str]]:
    """Name of each component in a pipeline's folder -> (library, class)."""
    named = read_index(folder, key).items()
    return {k: tuple(v) for k, v in named if not k.startswith("_") and _is_named(v)}


def _is_entry(name: str, value: Any) -> bool:
    """Whether an entry of an index can be a component's, or an option of the pipeline."""
    if name == "_class_name":  # of a pipeline with code of its own: module and class
        return isinstance(value, str) or _is_named(value)
    if name.startswith("_") or not isinstance(value, list):
        return True
    numbers = bool(value) and all(isinstance(v, (int, float)) for v in value)
    return value == [None, None] or numbers or _is_named(value)


def _is_named(value: Any) -> bool:
    """Whether a value is a library and a class, by names that Python can import."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, str) and len(v) <= 200 for v in value)
        and re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", value[0], re.ASCII) is not None
        and value[1].isidentifier()
    )


def files(folder: Path, name: str) -> list[str]:
    """Paths, within a pipeline's folder, of the component's files that a download would take; no
    code, and the weights of no variant."""
    present = []
    for place, folders, names in os.walk(folder / name):
        folders[:] = [f for f in folders if not f.startswith(".")]
        present += [Path(place, n).relative_to(folder).as_posix() for n in names if n[0] != "."]
    stock = TeacherSettings.of({"path": str(folder)})
    return sorted(f for f in wanted(present, "", (name,), (), stock) if (folder / f).is_file())


def leaves(folder: Path, path: Path) -> bool:
    """Whether a path in a pipeline's folder leads, by a link, out of it. In the Hub's cache, the
    blobs, to which the links of a snapshot lead, count as inside."""
    roots, whole = [folder.resolve()], folder.absolute()
    for snapshots in (*whole.parents, *roots[0].parents):
        if snapshots.name == "snapshots":
            roots.append((snapshots.parent / "blobs").resolve())
    real = path.resolve()
    return not any(real.is_relative_to(root) for root in roots)


def refuse_strange(folder: Path, key: str = "teacher.path") -> None:
    """Raises UserError if a component's folder holds a link to a folder; anything but files and
    folders, such as a pipe; a text file larger than TEXT_LIMIT (it would be read as a whole); or a
    link to a file elsewhere (it might be a private file, and would be exported).

    A component's folder as a whole, and files of weights, may be links, as is common.
    """
    for name in parts(folder, key):
        if not (folder / name).is_dir():
            continue  # `weights.check` refuses it, and says what to do
        base = (folder / name).resolve()
        for place, folders, names in os.walk(folder / name):
            for path in (Path(place, entry) for entry in (*folders, *names) if entry[0] != "."):
                strange = None
                if path.is_dir():
                    strange = "a link to a folder" if path.is_symlink() else None
                elif not path.is_file():
                    strange = "neither a file nor a folder" if path.exists() else None
                elif _TEXT.search(path.name) and path.stat().st_size > TEXT_LIMIT:
                    strange = f"larger than {TEXT_LIMIT >> 20} MiB"
                elif path.suffix != ".safetensors" and leaves(folder, path):
                    if not path.resolve().is_relative_to(base):
                        strange = f"a link to {path.resolve()}, which is somewhere else"
                if strange:
                    raise UserError(
                        f"{key}: {path} is {strange}, which is not read; replace it with what "
                        "belongs there, or remove it"
                    )
            folders[:] = [f for f in folders if not f.startswith(".")]
