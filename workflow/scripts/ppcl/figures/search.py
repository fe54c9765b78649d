"""Figures of the interval search, each a function from tables to a matplotlib Figure.

Tables are pandas DataFrames with the columns of `ppcl.storage.schemas`. Nothing is computed here
that a stage should have computed: figures select, average and draw. No torch: plots take seconds.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ppcl.errors import UserError
from ppcl.figures import labelling, style
from ppcl.figures.style import MINUS
from ppcl.storage.schemas import RULED_OUT

_STREAM_WORDS = {
    "image": "image stream",
    "text": "text stream",
    "joint": "joint stream",
    "mean": "mean of both streams",
}

# Kinds of pruning -> name, colour, marker, pale fill.
KINDS = {
    "depth": ("depth interval", style.BLACK, "D", style.SELECTED),
    "ffn_image": ("image FFN", style.BLUE, "o", "#B9D6EC"),
    "ffn_text": ("text FFN", style.VERMILION, "s", "#F6CDB4"),
    "text": ("text run", style.GREEN, "^", "#B5E0D0"),
}


def selected_spans(intervals: pd.DataFrame) -> list[tuple[int, int]]:
    """The selected intervals as (first, last), both replaced, in the order of depth."""
    rows = intervals[intervals["selected"]].sort_values("first")
    return [
        (int(first), int(last)) for first, last in zip(rows["first"], rows["last"], strict=True)
    ]


def _overlaps(spans: list[tuple[int, int]], span: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of `spans` that lie inside `span`."""
    parts = [(max(first, span[0]), min(last, span[1])) for first, last in spans]
    return [(first, last) for first, last in parts if first <= last]


