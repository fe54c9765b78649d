"""The figure of the ablation: every method at one size, before and after the same fine-tune.

Tables are pandas DataFrames with the columns of `schemas.ABLATION`. No torch: plots take seconds.
"""

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import stdtrit

from ppcl.figures import style

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
RESAMPLES = 1000
TINY = 1e-12  # the teacher's own error is zero, which has no logarithm
APART = {"plugged": 0.17, "finetuned": -0.17}  # rows between the two states of a method


def summary(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over seeds of each method and state, with a 95 % interval: mean, low, high, seeds.

    Of logarithms for velocity_error, whose mean is then the geometric one. Student's t over seeds:
    how far two trainings of one selection lie apart is taken to be alike for all methods, and
    pooled over those with several seeds (per state), so that one seed has an interval too. Where
    the seed decides the selection as well, the method's own spread counts. For velocity_error the
    bootstrap over prompts comes on top; the two are independent, so their squares add. A share's
    interval ends at 0 and 1.
    """
    log = column == "velocity_error"
    scaled = table[column].astype(float)
    table = table.assign(scaled=np.log(np.maximum(scaled, TINY)) if log else scaled)
    groups = dict(list(table.groupby(["method", "state"], sort=False)))
    pooled = {
        state: _spread(g for key, g in groups.items() if key[1] == state and not _by_chance(g))
        for state in table["state"].unique()
    }
    rows = []
    for (method, state), found in groups.items():
        deviation, freedom = _spread([found]) if _by_chance(found) else pooled[state]
        reach = stdtrit(freedom, 0.975) * deviation / len(found) ** 0.5 if freedom else 0.0
        below = above = reach if found["group"].iloc[0] != "teacher" else 0.0
        if log:
            ends = np.maximum(found[[f"{column}_low", f"{column}_high"]].to_numpy(float), TINY)
            by_prompt = np.abs(np.log(ends) - found[["scaled"]].to_numpy()).mean(axis=0)
            # Over one prompt there is no interval, and the seeds' stays what it is.
            below, above = np.hypot([below, above], np.nan_to_num(by_prompt))
        mean, low, high = found["scaled"].mean() + np.array([0, -below, above])
        mean, low, high = np.exp([mean, low, high]) if log else np.clip([mean, low, high], 0, 1)
        rows.append([method, state, mean, low, high, len(found)])
    names = ["method", "state", "mean", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=names).set_index(["method", "state"])


def ratio(table: pd.DataFrame, method: str, other: str, state: str) -> tuple[float, float, float]:
    """A method's velocity error over another's, with a 95 % interval: value, low, high.

    Prompt by prompt: both are measured on the same calls, so what a prompt adds to the error of all
    methods is no part of the interval, as it is of `summary`'s. Geometric means over seeds; the
    bootstrap over prompts and the spread over seeds (as in `summary`) add as squares.
    """
    table = table[table["state"] == state]
    table = table.assign(scaled=np.log(np.maximum(table["velocity_error"], TINY)))
    groups = dict(list(table.groupby("method", sort=False)))
    pooled = _spread(found for found in groups.values() if not _by_chance(found))
    variance, freedoms, sums = 0.0, [], []
    for found in (groups[method], groups[other]):
        deviation, freedom = _spread([found]) if _by_chance(found) else pooled
        variance += deviation**2 / len(found)
        freedoms.append(freedom)
        sums.append(np.array([json.loads(text) for text in found["by_prompt"]]))
    # Seeds of one method -> mean over them of log errors, of each resample of the prompts.
    prompts = sums[0].shape[-1]
    draws = np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))
    one, two = (
        np.log(np.maximum(errors[:, 0][:, draws].sum(-1) / errors[:, 1][:, draws].sum(-1), TINY))
        for errors in sums
    )
    value = groups[method]["scaled"].mean() - groups[other]["scaled"].mean()
    drawn = np.percentile(one.mean(0) - two.mean(0), [2.5, 97.5]) - value
    reach = stdtrit(min(freedoms), 0.975) * variance**0.5 if min(freedoms) else 0.0
    low, high = (np.hypot(reach, end) for end in drawn)
    return tuple(float(np.exp(v)) for v in (value, value - low, value + high))


def _by_chance(found: pd.DataFrame) -> bool:
    """Whether the seeds of a method chose different blocks."""
    return bool(found[["intervals", "text_runs", "linear_ffns"]].nunique().gt(1).any())


def _spread(groups: Iterable[pd.DataFrame]) -> tuple[float, int]:
    """Standard deviation of `scaled` within the groups, and its degrees of freedom."""
    every = [found["scaled"] for found in groups]
    freedom = sum(len(values) - 1 for values in every)
    squares = sum(((values - values.mean()) ** 2).sum() for values in every)
    return (float(squares / freedom) ** 0.5 if freedom else 0.0), freedom


def low_rank(table: pd.DataFrame) -> Figure:
    """`comparison` of the methods that were measured with low-rank modulations, with them."""
    table = table[table["state"].isin(LOW_RANK) | (table["group"] == "teacher")]
    return comparison(table.assign(state=table["state"].replace(LOW_RANK)))


@style.styled
def comparison(table: pd.DataFrame) -> Figure:
    """Velocity error, and accuracy where it was judged, of all methods in order."""
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
    found = summary(table, column)
    for name, y in place.items():
        ax.axhline(y, color="#E8E8E8", lw=0.6, zorder=0)
        for state, (colour, marker, _) in STATES.items():
            if (name, state) not in found.index:
                continue
            row, at = found.loc[name, state], y - APART[state]
            if not np.isfinite(row["mean"]):
                continue
            ax.plot([row["low"], row["high"]], [at, at], color=colour, lw=1.1)
            ax.plot(row["mean"], at, marker, color=colour, ms=5, mec="white", mew=0.5)
            if row["seeds"] > 1:
                mine = table[(table["method"] == name) & (table["state"] == state)][column]
                ax.plot(mine, [at] * len(mine), ".", color=colour, ms=2.5, zorder=1)
