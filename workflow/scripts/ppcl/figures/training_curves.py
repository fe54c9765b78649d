"""Losses and errors while students, sets of students and variants are trained."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ppcl.figures import labelling, style


@style.styled
def student_losses(log: pd.DataFrame, trained: str) -> Figure:
    """Loss of every student while it trains: both errors, each stream, one panel per interval.

    Args:
        log: as schemas.DISTILL_LOG: loss_normalised and loss_relative (per token, without unit)
            over step (optimiser steps), by interval and stream.
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
        across, down = left + column * (width + gap), top + line * pitch
        ax = style.axes_at(figure, across, down, width, pitch - 0.4, **shared)
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


def _picture_losses(panel: Axes, log: pd.DataFrame, colour: str) -> None:
    """The flow-matching loss of one's own pictures: a line for those that are trained on, dots for
    those that are held out (schemas.FINETUNE_LOG)."""
    if "picture_loss" not in log:
        return
    panel.plot(log["step"], log["picture_loss"], color=colour, lw=0.7, alpha=0.6)
    panel.plot(log["step"], log["heldout_picture_loss"], "o", color=colour, ms=4)
    panel.set_ylabel("loss of own pictures\n(dots: held out)")


@style.styled
def velocity_errors(logs: dict[str, pd.DataFrame], names: list[str], title: str) -> Figure:
    """Output distillation: velocity error and learning rate by step, one curve per log.

    Args:
        logs: name -> its log, as schemas.VELOCITY_LOG or FINETUNE_LOG: velocity_error (relative,
            squared) and lr (learning rate) over step (optimiser steps).
        names: all that there may be, in their order, so that a variant has the same colour here and
            in `quality_against_cost`.
    """
    logs = {name: log for name, log in logs.items() if len(log)}
    if not logs:
        return style.message(title, "Not part of this run: the config asks for no such steps.")
    figure = style.new_figure(
        title,
        4.0,
        note="Thin: every logged step. Thick: geometric means over 40 stretches of steps.",
    )
    seen = [log for log in logs.values() if "picture_loss" in log and log["picture_loss"].any()]
    error, rate, *more = figure.subplots(
        3 if seen else 2, 1, sharex=True, height_ratios=[2, 0.8, *([1.4] if seen else [])]
    )
    order = [*names, *(name for name in logs if name not in names)]
    looks = dict(zip(order, style.series(len(order)), strict=True))
    ends = []
    for name, log in logs.items():
        colour, _, dashes = looks[name]
        log = log.sort_values("step")
        rate.plot(log["step"], log["lr"], color=colour, ls=dashes)
        for panel in more:
            _picture_losses(panel, log, colour)
        log = log.dropna(subset="velocity_error")  # NaN where it was not trained
        if not len(log):
            continue
        error.plot(log["step"], log["velocity_error"], color=colour, lw=0.5, alpha=0.3)
        steps, values = style.log_average(log["step"], log["velocity_error"])
        if len(values):
            error.plot(steps, values, color=colour, ls=dashes)
            ends.append((log["step"].iloc[-1], list(values)[-1], name, colour))
    style.log_axis(error)
    labelling.label_ends(error, ends)
    error.set_ylabel("relative velocity\nerror")
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.yaxis.set_major_locator(MaxNLocator(2))
    rate.set_ylim(bottom=0)
    lowest = (more or [rate])[0]
    lowest.set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure
