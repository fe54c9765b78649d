"""Students: one block per interval. Their plan, their start weights, and how they are taught."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ppcl import blocks, calls, losses, tensors
from ppcl.errors import UserError
from ppcl.families import family_of


@dataclass(frozen=True)
class Interval:
    """Blocks first..last (inclusive), replaced by one student."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """Such as 03-05; the key of its student in files and logs."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def key(self) -> tuple[int, int]:
        return self.first, self.last


Students = dict[Interval, nn.Module]


# ---- the plan and the start weights


def start_weights(modules: list[nn.Module], how: str) -> dict[str, Tensor]:
    """Start weights of the student of an interval, as a float32 state dict.

    Args:
        modules: the interval's teacher blocks, in order.
        how: `first` (block u, PPCL), `middle` (block floor((u+v)/2), PPCL's published script), or
            `average`: weights that fall linearly with the distance from the middle (Amber-Image,
            arXiv 2602.17047).
    """
    states = [m.state_dict() for m in modules]
    count = len(states)
    if how == "first":
        weights = [1.0] + [0.0] * (count - 1)
    elif how == "middle":
        weights = [float(i == (count - 1) // 2) for i in range(count)]
    else:
        raw = [1 - abs(i - (count - 1) / 2) / ((count + 1) / 2) for i in range(count)]
        weights = [w / sum(raw) for w in raw]
    return {
        key: sum(w * s[key].float() for w, s in zip(weights, states, strict=True) if w)
        for key in states[0]
    }


def start(transformer: nn.Module, intervals: list[Interval], how: str) -> Students:
    """Students with their start weights, float32, on the CPU."""
    sequence = blocks.block_sequence(transformer)
    found = {}
    for interval in intervals:
        modules = [sequence[i].module for i in range(interval.first, interval.last + 1)]
        student = copy.deepcopy(modules[0]).float().cpu().requires_grad_(True)
        student.load_state_dict(start_weights(modules, how))
        found[interval] = student
    return found


def save(path: Path, students: Students, metadata: dict[str, str]) -> None:
    """Writes all students to one file, parameters named `<interval>/<parameter>`."""
    state = {f"{i.name}/{k}": v for i, m in students.items() for k, v in m.state_dict().items()}
    tensors.write(path, state, metadata)


def load(path: Path, transformer: nn.Module, intervals: list[Interval]) -> Students:
    """Reads students; their architecture is that of the teacher's block at the interval's start.

    Raises:
        UserError: the file lacks an interval, or holds other shapes, or NaN.
    """
    state, _ = tensors.read(path)
    sequence, found = blocks.block_sequence(transformer), {}
    for interval in intervals:
        student = copy.deepcopy(sequence[interval.first].module).float().cpu().requires_grad_(True)
        part = {
            k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(interval.name + "/")
        }
        try:
            student.load_state_dict(part)
        except RuntimeError as error:
            raise UserError(
                f"{path} does not fit interval {interval.name} of this teacher; delete it and "
                f"rerun. {error}"
            ) from error
        for key, value in part.items():
            if not torch.isfinite(value).all():
                raise UserError(f"{path}: '{interval.name}/{key}' holds NaN or infinity; delete it")
        found[interval] = student
    return found


def read_plan(path: Path) -> tuple[list[Interval], dict]:
    """The plan's intervals, and the whole plan.

    Raises:
        UserError: the plan is missing or not one that `prune` wrote.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return [Interval(i["first"], i["last"]) for i in plan["intervals"]], plan
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); run the prune stage") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole plan ({error}); delete it and rerun") from error


# ---- teaching


@torch.no_grad()
def teacher_states(
    transformer: nn.Module, intervals: list[Interval], arguments: dict[str, Any]
) -> tuple[dict[Interval, dict[str, Any]], dict[Interval, blocks.Streams]]:
    """Runs the teacher once, no further than the last interval's end.

    Returns:
        Per interval the bound arguments of its first block's call (with T_{u-1}^D as streams), and
        the streams T_v^D after its last block.
    """
    sequence = blocks.block_sequence(transformer)
    inputs: dict[Interval, dict[str, Any]] = {}
    targets: dict[Interval, blocks.Streams] = {}

    def before(block, bound):
        inputs.update({i: bound for i in intervals if i.first == block.index})

    def after(block, streams):
        targets.update({i: streams for i in intervals if i.last == block.index})

    ends = {end for i in intervals for end in i.key}
    watched = [b for b in sequence if b.index in ends]
    with blocks.watch(watched, before, after, stop_after=max(ends)) as run:
        run(transformer, arguments)
    return inputs, targets


def interval_losses(
    output: blocks.Streams, target: blocks.Streams, masks: blocks.Streams, options: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_depth of one interval (Eq. 6), summed over streams, and both errors of every stream."""
    metrics = {}
    for stream, value in target.items():
        mask = masks.get(stream)
        metrics[f"{stream}/normalised"] = losses.normalised_error(output[stream], value, mask)
        metrics[f"{stream}/relative"] = losses.relative_error(output[stream], value, mask)
    normalised = sum(m for k, m in metrics.items() if k.endswith("/normalised"))
    relative = sum(m for k, m in metrics.items() if k.endswith("/relative"))
    if options["loss"] == "normalised":
        return normalised, metrics
    if options["loss"] == "relative":
        return relative, metrics
    return normalised + options["relative_weight"] * relative, metrics


def share(rows, accelerator: Accelerator):
    """This process's part of a global batch; the batch is the same for any process count.

    Raises:
        UserError: there are fewer rows than processes.
    """
    if len(rows) < accelerator.num_processes:
        raise UserError(
            f"batch_size {len(rows)} is less than the number of training processes, "
            f"{accelerator.num_processes}; raise it, or lower the config key 'processes'"
        )
    return rows[accelerator.process_index :: accelerator.num_processes]


def distillation(
    transformer: nn.Module,
    students: Students,
    reader: calls.Reader,
    options: dict,
    seed: int,
    accelerator: Accelerator,
):
    """Step losses of all students (see training.Losses).

    mode `independent` (Eq. 6): a student gets the teacher's activation before its interval, and
    never another student's output. mode `sequential`, the ablation baseline: it gets what the
    students before it make of the input; gradients stay within each student.
    """
    sequence = blocks.block_sequence(transformer)
    family = family_of(type(transformer).__name__)
    intervals, rows = list(students), reader.rows(heldout=False)

    def losses_of_step(step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        drawn = reader.draw(rows, options["batch_size"], (seed, step))
        part = share(drawn, accelerator)
        # Shares differ by a row where the batch does not divide evenly; the loop averages them.
        weight = len(part) * accelerator.num_processes / len(drawn)
        batch = reader.batch(part).to(accelerator.device)
        masks = blocks.token_masks(family, batch.arguments)
        with accelerator.autocast():
            inputs, targets = teacher_states(transformer, intervals, batch.arguments)
        if options["mode"] == "sequential":
            inputs = sequential_inputs(transformer, students, batch.arguments, accelerator)
        for interval, student in students.items():
            # Students have float32 weights, whatever the teacher's dtype; autocast may lower them.
            bound = tree_map(calls.as_float32, inputs.pop(interval))
            with accelerator.autocast():
                returned = _call(student, bound, options["gradient_checkpointing"])
            output = sequence[interval.first].outputs(returned)
            loss, metrics = interval_losses(output, targets.pop(interval), masks, options)
            yield interval.name, weight * loss, {k: weight * m for k, m in metrics.items()}

    return losses_of_step


def plugged(
    transformer: nn.Module, students: Students
) -> tuple[nn.Module, dict[Interval, nn.Module]]:
    """The teacher with students in place of their intervals, and those students as they run there.

    A teacher of another dtype than the students' float32 gets copies in its own, as an exported
    model has them.
    """
    dtype = transformer.dtype
    fitting = {
        interval: student
        if all(p.dtype == dtype for p in student.parameters())
        else copy.deepcopy(student).to(dtype)
        for interval, student in students.items()
    }
    model, _ = blocks.assembled(transformer, {i.key: m for i, m in fitting.items()})
    return model, fitting


@torch.no_grad()
def sequential_inputs(
    transformer: nn.Module, students: Students, arguments: dict[str, Any], accelerator: Accelerator
) -> dict[Interval, dict[str, Any]]:
    """Per interval the bound arguments that its student gets inside the assembled model."""
    model, fitting = plugged(transformer, students)
    owner = {id(m): i for i, m in fitting.items()}
    inputs = {}

    def before(block, bound):
        if id(block.module) in owner:
            inputs[owner[id(block.module)]] = bound

    watched = [b for b in blocks.block_sequence(model) if id(b.module) in owner]
    with accelerator.autocast(), blocks.watch(watched, before, stop_after=watched[-1].index) as run:
        run(model, arguments)
    return inputs


@torch.no_grad()
def plugged_error(
    transformer: nn.Module,
    students: Students,
    reader: calls.Reader,
    rows,
    batch_size: int,
    accelerator: Accelerator,
) -> float:
    """Relative velocity error of the teacher with these students plugged in, on recorded calls."""
    model, _ = plugged(transformer, students)
    error = power = 0.0
    for batch in reader.batches(rows, batch_size):
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            output = model(**batch.arguments)[0].double()
        target = batch.output.double()
        error += float((output - target).square().sum())
        power += float(target.square().sum())
    return error / power


def _call(module: nn.Module, bound: dict[str, Any], recompute: bool) -> Any:
    if recompute:
        return checkpoint(module, use_reentrant=False, **bound)
    return module(**bound)
