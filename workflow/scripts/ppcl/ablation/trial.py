"""Trains and measures one method of the ablation, as the stages do it, in one process."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from ppcl.ablation import chain, rivals, schedules
from ppcl.ablation.choices import Chosen, Material, judged
from ppcl.closed_forms import (
    linear_map_candidates,
    linear_map_fits,
    linear_maps,
    modulation,
    solved,
)
from ppcl.digits.judge import Judge
from ppcl.evaluation import generation, metrics, timing, velocities
from ppcl.evaluation.metrics import TEACHER
from ppcl.extraction import conditioning
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit, new_blocks_of, units_of
from ppcl.settings import AblationSettings, Settings, TrainingSettings
from ppcl.storage import tensors
from ppcl.teacher import pipelines, prompts
from ppcl.training import distillation, loop, prices
from ppcl.transformer import blocks
from ppcl.transformer.context import Context, State

BUDGETS = 8  # sizes at which students are measured that are to serve every budget
ACCURACIES = tuple(f"{name}_accuracy" for name in prompts.JUDGE_COLUMNS) + ("all_correct",)
ENDS = "velocity_error_low", "velocity_error_high"
# Names of what is done without and with low-rank modulations: the states measured, the last phase.
STATES = ("plugged", "finetuned"), ("low_rank", "low_rank_finetuned")
FINETUNE = "finetune", "finetune-low-rank"
WITH_LOW_RANK = {"no": (False,), "also": (False, True), "only": (True,)}


def phases(select: Mapping, train: Mapping, options: AblationSettings) -> dict[str, int]:
    """Steps of each phase of a method; their sum is the same for all, apart from those of masks.

    Masks are learned before the training of the rest, for as many steps as the any-subset phase
    has, since no other selection takes steps from it. A staged schedule spends a quarter of
    distillation on narrow blocks, as the paper does (6000 and 2000 steps).

    Args:
        options: the config's `ablation`.
    """
    distill, subsets = options.distill_steps, options.subsets_steps
    masks = subsets if select["by"] == "learned_masks" else 0
    if not train.get("subsets", True):
        distill, subsets = distill + subsets, 0
    if "share" in train:
        total = distill + subsets
        subsets = round(train["share"] * total)
        distill = total - subsets
    staged = train.get("schedule") == "staged" and select["by"] == "depth_and_width"
    narrow = distill // 4 if staged else 0
    return {"masks": masks, "distill": distill - narrow, "narrow": narrow, "subsets": subsets}


def phase(
    material: Material,
    name: str,
    modules: Mapping[str, nn.Module],
    losses: Callable,
    options: TrainingSettings,
    scales: Mapping[str, float] | None = None,
) -> None:
    """One training, in place; what a killed run had finished is read instead.

    options: the stage's, with the ablation's steps and batch_size. Phases are short here: a
    warm-up takes at most a quarter of one.
    """
    path = material.state.folder / f"{name}.safetensors"
    identity = f"{material.state.identity} {name}"
    if path.exists():
        state, metadata = tensors.read(path)
        if metadata["identity"] == identity:
            for key, module in modules.items():
                start = f"{key}/"
                own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
                module.load_state_dict(own)
            return
    for module in modules.values():
        module.train()
    rows = loop.train(
        modules,
        losses,
        loop.Optimisation.from_settings(options),
        material.context.accelerator,
        path.with_name(f"{name}-checkpoint.safetensors"),
        identity,
        scales,
    )
    state = {f"{key}/{k}": v for key, m in modules.items() for k, v in m.state_dict().items()}
    seconds = rows[-1]["seconds"] if rows else 0.0
    tensors.write(path, state, {"identity": identity, "seconds": repr(seconds)})


def seconds_of(material: Material, *phases: str) -> float:
    """Time of these trainings, as far as this run has finished them, even before it was killed."""
    paths = [material.state.folder / f"{name}.safetensors" for name in phases]
    kept = [tensors.metadata(path) for path in paths if path.exists()]
    mine = [each for each in kept if each["identity"].startswith(f"{material.state.identity} ")]
    return sum(float(each["seconds"]) for each in mine)


def stage_options(material: Material, stage: str, steps: int, **changed) -> Any:
    """Settings of a stage for a phase of the ablation."""
    if material.ema is not None:
        changed = {"ema": material.ema, **changed}
    options = getattr(material.settings, stage).replace(**changed)
    warmup = min(options.warmup_steps, steps // 4)
    size = material.settings.ablation.batch_size
    return options.replace(steps=steps, warmup_steps=warmup, batch_size=size)


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
    parts = new_blocks_of(units)
    taught, uncut = rivals.start(transformer, starts), {}
    if train.get("start") == "solved":
        for student in taught.values():
            student.to(device)
        rows, _ = linear_map_fits.fit_rows(context.reader, wide, context.seed)
        solved.refit(context, taught, rows, wide.batch_size)

    def narrowed(whole: Students) -> tuple[Students, Students]:
        every = students.whole(transformer, parts, whole)
        before = {part: block.to(device) for part, block in students.uncut(every).items()}
        return linear_map_fits.start(context, every, wide), before

    def distil(name: str, count: int, taught: Students) -> None:
        options = stage_options(
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
            together = nn.ModuleDict({part.name: student for part, student in taught.items()})
            losses = chain.through_chain(context, taught, options)
            phase(material, name, {"students": together}, losses, options)
        else:
            modules = {part.name: student for part, student in taught.items()}
            scales = distillation.lr_scales(taught, wide.lr_scale)
            losses = distillation.independent(context, taught, options, uncut=uncut)
            phase(material, name, modules, losses, options, scales)

    if steps["narrow"]:
        first = steps["distill"] if taught else 0  # without intervals, narrow blocks get all steps
        if first:
            distil("distill", first, taught)
        taught, uncut = narrowed(taught)
        distil("narrow", steps["distill"] - first + steps["narrow"], taught)
    else:
        taught, uncut = narrowed(taught)
        if steps["distill"]:
            distil("distill", steps["distill"], taught)
    if steps["subsets"]:
        options = stage_options(material, "subsets", steps["subsets"])
        draw = schedules.DRAWS[train.get("draw", "uniform")]
        prices = _prices(material, units, taught) if draw is schedules.budgets else ((), ())
        losses = distillation.any_subset(context, units, taught, options, draw(units, prices))
        if "mixed" in train:
            # The losses of distill, drawn as subsets draws.
            also = stage_options(
                material,
                "distill",
                steps["subsets"],
                mode="independent",
                loss="normalised",
                outliers=0.0,
            )
            others = distillation.independent(context, taught, also, uncut=uncut)
            losses = schedules.mixed(losses, others, "students", train["mixed"])
        together = nn.ModuleDict({part.name: student for part, student in taught.items()})
        scales = distillation.lr_scales(taught, wide.lr_scale, "students/{}.")
        phase(material, "subsets", {"students": together.to(device)}, losses, options, scales)
    for student in taught.values():
        student.requires_grad_(False).eval()
    return units, taught


def _prices(material: Material, units: list[Unit], taught: Students) -> schedules.Prices:
    """Of each unit: its error when plugged in alone, on the rows of selection; what it saves."""
    for student in taught.values():
        student.eval()
    sets = {
        unit.name: (
            unit.first,
            unit.last,
            lambda u=unit: {part: taught[part] for part in u.new_blocks},
        )
        for unit in units
    }
    changes = prices.of_students(material.transformer, sets)
    errors = prices.measure(judged(material), changes)
    return errors, [
        linear_map_candidates.saved_parameters(material.transformer, unit) for unit in units
    ]


def _reported(material: Material) -> np.ndarray:
    """Rows behind the velocity errors of the table."""
    count, seed = material.settings.ablation.velocity_rows, material.settings.seed
    found = material.context.reader.sample_heldout("report", count, seed, "ablation.velocity_rows")
    return np.sort(found)


def at_budgets(material: Material, units: list[Unit], taught: Students) -> list[dict]:
    """Columns of each smaller set that saves k / BUDGETS of the whole, the cheapest of its size."""
    costs, savings = _prices(material, units, taught)
    whole, found = blocks.parameter_count(material.transformer), []
    for share in range(1, BUDGETS):
        picked = schedules.cheapest(costs, savings, share / BUDGETS * sum(savings))
        plugged = {part: taught[part] for i in picked for part in units[i].new_blocks}
        model, _, _ = students.plugged(material.transformer, plugged)
        removed = sum(savings[i] for i in picked)
        found.append(
            _velocity(material, model)
            | {
                "removed_blocks": sum(units[i].removed_blocks for i in picked),
                "removed_parameters": removed,
                "parameter_fraction": 1 - removed / whole,
                "latency_ratio": math.nan,
            }
        )
    return found


def with_low_rank(material: Material, model: nn.Module, block_map: list[list[int]]) -> nn.Module:
    """A model with all modulations that it has at the ablation's rank, in closed form."""
    firsts = [members[0] for members in block_map] + [material.depth]
    rank = material.settings.ablation.rank
    ranks = {(firsts[one.block], one.path): rank for one in modulation.matrices(model)}
    sums = conditioning.read(material.paths["conditioning"])
    return modulation.low_rank(model, block_map, ranks, sums)


