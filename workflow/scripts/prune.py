"""Makes the pruned model before training: the plan, and one student per selected interval.

    python workflow/scripts/prune.py --config config/digits.yaml \
        --intervals results/digits/intervals/intervals.parquet \
        --plan results/digits/prune/plan.json --students results/digits/prune/students.safetensors
"""

import argparse
from pathlib import Path

import torch

from ppcl import blocks, config, errors, pipelines, provenance, schemas, students, tables, texts
from ppcl.errors import UserError
from ppcl.students import Interval


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--intervals", type=Path, required=True, help="intervals.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json to write")
    parser.add_argument("--students", type=Path, required=True, help="start weights to write")
    args = parser.parse_args()
    settings = config.load(args.config)

    found = tables.read(args.intervals, schemas.INTERVALS).to_pandas()
    chosen = found[found["selected"]].sort_values("first")
    intervals = [Interval(int(r.first), int(r.last)) for r in chosen.itertuples()]
    if not intervals:
        raise UserError(f"{args.intervals}: no interval is selected; lower variants[].budget")
    transformer = pipelines.load_transformer(settings["teacher"], torch.device("cpu"))
    sequence = blocks.block_sequence(transformer)
    if intervals[-1].last >= len(sequence):
        raise UserError(
            f"{args.intervals} names blocks that this teacher lacks; delete it and rerun"
        )
    made = students.start(transformer, intervals, settings["prune"]["start"])
    stamp = provenance.stamp(settings, intervals=len(intervals))
    students.save(args.students, made, stamp)
    sizes = [blocks.parameter_count(b.module) for b in sequence]
    plan = {
        "teacher": settings["teacher"]["path"],
        "blocks": len(sequence),
        "transformer_parameters": blocks.parameter_count(transformer),
        "start": settings["prune"]["start"],
        "intervals": [
            {
                "name": i.name,
                "first": i.first,
                "last": i.last,
                "removed_blocks": i.last - i.first,
                "saved_parameters": sum(sizes[i.first : i.last + 1])
                - blocks.parameter_count(student),
            }
            for i, student in made.items()
        ],
        "provenance": stamp,
    }
    texts.write_json(args.plan, plan)


if __name__ == "__main__":
    errors.run(main)
