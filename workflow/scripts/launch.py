"""Start a training program in one process per GPU, or per CPU core, of this machine.

launch.py --processes auto --threads 2 SCRIPT ARGUMENTS...

What `torchrun --standalone` does, with two differences: a program that stops with an error ends
with its own message rather than with the launcher's traceback, and `auto` means the cores that
Snakemake gave to the job. (`accelerate launch` needs MPI to start several processes on a CPU.)
Inside, accelerate.Accelerator finds the processes. SIGTERM goes on to the processes, which have
half a minute to end by themselves (ppcl/stopping.py); their exit code is the launcher's. Several
processes take a GPU each, all at once, before they start (ppcl/gpus.py); one takes its own.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ppcl import endings, gpus, stopping

GRACE = 30  # seconds between SIGTERM to the processes and their end by SIGKILL


def count(processes: str, threads: int, device: str) -> int:
    """Number of processes: as asked, or one per GPU, or one per thread of the job on a CPU."""
    if processes != "auto":
        return int(processes)
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    if device in ("auto", "mps") and torch.backends.mps.is_available():
        return 1
    return threads


def main() -> None:
    """Parse the command line, start the processes and wait for them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", default="auto", help="a number, or auto (the default)")
    parser.add_argument("--threads", type=int, required=True, help="CPU cores of this job")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("script", help="program to start, followed by its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    stopping.heed()
    processes = count(options.processes, options.threads, options.device)
    # Processes, not threads, share the cores: small models lose more to thread synchronisation.
    # Snakemake sets both to the job's threads, and torch lets MKL's win: every process would start
    # as many threads as there are cores, and they would wait for each other ten times longer.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(max(1, options.threads // processes))
    command = ["-u", options.script, *options.arguments]
    if processes == 1:
        # It takes seconds until the program can handle it; until then it must not be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.execv(sys.executable, [sys.executable, *command])
    if options.device in ("auto", "cuda"):
        gpus.take(processes)
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as notes:  # torch would leave a folder per start
            launch = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                shutdown_timeout=GRACE,
                logs_specs=DefaultLogsSpecs(log_dir=notes),
            )
            elastic_launch(launch, sys.executable)(*command)
    except SignalException as stopped:
        sys.exit(stopping.EXIT_CODE if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            who = f"process {rank} of {processes}"
            print(f"error: {endings.explain(-failure.exitcode, who)}", file=sys.stderr)
            sys.exit(1)
        # The program has said why; what is left is to pass on how it ended.
        sys.exit(failure.exitcode)


if __name__ == "__main__":
    main()
