"""Puts the runs of the ablation together.

gather_ablation.py best --runs results/digits/ablation/runs/*.parquet --output .../best_rivals.json
gather_ablation.py table --runs results/digits/ablation/runs/*.parquet --output .../results.parquet
gather_ablation.py words --results results/digits/ablation/results.parquet --output .../tables.md

best: names of the two methods with the least velocity error after the fine-tune;
table: all rows, with the methods' groups, labels and order in the figure;
words: tables for a reader. Needs no torch.
"""

from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.ablation import methods, report
from ppcl.storage import schemas, tables, texts

BEST = 2


def best(runs: pd.DataFrame) -> list[str]:
    """The methods of least mean error, best first."""
    tuned = runs[runs["state"] == "finetuned"]
    means = tuned.groupby("method")["velocity_error"].mean()
    return means.sort_values().index[:BEST].tolist()


def labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of results.parquet, in the order of the table of methods."""
    order = {name: place for place, name in enumerate(methods.METHODS)}
    rows = runs.assign(order=runs["method"].map(order))
    for column in ("group", "label"):
        rows[column] = [getattr(methods.METHODS[name], column) for name in rows["method"]]
    rows = rows.sort_values(["order", "seed", "state"], ascending=[True, True, False])
    return rows[schemas.ABLATION.names]


def main() -> None:
    parser = program.parser(
        __doc__, may_read=("results",), writes=("output",), output="the file to write"
    )
    parser.add_argument("what", choices=("best", "table", "words"))
    parser.add_argument("--runs", type=Path, nargs="+", help="input: tables of ablate.py")
    args = parser.parse_args()
    if args.what == "words":
        results = tables.read(args.results, schemas.ABLATION).to_pandas()
        texts.write(args.output, report.markdown(results))
        return
    read = [tables.read(path, schemas.ABLATION_RUN).to_pandas() for path in args.runs]
    runs = pd.concat(read, ignore_index=True)
    if args.what == "best":
        texts.write_sealed(args.output, {"best": best(runs)})
        return
    stamp = provenance.stamp({}, runs=len(args.runs))
    tables.write(args.output, labelled(runs), schemas.ABLATION, stamp)


if __name__ == "__main__":
    program.run(main)
