"""Fresh processes that start at once: forks of one that has imported what takes seconds.

Such a process has memory, signals, files and an exit code of its own, like any; it only finds the
libraries imported already. Nothing of this repository is among them, so each reads its own code.
What libraries read from the environment while they are imported (HF_HOME, OMP_NUM_THREADS, say) is
the server's; but not where diffusers copies code to.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path

# What programs of either kind import; the server of a kind is started once per session.
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

# A program named python, which asks a server for a fork that does what it was to do. It hands over
# its own files, passes signals on, and ends as the fork does; if it is killed, so is the fork.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = {{"words": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
asked["blocked"] = list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
socket.send_fds(server, [b"%20d" % len(json.dumps(asked))], [0, 1, 2])
server.sendall(json.dumps(asked).encode())
child = int(server.recv(20))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(child, number))
signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what is blocked, the fork keeps waiting
code = int(server.recv(20))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def run(
    kind: tuple[str, ...],
    *words: object,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    merged: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess:
    """What `subprocess.run([sys.executable, *words])` returns, with both outputs as texts.

    Args:
        kind: MODELS or SNAKEMAKE.
        words: options, then `-c CODE`, `-m MODULE` or a script, and arguments.
        env: other variables.
        merged: stderr goes to stdout.
        timeout: seconds.
    """
    return subprocess.run(
        [python(kind), *map(str, words)],
        cwd=cwd,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        timeout=timeout,
    )


_servers: list[subprocess.Popen] = []  # each ends when its stdin does, with this process


@functools.cache
def python(kind: tuple[str, ...]) -> str:
    """The program that stands for Python of a kind; Snakemake's starts jobs with that of MODELS."""
    folder = tempfile.mkdtemp(prefix="fresh-")  # which the server removes
    program, address = Path(folder, "python"), Path(folder, "socket")
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    of_jobs = str(program) if kind == MODELS else python(MODELS)
    command = [sys.executable, __file__, str(address), of_jobs, *kind]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started.stdout.read(1)  # it listens
    _servers.append(started)
    return str(program)


def _serve(address: str) -> list[str]:
    """Forks for everyone who asks, until stdin is closed; returns in a fork, with what it is to do.

    A fork's end is told to who asked; who goes away before has the fork killed.
    """
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    os.write(1, b"x")
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                shutil.rmtree(os.path.dirname(address))
                os._exit(0)
            if key.fileobj is listening:
                client, _ = listening.accept()
                size, files, *_ = socket.recv_fds(client, 20, 3)
                if not size:
                    continue
                text = b""
                while len(text) < int(size):
                    text += client.recv(int(size) - len(text))
                if (child := os.fork()) == 0:
                    for place, file in enumerate(files):
                        os.dup2(file, place)
                        os.close(file)
                    client.close()
                    _close(waiting)
                    return _prepared(json.loads(text))
                for file in files:
                    os.close(file)
                client.sendall(b"%20d" % child)
                end = os.pidfd_open(child)
                waiting.register(end, selectors.EVENT_READ, (child, end, client))
                waiting.register(client, selectors.EVENT_READ, (child, end, client))
                continue
            child, end, client = key.data
            if key.fileobj is client:  # nobody sends anything more: it is gone
                os.kill(child, 9)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for watched in (end, client):
                waiting.unregister(watched)
            try:
                client.sendall(b"%20d" % code)
            except OSError:
                pass
            client.close()
            os.close(end)
            break  # what else is ready may be of the same fork


def _close(waiting: selectors.BaseSelector) -> None:
    """Closes what the server waits for: a fork that held a client would hide that it goes."""
    held = [key.fileobj for key in waiting.get_map().values()]
    waiting.close()
    for one in held:
        if isinstance(one, socket.socket):
            one.close()
        elif one:  # not stdin, which is the fork's own by now
            os.close(one)


def _prepared(asked: dict) -> list[str]:
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.stdin = open(0, closefd=False)
    # Where the code that comes with a model is copied to was read by diffusers at its import.
    if "diffusers" in sys.modules and (place := os.environ.get("HF_MODULES_CACHE")):
        sys.modules["diffusers.utils.dynamic_modules_utils"].HF_MODULES_CACHE = place
    return asked["words"]


def _become(words: list[str], program: str) -> None:
    """Does what `python *words` does once it has started."""
    sys.executable = program
    if "torch" in sys.modules:
        threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
        sys.modules["torch"].set_num_threads(int(threads))
    isolated = False
    while words[0] in ("-u", "-I"):
        isolated |= words.pop(0) == "-I"
    paths = os.environ.get("PYTHONPATH")
    sys.path[1:1] = paths.split(os.pathsep) if paths and not isolated else []
    first, *rest = words
    if first == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"], sys.argv = main, ["-c", *rest[1:]]
        sys.path[:1] = [] if isolated else [""]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[:1] = [] if isolated else [os.path.dirname(os.path.abspath(first))]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in sys.argv[3:]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:  # a name that its package makes on demand
            package, _, last = name.rpartition(".")
            getattr(importlib.import_module(package), last)
    gc.freeze()  # or every fork's collector would copy all of it
    words = _serve(sys.argv[1])
    code: object = 0
    try:
        _become(words, sys.argv[2])
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr) if code is not None else None
        code = int(code is not None)
    # As at any process's end, but for freeing every module, which copies them first.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)
