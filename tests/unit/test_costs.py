"""What students cost, plugged into the teacher: alone, in any number of processes, untrained."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._pytree import tree_map

from ppcl.closed_forms import linear_map_fits, linear_maps
from ppcl.errors import UserError
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.runtime import devices, processes
from ppcl.settings import DistillSettings, WidthSettings
from ppcl.storage import schemas, tables, texts
from ppcl.teacher import pipelines
from ppcl.training import distillation, prices, steps, tail, teacher_streams
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import State
from support import ROOT, tiny

CPU = torch.device("cpu")
FIRST, SECOND = NewBlock(0, 1), NewBlock(3, 4)
EVERY = [SECOND, NewBlock(1, 3), FIRST]

# ---- students in the teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_price_is_the_relative_velocity_error_in_float32(teacher, reader, dtype):
    """Of weights in the teacher's lower precision, without the rounding of activations."""
    low = copy.deepcopy(teacher).to(dtype)
    taught = students.start(low, [SECOND], "first")
    rows = reader.rows(heldout=True)
    price = prices.error(tiny.context(low, reader), taught, rows, 4)
    exact = copy.deepcopy(low).double()
    model, _ = blocks.assembled(
        exact, {SECOND.ends: copy.deepcopy(taught[SECOND]).to(dtype).double()}
    )
    error = power = 0.0
    for batch in reader.batches(rows, 4):
        given = tree_map(lambda x: x.double() if is_float(x) else x, batch.arguments)
        with torch.no_grad():
            answer, wanted = model(**given)[0], exact(**given)[0]
        error, power = error + (answer - wanted).square().sum(), power + wanted.square().sum()
    assert price == pytest.approx((error / power).item(), rel=1e-4) and price > 1e-4
    # Everything has the type that it had.
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert all(p.dtype == torch.float32 for p in taught[SECOND].parameters())
    batch = next(reader.batches(rows, 4))
    low_call = tree_map(lambda x: x.to(dtype) if is_float(x) else x, batch.arguments)
    inputs = steps.sequential_inputs(low, taught, low_call, Accelerator(cpu=True))
    assert inputs[SECOND]["hidden_states"].dtype == dtype


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def test_the_price_of_a_perfect_student_is_zero(teacher, reader):
    own = {NewBlock(2, 2): teacher.transformer_blocks[2]}
    assert prices.error(tiny.context(teacher, reader), own, reader.rows(heldout=True), 4) < 1e-12


def test_a_change_costs_the_same_from_its_first_block_on(teacher, reader, monkeypatch):
    """Forwards, back again, behind all blocks, and where there is no room for streams."""
    rows, models = reader.rows(heldout=True), []
    for index in (1, 4, 2):
        other = copy.deepcopy(teacher.transformer_blocks[index])
        other.attn.to_out[0].weight.mul_(1.1)
        models.append((index, blocks.assembled(teacher, {(index, index): other})[0]))
    behind = copy.copy(teacher)
    behind._modules = dict(teacher._modules) | {"proj_out": copy.deepcopy(teacher.proj_out)}
    behind.proj_out.weight.mul_(1.1)
    models.append((6, behind))
    judged = prices.Judged(tiny.context(teacher, reader), rows, 3)
    whole = [judged.error(model, 0) for _, model in models]
    assert min(whole) > 1e-5
    assert [judged.error(m, first) for first, m in models] == pytest.approx(whole, rel=1e-5)
    # The blocks before it do not run.
    ran = []
    judged.error(models[0][1], 1)
    with blocks.watch(
        blocks.block_sequence(teacher), lambda block, _bound: ran.append(block.index)
    ):
        judged.error(models[0][1], 1)
    assert set(ran) == {2, 3, 4, 5}  # and block 1 is the other one
    monkeypatch.setattr(teacher_streams, "KEPT_BYTES", 0)
    judged = prices.Judged(tiny.context(teacher, reader), rows, 3)
    assert [judged.error(m, first) for first, m in models] == pytest.approx(whole, rel=1e-5)
    assert judged._streams._streams[6][0] and not judged._streams._streams[6][1]


