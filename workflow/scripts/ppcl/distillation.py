"""How students are taught, and what they cost once they are plugged in.

Three teachers: `independent` is the paper's (Eq. 6, every student from the teacher's activations);
`any_subset` trains random sets of students through the whole model; `output_distillation`, which
the latter is made of, is also how a whole variant is fine-tuned.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ppcl import blocks, calls, losses, texts
from ppcl.errors import UserError
from ppcl.families import family_of
from ppcl.students import Interval, Students


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


def independent(
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


def output_distillation(
    model_at: Callable[[int], nn.Module],
    name: str,
    reader: calls.Reader,
    options: dict,
    seed: int,
    accelerator: Accelerator,
    in_float32: bool,
):
    """Step losses: relative velocity error against the recorded teacher (see training.Losses).

    The teacher does not run: its answer to every recorded call is part of the record.

    Args:
        model_at: the model of a step.
        name: of what is trained, in the log.
        in_float32: the model is float32, whatever dtype the teacher's calls were recorded in.
    """
    rows = reader.rows(heldout=False)

    def losses_of_step(step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        drawn = reader.draw(rows, options["batch_size"], (seed, step))
        batch = reader.batch(share(drawn, accelerator)).to(accelerator.device)
        if in_float32:
            batch = batch.to_float32()
        with accelerator.autocast():
            output = model_at(step)(**batch.arguments)[0]
        power = accelerator.reduce(batch.output.float().square().sum(), reduction="mean")
        error = losses.velocity_error(output, batch.output, power)
        yield name, error, {"velocity_error": error}

    return losses_of_step


def any_subset(
    transformer: nn.Module,
    students: Students,
    reader: calls.Reader,
    options: dict,
    seed: int,
    accelerator: Accelerator,
):
    """Step losses of output distillation with a random subset of the students plugged in.

    Students of Eq. 6 never see each other's errors. Here they do, and since every step plugs
    another subset, they stay pluggable: one set of students serves every budget. The size of the
    subset is uniform, then its members. Needs `transformer` without gradients of its own.
    """
    if options["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()
    fitting = {interval: _InFloat32(student) for interval, student in students.items()}

    def model_at(step: int) -> nn.Module:
        chosen = random_subset(list(fitting), (seed, step))
        return blocks.assembled(transformer, {i.key: fitting[i] for i in chosen})[0]

    return output_distillation(
        model_at, "students", reader, options, seed, accelerator, in_float32=False
    )


def random_subset(members: Sequence, seed: tuple[int, ...]) -> list:
    """At least one of the members; every size is equally likely, then every subset of that size."""
    # Batches are drawn from the same seed: the third number keeps the two draws apart.
    rng = np.random.default_rng((*seed, 1))
    size = rng.integers(1, len(members), endpoint=True)
    return [members[i] for i in sorted(rng.permutation(len(members))[:size])]


class _InFloat32(nn.Module):
    """A float32 student between blocks of another dtype; gradients reach the student."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, *args, **kwargs):
        streams = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        dtype = next(x.dtype for x in streams if x.is_floating_point())
        args, kwargs = tree_map(calls.as_float32, (args, kwargs))
        return tree_map(lambda x: x.to(dtype), self.student(*args, **kwargs))


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


def plugged_errors(
    transformer: nn.Module,
    intervals: Sequence[Interval],
    students_of: Callable[[Interval], Students],
    reader: calls.Reader,
    rows,
    batch_size: int,
    accelerator: Accelerator,
    state: Path | None = None,
    identity: str = "",
) -> list[float]:
    """`plugged_error` of each interval alone, the intervals shared out over the processes.

    Every process gets all errors back, in the order of `intervals`.

    Args:
        students_of: gives the student of an interval when its turn comes.
        state: folder in which finished errors wait for a killed run to go on, one file per process.
        identity: digest of what decides the errors; files with another one are not used.

    Raises:
        UserError: an error is NaN or infinite.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    done = _finished(state, identity) if state else {}
    if state and count > 1:
        accelerator.wait_for_everyone()  # all must share out the same rest
    found = torch.zeros(len(intervals), dtype=torch.float64)
    for number, interval in enumerate(intervals):
        if rank == 0:  # the sum over processes counts an error once
            found[number] = done.get(interval.name, 0.0)
    rest = [number for number, interval in enumerate(intervals) if interval.name not in done]
    for number in tqdm(rest[rank::count], desc="plugging", unit="interval", disable=rank > 0):
        fitting = students_of(intervals[number])
        error = plugged_error(transformer, fitting, reader, rows, batch_size, accelerator)
        found[number] = error
        if state and math.isfinite(error):
            done[intervals[number].name] = error
            texts.write_json(state / f"{rank}.json", {"identity": identity, "errors": done})
    if count > 1:
        found = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu()
    for interval, error in zip(intervals, found.tolist(), strict=True):
        if not math.isfinite(error):
            raise UserError(
                f"velocity error with a student for {interval.name} is {error}; its weights or the "
                "teacher's activations overflow: set teacher.dtype: float32 or bfloat16"
            )
    return found.tolist()


def _finished(state: Path, identity: str) -> dict[str, float]:
    """Errors by interval that earlier runs of the same identity left, of whatever process."""
    found = {}
    for path in sorted(state.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            found |= kept["errors"]
    return found


def cost_table(
    transformer: nn.Module,
    students: Students,
    plan: dict,
    reader: calls.Reader,
    options: dict,
    seed: int,
    accelerator: Accelerator,
) -> pd.DataFrame:
    """Rows of errors.parquet: what every student costs, plugged in alone, on held-out rows.

    options: the stage's, with heldout_rows and batch_size.
    """
    judged = reader.sample_heldout("select", options["heldout_rows"], seed)
    saved = {(i["first"], i["last"]): i["saved_parameters"] for i in plan["intervals"]}
    for student in students.values():
        student.eval()
    costs = plugged_errors(
        transformer,
        list(students),
        lambda interval: {interval: students[interval]},
        reader,
        judged,
        options["batch_size"],
        accelerator,
    )
    return pd.DataFrame(
        {
            "interval": interval.name,
            "first": interval.first,
            "last": interval.last,
            "saved_parameters": saved[interval.key],
            "velocity_error": cost,
            "rows": len(judged),
        }
        for interval, cost in zip(students, costs, strict=True)
    )


def _call(module: nn.Module, bound: dict[str, Any], recompute: bool) -> Any:
    if recompute:
        return checkpoint(module, use_reentrant=False, **bound)
    return module(**bound)
