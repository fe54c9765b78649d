"""Trains and measures one method of the ablation, as the stages do it, in one process."""

import copy
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from ppcl import judges
from ppcl.ablation import method_training, phases, schedules
from ppcl.ablation.material import Chosen, Material
from ppcl.closed_forms import (
    modulation,
)
from ppcl.evaluation import generation, metrics, timing, velocities
from ppcl.evaluation.metrics import TEACHER
from ppcl.extraction import conditioning
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit
from ppcl.settings import Settings
from ppcl.teacher import pipelines, prompts
from ppcl.training import distillation
from ppcl.transformer import blocks, diffusers_model
from ppcl.transformer.context import Context, State

BUDGETS = 8  # sizes at which students are measured that are to serve every budget
JUDGE = judges.JUDGES["digits"]  # the only one with columns in the ablation's table
ENDS = "velocity_error_low", "velocity_error_high"
# Each for a model without, then one with low-rank modulations: the states before and after the
# fine-tune, and the name of the fine-tune's phase.
STATES = ("plugged", "finetuned"), ("low_rank", "low_rank_finetuned")
FINETUNE = "finetune", "finetune-low-rank"
WITH_LOW_RANK = {"no": (False,), "also": (False, True), "only": (True,)}


def _reported(material: Material) -> np.ndarray:
    """Rows behind the velocity errors of the table."""
    count, seed = material.settings.ablation.velocity_rows, material.settings.seed
    rows = material.context.reader.sample_heldout("report", count, seed, "ablation.velocity_rows")
    return np.sort(rows)


def at_budgets(material: Material, units: list[Unit], taught: Students) -> list[dict]:
    """Rows of smaller sets: for k from 1 to BUDGETS - 1, the cheapest set of units that saves at
    least k / BUDGETS of the parameters that all units save."""
    costs, savings = method_training.unit_prices(material, units, taught)
    whole, rows = blocks.parameter_count(material.transformer), []
    for share in range(1, BUDGETS):
        picked = schedules.cheapest(costs, savings, share / BUDGETS * sum(savings))
        plugged = {
            new_block: taught[new_block] for i in picked for new_block in units[i].new_blocks
        }
        model, _, _ = students.plugged(material.transformer, plugged)
        removed = sum(savings[i] for i in picked)
        rows.append(
            _velocity(material, model)
            | {
                "removed_blocks": sum(units[i].removed_blocks for i in picked),
                "removed_parameters": removed,
                "parameter_fraction": 1 - removed / whole,
                "latency_ratio": math.nan,
            }
        )
    return rows


def with_low_rank(material: Material, model: nn.Module, block_map: list[list[int]]) -> nn.Module:
    """The model with all its modulation matrices at rank `ablation.rank`, in closed form."""
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
    modules = {new_block.ends: student for new_block, student in taught.items()}
    model, block_map = blocks.assembled(material.transformer, modules)
    if low_rank:
        model = with_low_rank(material, model, block_map)
    model = copy.deepcopy(model).float().requires_grad_(True)
    steps = material.settings.ablation.finetune_steps
    lr = material.settings.ablation.finetune_lr
    options = phases.stage_options(material, "finetune", steps, lr=lr)
    if options.gradient_checkpointing:
        diffusers_model.of(model).enable_gradient_checkpointing()
    losses = distillation.output_distillation(
        material.context, lambda _step: model, "transformer", options, in_float32=True
    )
    phases.train(material, FINETUNE[low_rank], {"transformer": model}, losses, options)
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
    columns = _velocity(material, model) | {
        "removed_parameters": whole - left,
        "parameter_fraction": left / whole,
        "latency_ratio": latency["latency_ratio"].value,
    }
    return columns | accuracies(pipe, model, settings)


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
    errors, norms, indices = (compared[key] for key in ("error", "norm", "prompt_index"))
    error = metrics.ratio(errors, norms, indices, options.bootstrap, material.settings.seed)
    # The same prompts for all, so that methods can be compared prompt by prompt.
    of_prompts = np.unique(indices, return_inverse=True)[1]
    sums = (np.bincount(of_prompts, values).tolist() for values in (errors, norms))
    columns = {"velocity_error": error.value, "by_prompt": json.dumps(list(sums))}
    if math.isfinite(error.low):  # over one prompt there is no interval, and JSON has no NaN
        columns |= dict(zip(ENDS, (error.low, error.high), strict=True))
    return columns


