"""What modulation matrices of low rank cost, and which ranks were taken."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ppcl.figures import seams, style


@style.styled
def modulation_costs(
    candidates: pd.DataFrame, blocks: int, kinds: Sequence[seams.Run] = ()
) -> Figure:
    """What each modulation matrix costs at every rank on offer, along the depth; what was chosen.

    One panel per matrix of a block; the last AdaLN stands after the last block. Below, the ranks
    that the smallest budgets took.

    Args:
        candidates: as schemas.WIDTH_CANDIDATES, of which the kind `modulation` counts:
            velocity_error (relative, squared) over first (block) by path and rank; selected ones
            are full.
        blocks: the teacher's number of blocks.
        kinds: runs of like blocks (`seams.runs`), between which lines are drawn.
    """
    table = candidates[candidates["kind"] == "modulation"]
    title = "Low-rank modulation"
    if not len(table):
        return style.message(title, "The model has no modulation matrices that could be low rank.")
    order = table.groupby("path")["first"].agg(["max", "min"]).sort_values(["max", "min"])
    beyond = [path for path in order.index if order.loc[path, "min"] == blocks]
    paths = [path for path in order.index if path not in beyond]
    ranks = sorted(int(rank) for rank in table["rank"].unique())
    looks = dict(zip(ranks, _shades(len(ranks)), strict=True))
    matrices = table.drop_duplicates(["first", "path"])
    picked = table[table["selected"]]
    panels = [[path, *(beyond if number == 0 else [])] for number, path in enumerate(paths)]
    panels = panels or [beyond]
    # Sizes in inches.
    left, top, across, high, pitch = 1.15, 0.93, style.WIDTH - 1.27, 1.25, 1.58
    strip_top = top + pitch * len(panels) + 0.05
    strip_height = 0.3 * len(panels)
    figure = style.new_figure(
        f"{len(picked)} of {len(matrices)} modulation matrices become products of low rank",
        strip_top + strip_height + 0.42,
        note="Velocity error of the teacher with only this matrix of low rank, in closed form. "
        "Full: the rank that the smallest budgets took.",
    )
    figure.set_layout_engine(None)
    errors = table["velocity_error"]
    positive = errors[errors > 0]
    # Six decades show what matters; what costs less is drawn at the edge.
    floor = max(positive.min() / 2, positive.max() / 1e6) if len(positive) else 1e-12
    width = blocks + bool(beyond)
    axes: list[Axes] = []
    for number, members in enumerate(panels):
        shared = {"sharey": axes[0]} if axes else {}
        ax = style.axes_at(figure, left, top + number * pitch, across, high, **shared)
        axes.append(ax)
        for rank in ranks:
            rows = table[table["path"].isin(members) & (table["rank"] == rank)].sort_values("first")
            values = rows["velocity_error"].clip(lower=floor)
            inner = rows["first"] < blocks
            line: dict[str, Any] = {"color": looks[rank], "lw": 0.7, "alpha": 0.8, "zorder": 2}
            ax.plot(rows["first"][inner], values[inner], **line)
            for row, value in zip(rows.itertuples(), values, strict=True):
                mark: dict[str, Any] = {
                    "mfc": looks[rank] if row.selected else "white",
                    "mec": looks[rank],
                }
                mark |= {"ms": 5 if row.selected else 3.6, "zorder": 4 if row.selected else 3}
                ax.plot(row.first, value, "o", mew=0.9, **mark)
        ax.set_title(" and ".join(members), pad=4, parse_math=False)
        style.block_ticks(ax, width)
        seams.mark(ax, kinds)
        ax.tick_params(labelbottom=False)
        ax.set_ylabel("velocity\nerror")
        ax.yaxis.set_label_coords(-0.55 / across, 0.5)
    axes[0].set_ylim(floor / 1.6, max(errors.max(), floor) * 1.9)
    style.log_axis(axes[0])
    strip = style.axes_at(figure, left, strip_top, across, strip_height)
    bars = {}
    for members in panels:
        rows = picked[picked["path"].isin(members)]
        bars[short_path(members[0])] = [
            (int(row.first), int(row.first), style.CLOSED_FORM, str(row.rank))
            for row in rows.itertuples()
        ]
    style.strip(strip, bars, width)
    name_last_column(strip, blocks, beyond)
    seams.mark(strip, kinds)
    seams.name_blocks(strip, kinds, "block; in its cell the rank taken", labelpad=1)
    handles = [
        Line2D([], [], color=looks[rank], marker="o", lw=0.7, label=f"rank {rank}")
        for rank in ranks
    ]
    style.legend_at(figure, 0.62, handles)
    return figure


def _shades(count: int) -> list[str]:
    """Colours of ranks, the darker the higher."""
    return [to_hex(colormaps["viridis_r"](at)) for at in np.linspace(0.15, 0.95, count)]


def short_path(path: str) -> str:
    """A path's first name: `img_mod` of `img_mod.1`."""
    return path.split(".")[0]


def name_last_column(ax: Axes, blocks: int, beyond: Sequence[str]) -> None:
    """Writes `last` below the column of the last AdaLN."""
    if beyond:
        ticks = [int(tick) for tick in ax.get_xticks() if tick < blocks]
        ax.set_xticks([*ticks, blocks], [*map(str, ticks), "last"])
