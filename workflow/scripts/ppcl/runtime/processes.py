"""The processes of a stage, one or several under `launch.py`: Accelerate's start and end, and what
they must agree on."""

import os
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list

from ppcl.errors import UserError
from ppcl.runtime import devices, stopping, surroundings


def accelerator(setting: str, mixed_precision: str = "no") -> Accelerator:
    """Accelerate for this process (one of several under `launch.py`), on the configured device.

    Raises:
        UserError: the device that the config asks for is not there.
    """
    surroundings.forget()  # accelerate reads some of these variables here
    # The main process measures and writes alone at the end; the others must not time out.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(
        cpu=devices.choose(setting).type == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[patience],
    )


def of_main(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The main process's `values`, on the CPU; every process gets them.

    A shared disk can change between one process's look at it and another's, as when two runs of one
    config are at work; so one process must decide what all of them do next.
    """
    if accelerator.num_processes == 1:
        return values
    return broadcast(values.to(accelerator.device), from_process=0).cpu()


def in_turns(accelerator: Accelerator, count: int, folder: Path) -> Iterator[int]:
    """Numbers from 0 to `count` - 1, each for one process only: whoever is free takes the next.

    To be called by all processes, which wait for each other at the end. The lowest numbers should
    be the longest work, or one process ends late.

    Args:
        folder: on a disk that all processes share; it exists. Turns are files in it.

    Raises:
        UserError: a number was given twice or never, since they do not share the disk.
    """
    if accelerator.num_processes == 1:
        yield from range(count)
        return
    # A name of this call's own: a killed run leaves its turns behind.
    (name,) = broadcast_object_list([uuid.uuid4().hex])
    turns = [folder / f".turn-{name}-{number}" for number in range(count)]
    taken = torch.zeros(count, dtype=torch.int64, device=accelerator.device)
    for number, turn in enumerate(turns):
        try:
            os.close(os.open(turn, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        taken[number] = 1
        yield number
    times = accelerator.reduce(taken, reduction="sum")
    for turn in turns:
        turn.unlink(missing_ok=True)
    if (times != 1).any():
        raise UserError(
            f"{folder}: the processes of this stage do not see each other's files there, so some "
            "work was done twice or not at all; put results/ on a disk that all machines of a job "
            "share, or set processes: 1"
        )


def finish(accelerator: Accelerator) -> None:
    """Waits for all processes and leaves the process group; results must be written before."""
    stopping.ignore()
    accelerator.wait_for_everyone()
    accelerator.end_training()