def test_changes_with_one_end_cost_together_what_they_cost_alone(teacher, reader, monkeypatch):
    """In small batches, which behind the changes are joined; and again where nothing is kept."""
    rows = reader.rows(heldout=True)
    # Also at the very end, where nothing of the teacher but its head follows.
    parts = [NewBlock(0, 2), NewBlock(1, 2), NewBlock(2, 2), NewBlock(4, 5), NewBlock(5, 5)]
    taught = students.start(teacher, parts, "first")
    for student in taught.values():
        with torch.no_grad():
            student.attn.to_out[0].weight.mul_(1.1)
    alone = [
        prices.error(tiny.context(teacher, reader), {part: taught[part]}, rows, 1) for part in parts
    ]
    assert len(set(alone)) == 5 and min(alone) > 1e-5
    sets = {p.name: (p.first, p.last, partial(lambda p: {p: taught[p]}, p)) for p in parts}
    changes = prices.of_students(teacher, sets)
    judged = prices.Judged(tiny.context(teacher, reader), rows, 2 * len(rows))
    assert judged.together == 2 * len(reader.in_batches(rows, 2 * len(rows))) > 1
    sizes, go_on = [], prices.Judged._go_on
    monkeypatch.setattr(prices.Judged, "_go_on", lambda *a: sizes.append(len(a[3])) or go_on(*a))
    assert prices.measure(judged, changes) == pytest.approx(alone, rel=1e-4)
    assert max(sizes) > 1 and set(sizes) <= set(range(1, 1 + judged.together))
    monkeypatch.setattr(teacher_streams, "KEPT_BYTES", -1)
    judged = prices.Judged(tiny.context(teacher, reader), rows, 2 * len(rows))
    assert prices.measure(judged, changes) == pytest.approx(alone, rel=1e-4)


@torch.no_grad()
def test_what_is_left_of_a_group_is_measured_with_the_rest_of_it(teacher, reader, tmp_path):
    """Alone, an error would be rounded in another way than in a run that nobody stopped."""
    rows, parts = reader.rows(heldout=True), [NewBlock(0, 2), NewBlock(1, 2), NewBlock(2, 2)]
    taught = students.start(teacher, parts, "first")
    sets = {p.name: (p.first, p.last, partial(lambda p: {p: taught[p]}, p)) for p in parts}
    changes = prices.of_students(teacher, sets)

    def measured():
        judged = prices.Judged(tiny.context(teacher, reader), rows, 3 * len(rows))
        assert judged.together >= 3
        return prices.measure(judged, changes, State(tmp_path, "same"))

    whole = measured()
    kept = texts.read_sealed(tmp_path / "0.json")
    assert kept["errors"].keys() == sets.keys()
    del kept["errors"][parts[1].name]
    texts.write_sealed(tmp_path / "0.json", kept)
    assert measured() == whole
    assert texts.read_sealed(tmp_path / "0.json")["errors"].keys() == sets.keys()


def test_a_text_run_up_to_the_end_goes_on_with_others(teacher, reader):
    """Nothing takes apart the two texts that its blocks pass on, so that it needs its own batch."""
    run = [NewBlock(4, 4, text="lend"), NewBlock(5, 5, text="borrow", source=(4, 4))]
    sets = [run, [NewBlock(5, 5)], [NewBlock(3, 5)]]
    taught = students.start(teacher, [part for parts in sets for part in parts], "first")
    for student in taught.values():
        with torch.no_grad():
            student.attn.to_out[0].weight.mul_(1.1)
    rows = reader.rows(heldout=True)
    made = [{part: taught[part] for part in parts} for parts in sets]
    alone = [prices.error(tiny.context(teacher, reader), one, rows, 1) for one in made]
    assert min(alone) > 1e-5
    named = {
        str(number): (parts[0].first, parts[-1].last, lambda one=one: one)
        for number, (parts, one) in enumerate(zip(sets, made, strict=True))
    }
    judged = prices.Judged(tiny.context(teacher, reader), rows, 3 * len(rows))
    assert judged.together >= 3
    changes = prices.of_students(teacher, named)
    measured = prices.measure(judged, changes)
    assert measured == pytest.approx(alone, rel=1e-4)


