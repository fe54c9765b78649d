"""The table at the end of a run and at the front of its report."""

import math
import re

import pandas as pd
import pytest
from docutils.core import publish_doctree

from ppcl import judges
from ppcl.evaluation import summary
from ppcl.storage import schemas, tables

MODELS = "results/mine/models/"


@pytest.fixture
def metrics(tmp_path):
    """Writes metrics.parquet of a teacher and two variants, with or without a judge."""

    def write(judged: bool):
        measured = {
            "teacher": (20_300_000_000, 1.0, 1.0, 0.8, 1.0, 0.0, None, None),
            "p85": (17_100_000_000, 0.84, 0.9, 0.74, 0.92, 8.3e-5, (-0.004, -0.004, 0.0), 31.25),
            "p_50*": (8_700, 0.43, 0.6, 0.46, 0.57, 0.0031, (0.004, 0.002, -0.1), 22.5),
        }
        rows = []
        for variant, (count, share, rest, s, ratio, error, falls, psnr) in measured.items():
            values = {"parameters": count, "parameter_fraction": share, "velocity_error": error}
            values |= {"latency_seconds": s, "latency_ratio": ratio}
            values |= {"parameter_fraction_without_modulation": rest}
            if judged and falls:
                named = [f"{name}_difference" for name in judges.facts()]
                values |= dict(zip(named, falls, strict=True))
            values |= {"psnr": psnr} if psnr else {}
            if variant == "p85":
                values |= {"stored_bytes": 1.5 * 2**30, "stored_fraction": 0.4}
            for metric, value in values.items():
                row = dict.fromkeys(schemas.METRICS.names, 0.0)
                row |= {"variant": variant, "metric": metric, "value": value}
                row |= {"ci_low": value - 0.01, "ci_high": value + 0.01}
                rows.append(row | {"higher_is_better": True, "samples": 1})
        tables.write(tmp_path / "metrics.parquet", pd.DataFrame(rows), schemas.METRICS, {})
        return summary.rows(tmp_path / "metrics.parquet", MODELS, "my `teacher`_")

    return write


def test_rows_tell_size_speed_error_and_the_largest_loss(metrics):
    rows = metrics(judged=True)
    shown = [re.split("  +", line) for line in summary.text(rows).splitlines()[:4]]
    assert shown == [
        list(summary.COLUMNS),
        ["teacher", "1.00 (20.3 B)", "1.00", "1.00 (0.8 s)", "0", "my `teacher`_"],
        ["p85", "0.84 (17.1 B)", "0.90", "0.40 (1.5 GiB)", "0.92 (0.74 s)", "8.3e-5", "31.2 dB"]
        + ["digit -0.4 points (-1.4 to +0.6)", MODELS + "p85"],
        ["p_50*", "0.43 (8.7 K)", "0.60", "0.57 (0.46 s)", "3.1e-3", "22.5 dB"]
        + ["background -10.0 points (-11.0 to -9.0)", MODELS + "p_50*"],
    ]
    rows = metrics(judged=False)
    assert {row["worst metric"] for row in rows} == {""}


def test_a_loss_of_nothing_has_no_sign_of_loss():
    same = {f"{name}_difference": (-0.0, math.nan, math.nan) for name in judges.facts()}
    assert summary._worst(same) == "digit +0.0 points"


def test_the_report_shows_the_same_cells(metrics):
    rows = metrics(judged=True)
    shown = publish_doctree(summary.rst(rows), settings_overrides={"halt_level": 2})
    cells = [entry.astext() for entry in shown.findall(lambda node: node.tagname == "entry")]
    wanted = [*summary.COLUMNS, *(row[name] for row in rows for name in summary.COLUMNS)]
    assert cells == wanted
