"""What every variant is made of along the depth."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ppcl.figures import seams, style
from ppcl.figures.modulation import name_last_column, short_path

# Where a unit is from, as in schemas.VARIANT_UNITS -> colour and words.
SOURCES = {
    "closed": (style.CLOSED_FORM, "closed form"),
    "refit": ("#8FBBDD", "closed form, refitted in its set"),
    "start": ("#D9D9D9", "untrained"),
    "distill": ("#F3C98B", "distilled"),
    "narrow": ("#E3BAD0", "distilled, then narrowed"),
    "subsets": ("#93D3BC", "random subsets"),
}


@style.styled
def variant_composition(
    units: pd.DataFrame, names: Sequence[str], blocks: int, kinds: Sequence[seams.Run] = ()
) -> Figure:
    """What every variant is made of along the depth, and the stage that each part is from.

    One strip of the depth per variant, with a row per kind of unit, coloured by its stage.

    Args:
        units: as schemas.VARIANT_UNITS: first and last (blocks), kind, stream, path and rank of
            what a variant has in place of the teacher's own, and source.
        names: all variants in the order of the config, also those that keep everything.
        blocks: the teacher's number of blocks.
        kinds: runs of like blocks (`seams.runs`), between which lines are drawn.
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
        name_last_column(ax, blocks, beyond)
        ax.tick_params(labelsize=7)
        seams.mark(ax, kinds)
        ax.set_title(f"{name}: {_told(own)}", pad=3, parse_math=False)
        top += row * max(1, len(bars)) + gap
    if len(kinds) > 1:
        seams.name_blocks(ax, kinds, labelpad=0)
    there = [source for source in SOURCES if (units["source"].map(_kind) == source).any()]
    handles = [Patch(fc=SOURCES[s][0], ec="#444444", lw=0.8, label=SOURCES[s][1]) for s in there]
    if handles:
        style.legend_at(figure, 0.62, handles)
    return figure


def _rows(units: pd.DataFrame, blocks: int) -> dict[str, list[tuple]]:
    """Rows of one variant's strip; kinds that it has none of are left out."""

    def bars(members: pd.DataFrame, text: Callable[[Any], str]) -> list[tuple]:
        return [
            (int(one.first), int(one.last), SOURCES[_kind(one.source)][0], text(one))
            for one in members.sort_values("first").itertuples()
        ]

    def ends(one: Any) -> str:
        return style.span_name(one.first, one.last)

    rows = {
        "depth intervals": bars(units[units["kind"] == "interval"], ends),
        "text runs": bars(units[units["kind"] == "text"], ends),
    }
    for stream in ("text", "image"):
        ffns = units[(units["kind"] == "ffn") & _streams(units).map(lambda names: stream in names)]
        rows[f"linear {stream} FFNs"] = bars(ffns, lambda one: "")
    ranks = units[units["kind"] == "modulation"]
    paths = sorted(ranks.loc[ranks["first"] < blocks, "path"].unique())
    last = ranks[ranks["first"] == blocks]
    for number, path in enumerate(paths or last["path"].unique()):
        own = ranks[ranks["path"] == path]
        # The last AdaLN has a column of its own, in the first of these rows.
        own = pd.concat([own, last]) if number == 0 and paths else own
        rows[f"{short_path(path)} rank"] = bars(own, lambda one: str(one.rank))
    return {name: drawn for name, drawn in rows.items() if drawn}


def _streams(units: pd.DataFrame) -> pd.Series:
    """Streams of each unit: a trained block has its linear FFNs as one unit, `image text`."""
    return units["stream"].fillna("").str.split()


def _kind(source: str) -> str:
    """A key of SOURCES: `refit` of `refit-p50`, in whichever variant's set that was."""
    return source.partition("-")[0]


def _told(units: pd.DataFrame) -> str:
    """How many units of each kind, in words."""
    counts = units["kind"].value_counts().to_dict()
    if "ffn" in counts:
        counts["ffn"] = int(_streams(units[units["kind"] == "ffn"]).map(len).sum())
    words = {"interval": "interval", "text": "text run", "ffn": "linear FFN"}
    words["modulation"] = "low-rank modulation"
    told = [
        f"{counts[kind]} {noun}" + "s" * (counts[kind] != 1)
        for kind, noun in words.items()
        if kind in counts
    ]
    return ", ".join(told) or "nothing: the teacher itself"


def taken_by_smallest(measured: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """Prices of closed forms with what the smallest variant takes of them, for runs without
    selection's own verdicts (width/candidates.parquet): those that search no intervals.

    Args:
        measured: as schemas.WIDTH_MEASURED.
        units: as schemas.VARIANT_UNITS.

    Returns `measured` with two more columns: `selected`, and `verdict`, empty in all rows.
    """
    saved = units.groupby("variant")["saved_parameters"].sum()
    own = units[units["variant"] == saved.idxmax()] if len(saved) else units
    keys = ["kind", "first", "last", "stream", "path", "rank"]
    chosen = set(own[keys].itertuples(index=False, name=None))
    selected = [row in chosen for row in measured[keys].itertuples(index=False, name=None)]
    return measured.assign(selected=selected, verdict="")
