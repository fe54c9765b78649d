"""Where a result comes from: versions, commit, settings and counts; digests of code."""

import ast
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "pyarrow")


def stamp(settings: Mapping[str, Any], **counts: object) -> dict[str, str]:
    """The provenance that every result file carries, as strings.

    `settings` is the configuration that the stage was given (its digest and seed are kept),
    `counts` are sample counts, such as tokens=4096, or whatever else tells results apart. Times are
    UTC.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **versions,
        "commit": commit(),
        "seed": str(settings.get("seed", "")),
        "settings": digest(settings),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: str(count) for name, count in counts.items()},
    }


@functools.cache
def commit() -> str:
    """The commit of this source tree, with "-dirty" for uncommitted changes, or "unknown".

    Programs ask when they start, and the answer is kept: a commit that is made while they run is
    not the code that made their results.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return "unknown"
        state = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(state, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed else "")


def digest(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def stamps(paths: Iterable[str]) -> list[tuple]:
    """Path, size in bytes and time of change in nanoseconds of each file, for digests."""
    return [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]


def code_digest(script: str | Path) -> str:
    """SHA-256 (hex) of a stage script and of every file of ppcl that it uses, directly or not.

    Snakemake notices an edited script, but not an edited module; rules put this in their params.
    Imports are read from the source without running it, so nothing (no torch) is imported. The
    packages around a module count, too: Python runs their `__init__.py` first. Not followed, since
    no script does so: module names that are put together at run time, `python -m`, and scripts that
    import or start each other.

    Raises:
        ModuleNotFoundError: an import from ppcl leads to no file.
    """
    folder = Path(script).parent
    library = _library(folder)
    seen: dict[str, bytes] = {}
    queue = [Path(script).name]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen[name] = (folder / name).read_bytes()
            imports, started = _imported(seen[name], name)
            for base, names in imports:
                queue += _files(base, names, library, name)
            queue += [file for end in started for file in library.values() if file.endswith(end)]
    combined = hashlib.sha256()
    for name in sorted(seen):
        combined.update(f"{name}\0{len(seen[name])}\0".encode() + seen[name])
    return combined.hexdigest()


def _library(folder: Path) -> dict[str, str]:
    """The modules and packages of ppcl: dotted name -> file, as seen from the scripts' folder."""
    files, places = {}, ["ppcl"] if (folder / "ppcl").is_dir() else []
    while places:
        place = places.pop()
        with os.scandir(folder / place) as entries:
            for entry in entries:
                file = f"{place}/{entry.name}"
                if entry.is_dir():
                    places.append(file)
                elif file.endswith(".py"):
                    name = file.removesuffix(".py").removesuffix("/__init__")
                    files[name.replace("/", ".")] = file
    return files


def _files(base: str, names: tuple[str, ...], library: dict[str, str], by: str) -> list[str]:
    """The files that one import runs: `import base`, or `from base import names`."""
    paths = []
    for name in names or ("",):
        module = f"{base}.{name}" if f"{base}.{name}" in library else base
        # A name that is no module would have to be defined in __init__.py; no package does that.
        if module not in library or (module == base and name and _is_package(library[base])):
            what = f"from {base} import {name}" if name else f"import {base}"
            raise ModuleNotFoundError(f"{by}: `{what}` leads to no file of the library")
        parts = module.split(".")
        around = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        paths += [library[each] for each in around if each in library]
    return paths


def _is_package(file: str) -> bool:
    return file.endswith("/__init__.py")


@functools.cache  # by content: most stages use most modules, and every rule asks
def _imported(
    source: bytes, file: str
) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], frozenset[str]]:
    """What a source file imports from ppcl, and the `/<name>.py` that it may start as programs.

    Imports are (base, names) of `from base import names`, with no names for `import base`.
    """
    started = {f"/{name}.py" for name in re.findall(r"(\w+)\.py[\"']", source.decode())}
    imports: list[tuple[str, tuple[str, ...]]] = []
    # Imports are statements, so expressions, nine of ten nodes, are skipped.
    queue: list[ast.AST] = [ast.parse(source, filename=file)]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            imports += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            around = file.split("/")[: -node.level] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            imports.append((base, tuple(alias.name for alias in node.names)))
        else:
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                statements = getattr(node, block, [])
                queue += statements if isinstance(statements, list) else []
    ours = [each for each in imports if each[0].split(".")[0] == "ppcl"]
    return tuple(ours), frozenset(started - {"/__init__.py"})
