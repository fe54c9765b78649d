"""Trains the students of a method with the stages' own steps, in one process."""

from collections.abc import Mapping

from torch import nn

from ppcl.ablation import chain, phases, rivals, schedules
from ppcl.ablation.material import Chosen, Material, judged
from ppcl.closed_forms import (
    linear_map_candidates,
    linear_map_fits,
    linear_maps,
    solved,
)
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit, new_blocks_of, units_of
from ppcl.training import distillation, prices


def teach(material: Material, chosen: Chosen, train: Mapping) -> tuple[list[Unit], Students]:
    """The units of a selection and their trained students; `train` as in `methods.Method`."""
    context, transformer, steps = material.context, material.transformer, material.steps
    device, wide = context.device, material.settings.width
    starts = {
        ends: train.get("start", how) if how == "first" else how
        for ends, how in chosen.starts.items()
    }
    unread_after = linear_maps.unread_after(transformer)
    units = units_of(starts, chosen.runs, chosen.ffns, unread_after)
    new_blocks = new_blocks_of(units)
    taught = rivals.start(transformer, starts)
    uncut: Students = {}
    if train.get("start") == "solved":
        for student in taught.values():
            student.to(device)
        rows, _ = linear_map_fits.fit_rows(context.reader, wide, context.seed)
        solved.refit(context, taught, rows, wide.batch_size)

    def distil(name: str, count: int, taught: Students) -> None:
        options = phases.stage_options(
            material,
            "distill",
            count,
            mode=train.get("mode", "independent"),
            loss=train.get("loss", "normalised"),
            outliers=train.get("outliers", 0.0),
        )
        for student in taught.values():
            student.to(device)
        if options.mode == "chain":
            together = nn.ModuleDict(
                {new_block.name: student for new_block, student in taught.items()}
            )
            losses = chain.through_chain(context, taught, options)
            phases.train(material, name, {"students": together}, losses, options)
        else:
            modules = {new_block.name: student for new_block, student in taught.items()}
            scales = distillation.lr_scales(taught, wide.lr_scale)
            losses = distillation.independent(context, taught, options, uncut=uncut)
            phases.train(material, name, modules, losses, options, scales)

    if steps["narrow"]:
        first = steps["distill"] if taught else 0  # without intervals, narrow blocks get all steps
        if first:
            distil("distill", first, taught)
        taught, uncut = linear_map_fits.narrowed(context, new_blocks, taught, wide)
        distil("narrow", steps["distill"] - first + steps["narrow"], taught)
    else:
        taught, uncut = linear_map_fits.narrowed(context, new_blocks, taught, wide)
        if steps["distill"]:
            distil("distill", steps["distill"], taught)
    if steps["subsets"]:
        options = phases.stage_options(material, "subsets", steps["subsets"])
        draw = schedules.DRAWS[train.get("draw", "uniform")]
        prices = unit_prices(material, units, taught) if draw is schedules.budgets else ((), ())
        losses = distillation.any_subset(context, units, taught, options, draw(units, prices))
        if "mixed" in train:
            # The losses of distill, on the batches that subsets draws.
            also = phases.stage_options(
                material,
                "distill",
                steps["subsets"],
                mode="independent",
                loss="normalised",
                outliers=0.0,
                gradient_checkpointing=options.gradient_checkpointing,
            )
            others = distillation.independent(context, taught, also, uncut=uncut)
            losses = schedules.mixed(losses, others, "students", train["mixed"])
        together = nn.ModuleDict({new_block.name: student for new_block, student in taught.items()})
        scales = distillation.lr_scales(taught, wide.lr_scale, "students/{}.")
        phases.train(
            material, "subsets", {"students": together.to(device)}, losses, options, scales
        )
    for student in taught.values():
        student.requires_grad_(False).eval()
    return units, taught


def unit_prices(material: Material, units: list[Unit], taught: Students) -> schedules.Prices:
    """For each unit: its velocity error when plugged in alone, on the rows that selections measure
    on; and the parameters that it saves."""
    for student in taught.values():
        student.eval()
    changes = prices.of_units(material.transformer, units, taught)
    errors = prices.measure(judged(material), changes)
    return errors, [
        linear_map_candidates.saved_parameters(material.transformer, unit) for unit in units
    ]
