"""Assembles a complete pipeline folder for one variant, from the students that cost least.

    python workflow/scripts/assemble.py --config config/digits.yaml --variant p70 \
        --calls results/digits/record/calls.parquet --plan results/digits/prune/plan.json \
        --students results/digits/subsets/students.safetensors \
        --errors results/digits/subsets/errors.parquet --output results/digits/models/p70
"""

import argparse
import json
from pathlib import Path

import torch

from ppcl import (
    assembly,
    blocks,
    calls,
    complete,
    config,
    errors,
    hub,
    pipelines,
    provenance,
    students,
    teacher_identity,
    tensors,
)
from ppcl.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--variant", required=True, help="name of the variant in the config")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet, for the check")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--students", type=Path, required=True, help="trained students")
    parser.add_argument("--errors", type=Path, required=True, help="their errors.parquet")
    parser.add_argument("--finetuned", type=Path, help="fine-tuned weights of this variant")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    variant = assembly.variant(settings, args.variant)

    plan = students.read_plan(args.plan)
    chosen = plan.named(assembly.choose(args.errors, plan.facts, variant, plan.pinned))
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings["teacher"], reader.provenance)
    teacher |= {"offload": "none"}
    source = hub.folder(teacher)
    # What is only copied need not be in memory, unless its files have a variant in their names.
    copied = () if teacher["variant"] else assembly.copied(source)
    pipe = pipelines.load(teacher, torch.device("cpu"), without=copied)
    transformer = pipelines.denoiser(pipe, teacher)
    taught = students.load(args.students, transformer, students.parts_of(chosen))
    whole = blocks.parameter_count(transformer)
    for part, student in taught.items():
        students.as_teacher(transformer, part, student)  # in place: copies would take more room
    model, _, block_map = students.plugged(transformer, taught)
    model.eval()
    if args.finetuned:
        weights, metadata = tensors.read(args.finetuned)
        if json.loads(metadata["units"]) != [unit.name for unit in chosen]:
            raise UserError(f"{args.finetuned} is of other units; delete it and rerun")
        model.load_state_dict(weights)
    complete.refuse_incomplete(model, f"variant {args.variant}")
    example = reader.batch(reader.buckets[0][:2])
    names = {unit.name for unit in chosen}
    card = {
        "variant": variant,
        "units": [entry for entry in plan.facts["units"] if entry["name"] in names],
        "finetuned": bool(args.finetuned),
        "parameters": blocks.parameter_count(model),
        "parameter_fraction": blocks.parameter_count(model) / whole,
        "provenance": provenance.stamp(settings),
    }
    assembly.export(
        pipe,
        model,
        block_map,
        args.output,
        card,
        example.arguments,
        hub.component(teacher),
        source,
    )


if __name__ == "__main__":
    errors.run(main)
