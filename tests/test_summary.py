"""The table at the end of a run and at the front of its report."""

import re

import pandas as pd
import pytest
from docutils.core import publish_doctree

from ppcl import schemas, summary, tables

MODELS = "results/mine/models/"


@pytest.fixture
def metrics(tmp_path):
    """Writes metrics.parquet of a teacher and two variants, with or without a judge."""

    def write(judged: bool):
        measured = {
            "teacher": (20_300_000_000, 1.0, 0.8, 1.0, 0.0, (0.986, 0.997, 1.0), None),
            "p85": (17_100_000_000, 0.84, 0.74, 0.92, 0.0008, (0.982, 0.993, 1.0), 31.25),
            "p_50*": (8_700, 0.43, 0.46, 0.57, 0.0031, (0.99, 0.999, 0.9), 22.5),
        }
        rows = []
        for variant, (count, share, seconds, ratio, error, accuracies, psnr) in measured.items():
            values = {"parameters": count, "parameter_fraction": share, "velocity_error": error}
            values |= {"latency_seconds": seconds, "latency_ratio": ratio}
            values |= dict(zip(summary.ACCURACIES, accuracies, strict=True)) if judged else {}
            values |= {"psnr": psnr} if psnr else {}
            for metric, value in values.items():
                row = dict.fromkeys(schemas.METRICS.names, 0.0)
                row |= {"variant": variant, "metric": metric, "value": value}
                rows.append(row | {"higher_is_better": True, "samples": 1})
        tables.write(tmp_path / "metrics.parquet", pd.DataFrame(rows), schemas.METRICS, {})
        return summary.rows(tmp_path / "metrics.parquet", MODELS, "my `teacher`_")

    return write


def test_rows_tell_size_speed_error_and_the_largest_loss(metrics):
    found = metrics(judged=True)
    shown = [re.split("  +", line) for line in summary.text(found).splitlines()[:4]]
    assert shown == [
        list(summary.COLUMNS),
        ["teacher", "1.00 (20.3 B)", "1.00 (0.8 s)", "0.0000", "my `teacher`_"],
        ["p85", "0.84 (17.1 B)", "0.92 (0.74 s)", "0.0008", "digit -0.4 points", MODELS + "p85"],
        ["p_50*", "0.43 (8.7 K)", "0.57 (0.46 s)", "0.0031", "background -10.0 points"]
        + [MODELS + "p_50*"],
    ]
    found = metrics(judged=False)
    assert [row["worst metric"] for row in found] == ["", "PSNR 31.2 dB", "PSNR 22.5 dB"]
    assert max(map(len, summary.text(found).splitlines())) <= 100


def test_a_loss_of_nothing_has_no_sign_of_loss():
    same = dict.fromkeys(summary.ACCURACIES, 0.975)
    assert summary._worst(same, same) == "digit +0.0 points"


def test_the_report_shows_the_same_cells(metrics):
    found = metrics(judged=True)
    shown = publish_doctree(summary.rst(found), settings_overrides={"halt_level": 2})
    cells = [entry.astext() for entry in shown.findall(lambda node: node.tagname == "entry")]
    wanted = [*summary.COLUMNS, *(row[name] for row in found for name in summary.COLUMNS)]
    assert cells == wanted
