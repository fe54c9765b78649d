"""Start a training program in one process per GPU, or per CPU core, of this machine.

launch.py --processes auto --threads 2 SCRIPT ARGUMENTS...

What `torchrun --standalone` does, with three differences: a program that stops with an error ends
with its own message rather than with the launcher's traceback; `auto` means the cores that
Snakemake gave to the job; and the processes' exit codes decide, not a signal that came meanwhile.
(`accelerate launch` needs MPI to start several processes on a CPU.) Inside, accelerate.Accelerator
finds the processes. SIGTERM goes on to the processes, which have half a minute to end by themselves
(ppcl/runtime/stopping.py). Several processes take a GPU each, all at once, before they start
(ppcl/runtime/gpus.py); one takes its own.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from ppcl import program
from ppcl.runtime import cores, endings, gpus, stopping, surroundings

GRACE = 30  # seconds between SIGTERM to the processes and their end by SIGKILL


def count(processes: str, threads: int, device: str) -> int:
    """Number of processes: as asked, or one per GPU, or on a CPU one per core of the job, up to
    cores.MOST."""
    if processes != "auto":
        return int(processes)
    if device == "cpu" or not gpus.possible():
        return min(threads, cores.MOST)
    import torch  # takes seconds, in which SIGTERM must be handled already

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    if device in ("auto", "mps") and torch.backends.mps.is_available():
        return 1
    return min(threads, cores.MOST)


def main() -> None:
    """Parse the command line, start the processes and wait for them."""
    stopping.heed()
    surroundings.forget_ranks()
    parser = program.parser(__doc__)
    parser.add_argument("--processes", default="auto", help="a number, or auto (the default)")
    parser.add_argument("--threads", type=int, required=True, help="CPU cores of this job")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("script", help="program to start, followed by its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    threads = min(options.threads, cores.available())
    processes = count(options.processes, threads, options.device)
    # Processes, not threads, share the cores: small models lose more to thread synchronisation.
    # Snakemake sets both to the job's threads, and torch lets MKL's win: every process would start
    # as many threads as there are cores, and they would wait for each other ten times longer.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(max(1, threads // processes))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in job.sh
    os.environ["PYTHONFAULTHANDLER"] = "1"  # so that a crash within a library says where
    command = [sys.executable, "-u", options.script, *options.arguments]
    if processes > 1 and options.device in ("auto", "cuda"):
        gpus.take(processes)
    # The program can handle SIGTERM only after seconds; blocked, it waits until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if processes == 1:
        os.execv(sys.executable, command)
    code = together(command, processes)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it takes a moment to end, as in stopping.done
    sys.exit(code)


def together(command: list[str], processes: int) -> int:
    """Starts a program in several processes, waits for all of them, and returns their exit code.

    When one fails, or SIGTERM comes, the others are sent SIGTERM, and SIGKILL after GRACE seconds.

    Returns:
        0 if all of them ended with 0, even if SIGTERM came meanwhile; stopping.EXIT_CODE if one
        failed and SIGTERM came; else the code of the first that failed, which has said why. If a
        signal ended it, 1, after this function has said so.
    """
    # Where the processes find each other: any free port, held from now on so that nobody takes it.
    door = socket.create_server(("127.0.0.1", 0), backlog=processes)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(door.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        surroundings.RUN: uuid.uuid4().hex,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    started: list[subprocess.Popen] = []
    last = _last_will(os.getpid())
    try:
        for rank in range(processes):
            mine = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=mine, preexec_fn=last))
        stopping.ignore()  # what the processes make of it decides
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # torch is imported here while the processes import it; an early one waits for the store.
        from torch.distributed import TCPStore

        host, port = door.getsockname()
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach()
        )
        code = _wait(started)
        del store  # which the processes used until now
        return code
    except KeyboardInterrupt:  # a terminal sends SIGINT to all processes
        return 128 + signal.SIGINT
    finally:
        for process in started:
            process.kill()


def _last_will(launcher: int) -> Callable[[], None] | None:
    """What a new process does first: it has the kernel send it SIGTERM when the launcher is gone,
    also by kill -9, lest it trains on beside the next run. On Linux; elsewhere, nothing."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, of_parents_death = ctypes.CDLL(None).prctl, 1

    def ask() -> None:
        prctl(of_parents_death, signal.SIGTERM)
        if os.getppid() != launcher:  # gone already
            os._exit(stopping.EXIT_CODE)

    return ask


def _wait(started: list[subprocess.Popen]) -> int:
    failed, who, deadline = 0, "", None
    while True:
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes):
            if code and not failed:
                failed, who = code, f"process {rank} of {len(started)}"
        if None not in codes:
            break
        if deadline is None and (failed or stopping.warned()):
            deadline = time.monotonic() + GRACE
            for process in started:
                process.terminate()
        elif deadline is not None and time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)
    if failed and stopping.warned():
        return stopping.EXIT_CODE
    if failed < 0:
        print(f"error: {endings.explain(-failed, who)}", file=sys.stderr)
    return failed if failed >= 0 else 1


if __name__ == "__main__":
    main()
