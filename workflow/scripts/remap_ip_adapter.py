"""Turns an IP-adapter of the teacher into one for a pruned pipeline.

    python workflow/scripts/remap_ip_adapter.py --adapter ip_adapter.safetensors \
        --model flux-p50 --output flux-p50-ip.safetensors

Its weights are numbered by blocks; each block gets those of the blocks that it stands for. The
output loads as the input does, by the pipeline's `load_ip_adapter`.
"""

import argparse

from ppcl import program
from ppcl.errors import UserError
from ppcl.export import ip_adapters, pruned_models
from ppcl.storage import tensors


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        reads=("adapter", "model"),
        writes=("output",),
        adapter="file of an IP-adapter of the teacher",
        model="folder of a pruned pipeline",
        output="file of the IP-adapter for it",
    )
    parser.add_argument("--component", default="transformer", help="the pipeline's pruned part")
    return parser.parse_args()


def main() -> None:
    args = command_line()
    if args.output.exists():
        raise UserError(f"--output: {args.output} is there already; name a new one")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output: {args.output} should end in .safetensors; diffusers asks so")
    model = pruned_models.read(args.model, args.component)
    made = ip_adapters.remap(args.adapter, model)
    tensors.write(args.output, made, {"format": "pt"})
    print(f"{args.output}: {len(made)} weights; loads with load_ip_adapter")


if __name__ == "__main__":
    program.run(main)
