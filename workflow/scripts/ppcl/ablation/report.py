"""The ablation in Markdown: what is compared at one size, at one time, and by depth alone.

Tables are pandas DataFrames with the columns of `schemas.ABLATION`. No torch: takes seconds.
"""

import json

import pandas as pd

from ppcl.figures.method_comparison import LOW_RANK, STATES
from ppcl.figures.method_statistics import ratio, summary

_MATCHED = "schedule-whole"  # "+ optimal segmentation", trained as rivals are

RIVALS = 2  # the best ones, that each method is compared with prompt by prompt

# Title -> groups, further methods, and whether the states are those with low-rank modulations.
SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "The ladder": (("ladder",), (), False),
    "Depth alone: as large and as fast": (("rival",), (_MATCHED,), False),
    "As fast: depth and width against depth alone": (("latency", "rival"), (_MATCHED,), False),
    "As large: everything, rivals with the same low-rank modulation": (
        ("ladder", "rival"),
        (),
        True,
    ),
    "Open choices": (("choice",), (), False),
}


def markdown(table: pd.DataFrame) -> str:
    """All sections that the table has methods of, and what each method chose."""
    judged, lines = bool(table["all_correct"].notna().any()), []
    for title, (groups, more, low_rank) in SECTIONS.items():
        states = LOW_RANK if low_rank else {state: state for state in STATES}
        every = table[table["state"].isin(states)]
        every = every.assign(state=every["state"].map(states))
        inside = every["group"].isin(groups) | every["method"].isin(more)
        if inside.any():
            lines += [f"## {title}", "", *_section(every, every[inside], judged), ""]
    return "\n".join([*lines, "## What was chosen", "", *_chosen(table), ""])


def _section(every: pd.DataFrame, table: pd.DataFrame, judged: bool) -> list[str]:
    """One row per method of `table`: means over seeds, with 95 % intervals in brackets, for which
    `summary` pools the spread of `every` method. With rivals in the table, also ratios of the
    fine-tuned error to that of the best RIVALS."""
    shown = {"velocity_error": ("velocity error", _error)}
    shown |= {"all_correct": ("all right", _share)} if judged else {}
    heads = [f"{w}, {s}" for w, _ in shown.values() for s in ("trained", "then fine-tuned")]
    tuned = table[(table["group"] == "rival") & (table["state"] == "finetuned")]
    best = tuned.groupby("method")["velocity_error"].mean().sort_values().index[:RIVALS].tolist()
    labels = table.drop_duplicates("method").set_index("method")["label"]
    heads += [f"error over that of {labels[name]}" for name in best]
    heads = ["method", "seeds", *heads, "parameters", "latency"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    cells = {column: summary(every, column) for column in shown}
    means = table.groupby("method")[["parameter_fraction", "latency_ratio"]].mean()
    for row in table.drop_duplicates("method").sort_values("order").itertuples():
        mine = [
            words(cells[column].loc[row.method, state])
            if (row.method, state) in cells[column].index
            else ""
            for column, (_, words) in shown.items()
            for state in STATES
        ]
        seeds = int(table.loc[table["method"] == row.method, "seed"].nunique())
        mine += [
            "" if row.method == name else _ratio(*ratio(every, row.method, name, "finetuned"))
            for name in best
        ]
        size, latency = means.loc[row.method]
        line = [row.label, str(seeds), *mine, f"{size:.3f}", f"{latency:.2f}"]
        lines.append(f"| {' | '.join(line)} |")
    return lines


def _error(row: pd.Series) -> str:
    return f"{row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f})"


def _ratio(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _share(row: pd.Series) -> str:
    mean, low, high = (f"{100 * row[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})"


def _chosen(table: pd.DataFrame) -> list[str]:
    """[first, last] of every interval and text run; block and stream of every linear FFN."""
    words = {"intervals": "intervals", "text_runs": "text runs", "linear_ffns": "linear FFNs"}
    lines = []
    for _, rows in table[table["group"] != "teacher"].sort_values("order").groupby("order"):
        kinds = rows[[*words]].drop_duplicates()
        sets = [
            ", ".join(f"{words[k]} {v}" for k, v in row._asdict().items() if json.loads(v))
            for row in kinds.itertuples(index=False)
        ]
        lines.append(f"- {rows['label'].iloc[0]}: {'; or '.join(sets)}")
    return lines
