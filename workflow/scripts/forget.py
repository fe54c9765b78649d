"""Removes what finished stages kept to resume from.

    python workflow/scripts/forget.py results/digits/state/distill

A stage's folder stays when its program ends: Snakemake deletes the outputs of a job that it has not
recorded yet, as when it is killed itself, and the stage then makes them again at once. The first
command of a stage that reads the outputs is this: it would not have been started before.
"""

from pathlib import Path

from ppcl import program
from ppcl.storage import whole


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="*", help="below state/; may be missing")
    for folder in parser.parse_args().folders:
        whole.forget(folder)


if __name__ == "__main__":
    main()
