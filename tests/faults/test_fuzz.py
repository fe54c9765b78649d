"""Thousands of bad inputs for every reader: each ends in a UserError, or is read as what it is.

PPCL_FUZZ=<examples per test> runs more of them than the default.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import selection_file
from ppcl.storage import seals, tensors, texts
from support import fuzzing
from support.fuzzing import READERS, SEALED
from tools import fuzz_readers

EXAMPLES = int(os.environ.get("PPCL_FUZZ", "150"))
SLOW_IS_FINE = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
HOW = settings(max_examples=EXAMPLES, derandomize="PPCL_FUZZ" not in os.environ, **SLOW_IS_FINE)
COUNTS = {"bad": 0, "refused": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder, and the content of a whole file of every kind, all of which are read."""
    folder = tmp_path_factory.mktemp("fuzz")
    contents = fuzzing.example(folder)
    assert not any(fuzzing.refused(name, folder / name) for name in READERS)
    yield folder, contents
    print(f"\n{COUNTS['bad']} bad inputs, of which {COUNTS['refused']} were refused", end="")


def tried(name: str, path: Path) -> bool:
    """Counts and returns whether a file was refused."""
    refused = fuzzing.refused(name, path)
    COUNTS["bad"] += 1
    COUNTS["refused"] += refused
    return refused


@pytest.mark.skipif(find_spec("atheris") is None, reason=fuzz_readers.MISSING)
def test_inputs_that_reach_new_code(tmp_path):
    """As far as two thousand get; tools/fuzz_readers.py goes on for as long as one likes."""
    command = [sys.executable, fuzz_readers.__file__, "--runs", "2000", "--keep", tmp_path, "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    count = int(re.fullmatch(r"all: (\d+) inputs, no finding\n", done.stdout)[1])
    assert count >= 2000
    COUNTS["bad"] += count


def test_atheris_is_no_friend_of_bugs(tmp_path):
    """A fitting seal lets what is inside through, so that the fuzzer gets behind it."""
    whole = fuzzing.example(tmp_path)
    for name in ("selection.json", "start.safetensors"):
        content = whole[name].replace(b"00-01", b"00-02")
        for bad, refusal in (
            (content, seals.DAMAGED),
            (fuzz_readers.resealed(name, content), ""),
        ):
            (tmp_path / name).write_bytes(bad)
            try:
                READERS[name](tmp_path / name)
            except UserError as error:
                assert refusal and refusal in str(error) or name == "selection.json"
            else:
                assert not refusal


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(whole, tmp_path, name):
    content = whole[1][name]
    path = tmp_path / name

    @HOW
    @given(fuzzing.damaged(content))
    def check(bad):
        path.write_bytes(bad)
        # Another text is another prompt; of what is sealed, nothing passes.
        assert tried(name, path) or name not in SEALED

    check()


@pytest.mark.parametrize("name", fuzzing.TABLES)
def test_whole_tables_of_other_content(tmp_path, name):
    path = tmp_path / name

    @HOW
    @given(fuzzing.odd_tables(fuzzing.TABLES[name], fuzzing.FURTHER[name]), fuzzing.WIDTHS)
    def check(table, provenance):
        fuzzing.write_table(path, table, provenance)
        tried(name, path)

    check()


def test_whole_plans_of_other_content(tmp_path):
    path = tmp_path / "selection.json"

    @HOW
    @given(fuzzing.mutated(fuzzing.SELECTION))
    def check(plan):
        texts.write_sealed(path, plan)
        if not tried("selection.json", path):
            for unit in selection_file.read(path).units:
                assert all(
                    0 <= part.first <= part.last < plan["blocks"] for part in unit.new_blocks
                )

    check()


def test_whole_tensors_are_read_as_they_are(tmp_path):
    path = tmp_path / "start.safetensors"
    names = st.text(max_size=8).filter(lambda name: name != seals.KEY)

    @HOW
    @given(fuzzing.odd_tensors(), st.dictionaries(names, st.text(max_size=8)))
    def check(content, about):
        tensors.write(path, content, about)
        assert not tried("start.safetensors", path)
        read, metadata = tensors.read(path)
        assert metadata == about and read.keys() == content.keys()
        for key, value in content.items():
            assert read[key].dtype == value.dtype and read[key].shape == value.shape

    check()


def test_configs(tmp_path):
    path = tmp_path / "config.yaml"

    @HOW
    @given(fuzzing.mutated(fuzzing.CONFIG, sorted(fuzzing.CONFIG)))
    def check(value):
        fuzzing.write_config(path, value)
        if not tried("config.yaml", path):
            # What passes is complete, and stays so.
            loaded = config.load(str(path))
            assert config.complete(loaded.given, "again") == loaded.given

    check()


@HOW
@given(st.text(max_size=40) | st.text("{}[]:,\"'-#&*!|>% \n\t0aé", max_size=40))
def test_configs_that_are_any_text(text):
    for source in (text.lstrip().removeprefix("{"), "{" + text):
        try:
            config.load(source)
        except UserError:
            COUNTS["refused"] += 1
        COUNTS["bad"] += 1


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.txt"])
def test_prompts_that_are_any_text(tmp_path, name):
    path = tmp_path / name
    odd = "prompt,image\"'\r\n\t\x00\x0b\x85\u2028;$`(){}../ é"

    @HOW
    @given(st.text(odd, max_size=60) | st.text(odd, max_size=60).map("prompt,digit\n{}".format))
    def check(text):
        path.write_bytes(text.encode())
        if not tried(name, path):
            for row in READERS[name](path):
                assert row["prompt"].strip()

    check()
