"""The rows of points.parquet: what each budget would get, and how good, large and fast it is."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from ppcl.evaluation.metrics import Estimate, Estimates
from ppcl.search import sets
from ppcl.search.choosing import Choice


def rows(
    budgets: Iterable[float], chosen: Sequence[tuple[str, Choice]], measured: Estimates
) -> list[dict]:
    """One row per budget, a share of the teacher's parameters.

    Args:
        chosen: of each budget, the name of its model in `measured`, and what it is made of.
        measured: as of `measuring.measure_transformers`.
    """
    return [
        {
            "budget": float(budget),
            "units": json.dumps(sets.entry(choice.set)),
            "predicted_error": choice.cost,
            **_columns(measured[name]),
        }
        for budget, (name, choice) in zip(budgets, chosen, strict=True)
    ]


def _columns(of_model: dict[str, Estimate]) -> dict[str, float]:
    sizes = ("parameters", "parameter_fraction", "latency_seconds")
    columns = {metric: of_model[metric].value for metric in sizes}
    # Of a teacher without modulation matrices there is no such share.
    without = "parameter_fraction_without_modulation"
    columns[without] = of_model.get(without, Estimate(np.nan)).value
    for metric in ("velocity_error", "latency_ratio"):
        value, low, high, _ = of_model[metric]
        columns |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
    return columns
