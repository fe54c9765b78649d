"""What a variant lacks of its teacher, in the rows of a table."""

from collections.abc import Iterable

import pandas as pd

from ppcl.publishing import markdown

SOURCES = {  # as in schemas.VARIANT_UNITS -> words
    "closed": "closed form",
    "refit": "closed form, fitted again in this variant",
    "start": "untrained",
    "distill": "distilled",
    "narrow": "distilled, narrowed, trained again",
    "subsets": "distilled, then trained in random subsets",
}
HEAD = ("removed", "of the teacher's blocks", "made by")


def rows(units: pd.DataFrame, blocks: int) -> list[tuple[str, str, str]]:
    """Cells, below HEAD, of every kind of unit that a variant has.

    Args:
        units: as schemas.VARIANT_UNITS, of one variant.
        blocks: the teacher's number of blocks.
    """
    intervals, text = units[units["kind"] == "interval"], units[units["kind"] == "text"]
    ffns = units[units["kind"] == "ffn"]
    made = []
    if len(intervals):
        gone = int((intervals["last"] - intervals["first"]).sum())
        what = f"{gone} {_plural('block', gone)}: one block stands for each of these runs"
        made.append((what, _runs(intervals), _sources(intervals)))
    for stream in ("image", "text"):
        own = ffns[ffns["stream"].str.split().map(lambda names, s=stream: s in names)]
        if len(own):
            where = {n for row in own.itertuples() for n in range(row.first, row.last + 1)}
            what = f"{len(own)} {stream} {_plural('FFN', len(own))}: now linear"
            made.append((what, spans(where), _sources(own)))
    if len(text):
        what = f"text streams in {len(text)} {_plural('run', len(text))}: the first one serves all"
        made.append((what, _runs(text), _sources(text)))
    ranks = units[units["kind"] == "modulation"]
    for path, own in ranks.groupby("path", sort=True):
        low, high = int(own["rank"].min()), int(own["rank"].max())
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        what = f"{len(own)} {_plural('matrix', len(own))} {markdown.code(path)}: now of {rank}"
        inside = spans(own.loc[own["first"] < blocks, "first"])
        beyond = "after the last one" if (own["first"] >= blocks).any() else ""
        made.append((what, ", ".join(filter(None, [inside, beyond])), _sources(own)))
    return made


def spans(numbers: Iterable[int]) -> str:
    """Numbers of blocks, those in a row as `3 to 5`."""
    ends: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ends)


def _runs(units: pd.DataFrame) -> str:
    pairs = zip(units["first"], units["last"], strict=True)
    return ", ".join(f"{first} to {last}" for first, last in sorted(pairs))


def _sources(units: pd.DataFrame) -> str:
    kinds = list(dict.fromkeys(source.partition("-")[0] for source in units["source"]))
    return "; ".join(SOURCES.get(kind, markdown.plain(kind)) for kind in kinds)


def _plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    return "matrices" if noun == "matrix" else f"{noun}s"
