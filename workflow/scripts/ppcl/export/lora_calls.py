"""Calls of the teacher while it makes pictures with a LoRA.

A LoRA leads the denoising elsewhere, where it changes more and other things than on the calls that
the run has recorded without it. So the fit of `lora_fit` comes nearer on these. The pictures are
noised again as the run's are, which tells of states that other settings of the pipeline lead to.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from ppcl.export import lora_fit
from ppcl.export.lora_layers import Layer
from ppcl.settings import Settings
from ppcl.teacher import pipelines, recording
from ppcl.transformer import call_tables, calls


def record(
    pipe: DiffusionPipeline,
    transformer: nn.Module,
    layers: Mapping[str, Layer],
    samples: list[dict],
    settings: Settings,
    most: int,
    folder: Path,
) -> calls.Reader:
    """Records calls of a teacher with a LoRA; the teacher is as before when it is done.

    Args:
        transformer: the pipeline's component that the LoRA is of.
        layers: the LoRA's, by path in the teacher.
        samples: the pictures to make (`pipelines.samples`).
        settings: of the run.
        most: about how many calls to keep. Of each picture, as many are drawn at random.
        folder: an empty one, for the files that the reader reads.

    Raises:
        UserError: as `recording.record_batch`, or the class takes no adapters.
    """
    samples = [sample | {"heldout": False} for sample in samples]
    batches = pipelines.in_batches(pipe, samples, settings.record.batch_size)
    parts, rng = [], np.random.default_rng(settings.seed)
    with lora_fit.adapted(transformer, layers):
        for number, batch in enumerate(tqdm(batches, desc="recording", unit="batch")):
            every = recording.record_batch(
                pipe,
                transformer,
                batch,
                settings.pipeline,
                settings.record.renoised_per_sample,
                settings.seed,
                replayed=False,
            )
            kept = rng.permutation(len(every))[: max(1, most // len(samples))]
            part = folder / f"{number:05d}.parquet"
            call_tables.write(part, [t.schema for t in every], [every[i] for i in kept], {})
            parts.append(part)
    call_tables.merge(parts, folder / "calls.parquet", {})
    return calls.Reader(folder / "calls.parquet")
