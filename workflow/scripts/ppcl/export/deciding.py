"""What each variant is made of: one search, then measured sources, then refitted linear FFNs."""

from collections.abc import Mapping
from dataclasses import replace

from ppcl.closed_forms import linear_map_fits, linear_map_refits
from ppcl.closed_forms.linear_map_refits import Refits
from ppcl.export import variants
from ppcl.export.variant_files import Files
from ppcl.pruning.selection_file import SelectionFile
from ppcl.runtime import stopping
from ppcl.search import choosing, sets
from ppcl.search.choosing import Decided, Measure
from ppcl.search.offers import Offer
from ppcl.settings import Settings, WidthSettings
from ppcl.storage import tensors
from ppcl.transformer.context import Context, State


def untrained_errors(
    selection: SelectionFile | None, files: Files, measure: Measure
) -> dict[str, dict[str, float]]:
    """Velocity errors of the selection's units without training: unit -> source -> error."""
    fresh = variants.untrained(selection, files)
    costs = measure([sets.Set((member,)) for member in fresh.values()])
    return {
        name: {member.source: cost}
        for (name, member), cost in zip(fresh.items(), costs, strict=True)
    }


def decided(
    context: Context,
    settings: Settings,
    offer: Offer,
    workshop: variants.Workshop,
    measure: Measure,
    state: State,
) -> tuple[dict[str, Decided], Refits]:
    """What every variant is, by name, and the refitted maps that they use.

    Args:
        settings: its sections variants, choose and width are read.
        state: of the files that keep refitted maps, so that a killed run can go on.
    """
    options = settings.choose
    searched = {v.name: (v, choosing.search(offer, v)) for v in settings.pruned}
    if options.source != "measured":
        return choosing.as_last_trained(offer, searched, measure), {}
    tried = choosing.trials(offer, searched, measure)
    settled = choosing.settle(offer, searched, tried)
    if not options.refit:
        return settled, {}
    refits = _refitted(context, settings.width, workshop, settled, state)
    workshop.take(refits)
    anew = {
        name: replace(one.choice, set=sets.refitted(one.choice.set, name))
        for name, one in settled.items()
    }
    anew = {name: one for name, one in anew.items() if one.set != settled[name].choice.set}
    costs = measure([one.set for one in anew.values()])
    for (name, one), error in zip(anew.items(), costs, strict=True):
        tried[name]["linear FFNs fitted once more"] = replace(one, error=error)
    settled = choosing.settle(offer, searched, tried)
    used = {source for one in settled.values() for source in one.choice.set.sources.values()}
    return settled, {source: maps for source, maps in refits.items() if source in used}


def _refitted(
    context: Context,
    options: WidthSettings,
    workshop: variants.Workshop,
    settled: Mapping[str, Decided],
    state: State,
) -> Refits:
    """The maps of every variant's linear FFNs, fitted once more with the variant's set plugged in.

    Processes share the variants out, and all return all maps.
    """
    accelerator = context.accelerator
    rank, count = accelerator.process_index, accelerator.num_processes
    asked = [(name, sets.refitted(one.choice.set, name)) for name, one in settled.items()]
    asked = [(name, anew) for name, anew in asked if anew != settled[name].choice.set]
    files = {name: state.folder / f"refit-{name}.safetensors" for name, _ in asked}
    for name, anew in asked[rank::count]:
        of = {"set": anew.key, "identity": state.identity}
        if files[name].exists() and of.items() <= tensors.metadata(files[name]).items():
            continue
        model, block_map = workshop.model(anew)
        rows, _ = linear_map_fits.fit_rows(context.reader, options, context.seed)
        source = f"{sets.REFIT}{name}"
        new_blocks = [b for m in anew.members if m.source == source for b in m.unit.new_blocks]
        maps = linear_map_refits.refit(context, model, block_map, new_blocks, rows, options)
        with stopping.part():
            linear_map_refits.write(files[name], {source: maps}, of)
    accelerator.wait_for_everyone()
    return {s: maps for path in files.values() for s, maps in linear_map_refits.read(path).items()}