def plugged(material: Material, taught: Students, low_rank: bool) -> nn.Module:
    """The model as its export holds it."""
    model, _, block_map = students.plugged(material.transformer, taught)
    return with_low_rank(material, model, block_map) if low_rank else model


def finetuned(material: Material, taught: Students, low_rank: bool) -> nn.Module:
    """The assembled model with all its parameters trained on the recorded velocities."""
    exported = students.types(plugged(material, taught, low_rank))
    modules = {part.ends: student for part, student in taught.items()}
    model, block_map = blocks.assembled(material.transformer, modules)
    if low_rank:
        model = with_low_rank(material, model, block_map)
    model = copy.deepcopy(model).float().requires_grad_(True)
    steps = material.settings.ablation.finetune_steps
    lr = material.settings.ablation.finetune_lr
    options = stage_options(material, "finetune", steps, lr=lr)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    losses = distillation.output_distillation(
        material.context, lambda _step: model, "transformer", options, in_float32=True
    )
    phase(material, FINETUNE[low_rank], {"transformer": model}, losses, options)
    return students.cast(model.requires_grad_(False).eval(), exported)


def measure(material: Material, pipe: DiffusionPipeline, model: nn.Module) -> dict:
    """Size, velocity error, latency and, with the judge, accuracies of a model, by column."""
    settings, reader, teacher = material.settings, material.context.reader, material.transformer
    options, device = settings.evaluate, material.context.device
    rows = _reported(material)
    timed = reader.draw(rows, options.batch_size, (settings.seed,))
    pair = {TEACHER: teacher, "ablation": model}
    latency = timing.latencies(pair, reader, timed, settings, device)["ablation"]
    whole, left = (blocks.parameter_count(each) for each in (teacher, model))
    found = _velocity(material, model) | {
        "removed_parameters": whole - left,
        "parameter_fraction": left / whole,
        "latency_ratio": latency["latency_ratio"].value,
    }
    return found | accuracies(pipe, model, settings)


