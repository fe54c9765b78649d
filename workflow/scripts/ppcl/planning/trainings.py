"""What the stages that train need on a device: their own steps, on tensors without content.

A step is that of `training.steps`, which the trainings call too.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ppcl.planning import footprint, weightless
from ppcl.planning.device_memory import Stage, of_parts
from ppcl.planning.planner import Planner, bytes_of
from ppcl.pruning import narrow, students
from ppcl.pruning.units import Unit, new_blocks_of
from ppcl.settings import FinetuneSettings, TrainingSettings
from ppcl.training import shards, steps
from ppcl.transformer import blocks, calls, diffusers_model


@dataclass(frozen=True)
class Shares:
    """A trained model that is shared out over processes (finetune.sharding: fsdp).

    Attributes:
        processes: their number.
        gathered: bytes that are whole on every device at once: what is not of blocks, a block
            that runs and the one fetched meanwhile, and a block's gradients.
        offloaded: whether shares rest in CPU memory.
    """

    processes: int
    gathered: int
    offloaded: bool


@dataclass(frozen=True)
class Trained:
    """What a stage trains.

    Attributes:
        modules: with float32 weights.
        measured: whether with gradient checkpointing -> what a step needs; None if unknown.
        at_once: whether all modules run in one graph, or one after the other. With mixed precision,
            autocast keeps casts of all modules of a graph.
        teacher: `streams` if it can be on the device a block at a time, `stays` if it can't, since
            gradients pass through it, `absent` if it is not there.
        shares: how the modules are shared out over processes, if they are.
    """

    modules: list[nn.Module]
    measured: Callable[[bool], footprint.Footprint | None]
    at_once: bool = False
    teacher: Literal["streams", "stays", "absent"] = "streams"
    shares: Shares | None = None


class _Alone:
    """Stands for an Accelerator: one process, whose modules are in the precision of the training
    already (`_running`)."""

    num_processes = 1

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


ALONE = _Alone()


def distillations(planner: Planner, units: list[Unit]) -> Iterator[Stage]:
    """The job that distills these units, or the jobs among which they are shared out."""
    if not units:
        return
    jobs, caching = planner.jobs(units), planner.caching()
    for number, job in enumerate(jobs):
        stage = distill(planner, "distill" if len(jobs) == 1 else f"distill/{number}", job)
        new_blocks = new_blocks_of(job)
        start = shards.first_needed(new_blocks) if shards.cached(job, caching) else 0
        if len(jobs) > 1 or start:
            stage.note += f"; {len(new_blocks)} students, teacher from block {start} to"
            stage.note += f" {job[-1].last}: {shards.cost(job, caching):.4g} block passes a step"
        yield stage


def distill(planner: Planner, name: str, units: list[Unit]) -> Stage:
    """Eq. 6 and L_linear: the teacher once, then one student's graph after the other."""
    options = planner.settings.distill
    size = _batch_size(planner, options)
    made = weightless.new_blocks(planner.transformer, units, torch.float32)

    def measured(recompute: bool) -> footprint.Footprint | None:
        batch = planner.batch(size, planner.dtype)
        if batch is None:
            return None
        dtype, times = _precision(options)
        running = _running(made, dtype)
        _as_autocast(running, dtype)
        used = options.replace(gradient_checkpointing=recompute)

        def run():
            arguments, transformer = batch.arguments, planner.transformer
            lessons = steps.lessons_of(transformer, running, arguments, used, ALONE)
            for _, loss, _ in steps.student_losses(
                transformer, running, lessons, batch, used, ALONE
            ):
                torch.autograd.backward(loss)

        needed = footprint.measured(run, running.values(), times)
        return needed.beside(bytes_of(batch.arguments))

    return _trained(planner, name, options, Trained(list(made.values()), measured))


def subsets(planner: Planner) -> Stage:
    """Any-subset distillation at its most: with all units plugged in."""
    options = planner.settings.subsets
    made = weightless.new_blocks(planner.transformer, planner.every, torch.float32)

    def measured(recompute: bool) -> footprint.Footprint | None:
        dtype, times = _precision(options)
        running = _running(made, dtype)
        wrapped: students.Students = {p: steps.InFloat32(m) for p, m in running.items()}
        model, _ = weightless.plugged(planner.transformer, wrapped if times == 1 else running)
        batch = planner.batch(_batch_size(planner, options), planner.dtype)
        return _velocity(model, batch, recompute, list(running.values()), times)

    trained = Trained(list(made.values()), measured, at_once=True, teacher="stays")
    return _trained(planner, "subsets", options, trained)


def finetune(planner: Planner) -> Stage:
    """Fine-tuning of all parameters of the smallest variant. The teacher does not run: its answers
    are recorded."""
    options = planner.settings.finetune
    model, _ = next(reversed(planner.variants.values()))
    model = nn.Module.to(copy.deepcopy(model), torch.float32)  # diffusers' own would warn

    def measured(recompute: bool) -> footprint.Footprint | None:
        dtype, times = _precision(options)
        running = nn.Module.to(copy.deepcopy(model), dtype).requires_grad_(True)
        batch = planner.batch(_batch_size(planner, options), dtype)
        return _velocity(running, batch, recompute, [running], times)

    shares = _shares(planner, options, model)
    trained = Trained([model], measured, at_once=True, teacher="absent", shares=shares)
    return _trained(planner, "finetune", options, trained)


