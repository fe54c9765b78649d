"""Which text streams and FFNs may become linear maps, and how many parameters each saves."""

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import nn

from ppcl.closed_forms import linear_maps
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, Unit, units_of
from ppcl.search import intervals
from ppcl.transformer import blocks


def ffn_candidates(transformer: nn.Module) -> list[Unit]:
    """A unit for each FFN that can become linear: of every block that may be pruned, and stream."""
    untouchable = blocks.untouchable(transformer)
    return [
        Unit((NewBlock(block.index, block.index, (stream,)),))
        for block in blocks.block_sequence(transformer)
        if block.index not in untouchable
        for stream in block.width.ffn
    ]


def text_candidates(
    transformer: nn.Module, cka: np.ndarray, longest: int, floor: float
) -> list[Unit]:
    """Runs of up to `longest` kept blocks whose text outputs are alike.

    Args:
        cka: [blocks, blocks] of the blocks' text outputs; NaN where there is none.
        floor: the least CKA that every block of a run must have with the run's first block.
    """
    sequence = blocks.block_sequence(transformer)
    without = {b.index for b in sequence if not b.width.text}
    without |= set(blocks.untouchable(transformer))
    runs = intervals.spans(len(sequence), blocks.seams(transformer), without)
    return [
        unit
        for first, last in intervals.all_within(runs, longest)
        if np.nan_to_num(cka[first, first : last + 1]).min() >= floor
        for unit in units_of([], [(first, last)], (), linear_maps.unread_after(transformer))
    ]


def saved_parameters(transformer: nn.Module, unit: Unit, sizes: Sequence[int] | None = None) -> int:
    """How many parameters fewer a model with the unit has.

    sizes: `blocks.parameters_of_blocks` of the transformer; it saves time to give them if this is
        called for many units.
    """
    sequence = blocks.block_sequence(transformer)
    sizes = sizes or blocks.parameters_of_blocks(transformer)
    before = sum(sizes[unit.first : unit.last + 1])
    for new_block in unit.new_blocks:
        module = sequence[new_block.first].module
        before -= sizes[new_block.first] - blocks.parameter_count(module)  # its companions stay
        before -= blocks.parameter_count(students.shaped(transformer, new_block, emptied(module)))
    return before


def emptied(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without a copy of the weights on the way."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(weight): weight.to("meta") for weight in weights})


def text_sizes(transformer: nn.Module) -> dict[str, list[int]]:
    """Parameters that a block's part in a text run saves or adds: column -> one number per block.

    text_saved: saved if the block borrows its text stream. text_output: in the map that makes a
    text stream again if a run ends with the block. text_lent: saved if the block is the source of a
    run that ends where nothing reads text. 0 where a block can't have the part.
    """
    columns: dict[str, list[int]] = {"text_saved": [], "text_output": [], "text_lent": []}
    unread = linear_maps.unread_after(transformer)
    reached = unread is not None and blocks.block_sequence(transformer)[unread].width.text
    saving = partial(saved_parameters, transformer, sizes=blocks.parameters_of_blocks(transformer))
    for block in blocks.block_sequence(transformer):
        here = (block.index, block.index)
        saved = output = lent = 0
        if block.width.text:
            lender = (-1, -1)
            borrower = Unit((NewBlock(*here, text="borrow", source=lender),))
            closing = Unit((NewBlock(*here, text="close", source=lender),))
            saved = saving(borrower)
            if block.index != unread:
                output = saved - saving(closing)
            if reached and block.index != unread:
                lent = saving(Unit((NewBlock(*here, text="lend"),)))
        columns["text_saved"].append(saved)
        columns["text_output"].append(output)
        columns["text_lent"].append(lent)
    return columns
