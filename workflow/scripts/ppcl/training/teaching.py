"""What the teacher has to say to every new block, and how far from that the block's answer is."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ppcl.pruning import narrow
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock
from ppcl.settings import DistillSettings
from ppcl.training import losses
from ppcl.training.losses import Real
from ppcl.transformer import blocks, calls, inside_block
from ppcl.transformer.family import TEXT, Family


class Processes(Protocol):
    """What a step asks of the processes that work together: an Accelerator, or what stands for one
    where nothing is computed."""

    @property
    def num_processes(self) -> int:
        """Their number."""

    def autocast(self) -> AbstractContextManager:
        """Within, the model's operations are in the precision of the training."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """The sum or the mean over processes, which all of them have then."""


@dataclass
class Lesson:
    """What the teacher has to say to one new block.

    Attributes:
        bound: arguments of its block's call, with T_{u-1}^D as streams; in place of a text stream
            that it borrows, the carry: block a's text output and text-side attention input, side
            by side along the channels.
        target: streams T_v^D after its last block; no text where the new block makes none.
        carry, text_input: of a new block that borrows: the argument with the carry, and z_p, what
            its block's attention got as text when the block was whole.
    """

    bound: dict[str, Any]
    target: blocks.Streams
    carry: str = ""
    text_input: Tensor | None = None

    @property
    def lent(self) -> Tensor | None:
        """z_a, what the attention of the run's source gets as text, of a new block that borrows."""
        return self.bound[self.carry].chunk(2, dim=-1)[1] if self.carry else None

    def lend(self, attended: Tensor) -> None:
        """Puts another z_a in the carry."""
        own, _ = self.bound[self.carry].chunk(2, dim=-1)
        self.bound = self.bound | {self.carry: torch.cat([own, attended], dim=-1)}


@torch.no_grad()
def teacher_states(
    transformer: nn.Module,
    new_blocks: Sequence[NewBlock],
    arguments: dict[str, Any],
    running: nn.Module | None = None,
    uncut: Students | None = None,
) -> dict[NewBlock, Lesson]:
    """Runs the teacher once, no further than the last new block's end.

    Args:
        running: what runs in its place, with its blocks from the first needed on (`tail.Tail`).
        uncut: of new blocks that borrow, the whole ones (`students.uncut`), where these are others
            than the teacher's first.
    """
    uncut = uncut or {}
    sequence = blocks.block_sequence(transformer)
    lenders = {new_block.source for new_block in new_blocks if new_block.source}
    ends = {end for new_block in new_blocks for end in new_block.ends} | {
        end for key in lenders for end in key
    }
    inputs: dict[int, dict[str, Any]] = {}
    outputs: dict[int, blocks.Streams] = {}
    tapped = {
        new_block.first for new_block in new_blocks if new_block.source and new_block not in uncut
    }
    tapped |= {first for first, _ in lenders}
    watched = [b for b in sequence if b.index in ends]
    with ExitStack() as stack:
        seen = {index: stack.enter_context(inside_block.taps(sequence[index])) for index in tapped}
        run = stack.enter_context(
            blocks.watch(
                watched,
                lambda block, bound: inputs.update({block.index: bound}),
                lambda block, streams: outputs.update({block.index: streams}),
                stop_after=max(ends),
            )
        )
        run(transformer if running is None else running, arguments)
    text_inputs = {index: inside["text/input"] for index, inside in seen.items()}
    lessons = {}
    for new_block in new_blocks:
        lesson = Lesson(inputs[new_block.first], outputs[new_block.last])
        if new_block.source:
            first, last = new_block.source
            block = sequence[new_block.first]
            if new_block in uncut:
                whole = replace(block, module=uncut[new_block])
                text_input = inside_block.text_input(whole, fitting(lesson.bound, whole.module))
            else:
                text_input = text_inputs[new_block.first]
            lesson = Lesson(lesson.bound, lesson.target, block.list.inputs[TEXT], text_input)
            lesson.bound = lesson.bound | {
                lesson.carry: torch.cat([outputs[last][TEXT], text_inputs[first]], dim=-1)
            }
        if new_block.text in ("borrow", "lend"):
            lesson.target = {s: v for s, v in lesson.target.items() if s != TEXT}
        lessons[new_block] = lesson
    return lessons


def fitting(bound: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The teacher's activations for a module with float32 weights, if that is what it has."""
    float32 = all(p.dtype == torch.float32 for p in module.parameters())
    return tree_map(calls.as_float32, bound) if float32 else bound


def real_tokens(
    family: Family,
    batch: calls.Batch,
    streams: blocks.Streams,
    batch_size: int,
    processes: Processes,
) -> dict[str, Real]:
    """Which tokens of a step's batch count in these streams, all of a process's share.

    To be called by all processes alike, which add up their counts.

    Args:
        batch_size: of all processes together.
    """
    shares = processes.num_processes
    # Shares differ by a row where the batch does not divide evenly.
    real = {stream: Real(None, len(batch) * shares / batch_size) for stream in streams}
    for stream, mask in blocks.token_masks(family, batch.arguments, streams).items():
        count = mask.sum().float()
        mean = processes.reduce(count, reduction="mean")
        real[stream] = Real(mask, count / mean.clamp_min(1 / shares))
    return real


def interval_losses(
    output: blocks.Streams,
    target: blocks.Streams,
    real: Mapping[str, Real],
    options: DistillSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_depth (Eq. 6) or L_width of one new block, summed over streams, and both errors of each.

    real: as of `real_tokens`; without an entry, all tokens of a stream count.
    options: with `outliers`, the loss is of the streams without them; the errors are of all.
    """
    deviations = options.outliers
    weights: dict[str, float] = {options.loss: 1.0}
    if options.loss == "mixed":
        weights = {"normalised": 1.0, "relative": options.relative_weight}
    metrics: dict[str, Tensor] = {}
    total: dict[str, Tensor | float] = dict.fromkeys(weights, 0.0)
    for stream, value in target.items():
        mask, weight = real.get(stream, Real())
        for kind, error in losses.STREAM_LOSSES.items():
            if kind not in weights and kind not in losses.LOGGED:
                continue
            trained = kind in weights
            # An error that is only reported needs no graph.
            with torch.set_grad_enabled(torch.is_grad_enabled() and trained and not deviations):
                distance = weight * error(output[stream], value, mask)
            metrics[f"{stream}/{kind}"] = distance
            if trained and deviations:
                both = output[stream], value
                near, near_value = (losses.without_outliers(x, deviations, mask) for x in both)
                distance = weight * error(near, near_value, mask)
            if trained:
                total[kind] = total[kind] + distance
    first, *others = (weights[kind] * loss for kind, loss in total.items())
    loss = sum(others, first)
    assert isinstance(loss, Tensor), "a block returns streams"
    return loss, metrics


def linear_loss(
    new_block: NewBlock,
    student: nn.Module,
    output: blocks.Streams,
    lesson: Lesson,
    real: Mapping[str, Real],
) -> Tensor | None:
    """L_linear of one new block: the sum of its new linear maps' plain squared errors; None without
    any.

    What a linear FFN or the text map at a run's end replaces is the teacher's stream after the
    new block; what the map of the attention's text input replaces is z_p.
    """

    def error(answer: Tensor, wanted: Tensor, stream: str) -> Tensor:
        mask, weight = real.get(stream, Real())
        return weight * losses.squared_error(answer, wanted, mask)

    errors = [
        error(output[stream], lesson.target[stream], stream)
        for stream in (*new_block.linear_ffn, *((TEXT,) if new_block.text == "close" else ()))
        if stream in output  # after the last block, nothing may read it
    ]
    if new_block.borrows:
        assert lesson.lent is not None and lesson.text_input is not None, "as it borrows"
        lent = losses.without_padding(lesson.lent, real.get(TEXT, Real()).mask)
        mapped = lent + narrow.maps(student)["text/input"](lent)
        errors.append(error(mapped, lesson.text_input, TEXT))
    return sum(errors[1:], errors[0]) if errors else None
