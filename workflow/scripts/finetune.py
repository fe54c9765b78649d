"""Fine-tunes one assembled variant: all its parameters, towards the teacher's recorded velocity,
and with --encoded towards the user's own pictures, by the flow-matching loss.

One process:        python workflow/scripts/finetune.py --variant p50 --config ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/finetune.py --config config/digits.yaml --variant p50 \
    --calls results/digits/record/calls.parquet --sets results/digits/variants/sets/p50.json \
    --refits results/digits/variants/maps.safetensors \
    --maps results/digits/width/maps.safetensors \
    --conditioning results/digits/activations/conditioning.safetensors \
    --start results/digits/prune/students.safetensors \
    --distill results/digits/distill/students.safetensors \
    --subsets results/digits/subsets/students.safetensors \
    --state results/digits/state/finetune-p50 \
    --output results/digits/finetune/p50.safetensors --log-table results/digits/finetune/p50.parquet

Killed at any point, the same command resumes from the last checkpoint in --state and ends
with the same weights. With finetune.sharding: fsdp every process holds a share of the weights.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.export import assembly, variant_files, variants
from ppcl.export.variant_files import Files
from ppcl.runtime import processes, stopping
from ppcl.search import sets_file
from ppcl.search.sets import Set
from ppcl.settings import TeacherSettings
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import finetuning, loop
from ppcl.transformer import calls
from ppcl.transformer.context import Context, State


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        "variant",
        "state",
        reads=("calls", "sets"),
        may_read=(*variant_files.MODEL_FILES, "refits", "encoded"),
        writes=("output", "log_table"),
        output="finetune/<variant>.safetensors",
        log_table="finetune/<variant>.parquet",
    ).parse_args()
    settings = config.load(args.config)
    variant = assembly.variant(settings, args.variant)
    options = settings.finetune.for_variant(variant)
    accelerator = processes.accelerator(settings.device, options.mixed_precision)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    written, files = sets_file.read(args.sets), Files.of(args)
    chosen = written.of(args.variant)
    refits = files.refits_digest(chosen, written.facts[args.variant].get("refits"))
    made_of = {"set": chosen.key, "refits": refits}
    model = finetuning.trainable(variant_model(teacher, files, chosen), options, accelerator)
    context = Context(model, reader, settings.seed, accelerator)
    inputs = [args.calls, *files.every, *([args.encoded] if args.encoded else [])]
    identity = loop.identity(Path(__file__), settings, inputs, **made_of)
    lesson = finetuning.lesson(context, options, args.encoded)
    rows, weights, judged = finetuning.train(lesson, State(args.state, identity))
    log = pd.DataFrame(rows).reindex(columns=schemas.FINETUNE_LOG.names)
    stopping.ignore()
    if accelerator.is_main_process:
        stamp = provenance.stamp(settings.given, rows=len(reader))
        tensors.write(args.output, weights, stamp | made_of)
        tables.write(args.log_table, log, schemas.FINETUNE_LOG, stamp | judged)
    processes.finish(accelerator)


def variant_model(teacher: TeacherSettings, files: Files, chosen: Set) -> nn.Module:
    """The model of a set, on the CPU. The teacher that it shares modules with was loaded for it
    alone, so that all of them may be trained."""
    # The teacher's answers are recorded: it neither runs nor goes to the device.
    transformer = pipelines.load_transformer(
        teacher.replace(offload="none"), torch.device("cpu"), gradients=True
    )
    model, _ = variants.Workshop(transformer, files, as_teacher=False).model(chosen)
    return model


if __name__ == "__main__":
    program.run(main)
