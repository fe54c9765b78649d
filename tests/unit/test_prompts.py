"""Prompts files are read as they stand, or refused with the line; what suits no teacher is told."""

import json
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ppcl.configuration import config, preflight, prompt_checks
from ppcl.errors import UserError
from ppcl.settings import Settings
from ppcl.teacher import prompts
from support import ROOT

ODD = [
    "a cat\u2028on a mat",
    "fog\x85and rain",
    "wire\x0c, and bird",
    "\x0bup",
    "rs\x1eus\x1f",
    "é",
]


def read(path: Path, content: str | bytes) -> list[dict]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return prompts.read(path, "mine.yaml: record.prompts")


def refusal(path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as raised:
        read(path, content)
    message = str(raised.value)
    assert message.startswith("mine.yaml: record.prompts: ") and str(path) in message
    assert "\n" not in message and ";" in message
    return message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(tmp_path, end):
    assert [row["prompt"] for row in read(tmp_path / "a.txt", end.join(ODD))] == ODD
    lines = [f'"{text}",{number}' for number, text in enumerate(ODD)]
    rows = read(tmp_path / "a.CSV", end.join(["prompt,digit", *lines, ""]))
    assert rows == [{"prompt": text, "digit": str(n)} for n, text in enumerate(ODD)]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in ODD]
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl", end.join(lines))] == ODD


def test_mixed_line_ends_a_mark_and_no_ending(tmp_path):
    rows = read(tmp_path / "PROMPTS", "\ufeffone\r\n\n \t\r\n\t two \nthree".encode())
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\rthree\n", "line 2 holds a carriage return"),
        ("one\rtwo\r", "line 1 holds a carriage return"),
        ("one\n\r\r\n", "line 2 holds a carriage return"),
        ("one\n\ntw\0o\n", "line 3 holds a NUL"),
        ("one\n\ufefftwo\n", "line 2 holds a byte order mark"),
        ("one\ntwo\n".encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        ("one\ntwo\n".encode("utf-16-le"), "holds a NUL"),
        (b"one\n\xe9t\xe9\n", "is not UTF-8 (byte 4, line 2)"),
        ("prompt,digit\none,1\n", "line 1, 'prompt,digit', is of a table"),
        ('\n{"prompt": "one"}\n', "line 2, "),
        ("Prompt\none\n", "line 1, 'Prompt', is of a table"),
        ("id, prompt\n1, one\n", "line 1, 'id, prompt', is of a table"),
        ('[\n"one",\n"two"\n]\n', "line 1, '[', is of a table"),
    ],
)
def test_lines_that_are_not_what_they_seem(tmp_path, content, expected):
    assert expected in refusal(tmp_path / "a.txt", content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('prompt\none\n"two\nthree\n', "the row that begins in line 3 can't be read"),
        ('prompt,n\n"one,1\ntwo,2\n"three,3\n', "the row that begins in line 2"),
        ('prompt\n"one" and two\n', "begins in line 2"),
        ("prompt,n\none,1\ntwo\n", "line 3: 'two' is of 1 columns, and there should be 2"),
        ("prompt\na cat, sitting\n", "line 2: 'a cat' is of 2 columns"),
        ('prompt,n\n"one\ntwo",1,2\n', "lines 2 to 3: "),
        ("prompt,n\none,1\n ,2\n", "line 3: the prompt is ' '"),
        ("prompt,n,n\none,1,2\n", "two columns 'n'"),
        ("prompt,digit,prompt\none,1,two\n", "two columns 'prompt'"),
        ("prompt;n\none;1\n", "separate columns by commas in a .csv"),
        ('"prompt";"n"\n"one";1\n', "separate columns by commas in a .csv"),
        ("Prompt,n\none,1\n", "write 'Prompt' in small letters"),
        ("one\ntwo\n", "has no column 'prompt' (its first line: 'one')"),
        ("prompt,image\none,a.png\n", "line 2: the image a.png is neither in"),
        (f"prompt,image\none,{'a' * 5000}\n", "aaa... is neither in"),
        (f'prompt\n"{"a" * 140_000}"\n', "begins in line 2"),
        ('id, prompt\n1, "a cat"\n', "line 2: ' \"a cat\"' has a blank before its first quote"),
    ],
)
def test_tables_that_would_lose_something(tmp_path, content, expected):
    assert expected in refusal(tmp_path / "a.csv", content)


def test_tables_as_people_write_them(tmp_path):
    """Blanks around names, rows of nothing but commas, an index without a name, tabs."""
    rows = read(tmp_path / "a.csv", '\n ,  prompt , digit\n0," a ""b""\nc ", 7\n,,\n')
    assert rows == [{"prompt": ' a "b"\nc ', "digit": "7"}]
    assert read(tmp_path / "a.tsv", "prompt\tn\na, b\t1\n") == [{"prompt": "a, b", "n": "1"}]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "prompt": "b"}', "line 2: has the key 'prompt' twice"),
        ('{"prompt": 3}', "line 2: the prompt is 3, and has to be a text"),
        ('{"prompt": ""}', "line 2: the prompt is ''"),
        ('{"text": "a"}', "line 2: the prompt is None"),
        ('["a"]', "line 2 is no object"),
        ('{"prompt": "a"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": "\\ud800"}', "line 2: '\\ud800' holds NUL or half a character"),
        ('{"prompt": "a\\u0000"}', "line 2: 'a\\x00' holds NUL"),
        ('{"prompt": "a", "image": ["b.png"]}', "line 2: has no image (but ['b.png'])"),
        ('{"prompt": "a", "image": "prompts"}', "line 2: has an image, and rows before have none"),
    ],
)
def test_json_lines_that_are_no_prompts(tmp_path, line, expected):
    (tmp_path / "prompts").touch()
    assert expected in refusal(tmp_path / "a.jsonl", f'{{"prompt": "one"}}\n{line}\n')


