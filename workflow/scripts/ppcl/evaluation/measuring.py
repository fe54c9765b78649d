"""What is measured of transformers side by side: size, velocity error, latency, memory."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ppcl.closed_forms import modulation
from ppcl.evaluation import metrics, timing, velocities
from ppcl.evaluation.metrics import TEACHER, Estimate, Estimates
from ppcl.evaluation.model_folders import Model
from ppcl.pruning import quantisable
from ppcl.runtime import devices
from ppcl.settings import Settings
from ppcl.transformer import blocks, calls


def measure_transformers(
    transformers: Mapping[str, nn.Module],
    reader: calls.Reader,
    timed: np.ndarray,
    settings: Settings,
    device: torch.device,
    accelerator: Accelerator | None = None,
) -> Estimates:
    """Size, velocity error and latency of every transformer.

    Args:
        transformers: by name; one is the teacher.
        timed: rows of the batch whose time is measured.
        accelerator: of several processes, all of which call this. They share out the velocity
            errors; then the main process measures latencies while the others are idle. None: this
            process does all.

    Returns:
        model -> metric -> estimate; latencies in the main process alone.
    """
    options, seed = settings.evaluate, settings.seed
    resamples = options.bootstrap
    # The same number for all models, whichever was loaded last.
    threads = devices.use_threads(transformers[TEACHER].parameters(), device)
    estimates: Estimates = {}
    for name, transformer in transformers.items():
        estimates[name] = sizes(transformer, transformers[TEACHER])

    rows = np.sort(reader.sample_heldout("report", options.velocity_rows, seed, "velocity_rows"))
    others = {name: module for name, module in transformers.items() if name != TEACHER}
    compared = velocities.compared(others, reader, rows, options.batch_size, device, accelerator)
    # The teacher's answers are the recorded ones, so its error is zero by definition.
    one = next(iter(compared.values()))
    compared[TEACHER] = one | {"error": np.zeros(len(rows))}
    for name, columns in compared.items():
        buckets = metrics.sigma_buckets(columns["sigma"])
        masks = {"": np.ones(len(rows), bool)} | {f"_{key}": m for key, m in buckets.items()}
        for suffix, mask in masks.items():
            errors, norms, of = (columns[key][mask] for key in ("error", "norm", "prompt_index"))
            estimates[name][f"velocity_error{suffix}"] = metrics.ratio(
                errors, norms, of, resamples, seed
            )

    if accelerator is None or accelerator.is_main_process:
        processes = accelerator.num_processes if accelerator else 1
        alone = timing.all_cores(processes) if threads and processes > 1 else nullcontext()
        with alone:
            for name, times in timing.latencies(
                transformers, reader, timed, settings, device
            ).items():
                estimates[name] |= times
    return estimates


def sizes(transformer: nn.Module, teacher: nn.Module) -> dict[str, Estimate]:
    """Parameters, and their share of the teacher's; the same of bytes as stored, and of parameters
    without modulation matrices, if there are any: making these small saves memory, not time."""
    count, whole = blocks.parameter_count(transformer), blocks.parameter_count(teacher)
    sizes = {"parameters": float(count), "parameter_fraction": count / whole}
    stored = quantisable.stored_bytes(transformer)
    sizes["stored_bytes"] = float(stored)
    sizes["stored_fraction"] = stored / quantisable.stored_bytes(teacher)
    if of_whole := modulation.parameter_count(teacher):
        own = modulation.parameter_count(transformer)
        sizes["modulation_parameters"] = float(own)
        sizes["parameter_fraction_without_modulation"] = (count - own) / (whole - of_whole)
    return {name: Estimate(value) for name, value in sizes.items()}


@torch.no_grad()
def peak_memory(model: Model, device: torch.device, path: Path, rows: np.ndarray) -> int:
    """Bytes that loading the transformer and running one batch of recorded calls take at most.

    To be called in a fresh process: on a CPU only the process's peak is known, which never falls;
    what Python, its libraries and the batch took before is subtracted.
    """
    reader = calls.Reader(path)
    batch = reader.batch(rows).to(device)
    devices.reset_peak_memory(device)
    before = devices.peak_memory(device)
    model.transformer(device)(**batch.arguments)
    return devices.peak_memory(device) - before
