"""Turns a LoRA of the teacher into one for a pruned pipeline.

    python workflow/scripts/remap_lora.py --lora style.safetensors \
        --model results/digits-depth/models/b16 --output style-b16.safetensors \
        --calls results/digits-depth/record/calls.parquet --teacher resources/digits
    python workflow/scripts/remap_lora.py --lora style.safetensors \
        --model results/digits/models/p70 --merge p70-style

Blocks are renumbered as block_map.json tells. With --calls and --teacher, all layers are then
fitted: what the LoRA changes in the pruned model's answers becomes what it changes in the
teacher's. Without them, a block that stands for several has the LoRA of the first.

--output writes a LoRA file, or with --style peft a folder. A modulation of low rank gets the
projection of its layer, for which --conditioning tells its inputs (activations/ of the run), and
the share of the change that is lost is printed. --merge writes a pipeline that has the LoRA in its
weights, without such a loss: these modulations become wider by the LoRA's rank.

The LoRA may be of any style that diffusers or peft reads. What can't be used is printed with the
reason.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl import program
from ppcl.errors import UserError
from ppcl.export import assembly, block_maps, lora_files, lora_fit, lora_remap, lora_styles
from ppcl.export.lora_remap import Given, Remapped
from ppcl.extraction import conditioning
from ppcl.runtime import processes
from ppcl.settings import TeacherSettings
from ppcl.storage import tensors, whole
from ppcl.teacher import hub, pipelines, teacher_identity
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        reads=("model", "lora"),
        may_read=("conditioning", "calls", "teacher"),
        model="folder of a pruned pipeline",
        lora="file of a LoRA of the teacher",
        teacher="folder of the teacher's pipeline; with --calls",
    )
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", type=Path, help="output: a LoRA file")
    output.add_argument("--merge", type=Path, help="output: a pipeline folder")
    parser.add_argument(
        "--style",
        choices=list(lora_styles.STYLES),
        default="diffusers",
        help="names in --output (%(default)s)",
    )
    parser.add_argument("--component", default="transformer", help="the pipeline's pruned part")
    parser.add_argument("--dtype", default="float32", help="number format of its weights")
    parser.add_argument("--device", default="auto", help="where to fit: auto, cpu, cuda or mps")
    parser.add_argument("--steps", type=int, default=400, help="of the fit (%(default)s)")
    return parser.parse_args()


def refuse(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, or an output that is there."""
    for option in ("output", "merge"):
        if (target := getattr(args, option)) and target.exists():
            raise UserError(f"--{option}: {target} is there already; name a new one")
    if (args.calls is None) != (args.teacher is None):
        raise UserError("--calls and --teacher go together: a fit needs both")
    if args.calls and args.dtype != "float32":
        raise UserError("--calls: the fit is in float32; leave --dtype out")
    if args.steps < 2:
        raise UserError("--steps: a fit takes 2 steps at least")
    if args.output and (args.output.suffix == ".safetensors") == (args.style == "peft"):
        wanted = "a folder for peft" if args.style == "peft" else "a .safetensors file"
        raise UserError(f"--output: {args.output} is not the name of {wanted}")


def settings(args: argparse.Namespace, folder: Path, **more: Any) -> TeacherSettings:
    """The settings to load a pipeline's component with."""
    of = {"path": str(folder), "component": args.component, "dtype": args.dtype}
    return TeacherSettings.of(of | more)


def known(args: argparse.Namespace) -> Given:
    """What is given beside the LoRA and the model."""
    moments = conditioning.read(args.conditioning) if args.conditioning else None
    if not args.calls:
        return Given(moments)
    accelerator = processes.accelerator(args.device)
    reader = calls.Reader(args.calls)
    # It changes nothing in the transformer, and is not asked for here.
    scheduler = teacher_identity.recorded_scheduler(reader.provenance)
    source = settings(args, args.teacher, scheduler=scheduler)
    teacher = teacher_identity.recorded(source, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, key="--teacher")
    context = Context(transformer, reader, 0, accelerator)
    return Given(moments, context, lora_fit.FitOptions(steps=args.steps))


def write(path: Path, made: Remapped, args: argparse.Namespace, pipe, model: nn.Module) -> None:
    """Writes the LoRA in the style that is asked for."""
    state = lora_styles.styled(made.file, args.style, type(pipe), args.component, model)
    if args.style != "peft":
        tensors.write(path, state, {"format": "pt"})
        return
    with whole.writing(path, folder=True) as folder:
        tensors.write(folder / "adapter_model.safetensors", state, {"format": "pt"})
        lora_fit.peft_config(model, made.file.layers).save_pretrained(str(folder))


def report(made: Remapped, args: argparse.Namespace) -> None:
    """Prints what became of the LoRA."""
    for path, share in made.lost.items():
        print(f"{path}: {share:.2%} of what it changes is lost")
    for key, why in made.file.unusable.items():
        print(f"{key} {why}")
    if made.errors:
        last = made.errors[-max(1, len(made.errors) // 10) :]
        went = f"{made.errors[0]:.3f} to {sum(last) / len(last):.3f}"
        print(f"fitted: the squared error of what it changes went from {went} of it")
    print(f"{len(made.file.layers)} layers are in {args.output or args.merge}")


def main() -> None:
    args = command_line()
    refuse(args)
    assembly.verify(args.model)
    if args.component not in hub.parts(args.model, "--model"):
        raise UserError(f"--component: {args.model} has no {args.component}")
    trusted = assembly.own_code(args.model, args.component)
    source = settings(args, args.model, trust_remote_code=trusted)
    pipe = pipelines.load(source, torch.device("cpu"), key="--model")
    model = pipelines.denoiser(pipe, source).requires_grad_(False)
    count = len(blocks.block_sequence(model))
    block_map = block_maps.read(args.model / args.component, count)
    file = lora_files.read(type(pipe), args.lora, args.component, model)
    given = known(args)
    if given.teacher:
        model.to(given.teacher.device)
    make = lora_remap.merge if args.merge else lora_remap.remap
    made = make(model, block_map, file, given)
    model.to("cpu")
    if args.merge:
        model = assembly.with_code(model)
        with whole.writing(args.merge, folder=True) as folder:
            assembly.save(assembly.TeacherPipeline(pipe, args.component), model, block_map, folder)
        print(f"{args.merge}: {blocks.parameter_count(model)} parameters")
    else:
        write(args.output, made, args, pipe, model)
    report(made, args)


if __name__ == "__main__":
    program.run(main)