def accuracies(pipe: DiffusionPipeline, model: nn.Module, settings: Settings) -> dict:
    """By column, the shares of pictures that show each fact of their prompt, and all facts.

    Column `right` is JSON with 1 or 0 for each picture: whether it shows all. {} without a judge.
    """
    options = settings.evaluate
    if judges.named(options.judge) is not JUDGE:
        return {}
    rows = prompts.read(options.prompts, "evaluate.prompts")
    items = pipelines.samples(rows, settings.ablation.samples, generation.FIRST_SEED)
    reader, teacher = JUDGE.load(), pipelines.denoiser(pipe, settings.teacher)
    right: list[dict[str, np.ndarray]] = []
    pipe.register_modules(transformer=model)
    try:
        for batch in pipelines.in_batches(pipe, items, options.batch_size):
            texts_, seeds = [i["prompt"] for i in batch], [i["seed"] for i in batch]
            made = pipelines.run(pipe, texts_, seeds, settings.pipeline, output_type="np")
            # As 8-bit pictures, which is what the evaluation judges.
            pictures = (np.asarray(made.images) * 255).round() / 255
            stated = [rows[item["prompt_index"]] for item in batch]
            right.append(
                judges.scores(JUDGE, judges.readings(JUDGE, reader, pictures, stated), stated)
            )
    finally:
        pipe.register_modules(transformer=teacher)
    scores = {metric: np.concatenate([of[metric] for of in right]) for metric in JUDGE.labels}
    shares = {metric: float(values.mean()) for metric, values in scores.items()}
    return shares | {"right": json.dumps([int(value) for value in scores["all_correct"]])}


def run(material: Material, pipe: DiffusionPipeline, job: Mapping, chosen: Chosen) -> list[dict]:
    """Rows of a run: one for each of the method's `STATES` and, for a method with `budgets`, one of
    state `part` for each smaller set. A method that removes nothing has one row, the teacher's."""
    steps = sum(material.steps.values())
    extra = material.settings.ablation.finetune_steps
    intervals = json.dumps(sorted(chosen.starts))
    common = {"method": job["name"], "seed": material.context.seed, "intervals": intervals}
    common |= dict.fromkeys((*JUDGE.labels, *ENDS), math.nan) | {"right": "[]"}
    common |= {"removed_blocks": sum(last - first for first, last in chosen.starts)}
    common |= {"text_runs": json.dumps(chosen.runs), "linear_ffns": json.dumps(chosen.ffns)}
    if not chosen.starts and not chosen.runs and not chosen.ffns:
        columns = measure(material, pipe, material.transformer)
        return [common | columns | {"state": "plugged", "steps": 0, "seconds": 0.0}]
    units, taught = method_training.teach(material, chosen, job["train"])
    trained = phases.seconds_of(material, "distill", "narrow", "subsets")
    rows = []
    for low_rank in WITH_LOW_RANK[job["train"].get("low_rank", "no")]:
        before, after = STATES[low_rank]
        model = plugged(material, taught, low_rank)
        by_state = {before: material.once(before, partial(measure, material, pipe, model))}
        model = finetuned(material, taught, low_rank)
        by_state[after] = material.once(after, partial(measure, material, pipe, model))
        tuning = phases.seconds_of(material, FINETUNE[low_rank])
        done = {before: (steps, trained), after: (steps + extra, trained + tuning)}
        for state, measured in by_state.items():
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
    steps = phases.steps_of(job["select"], job["train"], settings.ablation)
    return Material(context, settings, paths, state, steps, job["train"].get("ema"))
