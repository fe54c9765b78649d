"""What each variant is made of: closed forms and trained units, each from the stage that serves it.

One process:        python workflow/scripts/choose.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/choose.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet --width results/digits/width/measured.parquet \
    --maps results/digits/width/maps.safetensors \
    --conditioning results/digits/activations/conditioning.safetensors \
    --latency results/digits/latency/blocks.parquet --plan results/digits/prune/plan.json \
    --start results/digits/prune/students.safetensors \
    --distill results/digits/distill/students.safetensors \
    --distill-errors results/digits/distill/errors.parquet \
    --subsets results/digits/subsets/students.safetensors \
    --subsets-errors results/digits/subsets/errors.parquet \
    --state results/digits/state/choose --sets results/digits/variants/sets.json \
    --units results/digits/variants/units.parquet \
    --measured results/digits/variants/measured.parquet

One exact search per variant, over all that is priced and allowed for it; then the sources of its
trained units, by the errors of whole sets on held-out calls. Everything that the config leaves out
(no depth pruning, no training, nothing narrow, no latency) is left out of the command. Reads of the
config: seed, device, teacher, choose, variants, and what is pinned or forbidden (intervals, width,
modulation). A killed run goes on with what is not measured yet.
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
    pipelines,
    prices,
    provenance,
    schemas,
    sets,
    stopping,
    students,
    tables,
    teacher_identity,
    training,
    variants,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    variants.add_arguments(parser)
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--sets", type=Path, required=True, help="sets.json to write")
    parser.add_argument("--units", type=Path, required=True, help="units.parquet to write")
    parser.add_argument("--measured", type=Path, required=True, help="measured.parquet to write")
    args = parser.parse_args()
    settings = config.load(args.config)
    options, seed = settings["choose"], settings["seed"]

    accelerator = devices.accelerator(settings["device"])
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings["teacher"], reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device)
    plan = students.read_plan(args.plan) if args.plan else None
    files = variants.Files.of(args)
    workshop = variants.Workshop(transformer, files, device=accelerator.device)
    judged = reader.sample_heldout("select", options["rows"], seed, "choose.rows")
    identity = training.identity(Path(__file__), settings, [args.calls, *files.every])
    known: dict[str, float] = {}

    def measure(asked: list[sets.Set]) -> list[float]:
        """Velocity errors of sets; each is measured once."""
        new = {one.key: one for one in asked if one.key not in known}
        changes = {
            key: prices.Change(one.first, lambda one=one: workshop.model(one)[0])
            for key, one in new.items()
        }
        found = prices.measure(
            transformer,
            changes,
            reader,
            judged,
            options["batch_size"],
            accelerator,
            args.state,
            identity,
        )
        known.update(zip(new, found, strict=True))
        return [known[one.key] for one in asked]

    fresh = variants.untrained(plan, files)
    costs = measure([sets.Set((member,)) for member in fresh.values()])
    alone = {
        name: {member.source: cost}
        for (name, member), cost in zip(fresh.items(), costs, strict=True)
    }
    offer = variants.offer(settings, transformer, files, plan, alone)
    found = {v["name"]: (v, sets.search(offer, v)) for v in settings["variants"]}
    decide = sets.decide if options["source"] == "measured" else sets.as_last_trained
    decided = decide(offer, found, measure)
    choices = {name: one.choice for name, one in decided.items()}
    for name, choice in choices.items():
        if accelerator.is_main_process:
            print(sets.told(offer, name, choice), flush=True)
    stopping.ignore()
    if accelerator.is_main_process:
        depth = len(blocks.block_sequence(transformer))
        stamp = provenance.stamp(settings, rows=len(judged), blocks=depth)
        members = [row for name, one in choices.items() for row in sets.rows(offer, name, one)]
        trials = [row for name, one in decided.items() for row in sets.trial_rows(offer, name, one)]
        for path, rows, schema in (
            (args.units, members, schemas.VARIANT_UNITS),
            (args.measured, trials, schemas.VARIANT_SETS),
        ):
            tables.write(path, pd.DataFrame(rows, columns=schema.names), schema, stamp)
        sets.write(args.sets, offer, choices, stamp)
    devices.finish(accelerator)


if __name__ == "__main__":
    errors.run(main)
