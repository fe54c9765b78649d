"""What every run of blocks costs with one untrained student in its place."""

from functools import partial

import numpy as np
import pandas as pd

from ppcl.closed_forms import solved
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock
from ppcl.search import intervals
from ppcl.settings import Settings, WidthSettings
from ppcl.training import prices
from ppcl.transformer import blocks
from ppcl.transformer.context import Context, State


def interval_errors(
    context: Context, settings: Settings, rows: np.ndarray, state: State
) -> pd.DataFrame:
    """Rows of sensitivity/intervals.parquet.

    Args:
        settings: sensitivity and prune; if prune.start is `solved`, width as well.
        rows: numbers of the calls to judge on.
    """
    options, start = settings.sensitivity, settings.prune.start
    transformer = context.transformer
    depth = len(blocks.block_sequence(transformer))
    runs = intervals.spans(depth, blocks.seams(transformer), blocks.untouchable(transformer))
    measured = [NewBlock(*ends) for ends in intervals.all_within(runs, options.longest)]
    # The stage's rule passes the options of fits only where there are fits.
    fits = settings.width if start == "solved" else WidthSettings.of({})

    def untrained(new_block: NewBlock) -> Students:
        # One at a time: at full size, a student of every run would not fit in memory.
        return solved.start(context, [new_block], start, fits)

    plugged_in = {
        new_block.name: (new_block.first, new_block.last, partial(untrained, new_block))
        for new_block in measured
    }
    errors = prices.measure(
        prices.Judged(context, rows, options.batch_size),
        prices.of_students(transformer, plugged_in),
        state,
    )
    return pd.DataFrame(
        {
            "first": [new_block.first for new_block in measured],
            "last": [new_block.last for new_block in measured],
            "velocity_error": errors,
            "rows": len(rows),
        }
    )
