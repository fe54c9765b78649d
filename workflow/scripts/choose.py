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
    --each results/digits/variants/sets/p27.json results/digits/variants/sets/p50.json \
    --units results/digits/variants/units.parquet \
    --refitted results/digits/variants/maps.safetensors \
    --measured results/digits/variants/measured.parquet

One exact search per variant, over all that is priced and allowed for it; then the sources of its
trained units, by the errors of whole sets on held-out calls; then its linear FFNs once more by
least squares, in the set. Everything that the config leaves out (no depth pruning, no training,
nothing narrow, no latency) is left out of the command. Reads of the config: seed, device, teacher,
choose, variants, how maps are fitted (width), and what is pinned or forbidden (intervals, width,
modulation). A killed run goes on with what is not measured yet.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
from accelerate import Accelerator
from torch import nn

from ppcl import program, provenance
from ppcl.closed_forms import linear_map_fits, linear_map_refits
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.export import variant_files, variants
from ppcl.export.variant_files import Files
from ppcl.pruning import selection_file
from ppcl.runtime import processes, stopping
from ppcl.search import choosing, set_tables, sets, sets_file
from ppcl.search.choosing import Decided
from ppcl.settings import Settings
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import loop, prices
from ppcl.transformer import blocks, calls


def refit(
    settings: Settings,
    transformer: nn.Module,
    workshop: variants.Workshop,
    reader: calls.Reader,
    decided: Mapping[str, Decided],
    accelerator: Accelerator,
    state: Path,
    identity: str,
) -> dict[str, dict]:
    """Maps of every variant's set, fitted once more in it; shared out over the processes.

    state, identity: as of `prices.measure`, of files of maps.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    asked = [(name, sets.refitted(one.choice.found, name)) for name, one in decided.items()]
    asked = [(name, found) for name, found in asked if found != decided[name].choice.found]
    files = {name: state / f"refit-{name}.safetensors" for name, _ in asked}
    for name, found in asked[rank::count]:
        of = {"set": found.key, "identity": identity}
        if files[name].exists() and of.items() <= tensors.metadata(files[name]).items():
            continue
        model, block_map = workshop.model(found)
        rows, _ = linear_map_fits.fit_rows(reader, settings.width, settings.seed)
        source = f"{sets.REFIT}{name}"
        new_blocks = [p for m in found.members if m.source == source for p in m.unit.new_blocks]
        options, device = settings.width, accelerator.device
        maps = linear_map_refits.refit(
            transformer, model, block_map, new_blocks, reader, rows, options, device
        )
        with stopping.part():
            linear_map_refits.write(files[name], {source: maps}, of)
    accelerator.wait_for_everyone()
    return {s: maps for path in files.values() for s, maps in linear_map_refits.read(path).items()}


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
    options, seed = settings.choose, settings.seed
    names = [variant.name for variant in settings.variants]
    if unknown := [path for path in args.each if path.stem not in names]:
        raise UserError(f"--each: {unknown[0]} is named after no variant: {', '.join(names)}")

    accelerator = processes.accelerator(settings.device)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device)
    plan = selection_file.read(args.plan) if args.plan else None
    files = Files.of(args)
    workshop = variants.Workshop(transformer, files, device=accelerator.device)
    rows = reader.sample_heldout("select", options.rows, seed, "choose.rows")
    identity = loop.identity(Path(__file__), settings, [args.calls, *files.every])
    kept = args.state, identity
    judged = prices.Judged(transformer, reader, rows, options.batch_size, accelerator.device)
    measure = variants.measuring(workshop, judged, accelerator, *kept)

    fresh = variants.untrained(plan, files)
    costs = measure([sets.Set((member,)) for member in fresh.values()])
    alone = {
        name: {member.source: cost}
        for (name, member), cost in zip(fresh.items(), costs, strict=True)
    }
    offer = variants.offer(settings, transformer, files, plan, alone)
    found = {v.name: (v, choosing.search(offer, v)) for v in settings.variants}
    refits: dict[str, dict] = {}
    if options.source == "measured":
        tried = choosing.trials(offer, found, measure)
        decided = choosing.settle(offer, found, tried)
        if options.refit:
            refits = refit(settings, transformer, workshop, reader, decided, accelerator, *kept)
            workshop.take(refits)
            anew = {
                name: replace(one.choice, found=sets.refitted(one.choice.found, name))
                for name, one in decided.items()
            }
            anew = {n: one for n, one in anew.items() if one.found != decided[n].choice.found}
            costs = measure([one.found for one in anew.values()])
            for (name, one), error in zip(anew.items(), costs, strict=True):
                tried[name]["linear FFNs fitted once more"] = replace(one, error=error)
            decided = choosing.settle(offer, found, tried)
    else:
        decided = choosing.as_last_trained(offer, found, measure)
    choices = {name: one.choice for name, one in decided.items()}
    for name, choice in choices.items():
        if accelerator.is_main_process:
            print(choosing.told(offer, name, choice), flush=True)
    stopping.ignore()
    if accelerator.is_main_process:
        depth = len(blocks.block_sequence(transformer))
        stamp = provenance.stamp(settings.given, rows=len(rows), blocks=depth)
        members = [
            row for name, one in choices.items() for row in set_tables.rows(offer, name, one)
        ]
        trials = [
            row for name, one in decided.items() for row in set_tables.trial_rows(offer, name, one)
        ]
        for path, found_rows, schema in (
            (args.units, members, schemas.VARIANT_UNITS),
            (args.measured, trials, schemas.VARIANT_SETS),
        ):
            tables.write(path, pd.DataFrame(found_rows, columns=schema.names), schema, stamp)
        used = {source for one in choices.values() for source in one.found.sources.values()}
        refits = {source: maps for source, maps in refits.items() if source in used}
        linear_map_refits.write(args.refitted, refits, stamp)
        sets_file.write(args.sets, offer, choices, stamp)
        for path in args.each:
            choice = choices[path.stem]
            maps = linear_map_refits.digest(refits, choice.found)
            sets_file.write_one(path, offer, choice, maps)
    processes.finish(accelerator)


if __name__ == "__main__":
    program.run(main)
