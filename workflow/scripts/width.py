"""Stage 2: what every text run and every linear FFN costs, before any training.

One process:        python workflow/scripts/width.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/width.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet \
    --blocks results/digits/similarity/blocks.parquet \
    --state results/digits/state/width --table results/digits/width/measured.parquet \
    --maps results/digits/width/maps.safetensors

Candidates are the FFNs, image and text each for itself, and the runs of blocks whose text outputs
are alike (CKA). Their linear maps are fitted by least squares on recorded calls, judged on held-out
ones, and plugged into the teacher: the velocity error is what selection counts. Reads of the
config: seed, device, teacher, width. A killed run goes on with what is not measured yet.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from ppcl import (
    blocks,
    calls,
    config,
    devices,
    distillation,
    errors,
    pipelines,
    provenance,
    schemas,
    selection,
    stopping,
    tables,
    teacher_identity,
    tensors,
    training,
    trust,
    width,
)
from ppcl.families import TEXT


def text_cka(path: Path, depth: int) -> np.ndarray:
    """CKA [blocks, blocks] of text outputs (NaN where there is none)."""
    table = tables.read(path, schemas.BLOCKS).to_pandas()
    rows = table[table["stream"] == TEXT]
    selection.check_depth(path, rows["block_a"], depth)
    values = np.full((depth, depth), np.nan)
    values[rows["block_a"], rows["block_b"]] = rows["cka"]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--blocks", type=Path, required=True, help="CKA of pairs of blocks")
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--table", type=Path, required=True, help="measured.parquet to write")
    parser.add_argument("--maps", type=Path, required=True, help="maps.safetensors to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    options, seed = settings["width"], settings["seed"]

    accelerator = devices.accelerator(settings["device"])
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings["teacher"], reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, compiled=True)
    trust.refuse_narrowing(transformer)
    sequence = blocks.block_sequence(transformer)
    cka = text_cka(args.blocks, len(sequence))
    units = {
        f"ffn {u.parts[0].linear_ffn[0]} {u.name}": u for u in width.ffn_candidates(transformer)
    }
    runs = width.text_candidates(transformer, cka, options["longest"], options["cka_floor"])
    units |= {f"text {unit.name}": unit for unit in runs}

    maps = {name: [m for p in u.parts for m in width.maps_of(p)] for name, u in units.items()}
    identity = training.identity(Path(__file__), settings, [args.calls, args.blocks])
    files, fit_errors = width.fit_to_files(
        transformer,
        [one for found in maps.values() for one in found],
        reader,
        width.fit_rows(reader, options, seed),
        options,
        accelerator,
        args.state,
        identity,
    )
    fitted = width.stored(*files)
    judged = reader.sample_heldout("select", options["rows"], seed, "width.rows")
    costs = distillation.plugged_errors(
        transformer,
        {
            name: lambda u=unit: width.closed(transformer, u.parts, fitted)
            for name, unit in units.items()
        },
        reader,
        judged,
        options["batch_size"],
        accelerator,
        args.state,
        identity,
    )
    stopping.ignore()
    if accelerator.is_main_process:
        rows = [
            {
                "kind": name.split()[0],
                "first": unit.first,
                "last": unit.last,
                "stream": name.split()[1] if name.startswith("ffn") else TEXT,
                "path": "",
                "rank": 0,
                "fit_error_heldout": max(fit_errors[one] for one in maps[name]),
                "cka": cka[unit.first, unit.first : unit.last + 1].min()
                if name.startswith("text")
                else np.nan,
                "parameters_saved": width.saved_parameters(transformer, unit),
                "velocity_error": cost,
                "rows": len(judged),
            }
            for (name, unit), cost in zip(units.items(), costs, strict=True)
        ]
        table = pd.DataFrame(rows, columns=schemas.WIDTH_MEASURED.names)
        sizes = {k: json.dumps(v) for k, v in width.text_sizes(transformer).items()}
        stamp = provenance.stamp(settings, judged=len(judged))
        tensors.join(args.maps, files, stamp)
        tables.write(args.table, table, schemas.WIDTH_MEASURED, stamp | sizes)
    devices.finish(accelerator)


if __name__ == "__main__":
    errors.run(main)
