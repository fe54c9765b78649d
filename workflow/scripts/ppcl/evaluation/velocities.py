"""Velocity errors of models on recorded calls, in one process or shared out over several."""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ppcl.evaluation import metrics
from ppcl.evaluation.model_folders import broken
from ppcl.transformer import blocks, calls


@torch.no_grad()
def velocity_errors(
    name: str,
    transformer: nn.Module,
    reader: calls.Reader,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Replays recorded calls and compares with the teacher's recorded answers.

    Returns:
        Per row, in one order for all models: error and norm (metrics.squared_errors),
        prompt_index, sigma.

    Raises:
        UserError: the model answers with NaN or infinity, or a recorded answer is all zero.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for recorded in reader.batches(rows, batch_size, device):
        batch = recorded.to(device)
        output = blocks.answer(transformer, batch.arguments).cpu().double().numpy()
        if not np.isfinite(output).all():
            raise broken(name, "the transformer's output")
        error, norm = metrics.squared_errors(output, recorded.output.double().numpy())
        calls.refuse_zeros(norm.min())
        per_row = {"error": error, "norm": norm}
        per_row |= {name: recorded.rows[name] for name in ("prompt_index", "sigma")}
        for column, values in per_row.items():
            columns.setdefault(column, []).append(values)
    return {name: np.concatenate(values) for name, values in columns.items()}


def compared(
    transformers: Mapping[str, nn.Module],
    reader: calls.Reader,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device,
    accelerator: Accelerator | None,
) -> dict[str, dict[str, np.ndarray]]:
    """`velocity_errors` of every transformer: model -> `error`, `norm`, `prompt_index`, `sigma`,
    each [rows]. Several processes share out the batches, and all return all rows."""
    named = tqdm(
        transformers.items(),
        desc="comparing velocities",
        unit="model",
        disable=accelerator is not None and not accelerator.is_main_process,
    )
    if accelerator is None or accelerator.num_processes == 1:
        return {
            name: velocity_errors(name, transformer, reader, rows, batch_size, device)
            for name, transformer in named
        }
    rank, count = accelerator.process_index, accelerator.num_processes
    batches = reader.in_batches(rows, batch_size)
    ends = np.cumsum([len(batch) for batch in batches])
    # One process measures a batch of a model; the others have zeros there, so the sum has it all.
    measured = torch.zeros(len(transformers), 2, len(rows), dtype=torch.float64)
    for model, (name, transformer) in enumerate(named):
        # Shifted by the model: with few batches, not always the same processes should have work.
        for number in range((rank + model) % count, len(batches), count):
            batch, end = batches[number], ends[number]
            one = velocity_errors(name, transformer, reader, batch, len(batch), device)
            place = measured[model, :, end - len(batch) : end]
            place.copy_(torch.from_numpy(np.stack([one["error"], one["norm"]])))
    whole = accelerator.reduce(measured.to(accelerator.device), reduction="sum").cpu().numpy()
    order = np.concatenate(batches)
    about = {name: reader.index[name][order] for name in ("prompt_index", "sigma")}
    return {
        name: {"error": error, "norm": norm} | about
        for name, (error, norm) in zip(transformers, whole, strict=True)
    }
