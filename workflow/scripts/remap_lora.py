"""Turns a LoRA of the teacher into one for a pruned pipeline.

    python workflow/scripts/remap_lora.py --lora style.safetensors \
        --model results/digits-depth/models/b16 --output style-b16.safetensors \
        --config config/digits-depth.yaml
    python workflow/scripts/remap_lora.py --lora style.safetensors \
        --model results/digits/models/p70 --merge p70-style

Blocks are renumbered as block_map.json tells. Without more, a block that stands for several has the
LoRA of the first.

With --config, the run's, all layers are then fitted: the teacher makes pictures of the run's
prompts with the LoRA, and what the LoRA changes in the pruned model's answers becomes what it
changes in the teacher's. A large LoRA also makes up for what the pruned model itself has lost
there. Whole blocks get layers on all their linear parts. With --calls and --teacher, the fit is on
the calls that the run has recorded without the LoRA, which needs no pipeline but the transformer,
and is less near. On a large model, fewer --pictures and --steps do.

--output writes a LoRA file, or with --style peft a folder. A modulation of low rank gets the
projection of its layer, for which --conditioning tells its inputs (activations/ of the run), and
the share of the change that is lost is printed. --merge writes a pipeline that has the LoRA in its
weights, without such a loss: these modulations become wider by the LoRA's rank.

The LoRA may be of any style that diffusers or peft reads. What can't be used is printed with the
reason.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl import program
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.export import (
    assembly,
    block_maps,
    lora_calls,
    lora_files,
    lora_fit,
    lora_remap,
    lora_styles,
)
from ppcl.export.lora_layers import LoraFile
from ppcl.export.lora_remap import Given, Remapped
from ppcl.extraction import conditioning
from ppcl.runtime import processes
from ppcl.settings import TeacherSettings
from ppcl.storage import tensors, whole
from ppcl.teacher import arguments, hub, pipelines, prompts, teacher_identity
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
    parser.add_argument(
        "--config", help="of the run, or inline JSON: fit on the teacher's pictures"
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
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of its weights")
    parser.add_argument("--device", default="auto", help="where to fit: auto, cpu, cuda or mps")
    steps = lora_fit.FitOptions.steps
    parser.add_argument("--steps", type=int, default=steps, help="of the fit (%(default)s)")
    parser.add_argument(
        "--pictures", type=int, default=512, help="to make, with --config (%(default)s)"
    )
    return parser.parse_args()


def refuse(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, or an output that is there."""
    for option in ("output", "merge"):
        if (target := getattr(args, option)) and target.exists():
            raise UserError(f"--{option}: {target} is there already; name a new one")
    if args.config and (args.calls or args.teacher):
        raise UserError("--config tells the teacher: leave --calls and --teacher out")
    if (args.calls is None) != (args.teacher is None):
        raise UserError("--calls and --teacher go together: a fit needs both, or --config alone")
    if (args.config or args.calls) and args.dtype != "float32":
        raise UserError("--dtype: a fit is in float32; leave it out")
    if args.steps < 2:
        raise UserError("--steps: a fit takes 2 steps at least")
    if args.pictures < 1:
        raise UserError("--pictures: a fit takes 1 at least")
    if args.output and (args.output.suffix == ".safetensors") == (args.style == "peft"):
        wanted = "a folder for peft" if args.style == "peft" else "a .safetensors file"
        raise UserError(f"--output: {args.output} is not the name of {wanted}")


def settings(args: argparse.Namespace, folder: Path, **more: Any) -> TeacherSettings:
    """The settings to load a pipeline's component with."""
    of = {"path": str(folder), "component": args.component, "dtype": args.dtype}
    return TeacherSettings.of(of | more)


def known(args: argparse.Namespace, file: LoraFile, scratch: Path) -> Given:
    """What is given beside the LoRA and the model. scratch: an empty folder."""
    moments = conditioning.read(args.conditioning) if args.conditioning else None
    options = lora_fit.FitOptions(steps=args.steps)
    if args.config:
        return Given(moments, with_the_lora(args, file, options, scratch), options)
    if not args.calls:
        return Given(moments)
    accelerator = processes.accelerator(args.device)
    reader = calls.Reader(args.calls)
    if teacher_identity.had_loras(reader.provenance):
        raise UserError(
            "--teacher: LoRAs were fused into it when --calls were recorded, which its folder does "
            "not tell; give the run's config (--config) in place of both"
        )
    # It changes nothing in the transformer, and is not asked for here.
    scheduler = teacher_identity.recorded_scheduler(reader.provenance)
    source = settings(args, args.teacher, scheduler=scheduler)
    teacher = teacher_identity.recorded(source, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, key="--teacher")
    return Given(moments, Context(transformer, reader, 0, accelerator), options)


def with_the_lora(
    args: argparse.Namespace, file: LoraFile, options: lora_fit.FitOptions, scratch: Path
) -> Context:
    """The config's teacher, and its calls with the LoRA."""
    given = config.load(args.config)
    rows = prompts.read(given.record.prompts, "record.prompts")
    arguments.before_loading(given.teacher, given.pipeline, rows, "record.prompts")
    accelerator = processes.accelerator(args.device)
    teacher = given.teacher.replace(component=args.component, dtype="float32")
    pipe = pipelines.load(teacher_identity.resolved(teacher), accelerator.device)
    transformer = pipelines.denoiser(pipe, teacher).requires_grad_(False)
    lora_remap.refuse_others(transformer, file)
    samples = pipelines.samples(rows, args.pictures, given.seed)
    reader = lora_calls.record(
        pipe, transformer, file.layers, samples, given, options.calls, scratch
    )
    return Context(transformer, reader, given.seed, accelerator)


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
    trusted = assembly.may_run(args.model, args.component)
    source = settings(args, args.model, trust_remote_code=trusted)
    pipe = pipelines.load(source, torch.device("cpu"), key="--model")
    model = pipelines.denoiser(pipe, source).requires_grad_(False)
    count = len(blocks.block_sequence(model))
    block_map = block_maps.read(args.model / args.component, count)
    file = lora_files.read(type(pipe), args.lora, args.component, model)
    make = lora_remap.merge if args.merge else lora_remap.remap
    with tempfile.TemporaryDirectory() as scratch:
        given = known(args, file, Path(scratch))
        if given.teacher:
            model.to(given.teacher.device)
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
