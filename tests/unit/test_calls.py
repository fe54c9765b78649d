"""Recorded calls come back from their file without loss, and are drawn fairly."""

import runpy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.storage import tables
from ppcl.transformer import call_arguments, call_tables, calls
from support import SCRIPTS, tiny


def store(path, *every, shared=()):
    """Writes (arguments, output) calls; returns their reader."""
    written = [
        t
        for given, out in every
        for t in call_tables.to_tables(given, out, tiny.places(len(out)), shared)
    ]
    call_tables.write(path, [table.schema for table in written], written, {})
    return calls.Reader(path)


# ---- storage


def test_everything_comes_back_to_the_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    given = {
        "states": random(3, 4, 2),
        "half": random(3, 5).half(),
        "brain": torch.tensor([[1.1, -0.0], [1e-40, 3e38], [1 / 3, -7e-3]]).bfloat16(),
        "mask": torch.tensor([[True, False], [False, False], [True, True]]),
        "count": torch.tensor([2**62, -1, 0]),
        "double": random(3, 1).double(),
        "scalar": torch.tensor(2.5),
        "ids": random(7, 3).bfloat16(),  # shared: its first dimension is not the batch
        "table": random(3, 2),  # shared, although its first dimension could be the batch
        "shapes": [[(1, 2, 2)], [(1, 4, 1), (1, 2, 2)], []],
        "options": {"scale": 1.5, "pair": (1, "a"), "nothing": None, "flag": True},
        "sizes": (3, 4),
        "absent": None,
        "return_dict": True,
    }
    out = random(3, 4, 2).bfloat16()
    other = {"states": random(2, 9, 2), "brain": None}  # another shape: the columns hold nulls
    reader = store(tmp_path / "c.parquet", (given, out), (other, random(2, 1)), shared=("table",))
    assert [bucket.tolist() for bucket in reader.buckets] == [[0, 1, 2], [3, 4]]

    back = reader.batch(np.array([2, 0]))
    assert torch.equal(back.output.view(torch.int16), out[[2, 0]].view(torch.int16))
    expected = {name: value for name, value in given.items() if name != "absent"}
    assert back.arguments.keys() == expected.keys()
    for name, value in expected.items():
        got = back.arguments[name]
        if not isinstance(value, torch.Tensor):
            continue
        if name not in ("scalar", "ids", "table"):
            value = value[[2, 0]]
        assert got.dtype == value.dtype and got.shape == value.shape, name
        assert (
            got.numpy(force=True).tobytes() == value.numpy(force=True).tobytes()
            if (value.dtype != torch.bfloat16)
            else torch.equal(got.view(torch.int16), value.view(torch.int16))
        ), name
    assert back.arguments["shapes"] == [[], [(1, 2, 2)]]
    assert back.arguments["options"] == given["options"]
    assert back.arguments["sizes"] == (3, 4) and back.arguments["return_dict"] is False
    last = reader.batch(np.array([4]))
    assert set(last.arguments) == {"states", "return_dict"}
    assert torch.equal(last.arguments["states"][0], other["states"][1])


plain = st.sampled_from([None, True, -3, 0.1, float("inf"), "", "tuple"])


def nested(inner):
    lists = st.lists(inner, max_size=3)
    keys = st.sampled_from(["tuple", "mapping", "each", "x"])
    return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=2)


@settings(max_examples=25, deadline=None)
@given(st.recursive(plain, nested, max_leaves=6))
def test_other_arguments_survive_json(value):
    assert call_arguments.decode(call_arguments.encode(value, "a", None), {}) == value


def test_calls_with_other_shared_values_are_not_batched(tmp_path):
    def call(scale, **more):
        given = {"states": torch.ones(2, 3), "scale": torch.tensor(scale)}
        return given | more, torch.ones(2, 3)

    every = [call(1.0), call(2.0), call(1.0), call(1.0, mode="a"), call(1.0, mode="b")]
    reader = store(tmp_path / "c.parquet", *every)
    assert [bucket.tolist() for bucket in reader.buckets] == [[0, 1, 4, 5], [2, 3], [6, 7], [8, 9]]
    assert reader.batch(np.array([0, 4])).arguments["scale"] == 1
    assert reader.batch(np.array([3])).arguments["scale"] == 2


