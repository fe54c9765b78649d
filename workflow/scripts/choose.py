"""What each variant is made of: closed forms and trained units, each from the stage that serves it.

One process:        python workflow/scripts/choose.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/choose.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --width results/digits/width/measured.parquet \
    --maps results/digits/width/maps.safetensors \
    --conditioning results/digits/activations/conditioning.safetensors \
    --latency results/digits/latency/blocks.parquet \
    --selection results/digits/prune/selection.json \
    --start results/digits/prune/students.safetensors \
    --distill results/digits/distill/students.safetensors \
    --distill-unit-costs results/digits/distill/unit_costs.parquet \
    --subsets results/digits/subsets/students.safetensors \
    --subsets-unit-costs results/digits/subsets/unit_costs.parquet \
    --state results/digits/state/choose --sets results/digits/variants/sets.json \
    --each results/digits/variants/sets/p27.json results/digits/variants/sets/p50.json \
    --units results/digits/variants/units.parquet \
    --refitted results/digits/variants/maps.safetensors \
    --measured results/digits/variants/measured.parquet

One exact search per variant, over all that is priced and allowed for it; then the sources of its
trained units, by the errors of whole sets on held-out calls; then its linear FFNs once more by
least squares, in the set. Everything that the config leaves out (no depth pruning, no training,
nothing narrow, no latency) is left out of the command. Reads of the config: seed, device, teacher,
choose, variants, how maps are fitted (width), and what is required or forbidden (intervals, width,
modulation). A killed run goes on with what is not measured yet.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ppcl import program, provenance
from ppcl.closed_forms import linear_map_refits
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.export import deciding, variant_files, variants
from ppcl.export.variant_files import Files
from ppcl.pruning import selection_file
from ppcl.runtime import processes, stopping
from ppcl.search import choosing, offers, set_tables, sets_file
from ppcl.search.choosing import Decided
from ppcl.search.offers import Offer
from ppcl.settings import Settings
from ppcl.storage import schemas, tables
from ppcl.teacher import opening
from ppcl.training import loop, prices
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import State


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        "state",
        reads=("calls",),
        may_read=(*variant_files.MODEL_FILES, *variant_files.PRICE_FILES),
        writes=("sets", "units", "refitted", "measured"),
        refitted="variants/maps.safetensors",
    )
    parser.add_argument(
        "--each", type=Path, nargs="*", default=[], help="output: a file per variant, named so"
    )
    args = parser.parse_args()
    settings = config.load(args.config)
    refuse_unknown(args.each, settings)
    context = opening.opened(settings, calls.Reader(args.calls))
    selection = selection_file.read(args.selection) if args.selection else None
    files = Files.of(args)
    options = settings.choose
    rows = context.reader.sample_heldout("select", options.rows, settings.seed, "choose.rows")
    workshop = variants.Workshop(context.transformer, files, device=context.device)
    inputs = [args.calls, *files.every]
    state = State(args.state, loop.identity(Path(__file__), settings, inputs))

    measure = variants.measuring(workshop, prices.Judged(context, rows, options.batch_size), state)
    alone = deciding.untrained_errors(selection, files, measure)
    offer = offers.offered(
        settings, blocks.sizes(context.transformer), files.prices, selection, alone
    )
    decided, refits = deciding.decided(context, settings, offer, workshop, measure, state)
    if context.accelerator.is_main_process:
        for name, one in decided.items():
            print(choosing.told(offer, name, one.choice), flush=True)
    stopping.ignore()
    if context.accelerator.is_main_process:
        depth = len(blocks.block_sequence(context.transformer))
        stamp = provenance.stamp(settings.given, rows=len(rows), blocks=depth)
        write(args, offer, decided, refits, stamp)
    processes.finish(context.accelerator)


def refuse_unknown(each: Sequence[Path], settings: Settings) -> None:
    """Raises UserError for a file that is named after no variant."""
    names = [variant.name for variant in settings.pruned]
    if unknown := [path for path in each if path.stem not in names]:
        raise UserError(f"--each: {unknown[0]} is named after no variant: {', '.join(names)}")


def write(
    args: argparse.Namespace,
    offer: Offer,
    decided: Mapping[str, Decided],
    refits: linear_map_refits.Refits,
    stamp: dict[str, str],
) -> None:
    """Writes all that the stage leaves."""
    choices = {name: one.choice for name, one in decided.items()}
    units, trials = set_tables.units_table(offer, choices), set_tables.trials_table(offer, decided)
    tables.write(args.units, units, schemas.VARIANT_UNITS, stamp)
    tables.write(args.measured, trials, schemas.VARIANT_SETS, stamp)
    linear_map_refits.write(args.refitted, refits, stamp)
    sets_file.write(args.sets, offer, choices, stamp)
    for path in args.each:
        digest = linear_map_refits.digest(refits, choices[path.stem].set)
        sets_file.write_one(path, offer, choices[path.stem], digest)


if __name__ == "__main__":
    program.run(main)
