"""Sequential distillation with gradients through the chain of students: an ablation baseline."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ppcl.pruning.students import Students
from ppcl.settings import DistillSettings
from ppcl.training import distillation, steps, teaching
from ppcl.transformer import blocks
from ppcl.transformer.context import Context


def through_chain(context: Context, students: Students, options: DistillSettings):
    """Step losses (see training.Losses) of all stock students at once, as one module `students`.

    One forward of the teacher with all of them plugged in; Eq. 6 at every student's output against
    the teacher's activation there; one backward, so that a student also learns from what those
    after it make of its output. options: as `distillation.independent`.
    """
    transformer, accelerator = context.transformer, context.accelerator
    family, new_blocks = blocks.family(transformer), list(students)
    batch_of = distillation.batches_of_steps(context, options)
    inside = {new_block: steps.InFloat32(student) for new_block, student in students.items()}
    model, _ = blocks.assembled(transformer, {new_block.ends: m for new_block, m in inside.items()})
    owner = {id(module): new_block for new_block, module in inside.items()}
    watched = [b for b in blocks.block_sequence(model) if id(b.module) in owner]

    def losses_of_step(step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        batch = batch_of(step)
        outputs: dict = {}

        def keep(block, streams):
            outputs[owner[id(block.module)]] = streams

        with accelerator.autocast():
            lessons = teaching.teacher_states(transformer, new_blocks, batch.arguments)
            with blocks.watch(watched, after=keep, stop_after=watched[-1].index) as run:
                run(model, batch.arguments)
            targets = {
                new_block: steps.read_streams(transformer, new_block, lesson.target)
                for new_block, lesson in lessons.items()
            }
            streams = {s: x for target in targets.values() for s, x in target.items()}
            real = teaching.real_tokens(family, batch, streams, options.batch_size, accelerator)
            losses = [
                teaching.interval_losses(outputs[new_block], target, real, options)
                for new_block, target in targets.items()
            ]
        total: dict[str, Tensor] = {}
        for _, metrics in losses:
            for key, value in metrics.items():
                total[key] = total.get(key, torch.zeros_like(value)) + value
        first, *others = (loss for loss, _ in losses)
        yield "students", sum(others, first), total

    return losses_of_step
