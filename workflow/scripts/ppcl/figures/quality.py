"""Quality against cost: of the variants, and of every budget."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ppcl import judges
from ppcl.benchmarks import registry
from ppcl.figures import labelling, style
from ppcl.figures.style import TEACHER

DARK = "#444444"

FIDELITIES = {
    "psnr": "PSNR to the teacher's\nimage (dB)",
    "ssim": "SSIM to the teacher's\nimage",
    "velocity_error": "relative velocity error",
}

COSTS = {
    "parameter_fraction": "parameters (teacher = 1)",
    "parameter_fraction_without_modulation": "without modulation (teacher = 1)",
    "latency_ratio": "latency (teacher = 1)",
}


# Shown where weights are quantised; elsewhere bytes are as parameters.
STORED = "stored_fraction", "bytes as stored (teacher = 1)"


def _quantised(metrics: pd.DataFrame) -> bool:
    """Whether a variant has fewer bytes than its share of the parameters has."""
    wide = metrics.pivot_table(index="variant", columns="metric", values="value")
    if not {STORED[0], "parameter_fraction"} <= set(wide):
        return False
    return bool((wide[STORED[0]] < 0.98 * wide["parameter_fraction"]).any())


@style.styled
def quality_against_cost(metrics: pd.DataFrame) -> Figure:
    """Quality against size (left) and latency (right), with bootstrap intervals, teacher included.

    Shows the judged accuracies where the table has them, else the fidelity to the teacher's
    images and velocities; and of each benchmark the score that sums it up.

    metrics: as schemas.METRICS: value, ci_low and ci_high of a judge's accuracies (shares, shown
    in %) or of FIDELITIES (PSNR in dB; SSIM; velocity error: relative, squared) as y; of COSTS
    (teacher = 1) as x, and of STORED where a variant is quantised.
    """
    present = set(metrics["metric"])
    qualities = {m: label for m, label in judges.labels().items() if m in present}
    judged = bool(qualities)
    qualities = qualities or {m: label for m, label in FIDELITIES.items() if m in present}
    scored = {m: m for m in registry.of_metrics(metrics["metric"]) if "/" not in m}
    own = list(qualities or scored)  # benchmarks have pictures of their own
    qualities |= scored
    costs = {m: label for m, label in COSTS.items() if m in present}
    if _quantised(metrics):
        costs = {STORED[0]: STORED[1], **costs}
    if not qualities or not costs:
        return style.message("Quality against cost", "The metrics table holds no such pair.")
    variants = style.by_size(metrics)
    # In the order of the config, as in the table: colours do not depend on what was measured.
    others = [name for name in dict.fromkeys(metrics["variant"]) if name != TEACHER]
    looks = dict(zip(others, style.series(len(others)), strict=True)) | {
        TEACHER: (style.BLACK, "*", "-")
    }
    cells = metrics.set_index(["variant", "metric"])

    samples = int(metrics.loc[metrics["metric"].isin(own), "samples"].max())
    figure = style.new_figure(
        "Quality of the variants against their size and latency",
        1.6 * len(qualities) + 0.9,
        note=f"{samples:,} samples; bars: bootstrap intervals; dotted: the teacher.",
    )
    axes = figure.subplots(len(qualities), len(costs), sharex="col", sharey="row", squeeze=False)
    labels = []
    for ax, label in zip(axes[-1], costs.values(), strict=True):
        ax.set_xlabel(label)
    for line, (quality, quality_label) in zip(axes, qualities.items(), strict=True):
        for ax, cost in zip(line, costs, strict=True):
            points = []
            for variant in variants:
                if not {(variant, quality), (variant, cost)} <= set(cells.index):
                    continue
                x, y = cells.loc[(variant, cost)], cells.loc[(variant, quality)]
                if not np.isfinite([x["value"], y["value"]]).all():
                    continue
                colour, marker, _ = looks[variant]
                _point(ax, x, y, colour, marker)
                points.append((x["value"], y["value"], variant, colour))
                if variant == TEACHER:
                    ax.axhline(y["value"], color=style.GREY, lw=0.7, ls=":", zorder=0)
            labels.append((ax, points))
            ax.margins(x=0.14, y=0.18)
            if judged and quality in judges.labels():
                # The axis may reach beyond 100 %, but no share does.
                ax.yaxis.set_major_formatter(
                    lambda value, _: f"{100 * value:.4g} %" if value < 1 + 1e-9 else ""
                )
            ax.yaxis.set_major_locator(MaxNLocator(5))
        line[0].set_ylabel(quality_label)
    figure.align_ylabels(axes[:, 0])
    for ax, points in labels:
        labelling.label_points(ax, points)
    return figure


@style.styled
def budget_errors(points: pd.DataFrame, metrics: pd.DataFrame, finetuned: list[str]) -> Figure:
    """Velocity error of every budget against size and latency, measured and predicted.

    The errors lie decades apart; the teacher's, which is 0, stands at the lower edge. Sizes are
    shown with modulation and without, as low rank saves memory alone.

    Args:
        points: what each budget gets without further training, as schemas.POINTS: velocity_error
            and predicted_error (relative, squared) over the columns of COSTS (teacher = 1), with
            their bounds.
        metrics: as schemas.METRICS: the same of the variants.
        finetuned: names of the metrics table's variants that were trained further.
    """
    points = points.sort_values("budget")
    others = [name for name in dict.fromkeys(metrics["variant"]) if name != TEACHER]
    looks = dict(zip(others, style.series(len(others)), strict=True))
    cells = metrics.set_index(["variant", "metric"])
    tuned = [name for name in others if name in finetuned]
    figure = style.new_figure(
        f"What each of {len(points)} budgets gets without further training, and the variants",
        4.05,
        note="Bars: 95 % bootstrap intervals, of the error by prompt, of latency by round."
        + (f" Fine-tuned: {', '.join(tuned)}." if tuned else ""),
    )
    figure.set_layout_engine(None)
    costs = {cost: words for cost, words in COSTS.items() if points[cost].notna().any()}
    left, gap, top, high = 0.85, 0.25, 1.0, 2.5
    across = (style.WIDTH - left - gap * (len(costs) - 1) - 0.15) / len(costs)
    errors = [points["velocity_error"], points["predicted_error"], points["velocity_error_low"]]
    errors.append(metrics.loc[metrics["metric"] == "velocity_error", "value"])
    positive = pd.concat(errors).dropna()
    positive = positive[positive > 0]
    floor = positive.min() / 3 if len(positive) else 1e-6
    labels = []
    for number, (cost, words) in enumerate(costs.items()):
        shared = {"sharey": figure.axes[0]} if number else {}
        ax = style.axes_at(figure, left + number * (across + gap), top, across, high, **shared)
        x = points[cost]
        shown = points["predicted_error"].clip(lower=floor)
        ax.plot(x, shown, color=style.GREY, lw=0.9, ls="--", zorder=2)
        reach = {"xerr": _reach(points, cost), "yerr": _reach(points, "velocity_error")}
        look = {"ecolor": style.GREY, "elinewidth": 0.7, "capsize": 1.5, "zorder": 3}
        bars: dict[str, Any] = {**reach, **look}
        ax.errorbar(x, points["velocity_error"], color=DARK, marker="o", **bars)
        named = [(1.0, floor, TEACHER, style.BLACK)]
        ax.plot(1, floor, "*", color=style.BLACK, ms=9, clip_on=False, zorder=5)
        for name in others:
            if {(name, cost), (name, "velocity_error")} <= set(cells.index):
                colour, marker, _ = looks[name]
                x_cell, y_cell = cells.loc[(name, cost)], cells.loc[(name, "velocity_error")]
                if not y_cell["value"] > 0:
                    continue
                _point(ax, x_cell, y_cell, colour, marker)
                named.append((x_cell["value"], y_cell["value"], name, colour))
        labels.append((ax, named))
        ax.margins(x=0.08)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel(words)
        if number:
            ax.tick_params(labelleft=False)
    first = figure.axes[0]
    first.set_ylim(floor, (positive.max() if len(positive) else 1) * 2)
    style.log_axis(first)
    first.set_ylabel("relative velocity error (teacher: 0)")
    for ax, named in labels:
        labelling.label_points(ax, named)
    handles = [
        Line2D([], [], color=DARK, marker="o", label="measured"),
        Line2D(
            [],
            [],
            color=style.GREY,
            lw=0.9,
            ls="--",
            label="predicted: sum of each unit's own error",
        ),
    ]
    style.legend_at(figure, 0.66, handles)
    return figure


def _reach(points: pd.DataFrame, column: str) -> np.ndarray | None:
    """How far the intervals of a column reach below and above it, [2, rows]; None without any.

    An interval that is missing, since there is one prompt or round alone, has a reach of 0."""
    if f"{column}_low" not in points:
        return None
    below = points[column] - points[f"{column}_low"]
    above = points[f"{column}_high"] - points[column]
    return np.nan_to_num(np.maximum([below, above], 0))


def _point(ax: Axes, x: pd.Series, y: pd.Series, colour: str, marker: str) -> None:
    """One variant: a marker and its intervals; a bound that is missing, or on the other side of the
    value, draws no bar."""

    def bar(cell: pd.Series) -> np.ndarray:
        reach = np.array([[cell["value"] - cell["ci_low"]], [cell["ci_high"] - cell["value"]]])
        return np.nan_to_num(np.maximum(reach, 0))

    size = 8 if marker == "*" else 5
    ax.errorbar(
        x["value"],
        y["value"],
        yerr=bar(y),
        xerr=bar(x),
        color=colour,
        marker=marker,
        ms=size,
        elinewidth=0.9,
        capsize=2,
    )
