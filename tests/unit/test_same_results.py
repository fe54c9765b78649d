"""tools/same_results.py sees each change of a number, and none where only times differ."""

import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tools import same_results

NAN = float("nan")


@pytest.fixture
def folders(tmp_path, monkeypatch, capsys):
    """Two results folders that hold the same, and a function that compares them."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "distill").mkdir(parents=True)
    table(old / "distill" / "log.parquet", loss=[1.0, NAN], seconds=[1.0, 2.0])
    metrics = {"metric": ["ssim", "latency_ratio", "peak_memory_bytes"], "value": [0.5, 1.0, 2.0]}
    table(old / "metrics.parquet", **metrics)
    tensors = {"a": torch.tensor([1.0, NAN], dtype=torch.bfloat16), "b": torch.tensor(2)}
    save_file(tensors, old / "students.safetensors", {"when": "then"})
    shutil.copytree(old, new)

    def compare(*renamed):
        monkeypatch.setattr(sys, "argv", ["same_results.py", str(old), str(new), *renamed])
        with pytest.raises(SystemExit) as end:
            same_results.main()
        return end.value.code, "".join(capsys.readouterr())

    return new, compare


def table(path, **columns):
    pq.write_table(pa.table(columns), path)


def test_times_memory_and_provenance_are_not_compared(folders):
    new, compare = folders
    table(new / "distill" / "log.parquet", loss=[1.0, NAN], seconds=[3.0, 4.0])
    metrics = {"metric": ["ssim", "latency_ratio", "peak_memory_bytes"], "value": [0.5, 9.0, 9.0]}
    table(new / "metrics.parquet", **metrics)
    tensors = {"a": torch.tensor([1.0, NAN], dtype=torch.bfloat16), "b": torch.tensor(2)}
    save_file(tensors, new / "students.safetensors", {"when": "now"})
    (new / "state").mkdir()
    table(new / "state" / "part.parquet", x=[1])
    assert compare() == (0, "3 files compared: no differences\n")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda new: table(new / "distill" / "log.parquet", loss=[1.0, 2.0], seconds=[1.0, 2.0]),
            "distill/log.parquet: column loss: 1 of 2 rows differ, first row 1: nan, now 2.0",
        ),
        (
            lambda new: table(new / "distill" / "log.parquet", loss=[1, 2], seconds=[1.0, 2.0]),
            "distill/log.parquet: column loss: double, now int64",
        ),
        (
            lambda new: table(new / "distill" / "log.parquet", loss=[1.0], seconds=[1.0]),
            "distill/log.parquet: 2 rows, now 1",
        ),
        (
            lambda new: table(new / "metrics.parquet", metric=["ssim"], value=[0.6]),
            "metrics.parquet: column value: 1 of 1 rows differ, first row 0: 0.5, now 0.6",
        ),
        (
            lambda new: save_tensors(new, torch.tensor([1.5, NAN], dtype=torch.bfloat16)),
            "students.safetensors: tensor a: differs by up to",
        ),
        (
            lambda new: save_tensors(new, torch.tensor([1.0, NAN])),
            "students.safetensors: tensor a: torch.bfloat16 [2], now torch.float32 [2]",
        ),
        (lambda new: (new / "metrics.parquet").unlink(), "metrics.parquet: gone"),
        (lambda new: table(new / "more.parquet", x=[1]), "more.parquet: new"),
    ],
)
def test_each_change_of_a_number_is_named(folders, change, line):
    new, compare = folders
    change(new)
    status, printed = compare()
    assert status == 1 and printed.startswith(line)
    assert printed.endswith("3 files compared: 1 difference\n")


def save_tensors(folder, a):
    save_file({"a": a, "b": torch.tensor(2)}, folder / "students.safetensors")


def test_columns_and_tensors_that_come_and_go_are_named(folders):
    new, compare = folders
    table(new / "distill" / "log.parquet", error=[1.0, NAN], seconds=[1.0, 2.0])
    tensors = {"a": torch.tensor([1.0, NAN]).bfloat16(), "c": torch.tensor(2)}
    save_file(tensors, new / "students.safetensors")
    status, printed = compare()
    assert status == 1
    for line in ("column loss: gone", "column error: new", "tensor b: gone", "tensor c: new"):
        assert line in printed


def test_renamed_files_are_compared_with_what_they_were(folders):
    new, compare = folders
    (new / "metrics.parquet").rename(new / "measures.parquet")
    assert compare()[0] == 1
    assert compare("metrics.parquet=measures.parquet")[0] == 0


def test_what_cannot_be_compared_is_refused(folders, tmp_path):
    new, compare = folders
    status, printed = compare("metrics.parquet")
    assert status == 2 and "metrics.parquet is not of the form old=new" in printed
    status, printed = compare("other.parquet=metrics.parquet")
    assert status == 2 and "other.parquet is no parquet or safetensors file" in printed
    shutil.rmtree(new)
    status, printed = compare()
    assert status == 2 and "new holds no parquet or safetensors file" in printed