@style.styled
def search(cka: pd.DataFrame, intervals: pd.DataFrame, stream: str) -> Figure:
    """CKA (Eq. 3) and its fall (Eq. 4) against k for every search of Eq. 5's chain.

    A search starts at the last kept block u and ends at v, dashed: it found the interval u+1..v,
    shaded grey, of which selection took the orange parts. A ring marks the rise of Delta that ended
    it (none at the last block that a search may reach). Below: all of them along the depth.

    stream: the stream that was searched, as in the config's similarity.streams. Raises UserError
    if the table does not hold it.
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
    found = [(int(row.first), int(row.last)) for row in chain.itertuples()]
    bars = {
        "found by Eq. 5": [
            (*span, style.CANDIDATE, str(number)) for number, span in enumerate(found, 1)
        ],
        "selected": [(*span, style.SELECTED, style.span_name(*span)) for span in selected],
    }
    strip = style.axes_at(figure, 1.2, bottom + 0.05, style.WIDTH - 1.3, 0.56)
    style.strip(strip, bars, blocks)
    strip.set_xlabel("block", labelpad=1)
    style.legend_at(figure, 0.8, _search_legend(table, stream), fontsize=7.5)
    return figure


def _search_legend(table: pd.DataFrame, stream: str) -> list:
    """Legend handles of what the search figure really shows."""
    colour, marker = style.stream_look(stream)
    handles = [Line2D([], [], color=colour, marker=marker, label="measured")]
    if table["cka_low"].notna().any():
        handles.append(Patch(fc=colour, alpha=0.25, label="bootstrap"))
    ring = {"marker": "o", "mfc": "none", "ms": 7.5, "lw": 0}
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


@style.styled
def heatmap(blocks: pd.DataFrame, intervals: pd.DataFrame) -> Figure:
    """Linear CKA between the outputs of every two blocks, one map per stream, selection boxed."""
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
            if end <= last:
                size = end - begin + 1
                box = Rectangle((begin - 0.5, begin - 0.5), size, size, clip_on=False)
                box.set(fill=False, edgecolor="white", linewidth=1.2)
                box.set_path_effects([withStroke(linewidth=2.8, foreground="black")])
                ax.add_patch(box)
        ax.set_title(f"{stream} stream", y=1.01, pad=0)
        ax.set_xlabel("block")
        ax.set_ylabel("block" if number == 0 else "")
        ax.locator_params(integer=True, nbins=10)
        ax.spines[:].set_visible(False)
    scale = style.axes_at(figure, width + 0.12, top + 0.1 * side, 0.14, 0.8 * side)
    figure.colorbar(image, cax=scale, label="linear CKA").outline.set_lw(0.5)
    return figure


@style.styled
def probes(table: pd.DataFrame, intervals: pd.DataFrame) -> Figure:
    """How linear each block is: R2 and cosine of its probe on held-out tokens, and conditioning."""
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
            ax.set_xlabel("block")
        else:
            ax.tick_params(labelbottom=False)
        style.shade(ax, selected_spans(intervals))
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


@style.styled
def width(candidates: pd.DataFrame, intervals: pd.DataFrame, blocks: int) -> Figure:
    """What every linear FFN and text run costs along the depth, what went, and the model it makes.

    The kinds share one error axis, as selection compares them; it ends five decades below the
    largest error, with what is smaller (an FFN that nothing reads has 0) marked at its edge.

    blocks: the teacher's; not all need have candidates.
    """
    candidates = candidates[candidates["kind"] != "modulation"]  # which have a figure of their own
    ffn = candidates["kind"] == "ffn"
    table = candidates.assign(kind=candidates["kind"].mask(ffn, "ffn_" + candidates["stream"]))
    kinds = [kind for kind in KINDS if (table["kind"] == kind).any()]
    if not kinds:
        return style.message("Width pruning", "The model has no FFN or text stream to prune.")
    picked = table[table["selected"]]
    runs = selected_spans(candidates[candidates["kind"] == "text"])
    spans = selected_spans(intervals)
    unmeasured = int(table["velocity_error"].isna().sum())
    # Sizes in inches.
    left, top, across, high, pitch = 1.15, 1.07, style.WIDTH - 1.27, 1.1, 1.39
    bottom = top + pitch * (len(kinds) + 1) + 0.02
    strip_height = 0.26 * (len(kinds) + 1)
    figure = style.new_figure(
        f"Linear maps replace {len(picked) - len(runs)} of {int(ffn.sum())} FFNs "
        f"and the text stream in {_counted(len(runs), 'run')} of blocks",
        bottom + strip_height + 0.42,
        note="Velocity error of the teacher with only this candidate made linear, "
        "by least squares, before any training; the kinds share one axis."
        + (f"\nPinned without being measured, so not drawn: {unmeasured}." if unmeasured else ""),
    )
    figure.set_layout_engine(None)
    errors = table["velocity_error"]
    largest = errors.max() if (errors > 0).any() else 1.0
    floor = max(largest * 1e-5, errors[errors > 0].min() / 2 if (errors > 0).any() else 0)
    first = None
    for number, kind in enumerate(kinds):
        shared = {"sharey": first} if first else {}
        ax = style.axes_at(figure, left, top + number * pitch, across, high, **shared)
        first = first or ax
        rows = table[table["kind"] == kind]
        _candidates(ax, kind, rows, "velocity_error", floor)
        if kind == "ffn_text":
            style.shade(ax, [(begin + 1, end) for begin, end in runs], KINDS["text"][3])
        chosen = int(rows["selected"].sum())
        ax.set_title(f"{KINDS[kind][0]}s: {chosen} of {len(rows)} selected", pad=4)
    first.set_ylim(floor / 1.6, largest * 1.9)
    style.log_axis(first)
    ax = style.axes_at(figure, left, top + len(kinds) * pitch, across, high)
    fits = table["fit_error_heldout"]
    least = fits[fits > 0].min() if (fits > 0).any() else 1.0
    for kind in reversed(kinds):  # points over runs
        _candidates(ax, kind, table[table["kind"] == kind], "fit_error_heldout", least / 1.3)
    ax.axhline(1, color=style.BLACK, lw=0.8, ls="--", zorder=1)
    ax.set_ylim(least / 1.6, max(fits.max(), 1) * 1.5)
    style.log_axis(ax)
    ax.set_title(
        "Fit of these maps on held-out prompts (of a run: the worst map); dashed: no map at all",
        pad=4,
    )
    labels = [*["velocity\nerror"] * len(kinds), f"1 {MINUS} R²"]
    for ax, label in zip(figure.axes, labels, strict=True):
        style.shade(ax, spans)
        style.block_ticks(ax, blocks)
        ax.tick_params(labelbottom=False)
        ax.set_ylabel(label)
        ax.yaxis.set_label_coords(-0.55 / across, 0.5)
    strip = style.axes_at(figure, left, bottom, across, strip_height)
    style.strip(strip, _narrow_model(picked, spans, kinds), blocks)
    strip.set_xlabel("block", labelpad=1)
    style.legend_at(figure, 0.79 if unmeasured else 0.62, _width_legend(table, floor, spans, runs))
    return figure


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _candidates(ax: Axes, kind: str, rows: pd.DataFrame, column: str, floor: float) -> None:
    """The candidates of one kind: FFNs as points, text runs as spans over their blocks.

    Full: selected. Pale: not. Crossed or dotted: ruled out. What is below `floor` is drawn there.
    """
    _, colour, marker, _ = KINDS[kind]
    rows = rows[rows[column].notna()].sort_values("selected")
    for row in rows.itertuples():
        value = max(getattr(row, column), floor)
        out = row.verdict in RULED_OUT
        look = {"color": colour if row.selected else "#9A9A9A" if out else colour}
        look |= {"zorder": 3 if row.selected else 2}
        if kind == "text":
            ends = [row.first - 0.3, row.last + 0.3]
            look |= {"lw": 0.9, "alpha": 0.5, "ls": ":" if out else "-"}
            if row.selected:
                look |= {"lw": 2.8, "alpha": 1, "solid_capstyle": "butt"}
                look["path_effects"] = [withStroke(linewidth=5, foreground="white")]
            ax.plot(ends, [value] * 2, **look)
            continue
        shape = "x" if out else "v" if getattr(row, column) < floor else marker
        fill = colour if row.selected else "white"
        ax.plot(row.first, value, shape, ms=4.6, mfc=fill, mew=0.9, lw=0, **look)


def _narrow_model(picked: pd.DataFrame, spans: list, kinds: list[str]) -> dict[str, list[tuple]]:
    """Rows of the strip: what stands in the pruned model along the teacher's depth."""
    last = {first: end for first, end in spans}
    bars = {
        "depth intervals": [(*span, KINDS["depth"][3], style.span_name(*span)) for span in spans]
    }
    for kind in kinds:
        name, _, _, fill = KINDS[kind]
        rows = picked[picked["kind"] == kind].sort_values("first")
        ends = [(int(row.first), int(row.last)) for row in rows.itertuples()]
        if kind == "text":
            bars[f"{name}s"] = [(*span, fill, style.span_name(*span)) for span in ends]
        else:
            # The FFN of an interval's student stands for the interval's blocks.
            bars[f"linear {name}s"] = [(q, last.get(q, q), fill, "") for q, _ in ends]
    return bars


def _width_legend(table: pd.DataFrame, floor: float, spans: list, runs: list) -> list:
    """Legend handles of what the width figure really shows."""
    point = {"color": "#444444", "marker": "o", "ms": 4.6, "lw": 0}
    handles = [Line2D([], [], label="selected", **point)]
    handles.append(Line2D([], [], label="not selected", mfc="white", **point))
    if table["verdict"].isin(RULED_OUT).any():
        crossed = point | {"color": "#9A9A9A", "marker": "x"}
        handles.append(Line2D([], [], label="ruled out (dotted: run)", **crossed))
    if (table["velocity_error"] < floor).any():
        below = point | {"marker": "v"}
        handles.append(Line2D([], [], label="below the axis", mfc="white", **below))
    if spans:
        handles.append(Patch(fc=style.SELECTED, label="selected depth interval"))
    if runs and (table["kind"] == "ffn_text").any():
        handles.append(Patch(fc=KINDS["text"][3], label="text borrowed: no FFN"))
    return handles
