"""Schedules of training against each other, at every budget."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ppcl.figures import style
from ppcl.figures.method_statistics import TINY


@style.styled
def schedule_comparison(table: pd.DataFrame) -> Figure:
    """Each schedule's error over that of the first, at every budget and after the fine-tune.

    A table of numbers, coloured by the logarithm of the ratio; geometric means over seeds.

    table: as schemas.ABLATION, of which rows of the group `schedule` count: velocity_error
    (relative, squared) by method, state and removed_parameters; parameter_fraction (teacher = 1,
    shown in %) names the columns.
    """
    table = table[table["group"] == "schedule"].copy()
    if table.empty:
        return style.message("Schedules", "The table holds no schedules.")
    # In every run, the k-th row of state `part` in this order is the budget that saves k / n of
    # what all students save.
    table = table.sort_values(["order", "seed", "state", "removed_parameters"])
    part = table.groupby(["method", "seed", "state"]).cumcount() + 1
    last = part[table["state"] == "part"].max()
    last = 1 if np.isnan(last) else int(last) + 1
    after = last + 1
    table["column"] = part.mask(table["state"] == "plugged", last)
    table["column"] = table["column"].mask(table["state"] == "finetuned", after)
    table["log"] = np.log(np.maximum(table["velocity_error"], TINY))
    grid = table.groupby(["order", "column"])["log"].mean().unstack()
    ratio = np.exp(grid - grid.iloc[0])
    left_over = table.groupby("column")["parameter_fraction"].mean()
    names = [f"{100 * left_over[column]:.0f} %" for column in grid.columns]
    names[-1] += "\nfine-tuned" if grid.columns[-1] == after else ""
    labels = table.drop_duplicates("order").set_index("order")["label"]
    seeds = table["seed"].nunique()

    left, top, pitch = 2.9, 0.95, 0.3  # inches
    figure = style.new_figure(
        "One training for every budget: velocity error over that of the first schedule",
        top + pitch * len(grid) + 0.75,
        note="Columns: parameters left, the best set of the same trained students for each. First "
        f"row: its error.\nSeeds: {seeds}. The same number of steps for all.",
    )
    figure.set_layout_engine(None)
    ax = style.axes_at(figure, left, top, style.WIDTH - left - 0.15, pitch * len(grid))
    reach = max(float(np.nanmax(np.abs(np.log(ratio)))), 0.1)
    ax.imshow(np.log(ratio), cmap="PuOr_r", vmin=-1.6 * reach, vmax=1.6 * reach, aspect="auto")
    for y, order in enumerate(grid.index):
        for x, column in enumerate(grid.columns):
            value = np.exp(grid.loc[order, column]) if y == 0 else ratio.loc[order, column]
            words = f"{value:.2g}" if y == 0 else f"{value:.2f}"
            ax.text(x, y, words, ha="center", va="center", size=8)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(grid)), labels[grid.index])
    ax.set_xlabel("parameters left")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure
