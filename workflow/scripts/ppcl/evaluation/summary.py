"""What a run ended with: a row per variant, for the end of a run and for its report.

From evaluation/metrics.parquet alone, without torch.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ppcl import judges
from ppcl.benchmarks import registry
from ppcl.storage import schemas, tables

TEACHER = "teacher"
COLUMNS = (
    *("variant", "parameters", "without modulation", "stored", "latency", "error", "PSNR"),
    *("worst metric", "folder"),
)
NOTE = (
    "Parameters of the transformer, those without its modulation (AdaLN) matrices, which take "
    "memory but no time, bytes of its weights as stored, and latency of a call, over the "
    "teacher's; relative error of the "
    "velocity; PSNR to the teacher's pictures; the accuracy that fell most, of the same prompts "
    "and seeds, with the 95 % interval of the difference."
)
SCORES_NOTE = (
    "Scores of benchmarks, as their own scorers measured them; in brackets the 95 % interval of "
    "the difference to the teacher's, of the same prompts and seeds."
)


def rows(metrics: str | Path, models: str | Path, teacher: str) -> list[dict[str, str]]:
    """The cells of every variant, the teacher first, then in the order of the config.

    Args:
        metrics: evaluation/metrics.parquet.
        models: the folder of the variants' pipelines.
        teacher: the config's teacher.path.

    Raises:
        UserError: the table can't be read.
    """
    by_variant: dict[str, dict[str, float]] = {}
    intervals: dict[tuple[str, str], tuple[float, float]] = {}
    wanted = ("variant", "metric", "value", "ci_low", "ci_high")
    table = tables.read(metrics, schemas.METRICS)
    for name, metric, value, low, high in zip(
        *(table[key].to_pylist() for key in wanted), strict=True
    ):
        by_variant.setdefault(name, {})[metric] = value
        intervals[name, metric] = low, high
    return [
        {
            "variant": name,
            "parameters": _share(of, "parameter_fraction", "parameters", _short),
            "without modulation": _share(of, "parameter_fraction_without_modulation"),
            "stored": _share(of, "stored_fraction", "stored_bytes", _size),
            "latency": _share(of, "latency_ratio", "latency_seconds", lambda s: f"{s:.3g} s"),
            "error": _small(of["velocity_error"]) if "velocity_error" in of else "",
            "PSNR": f"{of['psnr']:.1f} dB" if "psnr" in of else "",
            "worst metric": _worst({m: (of[m], *intervals[name, m]) for m in of}),
            "folder": teacher if name == TEACHER else str(Path(models, name)),
        }
        for name, of in by_variant.items()
    ]


def scores(metrics: str | Path) -> list[dict[str, str]]:
    """A row for each metric of a benchmark, with a cell for each variant, the teacher first: its
    value and, in brackets, the interval of its difference to the teacher's; [] without any.

    Args:
        metrics: evaluation/metrics.parquet.

    Raises:
        UserError: the table can't be read.
    """
    table = tables.read(metrics, schemas.METRICS)
    wanted = (table[key].to_pylist() for key in ("variant", "metric", "value", "ci_low", "ci_high"))
    cells = {(name, metric): rest for name, metric, *rest in zip(*wanted, strict=True)}
    shown = registry.of_metrics(metric for _, metric in cells)
    variants = dict.fromkeys(name for name, metric in cells if metric in shown)
    made = []
    for metric in shown:
        row = {"benchmark": metric}
        for name in sorted(variants, key=lambda name: name != TEACHER):
            value, *_ = cells.get((name, metric), [math.nan])
            row[name] = "" if math.isnan(value) else f"{value:.4g}"
            _, *ends = cells.get((name, f"{metric}_difference"), [math.nan] * 3)
            if not any(map(math.isnan, ends)):
                row[name] += f" ({ends[0]:+.2g} to {ends[1]:+.2g})"
        made.append(row)
    return made


def text(rows: list[dict[str, str]], scores: Sequence[dict[str, str]] = ()) -> str:
    """As plain text: the names of the columns, a line per row, and what they say; then the scores
    of benchmarks, if there are any."""
    parts = [*_lines(rows, COLUMNS), textwrap.fill(NOTE, 88)]
    if scores:
        parts += ["", *_lines(scores, tuple(scores[0])), textwrap.fill(SCORES_NOTE, 88)]
    return "\n".join(parts)


def _lines(rows: Sequence[dict[str, str]], columns: tuple[str, ...]) -> list[str]:
    lines = [dict(zip(columns, columns, strict=True)), *rows]
    widths = {name: max(len(line[name]) for line in lines) for name in columns}
    shown = ("  ".join(line[name].ljust(widths[name]) for name in columns) for line in lines)
    return [line.rstrip() for line in shown]


def rst(rows: list[dict[str, str]], scores: Sequence[dict[str, str]] = ()) -> str:
    """As a table of reStructuredText, and what it says; then the scores of benchmarks."""
    parts = [*_list_table(rows, COLUMNS), "", NOTE]
    if scores:
        parts += ["", *_list_table(scores, tuple(scores[0])), "", SCORES_NOTE]
    return "\n".join(parts)


def _list_table(rows: Sequence[dict[str, str]], columns: tuple[str, ...]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        for name in columns:
            cell = re.sub(r"([^\w\s.,/-]|_)", r"\\\1", row[name])
            lines.append(f"   {'*' if name == columns[0] else ' '} - {cell}".rstrip())
    return lines


def _share(of: Mapping[str, float], share: str, measure: str = "", shown=str) -> str:
    """A measure over the teacher's and, in brackets, the measure itself."""
    if share not in of:
        return ""
    return f"{of[share]:.2f}" + (f" ({shown(of[measure])})" if measure in of else "")


def _size(count: float) -> str:
    """Bytes in three digits."""
    for unit_bytes, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit_bytes:
            return f"{count / unit_bytes:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"


def _small(error: float) -> str:
    """In two digits: errors lie decades apart."""
    return f"{error:.1e}".replace("e-0", "e-") if error else "0"


def _short(count: float) -> str:
    """A large number in three digits."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _worst(of: Mapping[str, tuple[float, float, float]]) -> str:
    """The accuracy that fell furthest below the teacher's, in percentage points, with the interval
    of the difference; empty without a judge, and for the teacher.

    of: metric -> value and interval.
    """
    falls = {
        label: of[f"{metric}_difference"]
        for metric, label in judges.facts().items()
        if f"{metric}_difference" in of
    }
    if not falls:
        return ""
    label = min(falls, key=lambda name: falls[name][0])
    value, *interval = (f"{round(100 * x, 1) + 0.0:+.1f}" for x in falls[label])
    known = not any(math.isnan(x) for x in falls[label])
    return f"{label} {value} points" + (f" ({' to '.join(interval)})" if known else "")
