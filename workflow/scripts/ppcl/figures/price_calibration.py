"""Which price of a candidate, known before any training, foretells its error after it."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ppcl.figures import style
from ppcl.figures.candidates import KINDS
from ppcl.figures.style import MINUS

PRICES = {  # column -> what it is, before any training
    "cost_cka": f"1 {MINUS} CKA",
    "cost_probe": "velocity error with probes",
    "cost_untrained": "velocity error before training",
}


@style.styled
def price_calibration(table: pd.DataFrame) -> Figure:
    """Each price that selection may go by against the error after training, with rank correlations.

    One panel per price, both axes logarithmic; one point per interval, text run or FFN.

    table: as schemas.CALIBRATION. The prices are columns of PRICES: cost_cka (1 - CKA), cost_probe
    and cost_untrained (velocity errors: relative, squared); the error is `trained` (likewise). A
    value that is not positive (an FFN that nothing reads, or CKA of 1) is drawn below the smallest
    positive one, and ranked as it is.
    """
    prices = {column: words for column, words in PRICES.items() if table[column].notna().any()}
    if not prices:
        return style.message("Prices before training", "The calibration table holds no prices.")
    left, gap, top, high = 0.85, 0.35, 1.4, 2.5  # inches
    across = min((style.WIDTH - left - gap * (len(prices) - 1) - 0.15) / len(prices), 3.6)
    figure = style.new_figure(
        _best(table, prices),
        top + high + 0.55,
        note="Each point: one interval, text run or FFN, plugged into the teacher alone. "
        "ρ: Spearman's rank correlation.",
    )
    figure.set_layout_engine(None)
    after = _positive(table["trained"])
    for number, (column, words) in enumerate(prices.items()):
        shared = {"sharey": figure.axes[0]} if number else {}
        ax = style.axes_at(figure, left + number * (across + gap), top, across, high, **shared)
        rows = table[table[column].notna()]
        before = _positive(rows[column])
        for kind, (_, colour, marker, _) in KINDS.items():
            here = rows.index[rows["kind"] == kind]
            look: dict[str, Any] = {
                "color": colour,
                "mec": "white",
                "mew": 0.4,
                "ms": 5,
                "alpha": 0.8,
            }
            ax.plot(before[here], after[here], marker, **look)
        depth = rows[rows["kind"] == "depth"]
        title = [f"all: ρ = {_correlation(rows, column)}"]
        if 0 < len(depth) < len(rows):
            title.append(f"depth: ρ = {_correlation(depth, column)}")
        ax.set_title("\n".join(title), pad=5)
        style.log_axis(ax, "x")
        ax.set_xlabel(words)
        ax.tick_params(labelleft=not number)
    first = figure.axes[0]
    style.log_axis(first)
    first.set_ylabel("velocity error after training")
    limits = [ax.get_xlim() for ax in figure.axes]
    for ax in figure.axes:
        ax.set(autoscale_on=False)
    for ax, column, (low, high) in zip(figure.axes, prices, limits, strict=True):
        if column != "cost_cka":
            ax.plot([low, high], [low, high], color=style.GREY, lw=0.9, ls=":", zorder=0)
    present = [kind for kind in KINDS if (table["kind"] == kind).any()]
    looks = {kind: KINDS[kind] for kind in present}
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=5, lw=0, label=name)
        for name, colour, marker, _ in looks.values()
    ]
    if {"cost_probe", "cost_untrained"} & set(prices):
        line: dict[str, Any] = {"color": style.GREY, "lw": 0.9, "ls": ":"}
        handles.append(Line2D([], [], label="training changes nothing", **line))
    style.legend_at(figure, 0.68, handles)
    return figure


def _best(table: pd.DataFrame, prices: dict[str, str]) -> str:
    """Which price ranks depth intervals best, judged on those that have them all."""
    rows = table[(table["kind"] == "depth") & table[[*prices]].notna().all(axis=1)]
    ranks = {column: rank_correlation(rows[column], rows["trained"]) for column in prices}
    ranks = {column: value for column, value in ranks.items() if np.isfinite(value)}
    if len(ranks) < 2:
        return "Prices before training against the error after it"
    best = max(ranks, key=ranks.__getitem__)
    return f"What depth intervals cost after training is ranked best by {prices[best]}"


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    """Spearman's, over rows that have both (ties share their mean rank); NaN if undefined."""
    both = a.notna() & b.notna()
    a, b = a[both].rank(), b[both].rank()
    return float(a.corr(b)) if min(a.nunique(), b.nunique()) > 1 else float("nan")


def _correlation(rows: pd.DataFrame, column: str) -> str:
    return f"{_number(rank_correlation(rows[column], rows['trained']))} (n = {len(rows)})"


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.2f}".replace("-", MINUS)


def _positive(values: pd.Series) -> pd.Series:
    """For a logarithmic axis: what is not positive becomes half of the smallest positive value."""
    positive = values[values > 0]
    return values.clip(lower=positive.min() / 2 if len(positive) else 1.0)