def _velocity(material: Material, model: nn.Module) -> dict:
    """The velocity error of a model on the reported rows, by column."""
    options, rows = material.settings.evaluate, _reported(material)
    compared = velocities.velocity_errors(
        "ablation",
        model,
        material.context.reader,
        rows,
        options.batch_size,
        material.context.device,
    )
    columns = [compared[key] for key in ("error", "norm", "prompt_index")]
    error = metrics.ratio(*columns, options.bootstrap, material.settings.seed)
    # The same prompts for all, so that methods can be compared prompt by prompt.
    of_prompts = np.unique(columns[2], return_inverse=True)[1]
    sums = (np.bincount(of_prompts, values).tolist() for values in columns[:2])
    found = {"velocity_error": error.value, "by_prompt": json.dumps(list(sums))}
    if math.isfinite(error.low):  # over one prompt there is no interval, and JSON has no NaN
        found |= dict(zip(ENDS, (error.low, error.high), strict=True))
    return found


def accuracies(pipe: DiffusionPipeline, model: nn.Module, settings: Settings) -> dict:
    """Shares of pictures that show what their prompt states, and which of them show it all; none
    without the judge."""
    options = settings.evaluate
    if options.judge != "digits":
        return {}
    rows = prompts.read(options.prompts, "evaluate.prompts")
    items = pipelines.samples(rows, settings.ablation.samples, generation.FIRST_SEED)
    judge, teacher = Judge(), pipelines.denoiser(pipe, settings.teacher)
    right: list[list[float]] = []
    pipe.register_modules(transformer=model)
    try:
        for batch in pipelines.in_batches(pipe, items, options.batch_size):
            texts_, seeds = [i["prompt"] for i in batch], [i["seed"] for i in batch]
            made = pipelines.run(pipe, texts_, seeds, settings.pipeline, output_type="np")
            # As 8-bit pictures, which is what the evaluation judges.
            pictures = (np.asarray(made.images) * 255).round() / 255
            for item, read in zip(batch, judge.read(pictures), strict=True):
                stated = rows[item["prompt_index"]]
                facts = [str(read[key]) == stated[key] for key in prompts.JUDGE_COLUMNS]
                right.append([*facts, all(facts)])
    finally:
        pipe.register_modules(transformer=teacher)
    shares = dict(zip(ACCURACIES, np.mean(right, axis=0).tolist(), strict=True))
    return shares | {"right": json.dumps([int(facts[-1]) for facts in right])}


