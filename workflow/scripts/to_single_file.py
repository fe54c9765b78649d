"""Writes the transformer of a pipeline as one file, for ComfyUI and other programs.

    python workflow/scripts/to_single_file.py --model results/digits-depth/models/b16 \
        --output b16.safetensors
    python workflow/scripts/to_single_file.py --model results/digits-depth/models/b16 \
        --output b16-Q8_0.gguf --type Q8_0

Tensors have the names that the model's authors gave them, and diffusers' `from_single_file`, with
config= the transformer's folder, reads the same model from a .safetensors file to the bit. In a
.gguf file, --type is of matrices; vectors stay in float32, first and last layers in float16. The
pipeline is a teacher, or a variant that is pruned in depth alone.
"""

import argparse

from ppcl import program
from ppcl.errors import UserError
from ppcl.export import assembly, gguf_file, single_file


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        reads=("model",),
        writes=("output",),
        model="folder of a pipeline",
        output="a .safetensors or .gguf file",
    )
    parser.add_argument("--component", default="transformer", help="of it, what is written")
    parser.add_argument("--type", choices=gguf_file.TYPES, help="of the matrices of a .gguf file")
    return parser.parse_args()


def main() -> None:
    args = command_line()
    kind = args.output.suffix
    if kind not in (".safetensors", ".gguf"):
        raise UserError(f"--output: {args.output} is no .safetensors and no .gguf file; name one")
    if (kind == ".gguf") != bool(args.type):
        raise UserError("--type goes with a .gguf file, and with no other; give both or none")
    if args.output.exists():
        raise UserError(f"--output: {args.output} is there already; name a new one")
    assembly.verify(args.model)
    transformer = single_file.opened(args.model, args.component)
    if kind == ".gguf":
        gguf_file.write(args.output, transformer, args.type)
    else:
        single_file.write(args.output, transformer)
    print(f"{args.output}: {len(transformer.tensors)} tensors")
    if told := transformer.files.fixed_depth:
        print(
            f"ComfyUI makes a fixed number of blocks of a {transformer.made_as} ({told}); if this "
            "one has fewer, it can't load the file, but diffusers can"
        )


if __name__ == "__main__":
    program.run(main)
