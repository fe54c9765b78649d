"""What figures of candidates share: how each kind looks, and which intervals were selected."""

import pandas as pd

from ppcl.figures import style

# Kinds of pruning -> name, colour, marker, pale fill.
KINDS = {
    "depth": ("depth interval", style.BLACK, "D", style.SELECTED),
    "ffn_image": ("image FFN", style.BLUE, "o", "#B9D6EC"),
    "ffn_text": ("text FFN", style.VERMILION, "s", "#F6CDB4"),
    "text": ("text run", style.GREEN, "^", "#B5E0D0"),
}


def selected_spans(intervals: pd.DataFrame) -> list[tuple[int, int]]:
    """The selected intervals as (first, last), both replaced, in the order of depth."""
    rows = intervals[intervals["selected"]].sort_values("first")
    return [
        (int(first), int(last)) for first, last in zip(rows["first"], rows["last"], strict=True)
    ]
