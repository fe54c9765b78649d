"""What the blocks of a teacher are like: CKA between their outputs, and how linear each is."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ppcl.figures import labelling, seams, style
from ppcl.figures.candidates import selected_spans
from ppcl.figures.style import MINUS


@style.styled
def block_similarity(
    blocks: pd.DataFrame, intervals: pd.DataFrame, kinds: Sequence[seams.Run] = ()
) -> Figure:
    """Linear CKA between the outputs of every two blocks, one map per stream, selection boxed.

    Args:
        blocks: as schemas.BLOCKS: cka (0 to 1, as colour) of block_a (x) and block_b (y), by
            stream.
        intervals: as schemas.INTERVALS: the selected ones are the boxes.
        kinds: runs of like blocks (`seams.runs`), between which lines are drawn.
    """
    streams = style.streams(blocks)
    left, gap, top, bar = 0.5, 0.4, 0.85, 0.8
    side = min((style.WIDTH - left - gap * (len(streams) - 1) - bar) / len(streams), 4.2)
    width = left + side * len(streams) + gap * (len(streams) - 1)
    figure = style.new_figure(
        "Linear CKA between the outputs of every two blocks",
        top + side + 0.5,
        width + bar,
        note="Boxes on the diagonal: selected intervals.",
    )
    figure.set_layout_engine(None)
    low = math.floor(max(0.0, float(blocks["cka"].min())) * 20) / 20
    for number, stream in enumerate(streams):
        ax = style.axes_at(figure, left + number * (side + gap), top, side, side)
        square = blocks[blocks["stream"] == stream].pivot(
            index="block_b", columns="block_a", values="cka"
        )
        first, last = square.columns.min(), square.columns.max()
        edges = (first - 0.5, last + 0.5)
        image = ax.imshow(
            square.to_numpy(),
            vmin=low,
            vmax=1,
            cmap="viridis",
            origin="lower",
            extent=edges * 2,
            interpolation="nearest",
        )
        for begin, end in selected_spans(intervals):
            if first <= begin and end <= last:
                size = end - begin + 1
                box = Rectangle((begin - 0.5, begin - 0.5), size, size, clip_on=False)
                box.set(fill=False, edgecolor="white", linewidth=1.2)
                box.set_path_effects([withStroke(linewidth=2.8, foreground="black")])
                ax.add_patch(box)
        ax.set_title(f"{stream} stream", y=1.01, pad=0)
        ax.locator_params(integer=True, nbins=10)
        for axis in "xy":
            seams.mark(ax, kinds, axis)
        seams.name_blocks(ax, kinds)
        ax.set_ylabel("block" if number == 0 else "")
        ax.spines[:].set_visible(False)
    scale = style.axes_at(figure, width + 0.12, top + 0.1 * side, 0.14, 0.8 * side)
    figure.colorbar(image, cax=scale, label="linear CKA").outline.set_linewidth(0.5)
    return figure


@style.styled
def probe_quality(
    table: pd.DataFrame, intervals: pd.DataFrame, kinds: Sequence[seams.Run] = ()
) -> Figure:
    """How linear each block is: R² and cosine of its probe on held-out tokens, and conditioning.

    Args:
        table: as schemas.PROBES: r2_heldout, cosine_heldout and condition_number (no units) over
            block, one curve per stream.
        intervals: as schemas.INTERVALS: the selected ones are shaded.
        kinds: runs of like blocks (`seams.runs`), between which lines are drawn.
    """
    share = (table["r2_heldout"] > 0.5).mean()
    figure = style.new_figure(
        f"A linear probe explains over half of T(x) {MINUS} x in {100 * share:.0f} % of blocks "
        "and streams",
        6.3,
        note="Probes judged on prompts that they were not fitted on. Shaded: selected intervals.",
    )
    figure.set_layout_engine(None)
    panels = {  # column -> label, top and height in inches
        "r2_heldout": (f"held-out R²\nof T(x) {MINUS} x", 0.8, 2.0),
        "cosine_heldout": ("held-out cosine\nwith T(x)", 2.95, 1.35),
        "condition_number": ("condition number\nof X Xᵀ", 4.45, 1.35),
    }
    blocks = int(table["block"].max()) + 1
    for column, (label, top, height) in panels.items():
        ax = style.axes_at(figure, 0.9, top, style.WIDTH - 1.5, height)
        style.block_ticks(ax, blocks)
        ends = []
        for stream in style.streams(table):
            rows = table[(table["stream"] == stream) & np.isfinite(table[column])]
            rows = rows.sort_values("block")
            colour, marker = style.stream_look(stream)
            ax.plot(rows["block"], rows[column], color=colour, marker=marker)
            if len(rows):
                ends.append((rows["block"].iloc[-1], rows[column].iloc[-1], stream, colour))
        if column == "r2_heldout":
            _floor(ax, table, column, -0.5)
        if column == "condition_number":
            style.log_axis(ax)
            seams.name_blocks(ax, kinds)
        else:
            ax.tick_params(labelbottom=False)
        style.shade(ax, selected_spans(intervals))
        seams.mark(ax, kinds)
        labelling.label_ends(ax, ends)
        ax.set_ylabel(label)
        ax.yaxis.set_label_coords(-0.55 / (style.WIDTH - 1.5), 0.5)
    return figure


def _floor(ax: Axes, table: pd.DataFrame, column: str, least: float) -> None:
    """Cut the axis at `least`, so that one bad probe does not flatten the rest, and say where."""
    below = table[table[column] < least]
    if not len(below):
        return
    top = max(1.0, float(table[column].max()))
    ax.set_ylim(least - 0.08, top + 0.05)
    for row in below.itertuples():
        colour = style.stream_look(row.stream)[0]
        ax.annotate(
            f"{getattr(row, column):.1f} ↓",
            (row.block, least),
            ha="center",
            color=colour,
            fontsize=7.5,
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )
