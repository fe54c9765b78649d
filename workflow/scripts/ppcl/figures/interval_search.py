"""The search for intervals, by Eq. 3 to 5: CKA and its fall along every search."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ppcl.errors import UserError
from ppcl.figures import seams, style
from ppcl.figures.candidates import selected_spans
from ppcl.figures.style import MINUS

_STREAM_WORDS = {
    "image": "image stream",
    "text": "text stream",
    "joint": "joint stream",
    "mean": "mean of both streams",
}


@style.styled
def interval_search(
    cka: pd.DataFrame, intervals: pd.DataFrame, stream: str, kinds: Sequence[seams.Run] = ()
) -> Figure:
    """CKA (Eq. 3) and its fall (Eq. 4) against k for every search of Eq. 5's chain.

    A search starts at the last kept block u and ends at v, dashed: it found the interval u+1..v,
    shaded grey, of which selection took the orange parts. A ring marks the rise of Delta that ended
    it (none at the last block that a search may reach). Below: all of them along the depth.

    Args:
        cka: as schemas.CKA: cka (0 to 1) and delta (drawn times 1000) over end (block k), with
            bootstrap bounds, for every start (u).
        intervals: as schemas.INTERVALS: first, last, selected, source and tolerance.
        stream: the stream that was searched, as in the config's similarity.streams.
        kinds: runs of like blocks (`seams.runs`), between which lines are drawn.

    Raises:
        UserError: the table does not hold the stream, or no rows of an interval's search.
    """
    available = style.streams(cka)
    if stream not in available and len(available) > 1:
        raise UserError(
            f"similarity table: no stream {stream!r} (it has {', '.join(available)}); set "
            "similarity.streams to one of these or rerun the similarity stage"
        )
    # A model with a single stream has no mean of two.
    stream = stream if stream in available else available[0]
    blocks = int(cka["end"].max()) + 1
    selected = selected_spans(intervals)
    chain = intervals[intervals["source"] == "trend"].sort_values("first")
    if not len(chain):
        return style.message("Interval search", "The search found no interval to replace.")

    removed = sum(last - first for first, last in selected)
    columns = min(5, len(chain))
    # Sizes in inches. Placed by hand: every panel has its own scale, so its own tick labels.
    left, gap, top, upper_height, lower_height, pitch = 0.72, 0.52, 1.22, 0.82, 0.72, 2.13
    width = min((style.WIDTH - left - gap * (columns - 1) - 0.12) / columns, 2.6)
    bottom = top + pitch * math.ceil(len(chain) / columns)
    figure = style.new_figure(
        f"Eq. 5 finds {len(chain)} intervals; selected: {len(selected)}, "
        f"removing {removed} of {blocks} blocks",
        bottom + 1.06,
        note="CKA of the teacher with linear probes in place of blocks u+1 to k and of the teacher "
        f"itself, after block k; {_STREAM_WORDS.get(stream, stream)}.\n"
        f"Δ(u, k) = CKA(u, k{MINUS}1) {MINUS} CKA(u, k). Every panel has its own scale.",
    )
    figure.set_layout_engine(None)
    table = cka[cka["stream"] == stream].sort_values("end")
    for number, row in enumerate(chain.itertuples()):
        line, column = divmod(number, columns)
        across, down = left + column * (width + gap), top + line * pitch
        upper = style.axes_at(figure, across, down, width, upper_height)
        lower = style.axes_at(figure, across, down + upper_height + 0.14, width, lower_height)
        span = (int(row.first), int(row.last))
        _search_panel(upper, lower, table, span, row.tolerance)
        for ax in (upper, lower):
            style.shade(ax, [span], style.CANDIDATE)
            style.shade(ax, _overlaps(selected, span))
            seams.mark(ax, kinds)
        upper.set_title(f"{number + 1}:  {style.blocks_name(*span)}", y=1.04, pad=0)
        if column == 0:
            upper.set_ylabel("CKA(u, k)")
            lower.set_ylabel("1000 · Δ(u, k)")
        if number + columns >= len(chain):
            lower.set_xlabel("k")
        # Given places: matplotlib spends half of its drawing time on finding them itself.
        for ax, height in ((upper, upper_height), (lower, lower_height)):
            ax.yaxis.set_label_coords(-0.55 / width, 0.5)
            ax.xaxis.set_label_coords(0.5, -0.24 / height)
    spans = [(int(row.first), int(row.last)) for row in chain.itertuples()]
    bars = {
        "found by Eq. 5": [
            (*span, style.CANDIDATE, str(number)) for number, span in enumerate(spans, 1)
        ],
        "selected": [(*span, style.SELECTED, style.span_name(*span)) for span in selected],
    }
    strip = style.axes_at(figure, 1.2, bottom + 0.05, style.WIDTH - 1.3, 0.56)
    style.strip(strip, bars, blocks)
    seams.mark(strip, kinds)
    seams.name_blocks(strip, kinds, labelpad=1)
    style.legend_at(figure, 0.8, _search_legend(table, stream), fontsize=7.5)
    return figure


def _overlaps(spans: list[tuple[int, int]], span: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of `spans` that lie inside `span`."""
    parts = [(max(first, span[0]), min(last, span[1])) for first, last in spans]
    return [(first, last) for first, last in parts if first <= last]


