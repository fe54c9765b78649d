"""What students cost, plugged into the teacher: alone, in any number of processes, untrained."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import nn

from ppcl import blocks, calls, devices, distillation, schemas, students, tables
from ppcl.errors import UserError
from ppcl.plans import Part, Unit

FIRST, SECOND = Part(0, 1), Part(3, 4)
EVERY = [SECOND, Part(1, 3), FIRST]

# ---- students in the teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plugged_error_is_the_relative_velocity_error(teacher, reader, accelerator, dtype):
    """Also with a teacher of lower precision than the students."""
    low = copy.deepcopy(teacher).to(dtype)
    taught = students.start(low, [FIRST], "first")
    rows = reader.rows(heldout=True)
    batches = list(reader.batches(rows, 4))
    for batch in batches:
        for key, value in batch.arguments.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                batch.arguments[key] = value.to(dtype)

    class Same:
        @staticmethod
        def batches(_rows, _size, _device):
            return batches

    found = distillation.plugged_error(low, taught, Same, rows, 4, accelerator)
    student = copy.deepcopy(taught[FIRST]).to(dtype)
    model, _ = blocks.assembled(low, {FIRST.key: student})
    with torch.no_grad():
        answer, wanted = model(**batches[0].arguments)[0].double(), batches[0].output.double()
    expected = (answer - wanted).square().sum() / wanted.square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-6) and found > 1e-4
    inputs = distillation.sequential_inputs(low, taught, batches[0].arguments, accelerator)
    assert inputs[FIRST]["hidden_states"].dtype == dtype
    assert all(p.dtype == torch.float32 for p in taught[FIRST].parameters())


def test_plugged_error_of_a_perfect_student_is_zero(teacher, reader, accelerator):
    own = {Part(2, 2): teacher.transformer_blocks[2]}
    rows = reader.rows(heldout=True)
    assert distillation.plugged_error(teacher, own, reader, rows, 4, accelerator) < 1e-12


def errors_of(process, teacher, taught, reader, asked=None):
    def student_of(part):
        if asked is not None:
            asked.append(part)
        return {part: taught[part]}

    rows, students_of = reader.rows(heldout=True), {p.name: partial(student_of, p) for p in EVERY}
    return distillation.plugged_errors(teacher, students_of, reader, rows, 4, process)


@pytest.fixture
def nothing_done(monkeypatch):
    """As no file is there, the main process has nothing to tell (else: test_two_runs.py)."""
    monkeypatch.setattr(devices, "of_main", lambda _accelerator, values: values)


@pytest.mark.usefixtures("nothing_done")
def test_errors_are_shared_out_over_processes(teacher, reader, accelerator):
    taught = students.start(teacher, EVERY, "first")
    rows = reader.rows(heldout=True)
    expected = [
        distillation.plugged_error(teacher, {part: taught[part]}, reader, rows, 4, accelerator)
        for part in EVERY
    ]
    assert errors_of(accelerator, teacher, taught, reader) == expected
    assert len(set(expected)) == 3 and min(expected) > 1e-4
    for count in (2, 4):  # one of the four has nothing to do
        parts, asked = {}, []
        for index in range(count):
            one = tiny.Process(index, count, lambda i, v: parts.setdefault(i, v), "sum")
            errors_of(one, teacher, taught, reader, asked)
        assert sorted(asked, key=EVERY.index) == EVERY
        for index in range(count):
            one = tiny.Process(index, count, lambda _i, _v: sum(parts.values()), "sum")
            assert errors_of(one, teacher, taught, reader) == expected


@pytest.mark.usefixtures("nothing_done")
def test_a_broken_student_is_named_by_every_process(teacher, reader):
    taught = students.start(teacher, EVERY, "first")
    with torch.no_grad():
        taught[SECOND].img_mod[1].bias[0] = torch.nan
    broken = torch.tensor([torch.nan, 0, 0], dtype=torch.float64)
    for index in range(2):
        process = tiny.Process(index, 2, lambda _i, v: v + broken, "sum")
        with pytest.raises(UserError, match=r"a student for 03-04 is nan.*set teacher\.dtype"):
            errors_of(process, teacher, taught, reader)
    with pytest.raises(UserError, match="a student for 03-04 is nan"):
        errors_of(tiny.Process(0, 1, None), teacher, taught, reader)


def test_cost_table_is_the_error_of_each_student_alone(teacher, reader, accelerator):
    taught = students.start(teacher, [SECOND, FIRST], "middle")
    units = [Unit((SECOND,)), Unit((FIRST,))]
    entries = [
        students.plan_entry(unit, saved, seconds)
        for unit, saved, seconds in zip(units, (9, 7), (0.5, np.nan), strict=True)
    ]
    options = {"heldout_rows": 3, "batch_size": 2}
    found = distillation.cost_table(
        teacher, units, taught, entries, reader, options, 5, accelerator
    )
    rows = np.random.default_rng(5).permutation(reader.rows(heldout=True))[:3]
    expected = pd.DataFrame({"unit": ["03-04", "00-01"], "first": [3, 0], "last": [4, 1]})
    expected = expected.assign(removed_blocks=1, saved_parameters=[9, 7])
    expected["saved_seconds"] = [0.5, np.nan]
    expected["velocity_error"] = [
        distillation.plugged_error(teacher, {part: student}, reader, rows, 2, accelerator)
        for part, student in taught.items()
    ]
    pd.testing.assert_frame_equal(found, expected.assign(rows=3), check_exact=True)
    assert list(found) == schemas.UNIT_ERRORS.names


# ---- untrained students: the program sensitivity

OPTIONS = {"rows": 3, "longest": 3, "batch_size": 2}


def measure(tiny_teacher, tiny_calls, path, **options):
    settings = {
        "seed": 3,
        "device": "cpu",
        "teacher": {"path": str(tiny_teacher)},
        "prune": {"start": "middle"},
        "sensitivity": OPTIONS | options,
    }
    tiny.stage("sensitivity", settings, calls=tiny_calls, state=path.parent / "state", table=path)
    found = tables.read(path, schemas.SENSITIVITY).to_pandas()
    return found.set_index(["first", "last"])


def test_every_run_costs_what_a_start_block_in_its_place_does(tiny_teacher, tiny_calls, tmp_path):
    found = measure(tiny_teacher, tiny_calls, tmp_path / "s.parquet")
    assert list(found.index) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    assert (found["rows"] == 3).all()

    reader = calls.Reader(tiny_calls)
    # The prompts held out are two; the first of them is the one to select by.
    rows = np.flatnonzero(reader.index["heldout"])
    prompts = reader.index["prompt"][rows]
    rows = rows[prompts == min(prompts)]
    assert 3 < len(rows) < reader.index["heldout"].sum()
    stock = tiny.load(tiny_teacher).transformer.double()
    for (first, last), middle in (((0, 1), 0), ((1, 3), 2), ((2, 4), 3)):
        every = list(stock.transformer_blocks)
        model = copy.copy(stock)
        model._modules = dict(stock._modules)
        model.transformer_blocks = nn.ModuleList(
            [*every[:first], every[middle], *every[last + 1 :]]
        )
        error = power = 0.0
        for row in np.random.default_rng(3).permutation(rows)[:3]:
            batch = reader.batch(np.array([row]))
            given = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in batch.arguments.items()
            }
            with torch.no_grad():
                answer = model(**given)[0]
            error += (answer - batch.output).square().sum().item()
            power += batch.output.double().square().sum().item()
        assert found.loc[(first, last), "velocity_error"] == pytest.approx(error / power, rel=1e-3)
        assert error / power > 1e-6


def test_no_run_crosses_a_seam_or_holds_an_untouchable_block(
    tiny_teacher, tiny_calls, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "seams", lambda _model: [0, 2])
    monkeypatch.setattr(blocks, "untouchable", lambda _model: {4: "the test says so"})
    path = tmp_path / "s.parquet"
    found = measure(tiny_teacher, tiny_calls, path, rows=1, longest=5)
    assert list(found.index) == [(0, 1), (2, 3)]


def test_a_stopped_measurement_goes_on_where_it_was(
    tiny_teacher, tiny_calls, tmp_path, monkeypatch
):
    whole = measure(tiny_teacher, tiny_calls, tmp_path / "whole" / "whole.parquet")
    asked, plugged_error = [], distillation.plugged_error

    def stopping(transformer, taught, *rest):
        asked.extend(taught)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return plugged_error(transformer, taught, *rest)

    monkeypatch.setattr(distillation, "plugged_error", stopping)
    path = tmp_path / "stopped.parquet"
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_teacher, tiny_calls, path)
    assert not path.exists()
    found = measure(tiny_teacher, tiny_calls, path)
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert len(asked) == len(whole) + 1  # only the one that was stopped is measured twice
    # What another measurement left is not used.
    measure(tiny_teacher, tiny_calls, path, rows=2)
    assert len(asked) == 1 + 2 * len(whole)
