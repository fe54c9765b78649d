"""Stages as processes of their own, with a fault in them. Run as a program, it is what they are
forked from: it has imported all that takes seconds, and computed nothing."""

import ctypes
import errno
import json
import os
import platform
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "workflow" / "scripts"
WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
# Numbers of Linux's calls: seccomp, and those that write or make sure of it.
CALLS = {
    "x86_64": (317, {"write": (1, 18, 20, 40), "fsync": (74, 75)}),
    "aarch64": (277, {"write": (64, 68, 66, 71), "fsync": (82, 83)}),
}


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


def fail_calls(kind: str, error: int) -> None:
    """From now on the kernel fails every call of a kind on all files of this process but its
    standard ones, be they made by Python, by Arrow or by safetensors.

    Args:
        kind: a key of CALLS.
        error: what it fails with, such as errno.EIO.
    """
    seccomp, kinds = CALLS[platform.machine()]
    load, equal, above, give = 0x20, 0x15, 0x25, 0x06  # of the kernel's filter language
    numbers = kinds[kind]
    steps = [(load, 0, 0, 0)]  # the call's number
    steps += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(give, 0, 0, 0x7FFF0000)]  # any other is allowed
    steps += [(load, 0, 0, 16), (above, 0, 1, 2)]  # its first argument, the file
    steps += [(give, 0, 0, 0x00050000 | error), (give, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    made = Program(len(steps), ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(38, 1, 0, 0, 0)  # no new privileges, which makes the filter anybody's right
    if library.syscall(seccomp, 1, 1, ctypes.byref(made)):  # in all threads
        raise OSError(ctypes.get_errno(), "no seccomp")


def send(number: int) -> None:
    """A signal to this process; SIGTERM once it can handle that, as everywhere it may be early."""
    while number == signal.SIGTERM and signal.getsignal(number) == signal.SIG_DFL:
        time.sleep(0.001)
    os.kill(os.getpid(), number)


def play(program: str, options: list[str], log: str, fault: dict) -> None:
    """Runs a stage in this process, with a fault.

    Args:
        fault: {} for none; or `signal` after `seconds`; or `fail`: the number of the first of the
            changes of files that fails, as all later ones do; or `calls`, a kind of calls that
            all fail with an `error` after `seconds`; or `vanish`: a file that is gone after so
            many `opened` files; or `delay`: begin after so many seconds; or `count`: a file to
            write the number of changes to.
    """
    import runpy

    from ppcl.export import assembly

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assembly.prove = lambda *_: None  # it takes long, and test_assembly has it
    if "signal" in fault:
        threading.Timer(fault["seconds"], send, (fault["signal"],)).start()
    if "calls" in fault:
        threading.Timer(fault["seconds"], fail_calls, (fault["calls"], fault["error"])).start()
    time.sleep(fault.get("delay", 0))
    seen = {"changes": 0, "opened": 0}

    def watch(event: str, arguments: tuple) -> None:
        if event in WRITING:
            seen["changes"] += 1
            if seen["changes"] >= fault.get("fail", float("inf")):
                # With the file's name, as the system's own errors have it.
                raise OSError(errno.EIO, "Input/output error (a test's)", arguments[0])
        elif event == "open" and "vanish" in fault:
            seen["opened"] += 1
            if seen["opened"] == fault["opened"]:
                Path(fault["vanish"]).unlink()

    sys.addaudithook(watch)
    sys.argv = [program, *options]
    try:
        runpy.run_path(str(SCRIPTS / f"{program}.py"), run_name="__main__")
    finally:
        if "count" in fault:
            Path(fault["count"]).write_text(str(seen["changes"]))


def main() -> None:
    sys.path[0] = str(SCRIPTS)
    import diffusers  # noqa: F401
    import pandas  # noqa: F401
    import torch  # noqa: F401

    from ppcl.evaluation import generation, measuring, workers  # noqa: F401
    from ppcl.export import assembly  # noqa: F401
    from ppcl.teacher import pipelines, recording  # noqa: F401
    from ppcl.training import student_stage  # noqa: F401

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
