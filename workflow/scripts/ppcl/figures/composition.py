"""Figures of closed forms: prices and ranks of modulation matrices; what every variant is made of.

Tables are pandas DataFrames with the columns of `ppcl.storage.schemas`. No torch: plots take
seconds.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ppcl.figures import style

# Where a unit is from, as in schemas.VARIANT_UNITS -> colour and words.
SOURCES = {
    "closed": ("#CFE6F5", "closed form"),
    "refit": ("#8FBBDD", "closed form, refitted in its set"),
    "start": ("#D9D9D9", "untrained"),
    "distill": ("#F3C98B", "distilled"),
    "narrow": ("#E3BAD0", "distilled, then narrowed"),
    "subsets": ("#93D3BC", "random subsets"),
}


@style.styled
def modulation(candidates: pd.DataFrame, blocks: int) -> Figure:
    """What each modulation matrix costs at every rank on offer, along the depth; what was chosen.

    One panel per matrix of a block; the last AdaLN stands after the last block. Below, the ranks
    that the smallest budgets took.

    blocks: the teacher's.
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
    first = None
    for number, members in enumerate(panels):
        shared = {"sharey": first} if first else {}
        ax = style.axes_at(figure, left, top + number * pitch, across, high, **shared)
        first = first or ax
        for rank in ranks:
            rows = table[table["path"].isin(members) & (table["rank"] == rank)].sort_values("first")
            values = rows["velocity_error"].clip(lower=floor)
            inner = rows["first"] < blocks
            line = {"color": looks[rank], "lw": 0.7, "alpha": 0.8, "zorder": 2}
            ax.plot(rows["first"][inner], values[inner], **line)
            for row, value in zip(rows.itertuples(), values, strict=True):
                mark = {"mfc": looks[rank] if row.selected else "white", "mec": looks[rank]}
                mark |= {"ms": 5 if row.selected else 3.6, "zorder": 4 if row.selected else 3}
                ax.plot(row.first, value, "o", mew=0.9, **mark)
        ax.set_title(" and ".join(members), pad=4, parse_math=False)
        style.block_ticks(ax, width)
        ax.tick_params(labelbottom=False)
        ax.set_ylabel("velocity\nerror")
        ax.yaxis.set_label_coords(-0.55 / across, 0.5)
    first.set_ylim(floor / 1.6, max(errors.max(), floor) * 1.9)
    style.log_axis(first)
    strip = style.axes_at(figure, left, strip_top, across, strip_height)
    bars = {}
    for members in panels:
        rows = picked[picked["path"].isin(members)]
        bars[_short(members[0])] = [
            (int(row.first), int(row.first), SOURCES["closed"][0], str(row.rank))
            for row in rows.itertuples()
        ]
    style.strip(strip, bars, width)
    _name_last(strip, blocks, beyond)
    strip.set_xlabel("block; in its cell the rank taken", labelpad=1)
    handles = [
        Line2D([], [], color=looks[rank], marker="o", lw=0.7, label=f"rank {rank}")
        for rank in ranks
    ]
    style.legend_at(figure, 0.62, handles)
    return figure


