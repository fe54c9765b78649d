"""Trains and measures one method of the ablation, as the stages do it, in one process."""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl import (
    blocks,
    chain,
    digits,
    distillation,
    evaluation,
    methods,
    metrics,
    pipelines,
    plans,
    prompts,
    rivals,
    students,
    tensors,
    texts,
    training,
    width,
)
from ppcl.ablation import Chosen, Material
from ppcl.metrics import TEACHER
from ppcl.plans import Unit
from ppcl.students import Students

ACCURACIES = tuple(f"{name}_accuracy" for name in prompts.JUDGE_COLUMNS) + ("all_correct",)


def phase(
    material: Material,
    name: str,
    modules: Mapping[str, nn.Module],
    losses: Callable,
    options: dict,
    scales: Mapping[str, float] | None = None,
) -> None:
    """One training, in place; what a killed run had finished is read instead.

    options: the stage's, with the ablation's steps and batch_size. Phases are short here: a
    warm-up takes at most a quarter of one.
    """
    path = material.state / f"{name}.safetensors"
    identity = f"{material.identity} {name}"
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
    training.train(
        modules,
        losses,
        training.Optimisation.from_settings(options),
        material.accelerator,
        path.with_name(f"{name}-checkpoint.safetensors"),
        identity,
        scales,
    )
    state = {f"{key}/{k}": v for key, m in modules.items() for k, v in m.state_dict().items()}
    tensors.write(path, state, {"identity": identity})


