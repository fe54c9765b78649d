"""Fine-tuning of a whole variant: made ready, its losses, and which of its weights are kept."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ppcl.settings import FinetuneSettings
from ppcl.teacher import teacher_identity
from ppcl.training import distillation, fsdp, loop, steps
from ppcl.training.picture_loss import Pictures
from ppcl.transformer import blocks, diffusers_model
from ppcl.transformer.context import Context, State

log = logging.getLogger(__name__)
NAME = "transformer"
JUDGED = 64  # held-out recorded calls that tell, with pictures, whether training did any good


@dataclass(frozen=True)
class Lesson:
    """What a variant is fine-tuned on.

    Attributes:
        context: the model and the teacher's recorded calls.
        options: the variant's own.
        pictures: the user's; None without any.
    """

    context: Context
    options: FinetuneSettings
    pictures: Pictures | None


def lesson(context: Context, options: FinetuneSettings, encoded: Path | None) -> Lesson:
    """Opens the encoded pictures, if there are any.

    Raises UserError if another teacher encoded them.
    """
    pictures = None
    if encoded:
        pictures = Pictures(encoded, options, context.seed, context.accelerator)
        teacher_identity.refuse_other(pictures.reader.provenance, context.reader.provenance)
    return Lesson(context, options, pictures)


def trainable(model: nn.Module, options: FinetuneSettings, accelerator: Accelerator) -> nn.Module:
    """The model in float32 with gradients, on the device or shared out over the processes."""
    shared_out = options.sharding == "fsdp" and (
        accelerator.num_processes > 1 or options.cpu_offload
    )
    if not shared_out:  # first, so that main memory need not hold it in float32
        model.to(accelerator.device)
    # In evaluation mode, as the teacher was: some classes answer in another shape in training.
    model = model.float().eval().requires_grad_(True)
    if options.gradient_checkpointing:
        diffusers_model.of(model).enable_gradient_checkpointing()
    if shared_out:
        every = [block.module for block in blocks.block_sequence(model)]
        fsdp.shard(model, every, accelerator, options.cpu_offload)
    return model


def train(of: Lesson, state: State) -> tuple[list[dict], dict[str, Any], dict[str, str]]:
    """Trains the model of the lesson's context.

    With pictures, the weights that it started from are kept if training did not lower the weighted
    sum of both losses on what is held out.

    Returns:
        The rows of the log; the weights, in the main process; and facts for the log's provenance.
    """
    model, accelerator = of.context.transformer, of.context.accelerator

    def weights() -> dict[str, Any]:
        return fsdp.gathered(model.state_dict(), keep=accelerator.is_main_process)

    start, before = {}, {}
    if of.pictures:
        start = {key: value.detach().cpu().clone() for key, value in weights().items()}
        before = judged(of)
    rows = loop.train(
        {NAME: model},
        _losses(of),
        loop.Optimisation.from_settings(of.options),
        accelerator,
        state.folder / "checkpoint.safetensors",
        state.identity,
        _measure(of) if of.pictures else None,
    )
    if not of.pictures:
        return rows, weights(), {}
    after = judged(of)
    better = after["sum"] < before["sum"]
    if not better:
        log.warning(
            "fine-tuning raised the weighted loss on what is held out from %.5g to %.5g, so the "
            "weights from before are kept; lower finetune.lr, or give more pictures",
            before["sum"],
            after["sum"],
        )
    facts = {"before": before, "after": after, "kept": "trained" if better else "start"}
    return rows, weights() if better else start, {"heldout": json.dumps(facts)}


def judged(of: Lesson) -> dict[str, float]:
    """The losses on what is held out, and their weighted sum; those with weight 0 left out."""
    assert of.pictures is not None, "asked for with pictures alone"
    context, parts, total = of.context, {}, 0.0
    if weight := of.options.weights.distillation:
        rows = context.reader.sample_heldout("select", JUDGED, context.seed)
        errors = 0.0
        with torch.no_grad():
            for batch in context.reader.batches(rows, of.options.batch_size, context.device):
                error = steps.velocity_loss(
                    context.transformer,
                    batch.to(context.device),
                    context.accelerator,
                    in_float32=True,
                )
                errors += float(error) * len(batch.numbers)
        parts["velocity_error"] = errors / len(rows)
        total += weight * parts["velocity_error"]
    if weight := of.options.weights.pictures:
        parts["picture_loss"] = of.pictures.heldout(context.transformer)
        total += weight * parts["picture_loss"]
    return parts | {"sum": total if math.isfinite(total) else math.inf}


def _measure(of: Lesson):
    """For the log: the loss on pictures that are held out."""
    assert of.pictures is not None
    pictures = of.pictures
    return lambda: {"heldout_picture_loss": pictures.heldout(of.context.transformer)}


def _losses(of: Lesson) -> loop.Losses:
    """The losses of a step: output distillation and, with pictures, flow matching, each times its
    weight; one graph after the other."""
    model, options, pictures = of.context.transformer, of.options, of.pictures
    distilled = distillation.output_distillation(
        of.context, lambda _step: model, NAME, options, in_float32=True
    )
    if pictures is None:
        return distilled

    def losses_of_step(step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        if weight := options.weights.distillation:
            for name, error, metrics in distilled(step):
                yield name, weight * error, metrics
        if weight := options.weights.pictures:
            loss = pictures.loss(model, step)
            yield NAME, weight * loss, {"picture_loss": loss}

    return losses_of_step
