"""The processes of a stage, one or several under `launch.py`: Accelerate's start and end, and what
they must agree on."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast

from ppcl import devices, stopping, surroundings


def accelerator(setting: str, mixed_precision: str = "no") -> Accelerator:
    """Accelerate for this process (one of several under `launch.py`), on the configured device.

    Raises:
        UserError: the device that the config asks for is not there.
    """
    surroundings.forget()  # accelerate reads some of them here
    # The main process measures and writes alone at the end; the others must have the patience.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(
        cpu=devices.choose(setting).type == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[patience],
    )


def of_main(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The main process's values, for all, on the CPU.

    What processes read of a shared disk can change between their looks at it, as when two runs of
    one config are at work; what they do next must be decided by one of them.
    """
    if accelerator.num_processes == 1:
        return values
    return broadcast(values.to(accelerator.device), from_process=0).cpu()


def finish(accelerator: Accelerator) -> None:
    """Waits for all processes and leaves the process group; results must be written before."""
    stopping.ignore()
    accelerator.wait_for_everyone()
    accelerator.end_training()
