"""Judges: one of another kind than digits goes through the evaluation by its entry alone."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ppcl import judges
from ppcl.configuration.config import schema
from ppcl.errors import UserError
from ppcl.evaluation import judging, summary
from ppcl.figures.quality import quality_against_cost
from ppcl.figures.sample_images import sample_images
from ppcl.storage import schemas, tables


class Brightness:
    """Reads whether a picture is light or dark."""

    def read(self, pictures):
        return [{"light": "yes" if picture.mean() > 0.5 else "no"} for picture in pictures]


@pytest.fixture
def brightness(monkeypatch):
    entry = judges.Judge(
        facts={"light": "light"},
        together="light",
        sides=None,
        values=lambda: {"light": ("yes", "no")},
        load=Brightness,
        tested=lambda reader: {"judge_light_accuracy": np.array([True, True, False, True])},
        words=lambda read: f"light: {read['light']}",
    )
    monkeypatch.setitem(judges.JUDGES, "brightness", entry)


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def test_the_schema_names_the_judges():
    names = schema()["properties"]["evaluate"]["properties"]["judge"]["enum"]
    assert names == [*judges.JUDGES, "none"]


def test_a_judge_of_any_kind_is_read_scored_and_shown(brightness, tmp_path):
    rows = [{"prompt": "a", "light": "yes"}, {"prompt": "b", "light": "no"}]
    column = {"variant": "teacher", "prompt": "a", "seed": 0, "read": "", "frames": 1}
    column |= {"source": ""}
    pictures = [png(200), png(250)]
    table = pd.DataFrame([column | {"png": p, "prompt_index": i} for i, p in enumerate(pictures)])
    part = tmp_path / "part.parquet"
    tables.write(part, table[schemas.IMAGES.names], schemas.IMAGES, {})

    judged = judging.Judged("brightness", rows)
    judged.read(part)
    assert [json.loads(text) for text in judged.readings[part]] == [
        {"light": "yes", "text": "light: yes", "correct": True},
        {"light": "yes", "text": "light: yes", "correct": False},
    ]
    scores = judged.scores(part, [0, 1])
    assert {name: list(values) for name, values in scores.items()} == {
        "light_accuracy": [1, 0],
        "all_correct": [1, 0],
    }
    assert judged.tested(10, 0)["judge_light_accuracy"].value == 0.75

    row = dict.fromkeys(schemas.METRICS.names, 0.5) | {"samples": 2}
    metrics = pd.DataFrame(
        [
            row | {"variant": name, "metric": metric}
            for name in ("teacher", "p50")
            for metric in ("light_accuracy", "light_accuracy_difference", "parameter_fraction")
        ]
    ).assign(higher_is_better=True)
    labels = [ax.get_ylabel() for ax in quality_against_cost(metrics).axes]
    assert "light right" in labels
    table["read"] = judged.readings[part]
    under = [ax.get_xlabel() for ax in sample_images(table, metrics).axes]
    assert [text for text in under if text] == ["light: yes"]  # under the one that is wrong
    path = tmp_path / "metrics.parquet"
    tables.write(path, metrics[schemas.METRICS.names], schemas.METRICS, {})
    assert summary.rows(path, "models", "t")[1]["worst metric"].startswith("light +50.0 points")


def test_without_a_judge_nothing_is_read(tmp_path):
    table = pd.DataFrame([["teacher", "a", 0, png(1), "", 0, 1, ""]], columns=schemas.IMAGES.names)
    tables.write(tmp_path / "part.parquet", table, schemas.IMAGES, {})
    judged = judging.Judged("none", [{"prompt": "a"}])
    judged.read(tmp_path / "part.parquet")
    assert judged.readings == {tmp_path / "part.parquet": [""]}
    assert judged.scores(tmp_path / "part.parquet", [0]) == judged.tested(10, 0) == {}


def test_what_a_judge_cannot_use_is_refused(brightness):
    judges.refuse_without_facts("none", [{"prompt": "a"}], "p.csv")
    with pytest.raises(UserError, match=r"p\.csv has no column light.*judge: none"):
        judges.refuse_without_facts("brightness", [{"prompt": "a"}], "p.csv")
    with pytest.raises(UserError, match=r"prompt 0 of p\.csv has light 'a bit'"):
        judges.refuse_unknown_facts("brightness", [{"light": "a bit"}], "p.csv")
    judges.refuse_sides("brightness", 3, 4)
    with pytest.raises(UserError, match="reads pictures of 32 x 32 pixels, these have 4 x 3"):
        judges.refuse_sides("digits", 3, 4)