def taken(measured: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """Prices of closed forms with what the smallest variant takes of them, for runs without
    selection's own verdicts (width/candidates.parquet): those that search no intervals.

    Args:
        measured: as schemas.WIDTH_MEASURED. units: as schemas.VARIANT_UNITS.
    """
    saved = units.groupby("variant")["saved_parameters"].sum()
    own = units[units["variant"] == saved.idxmax()] if len(saved) else units
    keys = ["kind", "first", "last", "stream", "path", "rank"]
    chosen = set(own[keys].itertuples(index=False, name=None))
    selected = [row in chosen for row in measured[keys].itertuples(index=False, name=None)]
    return measured.assign(selected=selected, verdict="")


def _shades(count: int) -> list[str]:
    """Colours of ranks, the darker the higher."""
    return [to_hex(colormaps["viridis_r"](at)) for at in np.linspace(0.15, 0.95, count)]


def _short(path: str) -> str:
    """A path's first name: `img_mod` of `img_mod.1`."""
    return path.split(".")[0]


def _name_last(ax, blocks: int, beyond: Sequence[str]) -> None:
    """Writes `last` below the column of the last AdaLN."""
    if beyond:
        ticks = [int(tick) for tick in ax.get_xticks() if tick < blocks]
        ax.set_xticks([*ticks, blocks], [*map(str, ticks), "last"])


@style.styled
def sets(units: pd.DataFrame, names: Sequence[str], blocks: int) -> Figure:
    """What every variant is made of along the depth, and the stage that each part is from.

    units: as schemas.VARIANT_UNITS. names: all variants in the order of the config, also those
    that keep everything. blocks: the teacher's.
    """
    beyond = [path for path in units.loc[units["first"] == blocks, "path"].unique() if path]
    width = blocks + bool(beyond)
    rows = {name: _rows(units[units["variant"] == name], blocks) for name in names}
    # Sizes in inches.
    left, top, row, gap = 1.35, 1.05, 0.225, 0.42
    height = top + sum(row * max(1, len(bars)) + gap for bars in rows.values()) + 0.12
    figure = style.new_figure(
        "What each variant is made of",
        height,
        note="Numbers in cells of modulation: the rank. The rest is the teacher's own.",
    )
    figure.set_layout_engine(None)
    for name, bars in rows.items():
        ax = style.axes_at(figure, left, top, style.WIDTH - left - 0.12, row * max(1, len(bars)))
        own = units[units["variant"] == name]
        style.strip(ax, bars or {"": []}, width)
        _name_last(ax, blocks, beyond)
        ax.tick_params(labelsize=7)
        ax.set_title(f"{name}: {_told(own)}", pad=3, parse_math=False)
        top += row * max(1, len(bars)) + gap
    there = [source for source in SOURCES if (units["source"].map(_kind) == source).any()]
    handles = [Patch(fc=SOURCES[s][0], ec="#444444", lw=0.8, label=SOURCES[s][1]) for s in there]
    if handles:
        style.legend_at(figure, 0.62, handles)
    return figure


def _rows(units: pd.DataFrame, blocks: int) -> dict[str, list[tuple]]:
    """Rows of one variant's strip; kinds that it has none of are left out."""

    def bars(found: pd.DataFrame, text) -> list[tuple]:
        return [
            (int(one.first), int(one.last), SOURCES[_kind(one.source)][0], text(one))
            for one in found.sort_values("first").itertuples()
        ]

    def ends(one) -> str:
        return style.span_name(one.first, one.last)

    rows = {
        "depth intervals": bars(units[units["kind"] == "interval"], ends),
        "text runs": bars(units[units["kind"] == "text"], ends),
    }
    for stream in ("text", "image"):
        found = units[(units["kind"] == "ffn") & (units["stream"] == stream)]
        rows[f"linear {stream} FFNs"] = bars(found, lambda one: "")
    ranks = units[units["kind"] == "modulation"]
    paths = ranks.loc[ranks["first"] < blocks, "path"].unique()
    last = ranks[ranks["first"] == blocks]
    for number, path in enumerate(paths if len(paths) else last["path"].unique()):
        own = ranks[ranks["path"] == path]
        # The last AdaLN has a column of its own, in the first of these rows.
        own = pd.concat([own, last]) if number == 0 and len(paths) else own
        rows[f"{_short(path)} rank"] = bars(own, lambda one: str(one.rank))
    return {name: found for name, found in rows.items() if found}


def _kind(source: str) -> str:
    """A key of SOURCES: `refit` of `refit-p50`, in whichever variant's set that was."""
    return source.partition("-")[0]


def _told(units: pd.DataFrame) -> str:
    """How many of what, in words."""
    counts = units["kind"].value_counts().to_dict()
    words = {"interval": "interval", "text": "text run", "ffn": "linear FFN"}
    words["modulation"] = "low-rank modulation"
    told = [
        f"{counts[kind]} {noun}" + "s" * (counts[kind] != 1)
        for kind, noun in words.items()
        if kind in counts
    ]
    return ", ".join(told) or "nothing: the teacher itself"