def stage_options(material: Material, stage: str, steps: int, **changed) -> dict:
    """Settings of a stage for a phase of the ablation."""
    options = material.settings[stage] | changed
    warmup = min(options["warmup_steps"], steps // 4)
    size = material.settings["ablation"]["batch_size"]
    return options | {"steps": steps, "warmup_steps": warmup, "batch_size": size}


def teach(material: Material, chosen: Chosen, train: Mapping) -> tuple[list[Unit], Students]:
    """The units of a selection and their trained students; `train` as in `methods.Method`."""
    transformer, steps = material.transformer, material.steps
    device, wide = material.accelerator.device, material.settings["width"]
    starts = {
        ends: train.get("start", how) if how == "first" else how
        for ends, how in chosen.starts.items()
    }
    unread_after = width.unread_after(transformer)
    units = plans.units(starts, chosen.runs, chosen.ffns, unread_after)
    parts = students.parts_of(units)
    taught = rivals.start(transformer, starts)

    def narrowed(whole: Students) -> Students:
        every = students.whole(transformer, parts, whole)
        return width.start(
            transformer, every, material.reader, wide, material.settings["seed"], device
        )

    def distil(name: str, count: int, taught: Students) -> None:
        options = stage_options(
            material,
            "distill",
            count,
            linear_weight=wide["linear_weight"],
            mode=train.get("mode", "independent"),
            loss=train.get("loss", "normalised"),
        )
        for student in taught.values():
            student.to(device)
        shared = transformer, taught, material.reader, options, material.seed, material.accelerator
        if options["mode"] == "chain":
            together = nn.ModuleDict({part.name: student for part, student in taught.items()})
            phase(material, name, {"students": together}, chain.through_chain(*shared), options)
        else:
            modules = {part.name: student for part, student in taught.items()}
            scales = distillation.lr_scales(taught, wide["lr_scale"])
            phase(material, name, modules, distillation.independent(*shared), options, scales)

    if steps["narrow"]:
        if taught:
            distil("distill", steps["distill"], taught)
        taught = narrowed(taught)
        distil("narrow", steps["narrow"], taught)
    else:
        taught = narrowed(taught)
        distil("distill", steps["distill"], taught)
    if steps["subsets"]:
        options = stage_options(material, "subsets", steps["subsets"])
        shared = material.reader, options, material.seed, material.accelerator
        losses = distillation.any_subset(transformer, units, taught, *shared)
        together = nn.ModuleDict({part.name: student for part, student in taught.items()})
        scales = distillation.lr_scales(taught, wide["lr_scale"], "students/{}.")
        phase(material, "subsets", {"students": together.to(device)}, losses, options, scales)
    for student in taught.values():
        student.requires_grad_(False).eval()
    return units, taught


def finetuned(material: Material, taught: Students) -> nn.Module:
    """The assembled model with all its parameters trained on the recorded velocities."""
    modules = {part.key: student for part, student in taught.items()}
    model, _ = blocks.assembled(material.transformer, modules)
    model = copy.deepcopy(model).float().requires_grad_(True)
    options = stage_options(material, "finetune", material.settings["ablation"]["finetune_steps"])
    if options["gradient_checkpointing"]:
        model.enable_gradient_checkpointing()
    shared = material.reader, options, material.seed, material.accelerator
    losses = distillation.output_distillation(
        lambda _step: model, "transformer", *shared, in_float32=True
    )
    phase(material, "finetune", {"transformer": model}, losses, options)
    model.requires_grad_(False).eval()
    dtype = material.transformer.dtype
    return model if model.dtype == dtype else model.to(dtype)


def measure(material: Material, pipe: DiffusionPipeline, model: nn.Module) -> dict:
    """Size, velocity error, latency and, with the judge, accuracies of a model, by column."""
    settings, reader = material.settings, material.reader
    options, seed, device = settings["evaluate"], settings["seed"], material.accelerator.device
    whole = blocks.parameter_count(material.transformer)
    found = {
        "removed_parameters": whole - blocks.parameter_count(model),
        "parameter_fraction": blocks.parameter_count(model) / whole,
    }
    count = settings["ablation"]["velocity_rows"]
    rows = np.sort(reader.sample_heldout("report", count, seed))
    size = options["batch_size"]
    compared = evaluation.velocity_errors("ablation", model, reader, rows, size, device)
    columns = (compared[key] for key in ("error", "norm", "prompt_index"))
    error = metrics.ratio(*columns, options["bootstrap"], seed)
    found |= {"velocity_error": error.value}
    found |= {"velocity_error_low": error.low, "velocity_error_high": error.high}

    arguments = reader.batch(reader.draw(rows, size, (seed,))).to(device).arguments
    with torch.no_grad():
        runs = {
            name: lambda one=one: one(**arguments)
            for name, one in ((TEACHER, material.transformer), ("model", model))
        }
        times = evaluation.interleaved_times(runs, options["latency_repeats"], device)
    ratio = metrics.median_ratio(times["model"], times[TEACHER], options["bootstrap"], seed)
    found["latency_ratio"] = ratio.value
    return found | accuracies(pipe, model, settings)


def accuracies(pipe: DiffusionPipeline, model: nn.Module, settings: Mapping) -> dict[str, float]:
    """Shares of pictures that show what their prompt states; none without the judge."""
    options = settings["evaluate"]
    if options["judge"] != "digits":
        return {}
    rows = prompts.read(options["prompts"], "evaluate.prompts")
    drawn = pipelines.sample_prompts(rows, settings["ablation"]["samples"], evaluation.FIRST_SEED)
    names = ("prompt_index", "prompt", "seed")
    items = [{"sample": n, **dict(zip(names, at, strict=True))} for n, at in enumerate(drawn)]
    judge, teacher = digits.Judge(), pipe.transformer
    right: list[list[float]] = []
    pipe.register_modules(transformer=model)
    try:
        for batch in pipelines.in_batches(pipe, items, options["batch_size"]):
            texts_, seeds = [i["prompt"] for i in batch], [i["seed"] for i in batch]
            made = pipelines.run(pipe, texts_, seeds, settings["pipeline"], output_type="np")
            # As 8-bit pictures, which is what the evaluation judges.
            pictures = (np.asarray(made.images) * 255).round() / 255
            for item, read in zip(batch, judge.read(pictures), strict=True):
                stated = rows[item["prompt_index"]]
                facts = [str(read[key]) == stated[key] for key in prompts.JUDGE_COLUMNS]
                right.append([*facts, all(facts)])
    finally:
        pipe.register_modules(transformer=teacher)
    return dict(zip(ACCURACIES, np.mean(right, axis=0).tolist(), strict=True))


def run(material: Material, pipe: DiffusionPipeline, job: Mapping, chosen: Chosen) -> list[dict]:
    """Rows of a run: its states `plugged` and `finetuned`; the teacher's alone without a choice."""
    steps = sum(material.steps.values())
    extra = material.settings["ablation"]["finetune_steps"]
    intervals = json.dumps(sorted(chosen.starts))
    common = {"method": job["name"], "seed": material.seed, "intervals": intervals}
    common |= dict.fromkeys(ACCURACIES, math.nan)
    common |= {"removed_blocks": sum(last - first for first, last in chosen.starts)}
    common |= {"text_runs": json.dumps(chosen.runs), "linear_ffns": json.dumps(chosen.ffns)}
    if not chosen.starts and not chosen.runs and not chosen.ffns:
        found = measure(material, pipe, material.transformer)
        return [common | found | {"state": "plugged", "steps": 0, "seconds": 0.0}]
    began = time.perf_counter()
    _, taught = teach(material, chosen, job["train"])
    trained = time.perf_counter() - began
    model, _ = distillation.plugged(material.transformer, taught)
    plugged = _once(material, "plugged", lambda: measure(material, pipe, model))
    began = time.perf_counter()
    tuned = finetuned(material, taught)
    seconds = {"plugged": trained, "finetuned": trained + time.perf_counter() - began}
    found = {"plugged": plugged, "finetuned": measure(material, pipe, tuned)}
    done = {"plugged": steps, "finetuned": steps + extra}
    return [
        common | found[state] | {"state": state, "steps": done[state], "seconds": seconds[state]}
        for state in found
    ]


def _once(material: Material, name: str, make: Callable[[], dict]) -> dict:
    """What `make` returns, or what it returned in an earlier, killed run."""
    path: Path = material.state / f"{name}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] == material.identity:
            return kept["found"]
    found = make()
    texts.write_json(path, {"identity": material.identity, "found": found})
    return found


def material_of(settings: Mapping, pipe, job: Mapping, **given) -> Material:
    """The material of one job."""
    steps = methods.phases(job["select"], job["train"], settings["ablation"])
    transformer = pipe.transformer.requires_grad_(False).eval()
    return Material(transformer, settings=settings, steps=steps, **given)
