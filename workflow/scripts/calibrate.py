"""Prices before training against errors after it, for a sample of intervals, FFNs and text runs.

    python workflow/scripts/calibrate.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet \
        --probes results/digits/probes/probes.safetensors \
        --cka results/digits/similarity/cka.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --width results/digits/width/measured.parquet --state results/digits/state/calibrate \
        --table results/digits/ablation/calibration.parquet

All are trained at once, each alone (Eq. 6), for as many steps as the methods of the ablation. A
killed run goes on from the last checkpoint in --state. Runs in one process.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ppcl import program, provenance
from ppcl.ablation import calibration, choices, trial
from ppcl.closed_forms import linear_map_fits, linear_maps
from ppcl.configuration import config
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import processes, stopping
from ppcl.search import measured
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import distillation, loop, prices
from ppcl.transformer import calls

SHARED = ("probes", "cka", "sensitivity", "width")


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        "state",
        reads=("calls", *SHARED),
        writes=("table",),
        table="ablation/calibration.parquet",
    ).parse_args()
    settings = config.load(args.config)
    wide, seed = settings.width, settings.seed

    accelerator = processes.accelerator(settings.device, settings.distill.mixed_precision)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, compiled=True)
    shared = {name: getattr(args, name) for name in SHARED}
    material = choices.Material(
        transformer,
        reader,
        accelerator,
        settings,
        shared,
        seed,
        args.state,
        loop.identity(Path(__file__), settings, [args.calls, *shared.values()]),
    )
    reader, depth = material.reader, material.depth
    cka = measured.cka(args.cka, settings.similarity.streams, depth)
    widths = measured.closed_forms(args.width, depth)
    drawn = calibration.sample(material.runs, widths, linear_maps.unread_after(transformer), seed)
    weights, _ = tensors.read(args.probes)

    # One unit at a time: two may stand for the same blocks, which least squares could not tell.
    taught = [
        linear_map_fits.start(
            transformer,
            students.start(transformer, unit.new_blocks, "first"),
            reader,
            wide,
            seed,
            accelerator.device,
        )
        for _, unit in tqdm(drawn, desc="starting", unit="unit")
    ]
    key, wanted = "distill.heldout_rows", settings.distill.heldout_rows
    reported = reader.sample_heldout("report", wanted, seed, key)
    size = settings.ablation.batch_size

    def cost(plugged: students.Students, rows: np.ndarray) -> float:
        for student in plugged.values():
            student.to(accelerator.device).eval()
        return prices.error(transformer, plugged, reader, rows, size, accelerator.device)

    found = {"kind": [kind for kind, _ in drawn]}
    found |= {"first": [u.first for _, u in drawn], "last": [u.last for _, u in drawn]}
    found["cost_cka"] = [calibration.cka_price(*one, cka, widths) for one in drawn]
    found["cost_probe"] = [
        cost(
            {
                NewBlock(u.first, u.last): calibration.probe_block(
                    transformer, weights, u.new_blocks[0].ends
                )
            },
            material.judged,
        )
        if kind == "depth"
        else np.nan
        for kind, u in drawn
    ]
    found["cost_untrained"] = [cost(each, material.judged) for each in taught]

    every = {part: student for each in taught for part, student in each.items()}
    names = {part: f"{number} {part.name}" for number, part in enumerate(every)}
    steps = sum(trial.phases({"by": "ppcl"}, {}, settings.ablation).values())
    options = trial.stage_options(material, "distill", steps, mode="independent")
    trial.phase(
        material,
        "calibration",
        {names[new_block]: student for new_block, student in every.items()},
        distillation.independent(transformer, every, reader, options, seed, accelerator, names),
        options,
        {f"{names[p]}/": wide.lr_scale for p in every if p.first == p.last},
    )
    found["trained"] = [cost(each, reported) for each in taught]
    stamp = provenance.stamp(settings.given, judged=len(reported), steps=steps)
    stopping.ignore()
    tables.write(args.table, pd.DataFrame(found), schemas.CALIBRATION, stamp)


if __name__ == "__main__":
    program.run(main)
