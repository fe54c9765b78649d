"""Removes what finished stages kept to resume from.

    python workflow/scripts/forget.py results/digits/state/distill

A stage's folder stays when its program ends. If Snakemake is killed before it has recorded the
outputs, it deletes them later, and the stage makes them again at once from this folder. So this
program is the first command of the next stage, which starts only when the outputs are recorded.
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
