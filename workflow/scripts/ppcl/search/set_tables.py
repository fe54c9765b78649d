"""Variants' sets as rows of units.parquet and measured.parquet. Needs no torch."""

import json
import math
from collections.abc import Iterable, Mapping

import pandas as pd

from ppcl.pruning import constraints
from ppcl.pruning.units import Unit
from ppcl.search import savings
from ppcl.search.choosing import Choice, Decided
from ppcl.search.offers import Offer
from ppcl.search.sets import CLOSED, REFIT
from ppcl.storage import schemas
from ppcl.transformer.family import IMAGE, TEXT


def rows(offer: Offer, name: str, choice: Choice) -> list[dict]:
    """A variant's rows of units.parquet; their savings add up to the variant's."""
    units = []
    for member in choice.set.members:
        unit = member.unit
        if offer.units.get(unit.name) == unit:
            streams = {stream for new_block in unit.new_blocks for stream in new_block.linear_ffn}
            kind = (
                "interval" if unit.removed_blocks else "text" if len(unit.new_blocks) > 1 else "ffn"
            )
            row = {
                "kind": kind,
                "stream": " ".join(s for s in (IMAGE, TEXT) if s in streams or kind != "ffn"),
                "velocity_error": _error(offer.errors[unit.name], member.source),
                "required": constraints.holds(unit, offer.required),
            }
            saved = {measure: w.units[unit.name] for measure, w in offer.weights.items()}
            units.append(_row(name, unit.name, unit.first, unit.last, member.source, saved, row))
            continue
        for kind, item in _closed(unit):
            cost = (offer.closed.runs if kind == "text" else offer.closed.ffns)[item]
            first, last = item if kind == "text" else (item[0], item[0])
            row = {
                "kind": kind,
                "stream": TEXT if kind == "text" else item[1],
                "velocity_error": cost,
                "required": item in offer.required.runs | offer.required.ffns,
            }
            saved = {
                measure: savings.saved(
                    (),
                    [item] if kind == "text" else [],
                    [item] if kind == "ffn" else [],
                    each,
                    offer.closed.unread,
                )
                for measure, each in offer.weights.items()
            }
            units.append(_row(name, unit.name, first, last, member.source, saved, row))
    holding = {b: m for m in choice.set.members for b in range(m.unit.first, m.unit.last + 1)}
    for (block, path), rank in choice.set.ranks:
        matrix, holder = (block, path), holding.get(block)
        sixths = 6
        if holder:
            modulation = offer.closed.modulations[matrix]
            sixths = savings.sixths_left(holder.unit, modulation, offer.closed.unread)
        row = {
            "kind": "modulation",
            "stream": "",
            "path": path,
            "rank": rank,
            "velocity_error": offer.closed.ranks[matrix][rank],
            "required": block in offer.required.ranks,
        }
        saved = {m: w.ranks.get((matrix, rank, sixths), 0.0) for m, w in offer.weights.items()}
        blocks = holder.unit.name if holder else f"{block:02d}-{block:02d}"
        units.append(_row(name, blocks, block, block, CLOSED, saved, row))
    return units


def _error(errors: Mapping[str, float], source: str) -> float:
    """Of a unit alone; of maps that were fitted once more in a set, as they were before."""
    return errors[CLOSED if source.startswith(REFIT) else source]


def _closed(unit: Unit) -> Iterable[tuple[str, tuple]]:
    """(kind, item) of the text run and of each linear FFN of a unit of kept blocks."""
    if len(unit.new_blocks) > 1:
        yield "text", (unit.first, unit.last)
    for new_block in unit.new_blocks:
        for stream in new_block.linear_ffn:
            yield "ffn", (new_block.first, stream)


def _row(
    variant: str,
    unit: str,
    first: int,
    last: int,
    source: str,
    saved: Mapping[str, float],
    more: Mapping,
) -> dict:
    return {
        "variant": variant,
        "unit": unit,
        "first": first,
        "last": last,
        "path": "",
        "rank": 0,
        "source": source,
        "saved_parameters": round(saved["parameters"]),
        "saved_seconds": saved.get("latency", math.nan),
    } | dict(more)


def trial_rows(offer: Offer, name: str, decided: Decided) -> list[dict]:
    """A variant's rows of measured.parquet."""
    return [
        {
            "variant": name,
            "tried": words,
            "sources": json.dumps(offer.trained(choice.set)),
            "parameters": offer.parameters_left(choice.saved),
            "predicted_error": choice.cost,
            "velocity_error": choice.error,
            "chosen": choice == decided.choice,
        }
        for words, choice in decided.tried.items()
    ]


def units_table(offer: Offer, choices: Mapping[str, Choice]) -> pd.DataFrame:
    """All of units.parquet."""
    every = [row for name, choice in choices.items() for row in rows(offer, name, choice)]
    return pd.DataFrame(every, columns=schemas.VARIANT_UNITS.names)


def trials_table(offer: Offer, decided: Mapping[str, Decided]) -> pd.DataFrame:
    """All of measured.parquet."""
    every = [row for name, one in decided.items() for row in trial_rows(offer, name, one)]
    return pd.DataFrame(every, columns=schemas.VARIANT_SETS.names)
