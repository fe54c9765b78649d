"""The message about a program that a signal ended, since the program can't print one itself.

endings.py CODE    prints it; CODE is the shell's exit code, 128 + the signal's number
"""

import re
import signal
import sys
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_CAUSES = {
    "SIGKILL": "most likely for lack of memory{memory}; give the job more (on a cluster "
    "--set-resources STAGE:mem_mb=MB), end what else runs here, or make batches smaller",
    "SIGBUS": "most likely since a disk is full or fails, that of temporary files and /dev/shm "
    "among them, or a file was cut short while it was read; make room (df -h) and rerun",
    "SIGSEGV": "which is a fault in a library or a driver, or in memory; rerun, and if it comes "
    "again at the same place, report it with this log",
    "SIGABRT": "by which a library gives up; the lines above may say why",
    "SIGILL": "which means that a package was built for other processors; install it anew here",
    "SIGFPE": "which is a fault in a library; rerun, and report it with this log if it comes again",
    "SIGXCPU": "at its limit of processor time; raise that (ulimit -t) and rerun",
    "SIGXFSZ": "at the limit of a file's size; raise that (ulimit -f) and rerun",
    "SIGHUP": "since its terminal was closed; rerun, in tmux or with nohup",
    "SIGPIPE": "since nothing took its output any more; rerun",
    "SIGTERM": "with which a person or a scheduler ends programs; rerun",
    "SIGINT": "which is Ctrl-C; rerun",
}


def explain(number: int, who: str = "the program") -> str:
    """One line about a program that a signal ended: which, the likely cause, and what to do."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = ""
    cause = _CAUSES.get(name, "").format(memory=_memory())
    shown = f"signal {number} ({name})" if name else f"signal {number}"
    return f"{who} was ended by {shown}" + (f", {cause}" if cause else "")


def _memory() -> str:
    """How many of this job's processes the kernel ended for lack of memory, in words.

    From its cgroup, of version 1 or 2; empty if it counts none.
    """
    own = dict(re.findall(r"^\d+:(|memory):(/.*)$", read(OWN), re.M))
    unified = [GROUPS / own.get("", "/")[1:] / "memory.events", GROUPS / "memory.events"]
    older = GROUPS / "memory"
    older_ones = [older / own.get("memory", "/")[1:], older]
    for path in [*unified, *(folder / "memory.oom_control" for folder in older_ones)]:
        if kills := re.search(r"^oom_kill ([1-9]\d*)$", read(path), re.M):
            return f" (the kernel has ended {kills[1]} of this job's processes for it)"
    return ""


def read(path: Path) -> str:
    """A file of the kernel's; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    print(f"error: {explain(int(sys.argv[1]) - 128)}", file=sys.stderr, flush=True)
