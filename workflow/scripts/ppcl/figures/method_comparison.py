"""Every method of the ablation at one size, before and after the same fine-tune."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ppcl.figures import style
from ppcl.figures.method_statistics import summary

TITLES = {
    "ladder": "The ladder (+ keeps what came before)",
    "choice": "Open choices",
    "latency": "Depth and width, as fast as rivals",
    "rival": "Rivals, all students plugged in at every step",
}

STATES = {
    "plugged": (style.SKY, "o", "before the fine-tune"),
    "finetuned": (style.BLUE, "D", "after"),
}

# Another pair of states, drawn as these are.
LOW_RANK = {"low_rank": "plugged", "low_rank_finetuned": "finetuned"}

# Distance of a state's marker above its method's line, in rows.
APART = {"plugged": 0.17, "finetuned": -0.17}


def low_rank_comparison(table: pd.DataFrame) -> Figure:
    """`method_comparison` of the methods that were measured with low-rank modulations as well, in
    the states that have them.

    table: as schemas.ABLATION. Of its column `state`, those that LOW_RANK names.
    """
    table = table[table["state"].isin(LOW_RANK) | (table["group"] == "teacher")]
    return method_comparison(table.assign(state=table["state"].replace(LOW_RANK)))


@style.styled
def method_comparison(table: pd.DataFrame) -> Figure:
    """Each method as a row: its velocity error, and its accuracy where that was judged, before and
    after the fine-tune, as means over seeds with 95 % intervals; at the right its latency.

    table: as schemas.ABLATION. Drawn of it: velocity_error (relative, squared) with its bounds;
    all_correct (share of images that the judge reads as asked for, shown in %); latency_ratio
    (teacher = 1); parameter_fraction (teacher = 1) in the title. Rows go by group, then order.
    """
    table = table[(table["group"] != "schedule") & table["state"].isin(STATES)]
    methods = table[table["group"] != "teacher"].drop_duplicates("method").sort_values("order")
    if methods.empty:
        return style.message("Ablation", "The table holds no method.")
    judged = table["all_correct"].notna().any()
    place, heads, y = {}, {}, 0.0
    for group, title in TITLES.items():
        inside = methods[methods["group"] == group]
        if len(inside):
            heads[title] = y
            for number, name in enumerate(inside["method"]):
                place[name] = y + 1 + number
            y += len(inside) + 1.6
    left, gap, top, pitch, below = 2.45, 0.25, 0.95, 0.215, 0.55  # inches
    high = pitch * y
    fraction = table.loc[table["group"] != "teacher", "parameter_fraction"]
    low, most = (f"{100 * value:.1f}" for value in (fraction.min(), fraction.max()))
    size = f"{low} %" if low == most else f"{low} to {most} %"
    figure = style.new_figure(
        f"The same training and fine-tune, {size} of the transformer's parameters left",
        top + high + below,
        note="Bars: 95 % over seeds (small dots), by the spread pooled over methods, and over "
        "prompts for the velocity error.\nRight: latency, the teacher's is 1.",
    )
    figure.set_layout_engine(None)
    panels = {"velocity_error": "relative velocity error"}
    panels |= {"all_correct": "pictures with all three right"} if judged else {}
    across = (style.WIDTH - left - gap * (len(panels) - 1) - 0.5) / len(panels)
    for number, (column, words) in enumerate(panels.items()):
        at = left + number * (across + gap)
        ax = style.axes_at(figure, at, top, across, high)
        _panel(ax, table, column, place)
        ax.set_ylim(y - 0.6, -0.6)
        ax.set_xlabel(words)
        ax.tick_params(axis="y", length=0, labelleft=not number)
        ax.spines["left"].set_visible(False)
        for title, where in heads.items():
            if not number:
                edge = -(left - 0.1) / across
                ax.text(edge, where, title, transform=ax.get_yaxis_transform(), weight="bold")
    latency = table[table["state"] == "finetuned"].groupby("method")["latency_ratio"].mean()
    for name, where in place.items():
        right = ax.get_yaxis_transform()
        ax.text(1.03, where, f"{latency[name]:.2f}", transform=right, va="center", size=8)
    first = figure.axes[0]
    labels = methods.set_index("method")["label"]
    for ax in figure.axes:
        ax.set_yticks(list(place.values()), [labels[name] for name in place])
    style.log_axis(first, "x")
    if judged:
        ax = figure.axes[1]
        teacher = table.loc[table["group"] == "teacher", "all_correct"]
        if len(teacher):
            ax.axvline(teacher.iloc[0], color=style.GREY, lw=0.9, ls=":", zorder=0)
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=5, lw=0, label=words)
        for colour, marker, words in STATES.values()
    ]
    if judged:
        handles.append(Line2D([], [], color=style.GREY, lw=0.9, ls=":", label="teacher"))
    style.legend_at(figure, 0.66, handles)
    return figure


def _panel(ax: Axes, table: pd.DataFrame, column: str, place: dict[str, float]) -> None:
    summaries = summary(table, column)
    for name, y in place.items():
        ax.axhline(y, color="#E8E8E8", lw=0.6, zorder=0)
        for state, (colour, marker, _) in STATES.items():
            if (name, state) not in summaries.index:
                continue
            row, at = summaries.loc[name, state], y - APART[state]
            if not np.isfinite(row["mean"]):
                continue
            ax.plot([row["low"], row["high"]], [at, at], color=colour, lw=1.1)
            ax.plot(row["mean"], at, marker, color=colour, ms=5, mec="white", mew=0.5)
            if row["seeds"] > 1:
                mine = table[(table["method"] == name) & (table["state"] == state)][column]
                ax.plot(mine, [at] * len(mine), ".", color=colour, ms=2.5, zorder=1)
