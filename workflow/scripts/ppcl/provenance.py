"""Where a result comes from: versions, commit, settings and counts; digests of code."""

import ast
import functools
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "pyarrow")


def stamp(settings: dict, **counts: int) -> dict[str, str]:
    """The provenance that every result file carries, as strings.

    `settings` is the configuration that the stage was given (its digest and seed are kept),
    `counts` are sample counts, such as tokens=4096. Times are UTC.
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

    Programs ask once when they start: what is committed meanwhile did not make their results.
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
    """Names, sizes and times of files, for digests."""
    return [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]


def code_digest(script: str | Path) -> str:
    """SHA-256 (hex) of a stage script and of every ppcl module that it uses, directly or not.

    Snakemake notices an edited script, but not an edited module; rules put this in their params.
    Imports are read from the source without running it, so nothing (no torch) is imported.
    """
    script = Path(script)
    package = script.parent / "ppcl"
    seen: dict[str, bytes] = {}
    queue = [script]
    while queue:
        path = queue.pop()
        name = path.relative_to(script.parent).as_posix()
        if name not in seen and path.is_file():
            seen[name] = path.read_bytes()
            queue.extend(package / f"{module}.py" for module in _imported(seen[name], path))
    combined = hashlib.sha256()
    for name in sorted(seen):
        combined.update(f"{name}\0{len(seen[name])}\0".encode() + seen[name])
    return combined.hexdigest()


@functools.cache  # by content: most modules are of most stages, and every rule asks
def _imported(source: bytes, path: Path) -> frozenset[str]:
    """Names that may be ppcl modules which a source file imports, or starts as `<name>.py`."""
    names = [f"ppcl.{name}" for name in re.findall(r"(\w+)\.py[\"']", source.decode())]
    # Imports are statements: expressions, nine nodes of ten, need no look.
    queue: list[ast.AST] = [ast.parse(source, filename=str(path))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "ppcl" if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                found = getattr(node, block, [])
                queue += found if isinstance(found, list) else []
    parts = [name.split(".") for name in names]
    return frozenset(part[1] for part in parts if part[0] == "ppcl" and len(part) > 1)
