"""Closed forms: what text runs, linear FFNs and low-rank modulations cost, and the maps for them.

One process:        python workflow/scripts/width.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/width.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet \
    --blocks results/digits/similarity/blocks.parquet \
    --conditioning results/digits/activations/conditioning.safetensors \
    --state results/digits/state/width --table results/digits/width/measured.parquet \
    --maps results/digits/width/maps.safetensors

Candidates are, with width.enabled, the FFNs, image and text each for itself, and with --blocks the
runs of blocks whose text outputs are alike (CKA); and, with --conditioning, every modulation matrix
at every rank on offer. Linear maps are fitted by least squares on recorded calls, products of low
rank to what matrices got there; each is judged on held-out calls, and put into the teacher alone:
the velocity error is what selection counts. Reads of the config: seed, device, teacher, width,
modulation. A killed run goes on with what is not fitted and not measured yet.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ppcl import program, provenance
from ppcl.closed_forms import (
    linear_map_candidates,
    linear_map_fits,
    linear_maps,
    modulation,
    modulation_prices,
)
from ppcl.closed_forms.linear_maps import Map, Stored
from ppcl.closed_forms.modulation_prices import Offers
from ppcl.configuration import config
from ppcl.extraction import conditioning
from ppcl.pruning import students
from ppcl.pruning.units import Unit
from ppcl.runtime import processes, stopping
from ppcl.search import measured
from ppcl.settings import WidthSettings
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines, teacher_identity, trust
from ppcl.training import loop, prices
from ppcl.transformer import blocks, calls
from ppcl.transformer.family import TEXT


def text_cka(path: Path, depth: int) -> np.ndarray:
    """CKA [blocks, blocks] of text outputs (NaN where there is none)."""
    table = tables.read(path, schemas.BLOCKS).to_pandas()
    rows = table[table["stream"] == TEXT]
    measured.check_depth(path, rows["block_a"], depth)
    values = np.full((depth, depth), np.nan)
    values[rows["block_a"], rows["block_b"]] = rows["cka"]
    return values


def narrow_units(
    transformer: nn.Module, cka: np.ndarray, options: WidthSettings
) -> dict[str, Unit]:
    """Linear FFNs and text runs by name."""
    units = {
        f"ffn {u.new_blocks[0].linear_ffn[0]} {u.name}": u
        for u in linear_map_candidates.ffn_candidates(transformer)
    }
    runs = linear_map_candidates.text_candidates(
        transformer, cka, options.longest, options.cka_floor
    )
    return units | {f"text {unit.name}": unit for unit in runs}


def made_narrow(
    transformer: nn.Module, unit: Unit, maps: Stored, device: torch.device
) -> students.Students:
    """Blocks for a unit, on the device, even if the teacher's come there only to run."""
    made = linear_maps.closed(transformer, unit.new_blocks, maps)
    return {new_block: block.to(device) for new_block, block in made.items()}


def narrow_rows(
    transformer: nn.Module,
    units: Mapping[str, Unit],
    fit_errors: Mapping[Map, float],
    cka: np.ndarray,
) -> dict[str, dict]:
    """Columns of the table, but for the velocity error."""
    sizes = blocks.parameters_of_blocks(transformer)
    return {
        name: {
            "kind": name.split()[0],
            "first": unit.first,
            "last": unit.last,
            "stream": name.split()[1] if name.startswith("ffn") else TEXT,
            "path": "",
            "rank": 0,
            "fit_error_heldout": max(
                fit_errors[one]
                for new_block in unit.new_blocks
                for one in linear_maps.maps_of(new_block)
            ),
            "cka": cka[unit.first, unit.first : unit.last + 1].min()
            if name.startswith("text")
            else np.nan,
            "parameters_saved": linear_map_candidates.saved_parameters(transformer, unit, sizes),
        }
        for name, unit in units.items()
    }


def modulation_rows(offers: Offers, fit_errors: Mapping[str, float]) -> dict[str, dict]:
    """As `narrow_rows`."""
    return {
        name: {
            "kind": "modulation",
            "first": matrix.block,
            "last": matrix.block,
            "stream": "",
            "path": matrix.path,
            "rank": rank,
            "fit_error_heldout": fit_errors[name],
            "cka": np.nan,
            "parameters_saved": matrix.parameters() - matrix.parameters(rank),
        }
        for matrix, ranks in offers.ranks.items()
        for rank, name in ((rank, modulation_prices.name(matrix, rank)) for rank in ranks)
    }


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
    options, seed = settings.width, settings.seed

    accelerator = processes.accelerator(settings.device)
    device = accelerator.device
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, device, compiled=True)
    trust.refuse_narrowing(transformer)
    depth = len(blocks.block_sequence(transformer))
    cka = text_cka(args.blocks, depth) if args.blocks else np.full((depth, depth), np.nan)
    inputs = [path for path in (args.calls, args.blocks, args.conditioning) if path]
    identity = loop.identity(Path(__file__), settings, inputs)
    judged = reader.sample_heldout("select", options.rows, seed, "width.rows")

    units = narrow_units(transformer, cka, options) if options.enabled else {}
    files, fit_errors = linear_map_fits.fit_to_files(
        transformer,
        [
            one
            for unit in units.values()
            for new_block in unit.new_blocks
            for one in linear_maps.maps_of(new_block)
        ],
        reader,
        options,
        seed,
        accelerator,
        args.state,
        identity,
    )
    maps = linear_maps.stored(*files)
    changes = prices.of_students(
        transformer,
        {
            name: (unit.first, unit.last, partial(made_narrow, transformer, unit, maps, device))
            for name, unit in units.items()
        },
    )
    offers = None
    if args.conditioning:
        given = conditioning.read(args.conditioning)
        offers = Offers(transformer, given, settings.modulation, device)
        changes |= offers.changes()
    batch = options.batch_size
    costs = prices.measure(
        prices.Judged(transformer, reader, judged, batch, device),
        changes,
        accelerator,
        args.state,
        identity,
    )
    if accelerator.is_main_process:
        found = narrow_rows(transformer, units, fit_errors, cka)
        if offers:
            seen = modulation_prices.inputs_of(
                transformer, offers.ranks, reader, judged, batch, device
            )
            found |= modulation_rows(offers, offers.errors(seen))
        for name, cost in zip(changes, costs, strict=True):
            found[name] |= {"velocity_error": cost, "rows": len(judged)}
        table = pd.DataFrame(list(found.values()), columns=schemas.WIDTH_MEASURED.names)
        facts = linear_map_candidates.text_sizes(transformer) | {
            "unread": linear_maps.unread_after(transformer)
        }
        facts["modulations"] = [asdict(one) for one in modulation.matrices(transformer)]
        stamp = provenance.stamp(settings.given, judged=len(judged))
        stopping.ignore()
        tensors.join(args.maps, files, stamp)
        stamp |= {name: json.dumps(value) for name, value in facts.items()}
        tables.write(args.table, table, schemas.WIDTH_MEASURED, stamp)
    processes.finish(accelerator)


if __name__ == "__main__":
    program.run(main)
