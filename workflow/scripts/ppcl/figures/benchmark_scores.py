"""Scores of benchmarks, as their own scorers measured them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppcl.benchmarks import registry
from ppcl.figures import style
from ppcl.figures.style import TEACHER

ACROSS = 3  # panels beside each other
MOST = 60  # panels; more take minutes to lay out, and nobody looks at them


@style.styled
def benchmark_scores(metrics: pd.DataFrame) -> Figure:
    """A panel per metric: a line per variant, with its score and interval, the teacher's dotted.

    metrics: as schemas.METRICS: value, ci_low and ci_high (NaN without an interval), in the units
    of each benchmark, of all metrics that are of a benchmark.
    """
    shown = registry.of_metrics(metrics["metric"])
    if not shown:
        return style.message(
            "Benchmarks", "No scores yet: logs/gather_metrics.log has the commands that make them."
        )
    left_out, shown = len(shown) - MOST, shown[:MOST]
    more = f"\n{left_out} more are in metrics.parquet." if left_out > 0 else ""
    cells = metrics.set_index(["variant", "metric"])
    order = style.by_size(metrics)
    others = [name for name in dict.fromkeys(metrics["variant"]) if name != TEACHER]
    looks = dict(zip(others, style.series(len(others)), strict=True))
    looks[TEACHER] = (style.BLACK, "*", "-")
    down = -(-len(shown) // ACROSS)
    figure = style.new_figure(
        "Scores of benchmarks",
        (0.55 + 0.17 * len(order)) * down + 0.8,
        note="Bars: 95 % bootstrap intervals by prompt, where the scorer tells prompts; dotted: "
        f"the teacher.{more}",
    )
    axes = figure.subplots(down, ACROSS, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes.flat, shown, strict=False):
        for place, name in enumerate(order):
            if (name, metric) not in cells.index:
                continue
            cell = cells.loc[(name, metric)]
            reach = [[cell["value"] - cell["ci_low"]], [cell["ci_high"] - cell["value"]]]
            colour, marker, _ = looks[name]
            ax.errorbar(
                cell["value"],
                place,
                xerr=np.nan_to_num(np.maximum(reach, 0)),
                color=colour,
                marker=marker,
                ms=7 if marker == "*" else 4,
                elinewidth=0.9,
                capsize=2,
            )
            if name == TEACHER:
                ax.axvline(cell["value"], color=style.GREY, lw=0.7, ls=":", zorder=0)
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.set_yticks(range(len(order)), order, parse_math=False)
        ax.set_title(metric, parse_math=False, fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.margins(x=0.12)
    return figure
