"""What there is to store of a transformer, part by part: record/sizes.parquet.

A part is what a candidate of selection takes away, as `search.savings.Weights` adds it up. Found on
the meta device, as parameters are (`linear_map_candidates.saved_parameters`).
"""

from collections.abc import Iterator
from dataclasses import asdict

import pandas as pd
from torch import nn

from ppcl.closed_forms import linear_map_candidates, linear_maps, modulation
from ppcl.pruning import narrow, quantisable, students
from ppcl.pruning.quantisation import Inventory
from ppcl.pruning.units import NewBlock
from ppcl.storage import schemas
from ppcl.transformer import blocks


def table(transformer: nn.Module) -> pd.DataFrame:
    """Rows of record/sizes.parquet (schemas.SIZES)."""
    return pd.DataFrame(list(_rows(transformer)), columns=schemas.SIZES.names)


def _rows(transformer: nn.Module) -> Iterator[dict]:
    whole = quantisable.inventory(transformer, quantisable.names(transformer))
    yield _row(-1, "transformer", whole)
    beside = [getattr(transformer, name) for name in blocks.family(transformer).companions]
    unread = linear_maps.unread_after(transformer)
    sequence = blocks.block_sequence(transformer)
    reached = unread is not None and sequence[unread].width.text
    for block in sequence:
        before, here = _of(block, block.module), (block.index, block.index)
        companions = (quantisable.inventory(each[block.index], ()) for each in beside)
        yield _row(block.index, "block", sum(companions, before))

        def saved(new_block: NewBlock, block=block, before=before) -> Inventory:
            shaped = students.shaped(
                transformer, new_block, linear_map_candidates.emptied(block.module)
            )
            return before - _of(block, shaped)

        if block.width.text:
            borrowed = saved(NewBlock(*here, text="borrow", source=(-1, -1)))
            yield _row(block.index, "text", borrowed)
            if block.index != unread:
                closing = saved(NewBlock(*here, text="close", source=(-1, -1)))
                yield _row(block.index, "text_output", borrowed - closing)
            if reached and block.index != unread:
                yield _row(block.index, "text_lent", saved(NewBlock(*here, text="lend")))
        for stream in block.width.ffn:
            yield _row(block.index, f"ffn_{stream}", saved(NewBlock(*here, (stream,))))
    for matrix in modulation.matrices(transformer):
        last = matrix.block == len(sequence)
        owner = transformer if last else sequence[matrix.block].module
        linear = narrow.linear_at(owner, narrow.held(owner, matrix.path))
        # The first block's are kept, as is all that is outside of the blocks.
        of = quantisable.of_linear(linear, quantised=0 < matrix.block < len(sequence))
        yield _row(matrix.block, "modulation", of) | {"path": matrix.path}


def _of(block: blocks.Block, module: nn.Module) -> Inventory:
    """What there is to store of a block, or of a new one in its place."""
    kept = block.list.modulations if block.index == 0 else ()
    return quantisable.inventory(module, quantisable.in_block(module, kept))


def _row(block: int, part: str, inventory: Inventory) -> dict:
    return {"block": block, "part": part, "path": "", **asdict(inventory)}
