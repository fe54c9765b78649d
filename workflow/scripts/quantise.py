"""Quantises a variant that is there: its pipeline folder once more, in fewer bytes.

    python workflow/scripts/quantise.py --config config/mine.yaml --variant p50-int8 \
        --calls results/mine/record/calls.parquet --model results/mine/models/p50 \
        --output results/mine/models/p50-int8

For a variant of the config with `of` and `quantise`. Only weights of the transformer's blocks
change, by stock diffusers, which loads the folder as any other; one recorded call proves that.
Reads of the config: teacher, variants.
"""

from pathlib import Path

import torch

from ppcl import program
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.evaluation import model_folders
from ppcl.export import assembly, quantising
from ppcl.teacher import hub
from ppcl.transformer import calls


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        "variant",
        reads=("calls",),
        writes=("output",),
        output="the pipeline folder",
    )
    parser.add_argument("--model", type=Path, required=True, help="input: models/<of>")
    args = parser.parse_args()
    settings = config.load(args.config)
    method = assembly.variant(settings, args.variant).quantise
    if method is None:
        raise UserError(f"--variant: variant '{args.variant}' has no quantise in the config")
    quantising.refuse_missing(method)
    # The folder is all that there is to it: of the teacher it needs no more than the dtype, and
    # whether code of its own may run.
    teacher, reader = settings.teacher.replace(offload="none"), calls.Reader(args.calls)
    _, model = model_folders.models(teacher, [args.model])
    assembly.requantise(
        model.transformer(torch.device("cpu")),
        args.model,
        args.output,
        hub.component(teacher),
        reader.batch(reader.buckets[0][:2]).arguments,
        method,
    )


if __name__ == "__main__":
    program.run(main)