def test_a_streamed_model_computes_in_float32_and_rests_as_it_was():
    """Also one that is stopped before a block, or breaks within."""
    low, call = tiny.transformer(blocks=3, scale=0.2).to(torch.bfloat16), tiny.arguments()
    exact = copy.deepcopy(low).float()
    kept = {name: (p.dtype, p.clone()) for name, p in low.named_parameters()}
    modules = [block.module for block in blocks.block_sequence(low)]
    devices.stream(low, modules, CPU)
    with devices.in_float32(low, modules):
        assert torch.equal(low(**call)[0], exact(**call)[0])
        streams = tail.streams_before(low, 2, call)
        for stream, value in tail.streams_before(exact, 2, call).items():
            assert torch.equal(streams[stream], value)
        with pytest.raises(RuntimeError):
            low(**call | {"timestep": torch.zeros(5)})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in exact.modules())
    for name, parameter in low.named_parameters():
        dtype, value = kept[name]
        assert parameter.dtype == dtype and torch.equal(parameter, value)
    with pytest.raises(RuntimeError, match="dtype"):  # as ever, afterwards
        low(**call)


def errors_of(process, teacher, taught, reader, asked=None):
    def student_of(part):
        if asked is not None:
            asked.append(part)
        return {part: taught[part]}

    rows = reader.rows(heldout=True)
    students_of = {p.name: (p.first, p.last, partial(student_of, p)) for p in EVERY}
    changes = prices.of_students(teacher, students_of)
    judged = prices.Judged(tiny.context(teacher, reader, 0, process), rows, 4)
    return prices.measure(judged, changes)


@pytest.fixture
def nothing_done(monkeypatch):
    """As no file is there, the main process has nothing to tell (else: test_two_runs.py)."""
    monkeypatch.setattr(processes, "of_main", lambda _accelerator, values: values)