def _search_legend(table: pd.DataFrame, stream: str) -> list[Artist]:
    """Legend handles of what the search figure really shows."""
    colour, marker = style.stream_look(stream)
    handles: list[Artist] = [Line2D([], [], color=colour, marker=marker, label="measured")]
    if table["cka_low"].notna().any():
        handles.append(Patch(fc=colour, alpha=0.25, label="bootstrap"))
    ring: dict[str, Any] = {"marker": "o", "mfc": "none", "ms": 7.5, "lw": 0}
    return [
        *handles,
        Patch(fc=style.CANDIDATE, label="found by Eq. 5"),
        Patch(fc=style.SELECTED, label="selected"),
        Line2D([], [], color="#444444", lw=1, ls="--", label="detected end v"),
        Line2D([], [], color=style.BLACK, lw=0.8, ls=":", label="Δ(u, v) + tolerance"),
        Line2D([], [], color=style.BLACK, label="rise that ends the search", **ring),
    ]


def _search_panel(
    upper: Axes, lower: Axes, table: pd.DataFrame, span: tuple[int, int], tolerance: float
) -> None:
    """One search: CKA above Delta, a few blocks further than the search itself looked."""
    start, end = span[0] - 1, span[1]
    rows = table[(table["start"] == start) & (table["end"] <= end + 3)]
    if not len(rows):
        raise UserError(
            f"similarity table: no rows for start {start}, where interval {span[0]}-{span[1]} of "
            "the intervals table was found; delete both and run snakemake to remake them"
        )
    k = rows["end"].to_numpy()
    colour, marker = style.stream_look(rows["stream"].iloc[0])
    looked = k <= end + 1
    for ax, name in ((upper, "cka"), (lower, "delta")):
        ax.axvline(end, color="#444444", lw=1, ls="--", zorder=1)
        ax.fill_between(
            k, rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.25, lw=0
        )
        ax.plot(k, rows[name], color=colour, lw=0.8, alpha=0.5)
        ax.plot(k[looked], rows[name][looked], color=colour, marker=marker)
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.margins(y=0.12)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlim(span[0] - 0.6, max(k.max(), end) + 0.6)
    upper.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lower.yaxis.set_major_formatter(lambda value, _: f"{1000 * value:g}")
    upper.tick_params(labelbottom=False)
    delta = dict(zip(k, rows["delta"], strict=True))
    # What Delta has to exceed: its last value plus the noise level.
    level = delta[end] + np.nan_to_num(tolerance)
    if delta.get(end + 1, -np.inf) > level:
        lower.plot(end + 1, delta[end + 1], "o", mfc="none", mec=style.BLACK, ms=7.5)
        lower.plot([end, end + 1.3], [level, level], color=style.BLACK, lw=0.8, ls=":")
