"""What the teacher gives every new block to learn from, and the losses of a block's answer."""

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
    """What a step needs of an Accelerator. The planner, whose tensors have no content, passes a
    stand-in."""

    @property
    def num_processes(self) -> int:
        """How many processes share a batch."""

    def autocast(self) -> AbstractContextManager:
        """A context in which the model's operations are in the training's precision."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """The sum or mean (`reduction`) over processes, the same on all of them."""


@dataclass
class Lesson:
    """What one new block, for blocks u..v, learns from: its inputs and the streams to match.

    Attributes:
        bound: arguments of the block's call by name, with T_{u-1}^D as streams. If the new block
            borrows text, its text stream is the carry: the source's text output h_a and text-side
            attention input z_a, side by side along the channels.
        target: streams T_v^D; without text if the new block makes none.
        carry: name of the argument that holds the carry; empty if the new block borrows no text.
        text_input: z_p, what the whole block's attention gets as text, before the block becomes
            narrow; None if the new block borrows no text.
    """

    bound: dict[str, Any]
    target: blocks.Streams
    carry: str = ""
    text_input: Tensor | None = None

    @property
    def lent(self) -> Tensor | None:
        """z_a, what the source's attention gets as text; None if the block borrows no text."""
        return self.bound[self.carry].chunk(2, dim=-1)[1] if self.carry else None

    def lend(self, attended: Tensor) -> None:
        """Replaces z_a in the carry by `attended` [batch, tokens, channels]."""
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
    """The lesson of each new block. Runs the teacher once, no further than the last block needed.

    Args:
        running: a model that runs in the transformer's place and has its blocks from the first
            needed one on (`tail.Tail.model`).
        uncut: whole blocks that give z_p for new blocks that borrow text (`students.uncut`); for
            those that are not in it, the teacher's block `first` does.
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
    """A call's arguments, cast to float32 if all weights of the module are float32."""
    float32 = all(p.dtype == torch.float32 for p in module.parameters())
    return tree_map(calls.as_float32, bound) if float32 else bound


def real_tokens(
    family: Family,
    batch: calls.Batch,
    streams: blocks.Streams,
    batch_size: int,
    processes: Processes,
) -> dict[str, Real]:
    """Stream -> the real tokens in this process's share of a step's batch.

    All processes must call this alike: it averages their token counts.

    Args:
        streams: those wanted, [batch, tokens, channels] each.
        batch_size: that of all processes together.
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
    """L_depth (Eq. 6) or L_width of one new block, summed over streams, and each stream's errors.

    real: from `real_tokens`; all tokens of a stream without an entry count.
    options: loss, relative_weight, outliers. With `outliers`, the loss is computed on streams
        without their outliers (`losses.without_outliers`), the errors on whole streams.

    Returns: the loss, a float32 scalar, and scalars by `<stream>/<name of an error>`.
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
    """L_linear of one new block: the sum of its new linear maps' plain squared errors, a float32
    scalar; None if it has no linear maps.

    The target of a linear FFN, and of the text map at a run's end, is the teacher's stream after
    the new block; the target of the map of the attention's text input is z_p.
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
