"""Pictures of teacher and variants: made by tasks for `workers`, a batch at a time."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ppcl.evaluation.metrics import TEACHER
from ppcl.evaluation.model_folders import Model, broken
from ppcl.runtime import stopping
from ppcl.storage import schemas, tables
from ppcl.teacher import pipelines, prompt_tokens

FIRST_SEED = 1_000_000_000  # of pictures; far from record's, which count up from the config's

SOURCE_SIDE = 512  # pixels, of a given picture as it is kept

_loaded: dict[str, tuple[Model, DiffusionPipeline]] = {}


def _pipeline(model: Model, device: torch.device) -> DiffusionPipeline:
    """The model's pipeline; this process keeps the one that it used last."""
    if _loaded.get("last", (None, None))[0] != model:
        _loaded.clear()
        _loaded["last"] = (model, model.pipeline(device))
    return _loaded["last"][1]


def plan_batches(
    model: Model,
    device: torch.device,
    settings: Mapping,
    items: list[dict],
    size: int,
    key: str = "evaluate.prompts",
) -> list[list[dict]]:
    """`pipelines.in_batches` as a worker's task, so that only workers load the pipeline. Warns of
    prompts that are cut, of the file that the config's `key` names."""
    pipe = _pipeline(model, device)
    texts = [item["prompt"] for item in items]
    prompt_tokens.warn_of_cut(pipe, texts, settings, key)
    return pipelines.in_batches(pipe, items, size)


def generate(
    model: Model, device: torch.device, settings: Mapping, batch: list[dict], part: Path
) -> None:
    """Makes one batch of pictures into a table (schemas.IMAGES), unless it is there already.

    Args:
        settings: the config's `pipeline` mapping.
        batch: per picture: prompt_index, prompt, seed and, if the prompts have one, image.

    Raises:
        UserError: a picture holds NaN or infinity.
    """
    if part.exists():
        return
    pipe = _pipeline(model, device)
    prompts, seeds = [item["prompt"] for item in batch], [item["seed"] for item in batch]
    given = [item.get("image") for item in batch]
    made = pipelines.run(pipe, prompts, seeds, settings, given, output_type="np")
    images, frames = stacked(made)
    if not np.isfinite(images).all():
        raise broken(model.name, "a picture")
    rounded = (images * 255).round().astype(np.uint8)
    columns = {
        "variant": [model.name] * len(batch),
        "prompt": prompts,
        "seed": seeds,
        "png": [to_png(picture) for picture in rounded],
        "read": [""] * len(batch),
        "prompt_index": [item["prompt_index"] for item in batch],
        "frames": [frames] * len(batch),
        "source": [_source(path) if model.name == TEACHER else b"" for path in given],
    }
    with stopping.part():
        tables.write(part, pa.table(columns), schemas.IMAGES, {})


def _source(path: str | None) -> bytes:
    """PNG bytes of the picture that a prompt names, made small enough for a figure; empty if it
    names none."""
    if path is None:
        return b""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((SOURCE_SIDE, SOURCE_SIDE))
    return to_png(np.asarray(picture))


def stacked(made) -> tuple[np.ndarray, int]:
    """What a pipeline made with output_type "np", float [batch, height, width, 3], and the number
    of frames of each: those of a video are one below the other."""
    if hasattr(made, "images"):
        return np.asarray(made.images), 1
    frames = np.asarray(made.frames)  # [batch, frames, height, width, 3]
    return frames.reshape(len(frames), -1, *frames.shape[3:]), frames.shape[1]


def to_png(picture: np.ndarray) -> bytes:
    """PNG bytes of a picture [height, width, 3], uint8."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """The picture [height, width, 3], uint8, of PNG bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
