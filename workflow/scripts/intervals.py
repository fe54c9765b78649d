"""Stages 1.2 and 2: candidate intervals by Eq. 5, then what the smallest budgets take, exactly.

    intervals.py --config config/config.yaml --cka results/digits/similarity/cka.parquet \
        --block-facts results/digits/record/blocks.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --width results/digits/width/measured.parquet \
        --intervals results/digits/intervals/intervals.parquet \
        --candidates results/digits/width/candidates.parquet

Reads of the config: intervals, similarity.streams, width (enabled, cka_floor and the lists),
modulation (enabled and the lists), and the smallest budgets of the variants that may have trained
students: larger budgets use what is trained for these as well. Needs no torch.
"""

from pathlib import Path

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.runtime import stopping
from ppcl.search import interval_search
from ppcl.storage import schemas, tables
from ppcl.transformer import block_facts


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        reads=("block_facts", "cka"),
        may_read=("sensitivity", "probes", "width", "latency", "sizes"),
        writes=("intervals",),
        probes="probes/probes.parquet; with intervals.cost: influence",
    )
    parser.add_argument("--candidates", type=Path, help=f"output: {program.FILES['candidates']}")
    args = parser.parse_args()
    settings = config.load(args.config)
    with_closed_forms = bool(interval_search.closed_kinds(settings))
    if with_closed_forms and not (args.width and args.candidates):
        raise UserError(
            "width.enabled or modulation.enabled is true: name the tables --width and --candidates"
        )

    depth = len(block_facts.read(args.block_facts))
    required, _ = constraints.of_config(settings, depth)
    known = interval_search.measurements(settings, vars(args), required)
    segmented = interval_search.segmentation(settings, known, required)
    decision = interval_search.cheapest(settings, known, segmented, required)
    print(interval_search.in_words(decision.selection), flush=True)
    saved = decision.selection.saved
    counts = {name: round(saved[name]) for name in ("blocks", "parameters")}
    removed = {f"removed_{name}": count for name, count in counts.items()}
    stamp = provenance.stamp(settings.given, blocks=depth, **removed)
    stopping.ignore()
    if with_closed_forms:
        table = interval_search.closed_form_table(settings, known, decision)
        tables.write(args.candidates, table, schemas.WIDTH_CANDIDATES, stamp)
    table = interval_search.interval_table(settings, known, segmented, decision)
    tables.write(args.intervals, table, schemas.INTERVALS, stamp)


if __name__ == "__main__":
    program.run(main)