def test_tensors_in_containers_come_back(tmp_path):
    """A list of the samples' tensors, which may differ in shape (Z-Image); a tuple that all share
    (CogVideoX); a mapping (PixArt); and a tensor whose batch is its second dimension (HiDream)."""
    given = {
        "x": [torch.full((2, 3), float(i)) for i in range(3)],
        "texts": [torch.full((n, 2), float(n)) for n in (1, 4, 1)],
        "rotary": (torch.arange(3.0), torch.arange(6.0).view(3, 2)),
        "more": {"size": torch.arange(6).view(3, 2), "ratio": None},
        "layers": torch.arange(24.0).view(2, 3, 4),
        "scale": 2,
    }
    answer = torch.arange(3.0)[:, None]
    written = call_tables.to_tables(given, answer, tiny.places(3), ("rotary",), {"layers": 1})
    assert [len(table) for table in written] == [2, 1]
    path = tmp_path / "c.parquet"
    call_tables.write(path, [table.schema for table in written], written, {})
    reader = calls.Reader(path)
    for bucket, members in zip(reader.buckets, ([0, 2], [1]), strict=True):
        batch = reader.batch(bucket)
        assert torch.equal(batch.output, answer[members])
        assert batch.arguments["scale"] == 2
        assert isinstance(batch.arguments["rotary"], tuple)
        for name in ("x", "texts"):
            for one, member in zip(batch.arguments[name], members, strict=True):
                assert torch.equal(one, given[name][member])
        for one, other in zip(batch.arguments["rotary"], given["rotary"], strict=True):
            assert torch.equal(one, other)
        assert torch.equal(batch.arguments["more"]["size"], given["more"]["size"][members])
        assert batch.arguments["more"]["ratio"] is None
        assert torch.equal(batch.arguments["layers"], given["layers"][:, members])


def test_what_is_no_tensor_text_or_number_is_refused():
    with pytest.raises(
        UserError, match="of type object inside the transformer argument 'controls'"
    ):
        call_tables.to_tables({"controls": {"a": object()}}, torch.ones(2, 1), tiny.places(2))


def test_parts_are_merged_in_order(tmp_path):
    parts, values = [], torch.arange(12.0).reshape(6, 2)
    for number, part in enumerate(values.split(2)):
        parts.append(tmp_path / f"{number}.parquet")
        name = "states" if number < 2 else "other"
        store(parts[-1], ({name: part}, part + 100))
    call_tables.merge(parts, tmp_path / "all.parquet", {"made": "here"})
    reader = calls.Reader(tmp_path / "all.parquet")
    assert reader.provenance == {"made": "here"}
    assert [bucket.tolist() for bucket in reader.buckets] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(reader.batch(np.array([3, 1])).arguments["states"], values[[3, 1]])
    assert torch.equal(reader.batch(np.array([5])).arguments["other"], values[[5]])
    outputs = [reader.batch(np.array([row])).output[0] for row in range(6)]
    assert torch.equal(torch.stack(outputs), values + 100)


@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_truncated_file_is_named(tiny_calls, tmp_path, kept):
    content = tiny_calls.read_bytes()
    path = tmp_path / "calls.parquet"
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"calls\.parquet: truncated or not parquet.*delete"):
        calls.Reader(path)


# ---- drawing


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """30 rows of one shape and 10 of another."""
    wide = [({"states": torch.full((10, 1000), float(n))}, torch.ones(10, 1)) for n in range(3)]
    path = tmp_path_factory.mktemp("draw") / "c.parquet"
    return store(path, *wide, ({"states": torch.ones(10, 3)}, torch.ones(10, 1)))


def test_draw_is_a_pure_function_of_the_seed(uneven):
    rows = np.arange(5, 40)
    for seed in range(20):
        drawn = uneven.draw(rows, 8, (seed, 1))
        assert np.array_equal(drawn, uneven.draw(rows, 8, (seed, 1)))
        assert len(set(drawn)) == 8 and set(drawn) <= set(rows)
        assert any(set(drawn) <= set(bucket) for bucket in uneven.buckets)
        assert not np.array_equal(drawn, uneven.draw(rows, 8, (seed, 2)))
    assert len(uneven.draw(np.array([31, 33]), 5, (0,))) == 5  # fewer rows than asked for


def test_every_row_is_equally_likely(uneven):
    count = np.zeros(40)
    for seed in range(1500):
        np.add.at(count, uneven.draw(np.arange(40), 2, (7, seed)), 1)
    # 3,000 draws over 40 rows: 75 each, with a standard deviation of about 8.6.
    assert abs(count - 75).max() < 5 * 8.6
    assert abs(count[30:].sum() - 750) < 5 * 2 * np.sqrt(1500 * 0.25 * 0.75)


