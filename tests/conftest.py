"""Fixtures of several folders, and the order of the files; imports no torch."""

import json
import os
import signal
import struct
import sys
from collections import Counter
from math import prod
from pathlib import Path

import pytest

# Two processes share the cores (pyproject.toml); small matrices gain nothing from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that take more all the same must not spin while the other process has the core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Files that take long for their number of tests, the longest first: begun last, each would keep one
# process waiting.
SLOW = (
    "test_dag.py",
    "test_slurm.py",
    "test_families.py",
    "test_faults.py",
    "test_fsdp.py",
    "test_stopping.py",
    "test_benchmarks.py",
    "test_kill.py",
)


def pytest_collection_modifyitems(items):
    """Puts slow files first, then those of many tests; the order within a file stays.

    The latter is what xdist would do by itself (--loadscope-reorder).
    """
    tests = Counter(item.path for item in items)
    turns = {name: turn for turn, name in enumerate(SLOW)}
    items.sort(key=lambda item: (turns.get(item.path.name, len(SLOW)), -tests[item.path]))


@pytest.fixture(autouse=True, scope="session")
def fsync():
    """In this process nobody waits until files are on the disk: it takes milliseconds for each of
    thousands, and no test cuts the power. Gives what does wait (test_whole.py has it back)."""
    own = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield own


@pytest.fixture(autouse=True)
def sigterm():
    """SIGTERM ends this process, and those that it starts, whatever a program run in it left."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="module")
def code_of_teachers():
    """Forgets copies of code that came with a teacher, and where they lie: the next file's lie in
    other folders."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in [n for n in sys.modules if n.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(tmp_path) -> dict:
    """A config of a teacher and prompts that pass every check made before a model is loaded.

    10 blocks of 8 parameters and 20 other ones.
    """
    teacher = tmp_path / "teacher"
    (teacher / "transformer").mkdir(parents=True)
    named = ["diffusers", "QwenImageTransformer2DModel"]
    index = {"_class_name": "QwenImagePipeline", "transformer": named}
    (teacher / "model_index.json").write_text(json.dumps(index))
    (teacher / "transformer/config.json").write_text("{}")
    header, end = {}, 0
    shapes = {f"transformer_blocks.{i}.weight": [2, 4] for i in range(10)} | {"proj": [20]}
    for name, shape in shapes.items():
        offsets = [end, end := end + prod(shape)]
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(end)
    (teacher / "transformer/diffusion_pytorch_model.safetensors").write_bytes(content)
    header = "prompt,digit,digit_color,background_color\n"
    calibration, evaluation = tmp_path / "calibration.csv", tmp_path / "evaluation.csv"
    calibration.write_text(header + "the digit 7,7,red,white\nthe digit 9,9,red,white\n")
    evaluation.write_text(header + "the digit 8,8,red,white\n")
    return {
        "teacher": {"path": str(teacher)},
        "record": {"prompts": str(calibration)},
        "evaluate": {"prompts": str(evaluation)},
    }


@pytest.fixture
def snakemake(stand_in, tmp_path):
    """Runs snakemake with a config of the repository, a stand-in teacher and further keys."""
    import yaml

    from support import dry_runs

    def call(*arguments, config="digits", code=0, variables=None, **keys) -> str:
        overlay = tmp_path / "overlay.yaml"
        given = dict(stand_in)
        for key, value in keys.items():
            given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
        overlay.write_text(yaml.safe_dump(given))
        files = ["--configfile", f"config/{config}.yaml", overlay]
        # Another run may hold the lock of this folder.
        common = ["--nolock", "--cores", "2", *files]
        return dry_runs.run("snakemake", *common, *arguments, code=code, **(variables or {}))

    return call


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """Folder of a complete tiny pipeline with 5 blocks."""
    from support import tiny  # imports torch, which many tests do without

    return tiny.pipeline(tmp_path_factory.mktemp("tiny") / "teacher", blocks=5)


@pytest.fixture(scope="session")
def tiny_calls(tiny_teacher, tmp_path_factory) -> Path:
    """Recorded calls of `tiny_teacher`: four prompts, one at a time, of two token lengths."""
    from support import tiny

    return tiny.record(tiny_teacher, tmp_path_factory.mktemp("tiny") / "calls.parquet")


@pytest.fixture
def accelerator():
    """Of this process alone, on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def teacher():
    """A stock transformer of 6 blocks that all matter."""
    from support import tiny

    return tiny.transformer(blocks=6, scale=0.2)


@pytest.fixture(scope="session")
def reader(teacher, tmp_path_factory):
    """Calls of `teacher`: 8 padded samples to fit on, and 4 held out, of which one is padded."""
    from ppcl.transformer import call_tables, calls
    from support import tiny

    path, tables = tmp_path_factory.mktemp("reader") / "calls.parquet", []
    for heldout, lengths, seed in ((False, (5, 3) * 4, 0), (True, (5, 5, 4, 5), 1)):
        given = tiny.arguments(lengths, seed)
        rows = tiny.places(len(lengths), heldout=heldout)
        tables += call_tables.to_tables(given, teacher(**given)[0], rows)
    call_tables.write(path, [table.schema for table in tables], tables, {})
    return calls.Reader(path)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """diffusers copies code to a cache; here to one of the test's own, and forgets it after."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    from ppcl.pruning import pruned_class

    for name in [
        n for n in sys.modules if n.startswith((pruned_class.MODULE, "diffusers_modules"))
    ]:
        del sys.modules[name]
