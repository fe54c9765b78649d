"""Turns a ControlNet of the teacher into one for a pruned pipeline.

    python workflow/scripts/remap_controlnet.py --controlnet canny \
        --model results/digits-depth/models/b16 --output b16-canny

Each block gets the sum of what the teacher adds after the blocks that it stands for. Where the
stock class does that, the output is of it; else it has code of its own: load it with
`AutoModel.from_pretrained("b16-canny", trust_remote_code=True)` and give it to the pipeline.
"""

import argparse

from ppcl import program
from ppcl.errors import UserError
from ppcl.export import controlnets, pruned_models


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        reads=("controlnet", "model"),
        writes=("output",),
        controlnet="folder of a ControlNet of the teacher",
        model="folder of a pruned pipeline",
        output="folder of the ControlNet for it",
    )
    parser.add_argument("--component", default="transformer", help="the pipeline's pruned part")
    return parser.parse_args()


def main() -> None:
    args = command_line()
    if args.output.exists():
        raise UserError(f"--output: {args.output} is there already; name a new one")
    model = pruned_models.read(args.model, args.component)
    if controlnets.remap(args.controlnet, model, args.output):
        print(f"{args.output}: loads with AutoModel.from_pretrained, trust_remote_code=True")
    else:
        print(f"{args.output}: is of the stock class, which fits this model")


if __name__ == "__main__":
    program.run(main)