def test_other_columns_become_text(tmp_path):
    (tmp_path / "a.png").touch()
    row = {"prompt": " a\n", "image": "a.png", "digit": 7, "n": 7.0, "b": None, "c": [1], "d": True}
    wanted = {"prompt": " a\n", "image": str(tmp_path / "a.png"), "digit": "7", "n": "7", "b": ""}
    wanted |= {"c": "[1]", "d": "true"}
    assert read(tmp_path / "a.jsonl", f"\n{json.dumps(row)}\n") == [wanted]
    pa.parquet.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    assert prompts.read(tmp_path / "a.parquet") == [wanted] * 2
    pa.parquet.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: row 2: the prompt is None"):
        prompts.read(tmp_path / "b.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    assert "is not a whole parquet file" in refusal(tmp_path / "a.parquet", whole[:-9])
    assert "is of a table" in refusal(tmp_path / "a.txt", f"{json.dumps(row)}\n")


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.csv.gz", "a.xlsx", "a.md", "a.txt.bak"])
def test_other_endings_are_refused(tmp_path, name):
    assert ".jsonl or .parquet" in refusal(tmp_path / name, "one\ntwo\n")


def written(tmp_path, **files) -> dict:
    """A config with these prompts, for a teacher of no digits."""
    given = {"evaluate": {"judge": "none"}, "record": {}, "teacher": {"path": "owner/name"}}
    for stage, texts in files.items():
        (tmp_path / f"{stage}.txt").write_text("\n".join(texts))
        given[stage] |= {"prompts": str(tmp_path / f"{stage}.txt")}
    return config.complete(given, "mine.yaml")


def test_digits_are_for_the_embedded_teacher(stand_in, tmp_path, monkeypatch, caplog):
    """Its defaults refuse another teacher, and warn of one with its tokenizer, or of the judge."""
    monkeypatch.chdir(ROOT)
    alone = {"run": "mine", "teacher": stand_in["teacher"]}
    with pytest.raises(UserError) as raised:
        preflight.check(Settings.of(config.complete(alone, "mine.yaml")), "mine.yaml")
    for key in ("record.prompts to", "evaluate.prompts to", "evaluate.judge: none", "init.py"):
        assert key in str(raised.value)
    assert not caplog.records
    preflight.check(Settings.of(config.complete({**stand_in}, "mine.yaml")), "mine.yaml")
    assert "set evaluate.judge: none" in caplog.text and "record.prompts to" not in caplog.text
    caplog.clear()
    place = Path(stand_in["teacher"]["path"]) / "tokenizer"
    place.mkdir()
    shutil.copy(ROOT / "resources/digits/tokenizer/tokenizer.json", place)
    prompt_checks.check(Settings.of(config.complete(alone, "mine.yaml")), "mine.yaml")
    assert "record.prompts to prompts for it" in caplog.text
    caplog.clear()
    prompt_checks.check(Settings.of(config.complete({}, "digits.yaml")), "digits.yaml")
    assert not caplog.records


def test_repeated_and_few_prompts_are_told(tmp_path, caplog):
    few = written(tmp_path, record=["a"] * 40 + ["b"] * 8, evaluate=["c"] * 48)
    with caplog.at_level(logging.WARNING):
        prompt_checks.check(Settings.of(few), "mine.yaml")
    said = [record.getMessage() for record in caplog.records]
    assert "record.prompts: of 48 prompts only 2 differ" in said[0]
    assert "evaluate.prompts: of 48 prompts only 1 differ" in said[1]
    assert "1 are held out, 1 to select blocks by and the same to report" in said[2]
    assert "evaluate.prompts: one prompt alone" in said[3] and len(said) == 4
    with pytest.raises(UserError, match="record.txt has only one prompt among the first 40"):
        few["record"]["samples"] = 40
        prompt_checks.check(Settings.of(few), "mine.yaml")


def test_enough_prompts_are_no_news_but_line_breaks_are(tmp_path, caplog):
    many = written(tmp_path, record=map(str, range(40)), evaluate="ab")
    prompt_checks.check(Settings.of(many), "mine.yaml")
    assert not caplog.records
    (tmp_path / "a.csv").write_text('prompt\n"one\ntwo"\nthree\n')
    many["evaluate"]["prompts"] = str(tmp_path / "a.csv")
    prompt_checks.check(Settings.of(many), "mine.yaml")
    assert "1 prompts have line breaks in them, such as 'one\\ntwo'" in caplog.text


def test_what_only_blanks_tell_apart_is_one_prompt(tmp_path):
    same = written(tmp_path, record="abcdefgh", evaluate="xy")
    (tmp_path / "e.csv").write_text('prompt\n"a "\n')
    same["evaluate"]["prompts"] = str(tmp_path / "e.csv")
    with pytest.raises(UserError, match="'a' is also a calibration prompt"):
        prompt_checks.check(Settings.of(same), "mine.yaml")


def test_prompts_that_are_a_link_to_themselves(tmp_path):
    given = written(tmp_path, record="abcdefgh", evaluate="xy")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    given["record"]["prompts"] = str(tmp_path / "loop.csv")
    given["teacher"]["path"] = "another/one"
    with pytest.raises(UserError, match="record.prompts: cannot read .*loop.csv"):
        prompt_checks.check(Settings.of(given), "mine.yaml")


@pytest.mark.parametrize(
    ("prompts_", "fraction", "count"),
    [(2, 0.1, 1), (3, 0.1, 2), (20, 0.1, 2), (64, 0.1, 6), (4, 0.9, 3)],
)
def test_two_prompts_are_held_out_at_least(prompts_, fraction, count):
    assert prompts.heldout_count(prompts_, fraction) == count
