"""Makes the pruned model before training: the plan, and every new block's start weights.

    python workflow/scripts/prune.py --config config/digits.yaml \
        --intervals results/digits/intervals/intervals.parquet \
        --candidates results/digits/width/candidates.parquet \
        --calls results/digits/record/calls.parquet \
        --plan results/digits/prune/plan.json --students results/digits/prune/students.safetensors

The plan holds all units of the selection, and those that distill trains: with width.schedule:
staged these are the depth students alone, whole blocks still. Narrow blocks start from least
squares on recorded calls.
"""

import argparse
from pathlib import Path

import pandas as pd

from ppcl import (
    blocks,
    calls,
    config,
    devices,
    errors,
    pins,
    pipelines,
    plans,
    provenance,
    schemas,
    selection,
    stopping,
    students,
    tables,
    teacher_identity,
    texts,
    width,
)
from ppcl.errors import UserError
from ppcl.plans import Unit


def selected(path: Path, schema) -> pd.DataFrame:
    """The selected rows of a table of candidates."""
    table = tables.read(path, schema).to_pandas()
    return table[table["selected"]]


def planned(args: argparse.Namespace, unread_after: int | None) -> tuple[list[Unit], list[Unit]]:
    """All units of the selection, and its depth students alone."""
    ends = selected(args.intervals, schemas.INTERVALS)[["first", "last"]].to_numpy().tolist()
    intervals, runs, linear = [tuple(pair) for pair in ends], [], []
    if args.candidates:
        narrower = selected(args.candidates, schemas.WIDTH_CANDIDATES)
        text = narrower[narrower["kind"] == "text"]
        ffns = narrower[narrower["kind"] == "ffn"]
        runs = [(int(r.first), int(r.last)) for r in text.itertuples()]
        linear = [(int(r.first), r.stream) for r in ffns.itertuples()]
    every = plans.units(intervals, runs, linear, unread_after)
    if not every:
        raise UserError(f"{args.intervals}: nothing is selected; lower a budget in variants")
    return every, plans.units(intervals)


def pinned_in(unit: Unit, pinned: pins.Named) -> bool:
    """Whether a unit holds anything that the config pins."""
    ffns = {(part.first, stream) for part in unit.parts for stream in part.linear_ffn}
    within = [run for run in pinned.runs if pins.within(run, (unit.first, unit.last))]
    ends = {(part.first, part.last) for part in unit.parts}
    return bool(ffns & pinned.ffns or ends & pinned.intervals or within)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--intervals", type=Path, required=True, help="intervals.parquet")
    parser.add_argument("--candidates", type=Path, help="width candidates, with width.enabled")
    parser.add_argument("--latency", type=Path, help="measured times, with a latency budget")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json to write")
    parser.add_argument("--students", type=Path, required=True, help="start weights to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    options, how = settings["width"], settings["prune"]["start"]

    device = devices.choose(settings["device"])
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings["teacher"], reader.provenance)
    transformer = pipelines.load_transformer(teacher, device)
    every, depth_only = planned(args, width.unread_after(transformer))
    if every[-1].last >= len(blocks.block_sequence(transformer)):
        raise UserError(
            f"{args.intervals} names blocks that this teacher lacks; delete it and rerun"
        )
    distilled = depth_only if options["schedule"] == "staged" else every
    made = students.start(transformer, students.parts_of(distilled), how)
    made = width.start(transformer, made, reader, options, settings["seed"], device)
    stamp = provenance.stamp(settings, units=len(every))
    depth = len(blocks.block_sequence(transformer))
    pinned, _ = pins.wishes(settings, depth)

    def entries(units: list[Unit]) -> list[dict]:
        seconds = selection.saved_seconds(units, args.latency)
        return [
            students.plan_entry(
                unit, width.saved_parameters(transformer, unit), saved, pinned_in(unit, pinned)
            )
            for unit, saved in zip(units, seconds, strict=True)
        ]

    timed = (
        {"transformer_seconds": selection.timing(args.latency, depth)[1]} if args.latency else {}
    )
    plan = timed | {
        "teacher": settings["teacher"]["path"],
        "blocks": depth,
        "transformer_parameters": blocks.parameter_count(transformer),
        "start": how,
        "units": entries(every),
        "distilled": entries(distilled),
        "provenance": stamp,
    }
    stopping.ignore()
    students.save(args.students, made, stamp)
    texts.write_sealed(args.plan, plan)


if __name__ == "__main__":
    errors.run(main)
