"""docs/renamed.md: all that it names is there, and old names lead to it (tests/old_names)."""

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys

import pyarrow as pa
import pytest

from ppcl.configuration import config, renamed
from ppcl.storage import schemas
from support import ROOT, SCRIPTS

FOLDER = ROOT / "tests" / "old_names"


@pytest.fixture(scope="module")
def old_names():
    """The module of aliases, which is read here and does not begin to work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("old_names")
        sys.modules.pop("old_names")


def run(code: str, *words: str) -> str:
    """What code prints in a process that takes old names."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(SCRIPTS)])}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_new_names_are_there(old_names):
    for module in {name for _, new in old_names.rows("module") for name in new}:
        assert importlib.util.find_spec(f"ppcl.{module}"), module
    for module in old_names.pairs("test module").values():
        assert importlib.util.find_spec(module), module
    for function in old_names.pairs("function").values():
        assert pkgutil.resolve_name(f"ppcl.{function}"), function
    known = "".join(path.read_text() for path in (SCRIPTS / "ppcl").rglob("*.py"))
    known += "".join(path.read_text() for path in SCRIPTS.glob("*.py"))
    for option in old_names.pairs("option").values():
        assert f'"{option.strip("-").replace("-", "_")}"' in known, option
    for program in old_names.pairs("program").values():
        assert (SCRIPTS / program).exists(), program
    for file in old_names.pairs("file").values():
        assert file in schemas.ARTIFACTS, file
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").rglob("*.smk"))
    for _, (target, *_) in old_names.rows("target"):
        assert re.search(rf"^(rule|checkpoint) {target}:", rules, re.M), target
    tables = [value for value in vars(schemas).values() if isinstance(value, pa.Schema)]
    for _, (column, *_) in [*old_names.rows("column"), *old_names.rows("new column")]:
        assert any(column in table.names for table in tables), column


def test_config_keys_are_those_that_are_refused(old_names):
    assert old_names.pairs("config key") == renamed.OLD_KEYS
    for key in renamed.OLD_KEYS.values():
        place = config.schema()
        for name in key.split("."):
            place = place["properties"][name]


def test_every_old_module_is_that_of_today(old_names):
    rows = {old: new for (old,), new in old_names.rows("module")}
    assert len(rows) == 108
    code = """
import importlib, json, sys
for old, new in json.loads(sys.argv[1]).items():
    module = importlib.import_module(f"ppcl.{old}")
    packages = ("ablation", "digits", "evaluation", "figures", "teacher", "training")
    assert old in packages or module is importlib.import_module(f"ppcl.{new[0]}"), old
for old, new in json.loads(sys.argv[2]).items():
    module, name = old.split(".")
    home, _, now = new.rpartition(".")
    there = getattr(importlib.import_module(f"ppcl.{home}"), now)
    assert getattr(importlib.import_module(f"ppcl.{module}"), name) is there, old
"""
    run(code, json.dumps(rows), json.dumps(old_names.pairs("function")))


def test_a_script_for_the_old_layout_runs():
    code = """
from unittest import mock
import ppcl.assembly
import tiny
from ppcl import calls, config, hub, teacher, training
from ppcl.errors import UserError
from ppcl.export import assembly
from ppcl.storage import tables
from ppcl.training import loop
from ppcl.transformer import call_tables

plain = assembly.prove, loop.train, call_tables.write
with mock.patch("ppcl.assembly.prove") as a, mock.patch("ppcl.training.train") as b:
    assert (assembly.prove, loop.train) == (a, b)
with mock.patch("ppcl.calls.write") as c:
    assert call_tables.write is c
assert (assembly.prove, loop.train, call_tables.write) == plain
assert calls.write is call_tables.write and callable(teacher.make_vae)
settings = config.complete({"teacher": {"path": "/nowhere"}}, "mine.yaml")
assert hub.component(settings["teacher"]) == "transformer"
try:
    hub.folder({"path": "/nowhere", "variant": None})
except UserError as error:
    print(error)
print(config.load('{"seed": 3}')["seed"], (tiny.source("here") | {"variant": "fp16"}).variant)
"""
    *_, refusal, last = run(code).splitlines()
    assert "/nowhere" in refusal and last == "3 fp16"


def test_old_options_are_taken(old_names):
    made = old_names.options("record", ["--calls", "there/calls.parquet", "--state", "s"])
    assert made[-2:] == ["--block-facts", "there/blocks.parquet"]
    made = old_names.options("distill", ["--plan", "p.json", "--errors", "e.parquet"])
    assert made == ["--selection", "p.json", "--unit-costs", "e.parquet"]


def test_the_product_knows_nothing_of_it():
    for folder in ("workflow", "tools", "benchmarks", "tests/support"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "old_names" not in path.read_text(encoding="utf-8"), path
