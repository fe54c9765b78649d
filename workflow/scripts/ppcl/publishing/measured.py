"""What was measured of a variant: for its card's tables and front matter, and for pruning.json."""

import math
import re
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult

from ppcl.publishing import markdown

TEACHER = "teacher"
_WORDS = {
    "psnr": "PSNR to the teacher's pictures",
    "ssim": "SSIM to the teacher's pictures",
    "velocity_error": "relative velocity error",
    "parameters": "parameters of the transformer",
    "parameter_fraction": "parameters, of the teacher's",
    "modulation_parameters": "parameters of its modulation",
    "parameter_fraction_without_modulation": "parameters without modulation, of the teacher's",
    "stored_bytes": "weights of the transformer, as stored",
    "stored_fraction": "weights as stored, of the teacher's",
    "latency_seconds": "one batch through the transformer",
    "latency_ratio": "time, of the teacher's",
    "peak_memory_bytes": "peak memory of the transformer with one batch",
}
_SIZES = ("parameter", "modulation_parameters", "latency", "peak_memory", "stored")
_SHARES = re.compile(r"(_accuracy|_fraction|_ratio|_fraction_without_modulation|^all_correct)$")
_DIFFERENCE = "_difference"
_HIDDEN = re.compile(r"^velocity_error_sigma_|_difference$")  # in pruning.json alone


def figures(metrics: pd.DataFrame, variant: str) -> dict[str, dict[str, Any]]:
    """Metric -> its value, the ends of its interval, the teacher's value, which of more or less is
    better, and the samples behind it; None for what there is none of. For JSON.

    metrics: as schemas.METRICS.
    """
    return {
        row.metric: {
            "value": _finite(row.value),
            "ci_low": _finite(row.ci_low),
            "ci_high": _finite(row.ci_high),
            "teacher": _finite(row.teacher_value),
            "higher_is_better": bool(row.higher_is_better),
            "samples": int(row.samples),
        }
        for row in metrics[metrics["variant"] == variant].itertuples()
    }


def tables(metrics: pd.DataFrame, variant: str) -> tuple[str, str]:
    """Two tables in Markdown: quality; size and speed. Empty where nothing was measured."""
    every = figures(metrics, variant)
    shown = {name: of for name, of in every.items() if not _HIDDEN.search(name)}
    sizes = {name: of for name, of in shown.items() if name.startswith(_SIZES)}
    quality = [
        (
            _label(name),
            _with_interval(name, of),
            _number(name, of["teacher"]),
            _difference(name, every.get(f"{name}{_DIFFERENCE}")),
            "more" if of["higher_is_better"] else "less",
        )
        for name, of in shown.items()
        if name not in sizes
    ]
    speed = [
        (_label(name), _with_interval(name, of), _number(name, of["teacher"]))
        for name, of in sizes.items()
    ]
    head = ("metric", "this model (95 % interval)", "teacher", "difference (95 %)", "better")
    return (
        markdown.table(head, quality) if quality else "",
        markdown.table(("", "this model (95 % interval)", "teacher"), speed) if speed else "",
    )


def eval_results(metrics: pd.DataFrame, variant: str, task: str, prompts: int) -> list[EvalResult]:
    """For the front matter (`model-index`): what the tables show, with the intervals."""
    return [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=f"{prompts} held-out prompts",
            metric_type=name,
            metric_value=of["value"],
            metric_name=f"{_words(name)}: {_with_interval(name, of)}",
            metric_args={key: of[key] for key in ("ci_low", "ci_high", "samples", "teacher")},
        )
        for name, of in figures(metrics, variant).items()
        if not _HIDDEN.search(name) and of["value"] is not None
    ]


def _words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def _label(name: str) -> str:
    return markdown.plain(_words(name))


def _number(name: str, value: float | None, unit: bool = True) -> str:
    """A value as people read it, with its unit or without."""
    if value is None:
        return ""
    if _SHARES.search(name):
        digits = 3 if abs(value) < 0.995 else 4
        return f"{100 * value:.{digits}g}" + " %" * unit
    if name.endswith("parameters"):
        return f"{value:,.0f}"
    if name.endswith("_bytes"):
        size, word = (2**30, " GiB") if value >= 2**30 else (2**20, " MiB")
        return f"{value / size:.3g}" + word * unit
    if name.endswith("_seconds"):
        return f"{1000 * value:.4g}" + " ms" * unit
    return f"{value:.3g}" + " dB" * (unit and name == "psnr")


def _with_interval(name: str, of: dict[str, Any]) -> str:
    ends = [_number(name, of[end], unit=False) for end in ("ci_low", "ci_high")]
    return _number(name, of["value"]) + (f" ({ends[0]} to {ends[1]})" if all(ends) else "")


def _difference(name: str, of: dict[str, Any] | None) -> str:
    """To the teacher over the same prompts and seeds; of shares in percentage points."""
    if of is None or of["value"] is None:
        return ""
    factor, unit = (100, " points") if _SHARES.search(name) else (1, "")
    value, low, high = (
        None if of[key] is None else _signed(factor * of[key])
        for key in ("value", "ci_low", "ci_high")
    )
    return f"{value}{unit}" + (f" ({low} to {high})" if low and high else "")


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _signed(value: float) -> str:
    """With its sign, in two digits; 0 has none."""
    return "0" if abs(value) < 1e-12 else f"{value:+.2g}"
