"""All that depends on the device: choice, number format, synchronisation, memory."""

import resource
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ppcl.errors import UserError


def choose(setting: str) -> torch.device:
    """The device to run on: `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device that the config asks for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if setting == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(setting.split(":")[0], False):
        there = ", ".join(name for name, ok in available.items() if ok)
        raise UserError(
            f"config key 'device': {setting} is not available here; use auto, or {there}"
        )
    return torch.device(setting)


def accelerator(setting: str, mixed_precision: str = "no") -> Accelerator:
    """Accelerate for this process (one of several under `launch.py`), on the configured device.

    Raises:
        UserError: the device that the config asks for is not there.
    """
    # The main process measures and writes alone at the end; the others must have the patience.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(
        cpu=choose(setting).type == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[patience],
    )


def finish(accelerator: Accelerator) -> None:
    """Waits for all processes and leaves the process group."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def dtype(name: str) -> torch.dtype:
    """A torch number format by name, such as bfloat16."""
    return getattr(torch, name)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it, for honest timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def statistics_device(device: torch.device) -> torch.device:
    """Where float64 sums are kept: on the device, unless it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of `peak_memory`, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on CUDA; of the whole process, since it started, elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