def _shares(planner: Planner, options: FinetuneSettings, model: nn.Module) -> Shares | None:
    """How `model` is shared out, if it is; with processes: auto, as with one."""
    processes = planner.settings.processes
    processes = 1 if processes == "auto" else processes
    if options.sharding == "none" or (processes == 1 and not options.cpu_offload):
        return None
    counts = [blocks.parameter_count(b.module) for b in blocks.block_sequence(model)]
    whole = blocks.parameter_count(model) - sum(counts) + 3 * max(counts)
    gathered = whole * _precision(options)[0].itemsize
    return Shares(processes, gathered, options.cpu_offload)


def _velocity(
    model: nn.Module,
    batch: calls.Batch | None,
    recompute: bool,
    trained: list[nn.Module],
    times: float,
) -> footprint.Footprint | None:
    """What a step of output distillation needs; times: see `footprint.measured`."""
    if batch is None:
        return None
    if recompute:
        diffusers_model.of(model).enable_gradient_checkpointing()

    def run():
        torch.autograd.backward(steps.velocity_loss(model, batch, ALONE, in_float32=False))

    try:
        needed = footprint.measured(run, trained, times)
    finally:
        if recompute:
            diffusers_model.of(model).disable_gradient_checkpointing()
    return needed.beside(bytes_of(batch.arguments))


def _batch_size(planner: Planner, options: TrainingSettings) -> int:
    """Samples per device; with processes: auto, all on one."""
    processes = planner.settings.processes
    return math.ceil(options.batch_size / (1 if processes == "auto" else processes))


def _trained(planner: Planner, name: str, options: TrainingSettings, trained: Trained) -> Stage:
    """A stage that trains float32 modules with AdamW."""
    modules, shares, teacher = trained.modules, trained.shares, trained.teacher
    cast = modules if trained.at_once else [max(modules, key=blocks.parameter_count)]
    count = sum(map(blocks.parameter_count, modules))
    held = sum(map(weightless.weight_bytes, modules))
    plain, again = trained.measured(False), trained.measured(True)
    states, small = (
        weightless.optimizer_bytes(count, kind, options.ema) for kind in ("adamw", "adamw8bit")
    )
    lowered = options.mixed_precision == "bf16"
    casts = 2 * sum(map(blocks.parameter_count, cast)) if lowered else 0
    parts: dict[str, float | None] = {
        "students": held,
        "casts": casts,
        "gradients": 4 * count,
        "optimizer 32-bit": states,
        "optimizer 8-bit": small,
        "activations": plain.activations if plain else None,
        "activations checkpointed": again.activations if again else None,
    }
    note = f"batch {_batch_size(planner, options)}, {options.mixed_precision} mixed precision"
    note += ", checkpointed" if options.gradient_checkpointing else ""
    note += ", 8-bit AdamW" if options.optimizer == "adamw8bit" else ""
    if shares:
        parts = {
            name: value
            if value is None or "activations" in name
            else math.ceil(value / shares.processes)
            for name, value in parts.items()
        } | {"casts": 0, "gathered": shares.gathered}
        note += f", shared out over {shares.processes} processes"
        note += ", shares in CPU memory" if shares.offloaded else ""
    if plain is None or again is None:
        return of_parts(planner, name, parts, None, note=note)
    used = again if options.gradient_checkpointing else plain
    configured = small if options.optimizer == "adamw8bit" else states
    # All gradients are there when the optimizer steps, whatever there was before.
    beside = held + configured + max(used.peak + casts, 4 * count)
    least = held + small + max(again.peak + casts, 4 * count)
    if shares:  # which 8-bit AdamW can't take
        kept = math.ceil((held + states + 4 * count) / shares.processes)
        beside = used.activations + shares.gathered + (0 if shares.offloaded else kept)
        least = again.activations + shares.gathered
    stage = of_parts(planner, name, parts, beside, least, note)
    if teacher != "streams":
        there = planner.weights if teacher == "stays" else 0
        stage.parts |= {"teacher": there, "teacher offloaded": there}
        stage.resident = stage.offloaded = there + beside
        stage.least = there + least
        stage.note += "; gradients pass through the teacher" if there else "; without teacher"
    return stage


def _precision(options: TrainingSettings) -> tuple[torch.dtype, float]:
    """The dtype that a step computes in, and bytes of a float32 gradient over one of that dtype."""
    return (torch.bfloat16, 2.0) if options.mixed_precision == "bf16" else (torch.float32, 1.0)


def _running(made: students.Students, dtype: torch.dtype) -> students.Students:
    """Trainable copies of new blocks, in the type that a step computes in."""
    running = {new_block: copy.deepcopy(module).to(dtype) for new_block, module in made.items()}
    for module in running.values():
        module.requires_grad_(True).train()
    return running


def _as_autocast(running: students.Students, dtype: torch.dtype) -> None:
    """Has students cast what they are given to this dtype, as autocast does: the teacher's
    activations may have another. Their linear maps too, which L_linear calls by themselves. In
    place."""

    def in_its_type(_module, args, kwargs):
        return tree_map(lambda value: _cast(value, dtype), (args, kwargs))

    for student in running.values():
        for called in (student, *narrow.maps(student).values()):
            called.register_forward_pre_hook(in_its_type, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
