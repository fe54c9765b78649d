"""Figures of training and of what the variants reach, from tables to matplotlib Figures.

Tables are pandas DataFrames with the columns of `ppcl.storage.schemas`. No torch: plots take
seconds.
"""

import io
import json
import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ppcl.figures import labelling, style

TEACHER = "teacher"
DARK = "#444444"
ACCURACIES = {
    "digit_accuracy": "digit right",
    "digit_color_accuracy": "digit colour right",
    "background_color_accuracy": "background right",
    "all_correct": "all three right",
}
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


@style.styled
def distill(log: pd.DataFrame, trained: str) -> Figure:
    """Loss of every student while it trains: both errors, each stream, one panel per interval.

    trained: the config's distill.loss, named in the title.
    """
    intervals = sorted(log["interval"].unique(), key=lambda name: [int(n) for n in name.split("-")])
    if not intervals:
        return style.message("Distillation", "No interval was distilled.")
    columns = min(5, len(intervals))
    rows = math.ceil(len(intervals) / columns)
    left, gap, top, pitch = 0.65, 0.15, 1.0, 1.45  # inches
    width = min((style.WIDTH - left - gap * columns) / columns, 3.0)
    last = log[log["step"] == log.groupby(["interval", "stream"])["step"].transform("max")]
    figure = style.new_figure(
        f"Students trained on the {trained} loss end at normalised "
        f"{last['loss_normalised'].median():.2g}, relative {last['loss_relative'].median():.2g}",
        top + pitch * rows + 0.08,
        note="Title: medians of the last step. Curves: geometric means over 40 stretches of steps.",
    )
    figure.set_layout_engine(None)
    losses = {"loss_normalised": ("normalised", "-"), "loss_relative": ("relative", (0, (4, 1.5)))}
    streams = style.streams(log)
    axes: list[Axes] = []
    for number, interval in enumerate(intervals):
        line, column = divmod(number, columns)
        shared = {"sharex": axes[0], "sharey": axes[0]} if axes else {}
        place = (left + column * (width + gap), top + line * pitch)
        ax = style.axes_at(figure, *place, width, pitch - 0.4, **shared)
        axes.append(ax)
        for stream in streams:
            curve = log[(log["interval"] == interval) & (log["stream"] == stream)]
            curve = curve.sort_values("step")
            for loss, (_, dashes) in losses.items():
                steps, values = style.log_average(curve["step"], curve[loss])
                ax.plot(steps, values, color=style.stream_look(stream)[0], ls=dashes, lw=1.2)
        ax.set_title(style.blocks_name(*(int(number) for number in interval.split("-"))))
        below = number + columns < len(intervals)
        ax.tick_params(labelleft=column == 0, labelbottom=not below)
        ax.set_ylabel("loss per token" if column == 0 else "")
        ax.set_xlabel("" if below else "step")
    style.log_axis(axes[0])
    axes[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [
        Line2D([], [], color=style.stream_look(s)[0], ls=dashes, label=f"{s}, {name}")
        for s in streams
        for name, dashes in losses.values()
    ]
    style.legend_at(figure, 0.59, handles)
    return figure


@style.styled
def velocity(logs: dict[str, pd.DataFrame], names: list[str], title: str) -> Figure:
    """Output distillation: velocity error and learning rate by step, one curve per log.

    logs: name -> its log. names: all that there may be, in their order, so that a variant has the
    same colour here and in `tradeoff`.
    """
    logs = {name: log for name, log in logs.items() if len(log)}
    if not logs:
        return style.message(title, "Not part of this run: the config asks for no such steps.")
    figure = style.new_figure(
        title,
        4.0,
        note="Thin: every logged step. Thick: geometric means over 40 stretches of steps.",
    )
    error, rate = figure.subplots(2, 1, sharex=True, height_ratios=[2, 0.8])
    order = [*names, *(name for name in logs if name not in names)]
    looks = dict(zip(order, _series(len(order)), strict=True))
    ends = []
    for name, log in logs.items():
        colour, _, dashes = looks[name]
        log = log.sort_values("step")
        error.plot(log["step"], log["velocity_error"], color=colour, lw=0.5, alpha=0.3)
        steps, values = style.log_average(log["step"], log["velocity_error"])
        if len(values):
            error.plot(steps, values, color=colour, ls=dashes)
            ends.append((log["step"].iloc[-1], list(values)[-1], name, colour))
        rate.plot(log["step"], log["lr"], color=colour, ls=dashes)
    style.log_axis(error)
    labelling.label_ends(error, ends)
    error.set_ylabel("relative velocity\nerror")
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.yaxis.set_major_locator(MaxNLocator(2))
    rate.set_ylim(bottom=0)
    rate.set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def _series(count: int) -> list[tuple]:
    """Colour, marker and line style for `count` variants; the styles repeat after six."""
    return [style.SERIES[number % len(style.SERIES)] for number in range(count)]


def _by_size(metrics: pd.DataFrame) -> list[str]:
    """Variants from the largest to the smallest transformer, the teacher first."""
    sizes = metrics[metrics["metric"] == "parameter_fraction"].set_index("variant")["value"]
    variants = list(dict.fromkeys(metrics["variant"]))
    return sorted(variants, key=lambda name: (name != TEACHER, -sizes.get(name, 0.0)))


@style.styled
def tradeoff(metrics: pd.DataFrame) -> Figure:
    """Quality against size (left) and latency (right), with bootstrap intervals, teacher included.

    Shows the judged accuracies where the table has them, else the fidelity to the teacher's
    images and velocities.
    """
    present = set(metrics["metric"])
    qualities = {m: label for m, label in ACCURACIES.items() if m in present}
    judged = bool(qualities)
    qualities = qualities or {m: label for m, label in FIDELITIES.items() if m in present}
    costs = {m: label for m, label in COSTS.items() if m in present}
    if not qualities or not costs:
        return style.message("Quality against cost", "The metrics table holds no such pair.")
    variants = _by_size(metrics)
    # In the order of the config, as in the table: colours do not depend on what was measured.
    others = [name for name in dict.fromkeys(metrics["variant"]) if name != TEACHER]
    looks = dict(zip(others, _series(len(others)), strict=True)) | {
        TEACHER: (style.BLACK, "*", "-")
    }
    cells = metrics.set_index(["variant", "metric"])

    samples = int(metrics.loc[metrics["metric"].isin(qualities), "samples"].max())
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
            if judged:
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
def pareto(points: pd.DataFrame, metrics: pd.DataFrame, finetuned: list[str]) -> Figure:
    """Velocity error of every budget against size and latency, measured and predicted.

    The errors lie decades apart; the teacher's, which is 0, stands at the lower edge. Sizes are
    shown with modulation and without, as low rank saves memory alone.

    points: what each budget gets without further training, as `schemas.POINTS`.
    finetuned: names of the metrics table's variants that were trained further.
    """
    points = points.sort_values("budget")
    others = [name for name in dict.fromkeys(metrics["variant"]) if name != TEACHER]
    looks = dict(zip(others, _series(len(others)), strict=True))
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
        bars = {"xerr": _reach(points, cost), "yerr": _reach(points, "velocity_error")}
        look = {"ecolor": style.GREY, "elinewidth": 0.7, "capsize": 1.5, "zorder": 3}
        ax.errorbar(x, points["velocity_error"], **bars, color=DARK, marker="o", **look)
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

    Where there is none, because it would be over one prompt or round, it reaches nowhere."""
    if f"{column}_low" not in points:
        return None
    below = points[column] - points[f"{column}_low"]
    above = points[f"{column}_high"] - points[column]
    return np.nan_to_num(np.maximum([below, above], 0))


def _point(ax: Axes, x: pd.Series, y: pd.Series, colour: str, marker: str) -> None:
    """One variant: a marker and its intervals; a bound that is missing or beyond draws no bar."""

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


PROMPTS = 8  # whose images are drawn


@style.styled
def images(table: pd.DataFrame, metrics: pd.DataFrame, rows: int = PROMPTS) -> Figure:
    """The first prompts' images: teacher and variants of one prompt share a seed.

    A picture whose reading by the classifier is not what the prompt asks for is framed, with the
    reading below it. Small images are enlarged without smoothing.
    """
    order = _by_size(metrics)
    shown = set(table["variant"])
    variants = [name for name in order if name in shown] + sorted(shown - set(order))
    prompts = sorted(table["prompt_index"].unique())[:rows]
    if not prompts:
        return style.message("Images", "The evaluation kept no images.")
    fractions = metrics[metrics["metric"] == "parameter_fraction"].set_index("variant")["value"]
    # One picture per prompt and variant; more seeds of a prompt would be more rows of the same.
    first = table.sort_values("seed").drop_duplicates(["variant", "prompt_index"])
    cells = first.set_index(["prompt_index", "variant"])

    framed = [
        (prompt, variant)
        for prompt, variant in cells.index
        if prompt in prompts and not _reading(cells.loc[(prompt, variant), "read"])["correct"]
    ]
    note = "Below each name: transformer parameters, of the teacher's."
    note += "\nFramed: read as something else than the prompt asks for." if framed else ""
    # Sizes in inches. Text at the left, then one column of pictures per variant.
    left, side, across, down = 2.0, 0.82, 0.97, 1.0
    top = 1.12 if framed else 0.93
    figure = style.new_figure(
        "Same prompt, same seed",
        top + down * len(prompts),
        left + across * len(variants),
        note=note,
    )
    figure.set_layout_engine(None)
    for line, prompt in enumerate(prompts):
        text = first.loc[first["prompt_index"] == prompt, "prompt"].iloc[0]
        # SVG has no room for control characters, nor for what is no character.
        text = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)
        text = textwrap.fill(text, 27, max_lines=5, placeholder=" …")
        label = style.axes_at(figure, 0.1, top + line * down, left, side, frameon=False)
        label.set(xticks=[], yticks=[])
        label.text(0, 0.5, text, va="center", parse_math=False)
        for column, variant in enumerate(variants):
            ax = style.axes_at(figure, left + column * across, top + line * down, side, side)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if line == 0:
                size = f"{100 * fractions[variant]:.0f} %" if variant in fractions else ""
                ax.set_title(f"{variant}\n{size}", loc="center", parse_math=False)
            if (prompt, variant) in cells.index:
                ax.imshow(_pixels(cells.loc[(prompt, variant), "png"]), interpolation="none")
            if (prompt, variant) in framed:
                ax.spines[:].set(visible=True, color=style.VERMILION, linewidth=2.2)
                reading = _reading(cells.loc[(prompt, variant), "read"])["text"]
                ax.set_xlabel(reading, color=style.VERMILION, fontsize=6, labelpad=2)
    return figure


def _pixels(png: bytes) -> np.ndarray:
    """Decode to uint8 [height, width, 3], at least 256 pixels (whole factors), at most 512."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    # Viewers smooth what they enlarge, so the enlarging is done here, pixel by pixel.
    factor = max(1, math.ceil(256 / max(picture.size)))
    return np.asarray(picture).repeat(factor, 0).repeat(factor, 1)


def _reading(read: str) -> dict:
    """What the judge read, as text, and whether it is correct (it is where nothing judged)."""
    reading = json.loads(read) if read else {}
    digit, ink, paper = (reading.get(k) for k in ("digit", "digit_color", "background_color"))
    return {"text": f"{digit} {ink} on {paper}", "correct": reading.get("correct", True)}
