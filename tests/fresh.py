"""Fresh processes that start at once: forks of one that has imported what takes seconds.

Such a process has memory, signals, files and an exit code of its own, like any; it only finds the
libraries already imported. Nothing of this repository is among them, so each reads its own code.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

# What programs of either kind import: the server of a kind is started once per session.
MODELS = ("accelerate.state", "diffusers.hooks", "diffusers.QwenImagePipeline", "pandas")
SNAKEMAKE = (
    "snakemake.cli",
    "snakemake.api",
    "snakemake.workflow",
    "snakemake.dag",
    "snakemake.linting.rules",
    "snakemake.profiles",
    "snakemake.report.html_reporter",
    "snakemake.storage",
    "smart_open",
    "yte",
    "jsonschema",
    "pandas",
    "pyarrow.parquet",
    "PIL.Image",
)


def run(
    kind: tuple[str, ...],
    *words: object,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    merged: bool = False,
) -> subprocess.CompletedProcess:
    """What `subprocess.run([sys.executable, *words])` returns, with both outputs as texts.

    Args:
        kind: MODELS or SNAKEMAKE.
        words: `-c CODE`, `-m MODULE` or a script, and arguments.
        env: other variables; OMP_NUM_THREADS is what it was when libraries were imported.
        merged: stderr goes to stdout.
    """
    server = _server(kind)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stdout" if merged else "stderr")]
        asked = {
            "words": [str(word) for word in words],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "outputs": [str(path) for path in outputs],
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess(words, code, texts[0], "" if merged else texts[1])


@functools.cache
def _server(kind: tuple[str, ...]) -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, __file__, *kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(started.wait)
    atexit.register(started.stdin.close)
    return started


def _serve() -> list[str]:
    """Forks for every line of stdin, and answers with the exit code; returns in a fork, with the
    words that it is to run."""
    for line in sys.stdin:
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            for number, place in enumerate([os.devnull, *asked["outputs"]]):
                flags = os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
                os.dup2(os.open(place, flags, 0o600), number)
            # What this process has read ahead of its own input is not the fork's.
            sys.stdin = open(0, closefd=False)
            os.environ.clear()
            os.environ.update(asked["env"])
            os.chdir(asked["cwd"])
            return asked["words"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(words: list[str]) -> None:
    """Does what `python *words` does, from sys.argv and sys.path on."""
    first, *rest = words
    paths = os.environ.get("PYTHONPATH")
    sys.path[1:1] = paths.split(os.pathsep) if paths else []
    if first == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"], sys.argv, sys.path[0] = main, ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:  # a name that its package makes on demand
            package, _, last = name.rpartition(".")
            getattr(importlib.import_module(package), last)
    _become(_serve())
