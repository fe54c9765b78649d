"""What has to go for the budgets of variants, and amounts in words."""

import math
from collections.abc import Iterable, Mapping

from ppcl.pruning.quantisation import GIB
from ppcl.settings import Variant


def bytes_measure(quantise: str | None) -> str:
    """The measure of bytes as stored, quantised in some way or (None) not."""
    return f"bytes in {quantise}" if quantise else "bytes"


def needed(
    budget: Mapping[str, float], facts: Mapping[str, float], quantise: str | None = None
) -> dict[str, float]:
    """What has to go for a budget: parameters, blocks, latency (s per call) or bytes as stored ->
    how much of it.

    Args:
        budget: of a variant.
        facts: transformer_parameters, blocks, transformer_seconds for latency, and for gib the
            bytes of the transformer, by `bytes_measure`.
        quantise: how the variant is quantised, if it is.
    """
    amounts_needed: dict[str, float] = {}
    for kind, value in budget.items():
        if kind == "latency":
            amount = (1 - value) * facts["transformer_seconds"]
        elif kind == "blocks":
            amount = max(0, facts["blocks"] - value)
        elif kind == "parameters":
            amount = max(0, facts["transformer_parameters"] - value)
        elif kind == "gib":
            kind = bytes_measure(quantise)
            amount = max(0, facts[kind] - value * GIB)
        else:
            kind, amount = "parameters", parameters_needed(facts["transformer_parameters"], value)
        amounts_needed[kind] = max(amount, amounts_needed.get(kind, 0))
    return amounts_needed


def targets(variants: Iterable[Variant], facts: Mapping[str, float]) -> dict[str, float]:
    """Per measure, what has to go for the smallest budget of all variants."""
    largest: dict[str, float] = {}
    for variant in variants:
        for measure, amount in needed(variant.budget, facts, variant.quantise).items():
            largest[measure] = max(amount, largest.get(measure, 0))
    return largest


def parameters_needed(total: float, fraction: float) -> float:
    """Parameters that must go so that at most fraction * total stay."""
    # The small addend keeps 0.55 * 20 = 11.000000000000002 or 10.999999999999998 at 11.
    return max(0, total - math.floor(fraction * total + 1e-6))


def amount(measure: str, value: float) -> str:
    """In words, such as 1,234 parameters."""
    if measure == "latency":
        return f"{1000 * value:.4g} ms per call"
    if measure.startswith("bytes"):
        return f"{value / GIB:.4g} GiB{measure.removeprefix('bytes')}"
    return f"{round(value):,} {measure}"


def amounts(values: Mapping[str, float]) -> str:
    """Several, in words."""
    return " and ".join(amount(*item) for item in values.items()) or "nothing"
