"""Writes a config for a model of one's own, with what its pipeline takes by default filled in.

    python workflow/scripts/init.py --teacher black-forest-labs/FLUX.1-dev --output config/mine.yaml

The teacher is a local folder of a diffusers pipeline, or owner/name on the Hub, of which only the
configs are fetched. Every line of the file says what it is for; what it leaves out has a default
(config/README.md). With --free it asks for closed forms alone, and nothing is trained. A file that
is there already is never written over.
"""

from ppcl import program
from ppcl.configuration import starter


def main() -> None:
    parser = program.parser(__doc__, writes=("output",), output="the config file (.yaml)")
    parser.add_argument("--teacher", required=True, help="folder of a pipeline, or owner/name")
    for name, what in (
        ("run", "name of the run; without it, the name of the file"),
        ("revision", "branch, tag or commit on the Hub"),
        ("variant", "variant of the weight files, such as fp16"),
        ("subfolder", "folder of the pipeline inside the path"),
        ("calibration", "your prompts to calibrate on"),
        ("evaluation", "your prompts to evaluate on, other ones"),
    ):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--component", default="transformer", help="the part that is pruned")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with it"
    )
    parser.add_argument(
        "--free", action="store_true", help="closed forms alone: nothing is trained"
    )
    args = parser.parse_args()
    names = ("component", "revision", "variant", "subfolder", "trust_remote_code")
    teacher = {"path": args.teacher} | {name: getattr(args, name) for name in names}
    starter.write(teacher, args.output, args.run, args.calibration, args.evaluation, args.free)
    print(
        f"{args.output} is written: read it, name your own prompts, set the budgets; then\n"
        f"  snakemake forecast --cores all --configfile {args.output}\n"
        f"  snakemake --cores all --configfile {args.output}"
    )


if __name__ == "__main__":
    program.run(main)