def run(material: Material, pipe: DiffusionPipeline, job: Mapping, chosen: Chosen) -> list[dict]:
    """Rows of a run: its `STATES`, and `part` where smaller budgets are asked for; the teacher's
    alone without a choice."""
    steps = sum(material.steps.values())
    extra = material.settings.ablation.finetune_steps
    intervals = json.dumps(sorted(chosen.starts))
    common = {"method": job["name"], "seed": material.context.seed, "intervals": intervals}
    common |= dict.fromkeys((*ACCURACIES, *ENDS), math.nan) | {"right": "[]"}
    common |= {"removed_blocks": sum(last - first for first, last in chosen.starts)}
    common |= {"text_runs": json.dumps(chosen.runs), "linear_ffns": json.dumps(chosen.ffns)}
    if not chosen.starts and not chosen.runs and not chosen.ffns:
        found = measure(material, pipe, material.transformer)
        return [common | found | {"state": "plugged", "steps": 0, "seconds": 0.0}]
    units, taught = teach(material, chosen, job["train"])
    trained = seconds_of(material, "distill", "narrow", "subsets")
    rows = []
    for low_rank in WITH_LOW_RANK[job["train"].get("low_rank", "no")]:
        before, after = STATES[low_rank]
        model = plugged(material, taught, low_rank)
        found = {before: material.once(before, lambda m=model: measure(material, pipe, m))}
        model = finetuned(material, taught, low_rank)
        found[after] = material.once(after, lambda m=model: measure(material, pipe, m))
        tuning = seconds_of(material, FINETUNE[low_rank])
        done = {before: (steps, trained), after: (steps + extra, trained + tuning)}
        for state, measured in found.items():
            taken, seconds = done[state]
            rows.append(common | measured | {"state": state, "steps": taken, "seconds": seconds})
    if job["train"].get("budgets"):
        same = {"state": "part", "steps": steps, "seconds": trained}
        rows += [common | part | same for part in at_budgets(material, units, taught)]
    return rows


def material_of(
    context: Context, settings: Settings, job: Mapping, paths: Mapping[str, Path], state: State
) -> Material:
    """The material of one job; arguments as of `Material`."""
    steps = phases(job["select"], job["train"], settings.ablation)
    return Material(context, settings, paths, state, steps, job["train"].get("ema"))