@pytest.mark.usefixtures("nothing_done")
def test_errors_are_shared_out_over_processes(teacher, reader, accelerator):
    taught = students.start(teacher, EVERY, "first")
    rows = reader.rows(heldout=True)
    expected = [
        prices.error(tiny.context(teacher, reader), {part: taught[part]}, rows, 4) for part in EVERY
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
        with pytest.raises(UserError, match=r"03-04 changed is nan.*set teacher\.dtype"):
            errors_of(process, teacher, taught, reader)
    with pytest.raises(UserError, match="03-04 changed is nan"):
        errors_of(tiny.Process(0, 1, None), teacher, taught, reader)


def test_cost_table_is_the_error_of_each_student_alone(teacher, reader, accelerator):
    taught = students.start(teacher, [SECOND, FIRST], "middle")
    units = [Unit((SECOND,)), Unit((FIRST,))]
    entries = [
        selection_file.unit_entry(unit, saved, seconds)
        for unit, saved, seconds in zip(units, (9, 7), (0.5, np.nan), strict=True)
    ]
    options = DistillSettings.of({"heldout_rows": 3, "batch_size": 2})
    table = distillation.cost_table(
        tiny.context(teacher, reader, 5, accelerator), units, taught, entries, options
    )
    rows = reader.sample_heldout("select", 3, 5)
    expected = pd.DataFrame({"unit": ["03-04", "00-01"], "first": [3, 0], "last": [4, 1]})
    expected = expected.assign(removed_blocks=1, saved_parameters=[9, 7])
    expected["saved_seconds"] = [0.5, np.nan]
    expected["velocity_error"] = [
        prices.error(tiny.context(teacher, reader), {part: student}, rows, 2)
        for part, student in taught.items()
    ]
    pd.testing.assert_frame_equal(table, expected.assign(rows=3), check_exact=True)
    assert list(table) == schemas.UNIT_COSTS.names


# ---- a teacher of lower precision


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """The embedded teacher, some recorded calls, and linear maps for text FFNs of little effect."""
    folder = ROOT / "resources" / "digits"
    prompts = ["a red 3 on blue", "a white 7 on black", "a green 1 on red", "a blue 9 on white"]
    path = tmp_path_factory.mktemp("digits") / "calls.parquet"
    reader = calls.Reader(tiny.record(folder, path, prompts))
    teacher = pipelines.load_transformer(tiny.source(folder), CPU)
    parts = [NewBlock(block, block, ("text",)) for block in (4, 11, 12, 17, 21)]
    wholes = {(b.index, b.index): b.module for b in blocks.block_sequence(teacher)}
    maps = [one for part in parts for one in linear_maps.maps_of(part)]
    rows = reader.rows(heldout=False), reader.rows(heldout=True)
    fits = linear_map_fits.fit(
        tiny.context(teacher, reader),
        wholes,
        maps,
        rows,
        WidthSettings.of({"batch_size": 64, "ridge": 1e-6}),
    )
    return teacher, reader, parts, {one: fit.probe for one, fit in fits.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prices_of_harmless_units_add_up(harmless, dtype):
    """In bfloat16, each would cost about 2e-5 by rounding alone."""
    teacher, reader, parts, maps = harmless
    low = copy.deepcopy(teacher).to(dtype)
    made = linear_maps.closed(low, parts, maps)
    judged = prices.Judged(tiny.context(low, reader), reader.rows(heldout=True), 64)
    costs = [
        judged.error(students.plugged(low, {part: made[part]})[0], part.first) for part in parts
    ]
    together = judged.error(students.plugged(low, made)[0], parts[0].first)
    assert max(costs) < 2e-6 and sum(costs) == pytest.approx(together, rel=0.2)


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
    table = tables.read(path, schemas.SENSITIVITY).to_pandas()
    return table.set_index(["first", "last"])


def test_every_run_costs_what_a_start_block_in_its_place_does(tiny_teacher, tiny_calls, tmp_path):
    costs = measure(tiny_teacher, tiny_calls, tmp_path / "s.parquet")
    assert list(costs.index) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    assert (costs["rows"] == 3).all()

    reader = calls.Reader(tiny_calls)
    # The prompts held out are two; the first of them is the one to select by.
    rows = np.flatnonzero(reader.index["heldout"])
    prompts = reader.index["prompt"][rows]
    rows = rows[prompts == min(prompts)]
    assert 3 < len(rows) < reader.index["heldout"].sum()
    judged = reader.sample_heldout("select", 3, 3)
    assert set(judged) <= set(rows) and len(set(judged)) == 3
    stock = tiny.load(tiny_teacher).transformer.double()
    for (first, last), middle in (((0, 1), 0), ((1, 3), 2), ((2, 4), 3)):
        every = list(stock.transformer_blocks)
        model = copy.copy(stock)
        model._modules = dict(stock._modules)
        model.transformer_blocks = nn.ModuleList(
            [*every[:first], every[middle], *every[last + 1 :]]
        )
        error = power = 0.0
        for row in judged:
            batch = reader.batch(np.array([row]))
            given = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in batch.arguments.items()
            }
            with torch.no_grad():
                answer = model(**given)[0]
            error += (answer - batch.output).square().sum().item()
            power += batch.output.double().square().sum().item()
        assert costs.loc[(first, last), "velocity_error"] == pytest.approx(error / power, rel=1e-3)
        assert error / power > 1e-6


def test_no_run_crosses_a_seam_or_holds_an_untouchable_block(
    tiny_teacher, tiny_calls, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "seams", lambda _model: [0, 2])
    monkeypatch.setattr(blocks, "untouchable", lambda _model: {4: "the test says so"})
    path = tmp_path / "s.parquet"
    costs = measure(tiny_teacher, tiny_calls, path, rows=1, longest=5)
    assert list(costs.index) == [(0, 1), (2, 3)]


def test_a_stopped_measurement_goes_on_where_it_was(
    tiny_teacher, tiny_calls, tmp_path, monkeypatch
):
    whole = measure(tiny_teacher, tiny_calls, tmp_path / "whole" / "whole.parquet")
    asked, error = [], prices.Judged.error

    def stopping(judged, model, first):
        asked.append(first)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return error(judged, model, first)

    monkeypatch.setattr(prices.Judged, "error", stopping)
    path = tmp_path / "stopped.parquet"
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_teacher, tiny_calls, path)
    assert not path.exists()
    resumed = measure(tiny_teacher, tiny_calls, path)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert len(asked) == len(whole) + 1  # only the one that was stopped is measured twice
    # What another measurement left is not used.
    measure(tiny_teacher, tiny_calls, path, rows=2)
    assert len(asked) == 1 + 2 * len(whole)