def test_batches_cover_all_rows_once(uneven):
    rows = np.array([39, 2, 11, 30, 7])
    batches = list(uneven.batches(rows, 2))
    assert [len(batch) for batch in batches] == [2, 1, 2]
    assert sorted(np.concatenate([batch.numbers for batch in batches])) == sorted(rows)


def test_memory_is_bounded_and_harmless(uneven):
    small = calls.Reader(uneven.path, memory=90_000)  # a row group of wide rows holds 40 kB
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = rng.integers(40, size=1)
        one, other = small.batch(row), uneven.batch(row)
        assert torch.equal(one.arguments["states"], other.arguments["states"])
        held = sum(t.nbytes for group in small._groups.values() for t in group.values())
        assert held == small._held <= 90_000
    assert len(uneven._groups) == 4
    nothing = calls.Reader(uneven.path, memory=0)
    nothing.batch(np.arange(30))
    assert len(nothing._groups) == 1


def test_heldout_prompts_either_select_or_report(reader, monkeypatch):
    prompts = np.array([f"prompt {row % 4}" for row in range(len(reader))], dtype=object)
    monkeypatch.setitem(reader.index, "prompt", prompts)
    select, report = reader.heldout_rows("select"), reader.heldout_rows("report")
    assert sorted([*select, *report]) == list(reader.rows(heldout=True))
    assert len(select) and len(report) and not set(prompts[select]) & set(prompts[report])


def test_a_sample_is_spread_over_the_timesteps(reader, monkeypatch):
    """One of each group of neighbours; where timesteps tell nothing, at random."""
    rng = np.random.default_rng(0)
    monkeypatch.setitem(reader.index, "timestep", rng.permutation(len(reader)).astype(float))
    rows = reader.heldout_rows("select")
    times = np.sort(reader.index["timestep"][rows])
    for count in (1, 2, len(rows) - 1, len(rows)):
        sampled = set()
        for seed in range(100):
            sample = reader.sample_heldout("select", count, seed)
            assert sample.tolist() == reader.sample_heldout("select", count, seed).tolist()
            drawn = np.sort(reader.index["timestep"][sample])
            for time, group in zip(drawn, np.array_split(times, count), strict=True):
                assert time in group
            sampled |= set(sample)
        assert sampled == set(rows)
    monkeypatch.setitem(reader.index, "timestep", np.full(len(reader), np.nan))
    samples = [reader.sample_heldout("select", 2, seed) for seed in range(100)]
    assert set(np.concatenate(samples)) == set(rows)
    assert all(len(set(sample)) == 2 for sample in samples)


def test_counts_that_cannot_be_met_are_told_once(reader, monkeypatch, caplog):
    """And so is one held-out prompt, which selects and is reported on."""
    monkeypatch.setitem(reader.index, "prompt", np.array(["one"] * len(reader), dtype=object))
    count = len(reader.rows(heldout=True))
    for _ in range(2):
        sample = reader.sample_heldout("report", 64, 0, "evaluate.velocity_rows")
    assert sorted(sample) == list(reader.rows(heldout=True))
    said = [record.getMessage() for record in caplog.records]
    assert "one prompt alone is held out" in said[0] and str(reader.path) in said[0]
    wanted = f"evaluate.velocity_rows asks for 64, and there are {count} held-out calls to report"
    assert said[1].startswith(wanted) and len(said) == 2
    reader.sample_heldout("select", count, 0, "sensitivity.rows")
    assert len(caplog.records) == 2


def test_fewer_calls_than_extraction_asks_for(reader, caplog):
    choose = runpy.run_path(str(SCRIPTS / "extract.py"))["choose_rows"]
    fit, heldout = len(reader.rows(heldout=False)), len(reader.heldout_rows("select"))
    assert len(choose(reader, 100, 0)) == fit + heldout
    for count, what in ((fit, "to fit on"), (heldout, "held out to select by")):
        assert (
            f"half of extract.rows asks for 50, and there are {count} calls {what}" in caplog.text
        )


def test_a_large_table_read_whole_is_noticed(tiny_calls, monkeypatch):
    """By what all tests of stages run under."""
    tiny.by_row_group(monkeypatch)
    assert len(tables.File(tiny_calls)) > 1
    assert len(tables.read(tiny_calls, columns=["prompt", "step"])) > 1
    with pytest.raises(AssertionError, match="is read whole"):
        tables.read(tiny_calls)
