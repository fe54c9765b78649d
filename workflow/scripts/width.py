"""Closed forms: what text runs, linear FFNs and low-rank modulations cost, and the maps for them.

One process:        python workflow/scripts/width.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/width.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet \
    --blocks results/digits/similarity/blocks.parquet \
    --conditioning results/digits/activations/conditioning.safetensors \
    --state results/digits/state/width --table results/digits/width/measured.parquet \
    --maps results/digits/width/maps.safetensors

Candidates are, with width.enabled, each image FFN and each text FFN and, with --blocks, the runs of
blocks whose text outputs are alike (CKA); with --conditioning, every modulation matrix at every
rank on offer. Linear maps are fitted by least squares on recorded calls, low-rank products to the
inputs of the matrices, summed by `extract`. The fit of each is judged on held-out calls; then each
is put into the teacher alone, and selection adds up the velocity errors. Reads of the config: seed,
device, teacher, width, modulation. A killed run goes on with what is not fitted or measured yet.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from torch import nn

from ppcl import program, provenance
from ppcl.closed_forms import (
    linear_map_candidates,
    linear_map_fits,
    linear_maps,
    modulation,
    modulation_prices,
)
from ppcl.closed_forms.linear_map_prices import LinearMapPrices
from ppcl.closed_forms.modulation_prices import Offers
from ppcl.configuration import config
from ppcl.extraction import conditioning
from ppcl.runtime import processes, stopping
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import opening, trust
from ppcl.training import loop, prices
from ppcl.transformer import calls
from ppcl.transformer.context import State


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        "state",
        reads=("calls",),
        may_read=("blocks", "conditioning"),
        writes=("table", "maps"),
        table="width/measured.parquet",
    ).parse_args()
    settings = config.load(args.config)
    options = settings.width
    context = opening.opened(settings, calls.Reader(args.calls), compiled=True)
    transformer = context.transformer
    trust.refuse_narrowing(transformer)
    narrow = LinearMapPrices(context, options, args.blocks)
    inputs = [path for path in (args.calls, args.blocks, args.conditioning) if path]
    state = State(args.state, loop.identity(Path(__file__), settings, inputs))
    rows = context.reader.sample_heldout("select", options.rows, settings.seed, "width.rows")

    files, fit_errors = linear_map_fits.fit_to_files(context, narrow.maps, options, state)
    changes, offers = narrow.changes(linear_maps.stored(*files)), None
    if args.conditioning:
        given = conditioning.read(args.conditioning)
        offers = Offers(transformer, given, settings.modulation, context.device)
        changes |= offers.changes()
    costs = prices.measure(prices.Judged(context, rows, options.batch_size), changes, state)
    if context.accelerator.is_main_process:
        priced = narrow.rows(fit_errors)
        if offers:
            seen = modulation_prices.inputs_of(context, offers.ranks, rows, options.batch_size)
            priced |= offers.rows(offers.errors(seen))
        for name, cost in zip(changes, costs, strict=True):
            priced[name] |= {"velocity_error": cost, "rows": len(rows)}
        table = pd.DataFrame(list(priced.values()), columns=schemas.WIDTH_MEASURED.names)
        stamp = provenance.stamp(settings.given, judged=len(rows))
        stopping.ignore()
        tensors.join(args.maps, files, stamp)
        tables.write(args.table, table, schemas.WIDTH_MEASURED, stamp | facts(transformer))
    processes.finish(context.accelerator)


def facts(transformer: nn.Module) -> dict[str, str]:
    """What the table says of the teacher, beside its rows."""
    said = {
        **linear_map_candidates.text_sizes(transformer),
        "unread": linear_maps.unread_after(transformer),
        "modulations": [asdict(one) for one in modulation.matrices(transformer)],
    }
    return {name: json.dumps(value) for name, value in said.items()}


if __name__ == "__main__":
    program.run(main)
