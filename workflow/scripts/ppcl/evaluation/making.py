"""Makes the pictures of several models in parallel processes, to be resumed batch by batch."""

from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from ppcl.evaluation import generation, workers
from ppcl.evaluation.model_folders import Model
from ppcl.settings import Settings


def pictures(
    models: list[Model],
    samples: list[dict],
    settings: Settings,
    device: torch.device,
    state: Path,
    key: str,
    finished: Callable[[Path], None] = lambda part: None,
) -> dict[str, list[Path]]:
    """Every model's pictures of the same prompts and seeds: model -> tables of batches
    (schemas.IMAGES), in one order for all. Those that are in `state` already stay.

    Args:
        samples: as `generation.generate`, with their numbers (`sample`).
        state: a folder for these samples and settings alone; each model has one below it.
        key: of the config, that names the prompts file, for messages.
        finished: is called with each table, in any order, while others are still made.
    """
    parts: dict[str, list[Path]] = {}
    with workers.pool(workers.process_count(settings.processes, device)) as pool:
        batches = pool.submit(
            generation.plan_batches,
            models[0],
            device,
            settings.pipeline,
            samples,
            settings.evaluate.batch_size,
            key,
        ).result()
        tasks = {}
        for model in models:
            folder = state / f"{model.name}-{model.digest()[:16]}"
            parts[model.name] = [folder / f"{n:05d}.parquet" for n in range(len(batches))]
            for part, batch in zip(parts[model.name], batches, strict=True):
                task = pool.submit(
                    generation.generate, model, device, settings.pipeline, batch, part
                )
                tasks[task] = part
        bar = tqdm(as_completed(tasks), total=len(tasks), desc="generating", unit="batch")
        for task in bar:
            task.result()
            finished(tasks[task])
    return parts
