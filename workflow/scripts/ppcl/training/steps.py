"""What one training step computes: its losses, on a batch of recorded calls.

Trainer (distillation.py), planner (on tensors without content), ablation and benchmarks call these
functions, so that a changed loss changes all of them. What is drawn for a step, how losses are
differentiated and what the optimizer does is not decided here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ppcl.pruning.students import Students, plugged
from ppcl.pruning.units import NewBlock
from ppcl.settings import DistillSettings
from ppcl.training import losses, teaching
from ppcl.training.losses import Real
from ppcl.training.teaching import Lesson, Processes
from ppcl.transformer import blocks, calls
from ppcl.transformer.family import TEXT


def lessons_of(
    transformer: nn.Module,
    students: Students,
    arguments: dict[str, Any],
    options: DistillSettings,
    processes: Processes,
    running: nn.Module | None = None,
    uncut: Students | None = None,
) -> dict[NewBlock, Lesson]:
    """Every student's lesson on a batch: its inputs and the teacher's streams that it is to match.

    Args:
        arguments: of the transformer's call.
        options: `mode` says where a student's input comes from: `independent`, from the teacher;
            `sequential`, from the students before it in the assembled model.
        running, uncut: see `teaching.teacher_states`.
    """
    with processes.autocast():
        lessons = teaching.teacher_states(transformer, list(students), arguments, running, uncut)
    if options.mode == "sequential":
        given = sequential_inputs(transformer, students, arguments, processes)
        for new_block, bound in given.items():
            lessons[new_block].bound = bound
    return lessons


def student_losses(
    transformer: nn.Module,
    students: Students,
    lessons: dict[NewBlock, Lesson],
    batch: calls.Batch,
    options: DistillSettings,
    processes: Processes,
) -> Iterator[tuple[NewBlock, Tensor, dict[str, Tensor]]]:
    """The losses of all students on a batch: Eq. 6, and L_linear of those with linear maps.

    A student runs when its loss is asked for, and its lesson is let go then. If each loss is
    differentiated at once, only one student's activations are in memory at a time.

    Args:
        students: the source of a text run comes before those that borrow from it.
        lessons: from `lessons_of`; the dict is emptied.
        batch: this process's part of the step's batch.
        options: the config's `distill`; its batch_size is that of all processes together.

    Yields:
        The new block that a student is, its loss, a float32 scalar, and its metrics, scalars too:
        `<stream>/normalised`, `<stream>/relative`, and `linear` if it has linear maps.
    """
    sequence, family = blocks.block_sequence(transformer), blocks.family(transformer)
    sources = {new_block.ends for new_block in students if new_block.lends}
    real: dict[str, Real] = {}  # by stream: a stream's real tokens are the same in all blocks
    lent: dict[tuple[int, int], Tensor] = {}
    for new_block, student in students.items():
        lesson = lessons.pop(new_block)
        # In mode `sequential` its input holds what its source, a student, made.
        if new_block.source in sources and options.mode != "sequential":
            lesson.lend(lent[new_block.source])
        lesson.target = read_streams(transformer, new_block, lesson.target)
        seen = {} if lesson.text_input is None else {TEXT: lesson.text_input}
        fresh = {s: x for s, x in (seen | lesson.target).items() if s not in real}
        real |= teaching.real_tokens(family, batch, fresh, options.batch_size, processes)
        # Students have float32 weights, whatever the teacher's dtype; autocast may lower them.
        lesson.bound = teaching.fitting(lesson.bound, student)
        with processes.autocast():
            returned = _call(student, lesson.bound, options.gradient_checkpointing)
            output = sequence[new_block.first].outputs(returned)
            # A source returns its carry: its own text stream, and what it lends.
            if new_block.lends:
                lent[new_block.ends] = output[TEXT].detach().chunk(2, dim=-1)[1]
            output = {s: output[s][..., : t.shape[-1]] for s, t in lesson.target.items()}
            loss, metrics = teaching.interval_losses(output, lesson.target, real, options)
            linear = teaching.linear_loss(new_block, student, output, lesson, real)
        if linear is not None:
            metrics["linear"] = linear
            loss = loss + options.linear_weight * linear
        yield new_block, loss, metrics


def velocity_loss(
    model: nn.Module, batch: calls.Batch, processes: Processes, in_float32: bool
) -> Tensor:
    """Relative velocity error of a model against the recorded teacher (`losses.velocity_error`),
    over all values [batch, ...] of its answers: a float32 scalar.

    The teacher does not run: its answer to every recorded call is part of the record.

    Args:
        batch: this process's part of the step's batch.
        in_float32: the model is float32, whatever dtype the teacher's calls were recorded in.
    """
    if in_float32:
        batch = batch.to_float32()
    # Before the model runs: processes are in step here; after it they would wait for each other.
    power = processes.reduce(batch.output.float().square().sum(), reduction="mean")
    with processes.autocast():
        output = blocks.answer(model, batch.arguments)
    return losses.velocity_error(output, batch.output, power)


def read_streams(
    transformer: nn.Module, new_block: NewBlock, streams: blocks.Streams
) -> blocks.Streams:
    """Of the streams after a new block, those that something reads: not all are read after the
    model's last block."""
    if new_block.last < len(blocks.block_sequence(transformer)) - 1:
        return streams
    unread = blocks.family(transformer).unread
    return {stream: x for stream, x in streams.items() if stream not in unread}


@torch.no_grad()
def sequential_inputs(
    transformer: nn.Module, students: Students, arguments: dict[str, Any], processes: Processes
) -> dict[NewBlock, dict[str, Any]]:
    """Per new block the bound arguments that its student gets inside the assembled model."""
    model, held, _ = plugged(transformer, students)
    owner = {id(module): new_block for new_block, module in held.items()}
    inputs = {}

    def before(block, bound):
        if id(block.module) in owner:
            inputs[owner[id(block.module)]] = bound

    watched = [b for b in blocks.block_sequence(model) if id(b.module) in owner]
    with processes.autocast(), blocks.watch(watched, before, stop_after=watched[-1].index) as run:
        run(model, arguments)
    return inputs


class InFloat32(nn.Module):
    """Runs a float32 student between blocks of another dtype: casts its inputs to float32, and its
    outputs back to the dtype of the inputs. Gradients reach the student."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, *args, **kwargs):
        streams = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        dtype = next(x.dtype for x in streams if x.is_floating_point())
        args, kwargs = tree_map(calls.as_float32, (args, kwargs))
        return tree_map(lambda x: x.to(dtype), self.student(*args, **kwargs))


def _call(module: nn.Module, bound: dict[str, Any], recompute: bool) -> Any:
    if recompute:
        return checkpoint(module, use_reentrant=False, **bound)
    return module(**bound)
