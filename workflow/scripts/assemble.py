"""Assembles a complete pipeline folder for one variant, of what `choose` decided.

    python workflow/scripts/assemble.py --config config/digits.yaml --variant p70 \
        --calls results/digits/record/calls.parquet \
        --sets results/digits/variants/sets/p70.json \
        --refits results/digits/variants/maps.safetensors \
        --maps results/digits/width/maps.safetensors \
        --conditioning results/digits/activations/conditioning.safetensors \
        --start results/digits/prune/students.safetensors \
        --distill results/digits/distill/students.safetensors \
        --subsets results/digits/subsets/students.safetensors --output results/digits/models/p70
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.export import assembly, quantising, variant_files, variants
from ppcl.export.variant_files import Files
from ppcl.pruning import quantisable
from ppcl.pruning.quantisation import GIB
from ppcl.search import sets, sets_file
from ppcl.settings import TeacherSettings, Variant
from ppcl.storage import tensors
from ppcl.teacher import complete, hub, lora_files, loras, pipelines, teacher_identity
from ppcl.transformer import blocks, calls


def take_weights(model: nn.Module, path: Path, chosen: sets.Set, refits: str) -> None:
    """Fine-tuned weights, into the model. Raises UserError if they are of another set."""
    weights, metadata = tensors.read(path)
    if (metadata.get("set"), metadata.get("refits")) != (chosen.key, refits):
        raise UserError(f"{path} is of another set; delete it and rerun")
    model.load_state_dict(weights)


def refuse_other(args: argparse.Namespace, count: int, predicted: int) -> None:
    """Raises UserError unless the model has as many parameters as the file of sets predicts."""
    if count != predicted:
        raise UserError(
            f"variant {args.variant} has {count:,} parameters, but {args.sets} expects "
            f"{predicted:,}: it is of other files; delete it and rerun"
        )


def pruned_for(teacher: TeacherSettings, call: Mapping[str, Any]) -> dict[str, Any]:
    """For the card: the LoRAs that the weights hold, the keys of the scheduler's config that are
    not the original teacher's, and the arguments of the calls that were recorded.

    teacher: as `teacher_identity.recorded` gives it.
    """
    loras = [
        {"path": lora.path if lora_files.on_hub(lora) else Path(lora.path).name}  # no private one
        | {key: getattr(lora, key) for key in ("weight_name", "revision", "scale")}
        | {"component": lora_files.component(lora, teacher)}
        | {"sha256": lora_files.digest(lora)}
        for lora in teacher.loras
    ]
    return {"loras": loras, "scheduler": dict(teacher.scheduler), "pipeline": dict(call)}


def refuse_larger(variant: Variant, model: nn.Module) -> None:
    """Raises UserError if the model takes more bytes than its budget has, if it has one of them."""
    stored = quantisable.inventory(model, quantisable.names(model)).stored(variant.quantise)
    if stored > variant.budget.get("gib", math.inf) * GIB:
        raise UserError(
            f"variant {variant.name} takes {stored / GIB:.6g} GiB, more than its budget of "
            f"{variant.budget['gib']:g}: it is of other files; delete the run's folder variants "
            "and rerun"
        )


def command_line() -> argparse.Namespace:
    """The options."""
    return program.parser(
        __doc__,
        "config",
        "variant",
        reads=("calls", "sets"),
        may_read=(*variant_files.MODEL_FILES, "refits", "finetuned"),
        writes=("output",),
        output="the pipeline folder",
    ).parse_args()


def main() -> None:
    args = command_line()
    settings = config.load(args.config)
    variant = assembly.variant(settings, args.variant)
    quantising.refuse_missing(variant.quantise)
    written, files = sets_file.read(args.sets), Files.of(args)
    chosen = written.of(args.variant)
    refits = files.refits_digest(chosen, written.facts[args.variant].get("refits"))
    reader = calls.Reader(args.calls)
    recorded = teacher_identity.recorded(settings.teacher, reader.provenance)
    teacher = recorded.replace(offload="none")
    source = hub.folder(teacher)
    # What is only copied need not be in memory, unless its files have a variant in their names.
    copied = (
        () if teacher.variant else assembly.copied(source, loras.text_encoders(teacher, source))
    )
    pipe = pipelines.load(teacher, torch.device("cpu"), without=copied)
    transformer = pipelines.denoiser(pipe, teacher)
    model, block_map = variants.Workshop(transformer, files).model(chosen)
    model.eval()
    if args.finetuned:
        take_weights(model, args.finetuned, chosen, refits)
    count = blocks.parameter_count(model)
    refuse_other(args, count, written.parameters[args.variant])
    refuse_larger(variant, model)
    complete.refuse_incomplete(model, f"variant {args.variant}")
    example = reader.batch(reader.buckets[0][:2])
    card = {
        # Its entry as the config's file has it.
        "variant": next(v for v in settings.given["variants"] if v["name"] == args.variant),
        **sets.entry(chosen),
        "finetuned": bool(args.finetuned),
        "parameters": count,
        "parameter_fraction": count / blocks.parameter_count(transformer),
        **pruned_for(teacher, settings.pipeline),
        "teacher": teacher_identity.named(recorded),
        "provenance": provenance.stamp(settings.given),
    }
    whole, call = assembly.TeacherPipeline(pipe, hub.component(teacher), source), example.arguments
    assembly.export(whole, model, block_map, args.output, card, call, variant.quantise)


if __name__ == "__main__":
    program.run(main)
