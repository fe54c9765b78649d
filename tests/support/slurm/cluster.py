"""A real SLURM cluster of one node, private to a folder: munged, slurmctld and slurmd.

cluster.py up FOLDER      starts it, and prints the variables with which commands find it
cluster.py down FOLDER    stops it

Needs Debian's packages slurm-wlm and munge (or the same programs from elsewhere), and neither
systemd nor root. FOLDER must be searchable by everyone up to the root, or munged refuses it, and
its path short, for the sake of sockets. Nothing outside it is written. There is no accounting.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CPUS, MEMORY, GPUS = 8, 64_000, 2
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
DAEMONS = ("slurmd", "slurmctld", "munged")  # in the order in which they stop
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

# Sizes are declared, whatever the machine has (config_overrides). MinJobAge keeps ended jobs in
# squeue, the only record without accounting. KillWait is what a job has between SIGTERM and
# SIGKILL. DefMemPerCPU: without it, a job that names no memory takes the whole node.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
MinJobAge=3600
KillWait=20
CompleteWait=0
ReturnToService=2
SlurmdParameters=config_overrides
DefMemPerCPU=500
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def environment(folder: Path) -> dict[str, str]:
    """Variables with which SLURM's commands find the cluster of a folder."""
    return {"SLURM_CONF": f"{folder}/etc/slurm.conf", "PATH": f"{folder}/bin:{PATH}"}


def up(folder: Path) -> dict[str, str]:
    """Start a cluster and wait until it takes jobs.

    Returns:
        The variables of `environment`.

    Raises:
        RuntimeError: it did not get ready; the message holds the logs' last lines.
    """
    folder = folder.resolve()
    for name in ("etc", "state", "spool", "log", "run", "munge", "bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        # Neither the cluster's key nor its socket may be where others could replace it.
        (folder / name).chmod(0o700 if name == "munge" else 0o755)
    _configure(folder)
    variables = environment(folder)
    try:
        _start_daemons(folder, os.environ | variables)
        _wait_until_idle(folder, os.environ | variables)
    except BaseException:
        down(folder)
        raise
    return variables


def _configure(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    user = os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip()
    # Bound at the same time, so that they differ.
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = {"controller": one.getsockname()[1], "node": other.getsockname()[1]}
    sizes = {"cpus": CPUS, "memory": MEMORY, "gpus": GPUS}
    text = CONFIG.format(host=host, user=user, folder=folder, **ports, **sizes)
    (folder / "etc/slurm.conf").write_text(text)
    # A GPU without a device file is not registered; any device will do.
    for number in range(GPUS):
        link = folder / f"run/gpu{number}"
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    gres = f"NodeName={host} Name=gpu File={folder}/run/gpu[0-{GPUS - 1}]\n"
    (folder / "etc/gres.conf").write_text(gres)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    # The executor's job step takes SLURM_CONF away before it calls srun; a real cluster has its
    # configuration in the usual place.
    wrapper = folder / "bin/srun"
    srun = shutil.which("srun", path=PATH)
    wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/etc/slurm.conf exec {srun} "$@"\n')
    wrapper.chmod(0o755)


def _start_daemons(folder: Path, env: dict[str, str]) -> None:
    munged = [
        "munged",
        f"--key-file={folder}/munge/key",
        f"--socket={folder}/run/munge.sock",
        f"--pid-file={folder}/run/munged.pid",
        f"--log-file={folder}/munge/munged.log",
        f"--seed-file={folder}/munge/seed",
    ]
    host = socket.gethostname().split(".")[0]
    for command in (munged, ["slurmctld", "-c"], ["slurmd", "-c", "-N", host]):
        # Each puts itself in the background, and keeps what it was given as standard output.
        with open(folder / f"log/{command[0]}.out", "wb") as out:
            program = shutil.which(command[0], path=env["PATH"])
            done = subprocess.run(
                [program, *command[1:]],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=60,
            )
        if done.returncode:
            raise RuntimeError(_failure(folder, f"{command[0]} ended with {done.returncode}"))


def _wait_until_idle(folder: Path, env: dict[str, str], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        command = ["sinfo", "-h", "-p", "cpu", "-o", "%T"]
        state = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60
        ).stdout.strip()
        if state == "idle":
            return
        time.sleep(0.1)
    raise RuntimeError(_failure(folder, f"the node is {state or 'unknown'} after {patience} s"))


def _failure(folder: Path, what: str) -> str:
    logs = [*sorted((folder / "log").iterdir()), folder / "munge/munged.log"]
    tails = [f"--- {path}\n" + path.read_text()[-1500:] for path in logs if path.is_file()]
    return "\n".join([f"SLURM did not start: {what}", *tails])


def down(folder: Path, patience: float = 10) -> None:
    """Stop the daemons that the folder's pid files name, the last ones by force."""
    for name in DAEMONS:
        file = folder / f"run/{name}.pid"
        if not file.is_file() or not file.read_text().strip():
            continue
        number = int(file.read_text())
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + patience
            while _is(number, name) and time.monotonic() < deadline:
                os.kill(number, wanted)
                time.sleep(0.1)
        file.unlink(missing_ok=True)


def _is(number: int, name: str) -> bool:
    """Whether a process is there, is of this program, and is no zombie."""
    try:
        status = Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False
    return status.split()[1] == name and "\nState:\tZ" not in status


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        sys.exit(__doc__)
    folder = Path(sys.argv[2])
    if sys.argv[1] == "down":
        down(folder.resolve())
        return
    if absent := missing():
        sys.exit(f"error: no {', '.join(absent)}; on Debian: apt-get install slurm-wlm munge")
    for name, value in up(folder).items():
        print(f"export {name}='{value}'")


if __name__ == "__main__":
    main()
