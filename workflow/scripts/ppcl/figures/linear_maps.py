"""What linear FFNs (Eq. 9) and text runs (Eq. 8) cost, and which were taken."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from ppcl.figures import seams, style
from ppcl.figures.candidates import KINDS, selected_spans
from ppcl.figures.style import MINUS
from ppcl.storage.schemas import RULED_OUT


@style.styled
def linear_map_costs(
    candidates: pd.DataFrame,
    intervals: pd.DataFrame,
    blocks: int,
    kinds_of_blocks: Sequence[seams.Run] = (),
) -> Figure:
    """What every linear FFN and text run costs along the depth, what went, and the model it makes.

    The kinds share one error axis, as selection compares them. It ends at most five decades below
    the largest error; what is smaller (an FFN that nothing reads has 0) is marked at its edge.

    One panel per kind over the depth, a panel of how well the maps fit, and a strip of what was
    taken. Full: selected; crossed or dotted: ruled out, by the column verdict.

    Args:
        candidates: as schemas.WIDTH_CANDIDATES, without the kind `modulation`: velocity_error
            (relative, squared) and fit_error_heldout (1 - R²) over first and last (blocks), by
            kind and stream; selected; verdict, of schemas.RULED_OUT or not.
        intervals: as schemas.INTERVALS: the selected ones are shaded.
        blocks: the teacher's number of blocks; not all need have candidates.
        kinds_of_blocks: runs of like blocks (`seams.runs`), between which lines are drawn.
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
    axes: list[Axes] = []
    for number, kind in enumerate(kinds):
        shared = {"sharey": axes[0]} if axes else {}
        ax = style.axes_at(figure, left, top + number * pitch, across, high, **shared)
        axes.append(ax)
        rows = table[table["kind"] == kind]
        _candidates(ax, kind, rows, "velocity_error", floor)
        if kind == "ffn_text":
            style.shade(ax, [(begin + 1, end) for begin, end in runs], KINDS["text"][3])
        chosen = int(rows["selected"].sum())
        ax.set_title(f"{KINDS[kind][0]}s: {chosen} of {len(rows)} selected", pad=4)
    axes[0].set_ylim(floor / 1.6, largest * 1.9)
    style.log_axis(axes[0])
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
        seams.mark(ax, kinds_of_blocks)
        ax.tick_params(labelbottom=False)
        ax.set_ylabel(label)
        ax.yaxis.set_label_coords(-0.55 / across, 0.5)
    strip = style.axes_at(figure, left, bottom, across, strip_height)
    style.strip(strip, _narrow_model(picked, spans, kinds), blocks)
    seams.mark(strip, kinds_of_blocks)
    seams.name_blocks(strip, kinds_of_blocks, labelpad=1)
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
        look: dict[str, Any] = {"color": colour if row.selected else "#9A9A9A" if out else colour}
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


def _width_legend(table: pd.DataFrame, floor: float, spans: list, runs: list) -> list[Artist]:
    """Legend handles of what the width figure really shows."""
    point: dict[str, Any] = {"color": "#444444", "marker": "o", "ms": 4.6, "lw": 0}
    handles: list[Artist] = [Line2D([], [], label="selected", **point)]
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
