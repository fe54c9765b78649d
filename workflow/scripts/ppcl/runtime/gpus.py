"""Different GPUs for jobs that run at the same time on one machine.

Snakemake counts GPUs and assigns none. A program that needs some locks a file for each, in a folder
that all jobs of this user share, and hides the others from CUDA. The kernel unlocks them when the
last process that holds them ends, however it ends.
"""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Not TMPDIR, which may be another one for every job.
COMMON = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
FOLDER = COMMON / f"ppcl-gpus-{os.getuid()}"
VISIBLE = "CUDA_VISIBLE_DEVICES"
HELD = "PPCL_GPUS"  # lock files of the GPUs taken, for the processes that this one starts
RANK = "LOCAL_RANK"  # of one of several processes: which of the GPUs that all see is its own
SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "OAR_JOB_ID", "COBALT_JOBID")
PATIENCE = 1  # seconds between looks

# What a GPU's driver makes: CUDA's, the same in WSL and on a Jetson, ROCm's.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")

_held: list[int] = []  # open files, whose locks end with this process


def possible() -> bool:
    """Whether this machine may have a GPU that torch can use. To ask torch would take seconds."""
    if not sys.platform.startswith("linux"):
        return True
    # Some machines make the files of NVIDIA's driver when it is first used.
    return any(map(os.path.exists, DRIVERS)) or shutil.which("nvidia-smi") is not None


def take(count: int = 1) -> None:
    """Takes `count` GPUs for this process and those that it starts; waits until they are free.

    To be called before CUDA looks for devices. Takes from CUDA_VISIBLE_DEVICES if that is set, and
    all GPUs if there are no more than `count`. Where a scheduler gave the job no more than `count`,
    they are its own, and need no locks. Does nothing where there is no GPU (or none that nvidia-smi
    lists), when called again, and in one of several processes whose launcher took no GPUs: each
    process uses the GPU of its rank.
    """
    if _held:
        return
    if os.environ.get(HELD):
        for path in os.environ[HELD].split(os.pathsep):
            _held.append(_open(Path(path)))
            fcntl.flock(_held[-1], fcntl.LOCK_SH)
        return
    given = os.environ.get(VISIBLE)
    if RANK in os.environ or given is not None and not given.strip():
        return
    names = usable(given, listed())
    if given is not None and len(names) <= count and any(map(os.environ.get, SCHEDULERS)):
        return
    count = min(count, len(names))
    if not count:
        return
    try:
        taken = _wait(names, count)
    except OSError as error:
        print(
            f"warning: {FOLDER}: no locks on GPUs ({error}); jobs at the same time may share one",
            file=sys.stderr,
            flush=True,
        )
        return
    os.environ[VISIBLE] = ",".join(taken)
    os.environ[HELD] = os.pathsep.join(str(_file(full)) for full in taken.values())


def listed() -> list[list[str]]:
    """UUIDs of this machine's GPUs, in their order: of each its own, then those of its MIG parts.

    From nvidia-smi: to ask CUDA would fix which devices this process sees.
    """
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    gpus: list[list[str]] = []
    for kind, name in re.findall(r"^\s*(GPU|MIG) .*\(UUID: ([^)]+)\)", listing, re.M):
        if kind == "GPU":
            gpus.append([name])
        elif gpus:
            gpus[-1].append(name)
    return gpus


def usable(given: str | None, gpus: list[list[str]]) -> dict[str, str]:
    """What may be taken: name for CUDA_VISIBLE_DEVICES -> full name, by which the GPU is locked.

    Args:
        given: CUDA_VISIBLE_DEVICES: numbers, or names and beginnings of names; None for all.
        gpus: as `listed`. One that is parted (MIG) can only be used by its parts.
    """
    devices = [gpu[1:] or gpu for gpu in gpus]
    if given is None or not gpus:
        return {name: name for device in devices for name in device}
    names: dict[str, str] = {}
    for name in map(str.strip, given.split(",")):
        if name.isdigit() and int(name) < len(gpus):
            full = devices[int(name)][0]
        elif name.startswith(("GPU-", "MIG-")):
            alike = [one for gpu in gpus for one in gpu if one.startswith(name)]
            full = alike[0] if len(alike) == 1 else name
        else:
            break  # CUDA, too, ignores an unknown name and all after it
        if full not in names.values():
            names[name] = full
    return names


def _wait(names: dict[str, str], count: int) -> dict[str, str]:
    """Waits until `count` GPUs are free, locks the first of these, and returns their `names`."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    if FOLDER.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is another user's")
    # What clears /tmp of old files (systemd-tmpfiles) leaves a locked folder alone.
    folder = os.open(FOLDER, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(folder, fcntl.LOCK_SH)
    told = False
    while True:
        free: dict[str, int] = {}
        with _alone():
            for name, full in names.items():
                file = _open(_file(full))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(file)
                    continue
                free[name] = file
                if len(free) == count:
                    for taken in free.values():
                        fcntl.flock(taken, fcntl.LOCK_SH)
                        os.truncate(taken, 0)
                        os.pwrite(taken, f"{os.getpid()}\n".encode(), 0)
                    _held.extend([folder, *free.values()])
                    return {name: names[name] for name in free}
            for file in free.values():
                os.close(file)
        if not told:
            told = True
            busy = [_file(full).read_text().strip() for n, full in names.items() if n not in free]
            print(
                f"waiting for {count - len(free)} of {len(names)} GPUs, which other jobs have "
                f"(processes {', '.join(busy)})",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(PATIENCE)


@contextmanager
def _alone() -> Iterator[None]:
    """One program at a time looks for GPUs: two could each hold what the other waits for."""
    file = _open(FOLDER / "looking.lock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _file(name: str) -> Path:
    return FOLDER / f"{re.sub('[^A-Za-z0-9-]', '_', name)}.lock"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
