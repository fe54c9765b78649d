"""Stages as processes of their own, with a fault in them. Run as a program, it is what they are
forked from: it has imported all that takes seconds, and computed nothing."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


class Zygote:
    """Starts stages; every job is a dict of the arguments of `play`."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, *jobs: dict) -> list[int]:
        """Exit codes of jobs that run at once; -n of those that signal n ended."""
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def play(program: str, options: list[str], log: str, fault: dict) -> None:
    """Runs a stage in this process, with a fault.

    Args:
        fault: {} for none; or `signal` after `seconds`; or `fail`: the number of the first of the
            changes of files that fails, as all later ones do; or `limit` of any file's bytes;
            or `vanish`: a file that is gone after so many `opened` files; or `count`: a file to
            write the number of changes to.
    """
    import runpy

    from ppcl import assembly

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assembly.prove = lambda *_: None  # it takes long, and test_assembly has it
    if "signal" in fault:
        threading.Timer(fault["seconds"], os.kill, (os.getpid(), fault["signal"])).start()
    if "limit" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], resource.RLIM_INFINITY))
    seen = {"changes": 0, "opened": 0}

    def watch(event: str, arguments: tuple) -> None:
        if event in WRITING:
            seen["changes"] += 1
            if seen["changes"] >= fault.get("fail", float("inf")):
                raise OSError(errno.EIO, "Input/output error (a test's)")
        elif event == "open" and "vanish" in fault:
            seen["opened"] += 1
            if seen["opened"] == fault["opened"]:
                Path(fault["vanish"]).unlink()

    sys.addaudithook(watch)
    sys.argv = [program, *options]
    try:
        runpy.run_path(str(HERE.parent / f"workflow/scripts/{program}.py"), run_name="__main__")
    finally:
        if "count" in fault:
            Path(fault["count"]).write_text(str(seen["changes"]))


def main() -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent / "workflow/scripts")]
    import diffusers  # noqa: F401
    import pandas  # noqa: F401
    import torch  # noqa: F401

    from ppcl import assembly, evaluation, pipelines, recording, student_stage  # noqa: F401

    for line in sys.stdin:
        started = []
        for job in json.loads(line):
            child = os.fork()
            if child:
                started.append(child)
                continue
            code = 1
            try:
                play(**job)
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                random.seed()
                os._exit(code)
        ended = [os.waitpid(child, 0)[1] for child in started]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in ended]), flush=True)


if __name__ == "__main__":
    main()
