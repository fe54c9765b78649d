"""Figures of ablations, from tables to matplotlib Figures.

Tables are pandas DataFrames with the columns of `ppcl.schemas`. No torch: plots take seconds.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ppcl import figure_style as style
from ppcl.figure_style import DASH, MINUS
from ppcl.figures import KINDS

COSTS = {  # column -> what it is, before any training
    "cost_cka": f"1 {MINUS} CKA",
    "cost_probe": "velocity error, composed probes",
    "cost_untrained": "velocity error, untrained",
}


@style.styled
def calibration(table: pd.DataFrame) -> Figure:
    """Each price that selection may go by against the error after training, with rank correlations.

    table: as `schemas.CALIBRATION`. A price or error that is not positive (an FFN that nothing
    reads; the debiased CKA) is drawn at the frame and ranked as it is.
    """
    shown = {column: words for column, words in COSTS.items() if table[column].notna().any()}
    kinds = [kind for kind in KINDS if (table["kind"] == kind).any()]
    if not shown:
        return style.message("Prices before training", "The calibration table holds no prices.")
    left, gap, top, high = 0.85, 0.35, 1.32, 2.55  # inches
    across = min((style.WIDTH - left - gap * (len(shown) - 1) - 0.15) / len(shown), 3.6)
    figure = style.new_figure(
        _best(table, shown),
        top + high + 0.55,
        note="One point per interval, text run or FFN, plugged into the teacher alone. ρ: Spearman "
        "rank correlation. Dotted: training changes nothing.",
    )
    figure.set_layout_engine(None)
    for number, (column, words) in enumerate(shown.items()):
        shared = {"sharey": figure.axes[0]} if number else {}
        ax = style.axes_at(figure, left + number * (across + gap), top, across, high, **shared)
        rows = table[table[column].notna()]
        x, y = _positive(rows[column]), _positive(table["trained"])[rows.index]
        for kind in kinds:
            here = rows["kind"] == kind
            _, colour, marker, _ = KINDS[kind]
            look = {"color": colour, "mec": "white", "mew": 0.4, "ms": 5, "alpha": 0.85}
            ax.plot(x[here], y[here], marker, clip_on=False, **look)
        title = [f"ρ = {_words(rows)}   all, {len(rows)}"]
        depth = rows[rows["kind"] == "depth"]
        if 0 < len(depth) < len(rows):
            title.append(f"ρ = {_words(depth)}   depth only, {len(depth)}")
        ax.set_title("\n".join(title), pad=6)
        style.log_axis(ax, "x")
        ax.set_xlabel(words)
        if number:
            ax.tick_params(labelleft=False)
    return figure
