"""Puts a LoRA of the teacher into a pruned pipeline whose modulation is of low rank.

    python workflow/scripts/lora_to_low_rank.py --model results/digits/models/p70 \
        --lora style.safetensors --merged p70-style
    python workflow/scripts/lora_to_low_rank.py --model results/digits/models/p70 \
        --lora style.safetensors --projected p70-style.safetensors \
        --conditioning results/digits/activations/conditioning.safetensors

--merged writes a pipeline that has the LoRA in its weights, exactly; products of low rank become
wider by its rank. --projected writes a LoRA file for the pipeline as it is, and prints what share
of each modulation's change is lost. Blocks are renumbered as block_map.json tells.
"""

import argparse
from pathlib import Path

import torch

from ppcl import program
from ppcl.errors import UserError
from ppcl.export import assembly, block_maps, lora
from ppcl.extraction import conditioning
from ppcl.settings import TeacherSettings
from ppcl.storage import tensors, whole
from ppcl.teacher import hub, pipelines
from ppcl.transformer import blocks


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        reads=("model", "lora"),
        may_read=("conditioning",),
        model="folder of a pruned pipeline",
        lora="file of a LoRA of the teacher",
    )
    parser.add_argument("--component", default="transformer", help="the pipeline's pruned part")
    parser.add_argument("--dtype", default="float32", help="number format of its weights")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--merged", type=Path, help="output: a pipeline folder")
    output.add_argument("--projected", type=Path, help="output: a LoRA file")
    return parser.parse_args()


def main() -> None:
    args = command_line()
    if args.projected and not args.conditioning:
        raise UserError("--projected needs --conditioning, which `extract` has written")
    for option in ("merged", "projected"):
        if (target := getattr(args, option)) and target.exists():
            raise UserError(f"--{option}: {target} is there already; name a new one")
    assembly.verify(args.model)
    if args.component not in hub.parts(args.model, "--model"):
        raise UserError(f"--component: {args.model} has no {args.component}")
    source = TeacherSettings.of(
        {
            "path": str(args.model),
            "component": args.component,
            "dtype": args.dtype,
            "trust_remote_code": assembly.own_code(args.model, args.component),
        }
    )
    pipe = pipelines.load(source, torch.device("cpu"), key="--model")
    model = pipelines.denoiser(pipe, source)
    count = len(blocks.block_sequence(model))
    block_map = block_maps.read(args.model / args.component, count)
    layers = lora.read(type(pipe), args.lora, args.component)
    if args.merged:
        gone = lora.merge(model, block_map, layers)
        model = assembly.with_code(model)
        with whole.writing(args.merged, folder=True) as folder:
            assembly.save(assembly.TeacherPipeline(pipe, args.component), model, block_map, folder)
        print(f"{args.merged}: {blocks.parameter_count(model)} parameters")
    else:
        moments = conditioning.read(args.conditioning)
        made, lost, gone = lora.projected(model, block_map, layers, moments)
        tensors.write(args.projected, lora.state(made, args.component), {"format": "pt"})
        for path, share in lost.items():
            print(f"{path}: {share:.2%} of what it changes is lost")
    print(f"{len(layers) - len(gone)} of {len(layers)} layers have a place in {args.model}")
    for path in gone:
        print(f"{path} is gone")


if __name__ == "__main__":
    program.run(main)
