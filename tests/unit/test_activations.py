"""What extraction keeps, against activations that are held whole in float64."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ppcl.errors import UserError
from ppcl.extraction import activations, call_tokens, modulation_inputs, token_store, token_table
from ppcl.runtime import devices
from ppcl.settings import ExtractSettings
from ppcl.storage import schemas, tables
from ppcl.transformer import call_tables, calls
from ppcl.transformer.context import State
from support import tiny

CPU = torch.device("cpu")
PROMPTS = ["a red 1 on blue", "a blue handwritten two on a red background", "4 in red", "a green 9"]
DEPTH = 5


@pytest.fixture(scope="module")
def world(tiny_teacher, tmp_path_factory):
    """The teacher, its calls in padded batches of four prompts, and a reader of them."""
    path = tmp_path_factory.mktemp("extract") / "calls.parquet"
    tiny.record(tiny_teacher, path, PROMPTS, batch=4)
    return tiny.load(tiny_teacher).transformer, calls.Reader(path)


def collect(world, rows=None, batch_size=4, moment_tokens=99, sample_tokens=3, sums=True):
    transformer, reader = world
    rows = np.arange(len(reader)) if rows is None else rows
    options = ExtractSettings.of(
        {
            "batch_size": batch_size,
            "moment_tokens": moment_tokens,
            "sample_tokens": sample_tokens,
            "checkpoint_every": 10**6,
        }
    )
    # The files stay open, and may go.
    with tempfile.TemporaryDirectory() as folder:
        return activations.collect(
            tiny.context(transformer, reader),
            rows,
            options,
            State(Path(folder), ""),
            tiny.NoBar(),
            sums=sums,
        )


@torch.no_grad()
def materialised(world, rows):
    """[boundary] -> stream -> [rows, tokens, d] of one batch, by hooks of our own."""
    transformer, reader = world
    batch = reader.batch(rows)
    boundaries = [{}]

    def first(_module, _args, kwargs):
        boundaries[0] = {"image": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"]}

    def each(_module, _args, returned):
        boundaries.append({"text": returned[0], "image": returned[1]})

    every = transformer.transformer_blocks
    handles = [every[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(each) for block in every]
    transformer(**batch.arguments)
    for handle in handles:
        handle.remove()
    return batch, boundaries


def lengths(batch):
    """Real text tokens of every sample."""
    mask = batch.arguments.get("encoder_hidden_states_mask")
    count = batch.arguments["encoder_hidden_states"].shape[1]
    return mask.sum(1).tolist() if mask is not None else [count] * len(batch)


def test_without_sums_the_rest_is_the_same(world):
    """Where nothing is probed."""
    _, expected = collect(world)
    moments, samples = collect(world, sums=False)
    assert moments.sums == {}
    for stream, sample in expected.items():
        assert np.array_equal(samples[stream]["token"], sample["token"])


def test_moments_are_the_direct_sums(world):
    """One sample a batch, so that all of its tokens count."""
    _, reader = world
    moments, _ = collect(world, batch_size=1)
    direct = {}
    for row in reader.rows(heldout=False):
        batch, boundaries = materialised(world, np.array([row]))
        for i in range(DEPTH):
            for stream, x in boundaries[i].items():
                keep = lengths(batch)[0] if stream == "text" else x.shape[1]
                x, after = (t[0, :keep].double().numpy() for t in (x, boundaries[i + 1][stream]))
                y = after - x
                parts = {
                    "count": np.array([len(x)], float),
                    "x_sum": x.sum(0),
                    "x_x": sum(np.outer(a, a) for a in x),
                    "y_sum": y.sum(0),
                    "x_y": sum(np.outer(a, b) for a, b in zip(x, y, strict=True)),
                    "y_y": np.array([(y**2).sum()]),
                }
                for name, value in parts.items():
                    key = f"{stream}.{i}.{name}"
                    direct[key] = direct.get(key, 0) + value
    assert moments.sums.keys() == direct.keys() and len(direct) == 2 * DEPTH * 6
    for key, value in direct.items():
        assert moments.sums[key].dtype == torch.float64
        np.testing.assert_allclose(moments.sums[key].numpy(), value, rtol=1e-9, atol=1e-9)


def test_moments_do_not_grow():
    moments = activations.Moments(CPU)
    x = torch.randn(50, 8)
    moments.add("image", 0, x, x + 1)
    size = sum(t.nbytes for t in moments.sums.values())
    for _ in range(20):
        moments.add("image", 0, x, x + 1)
    assert sum(t.nbytes for t in moments.sums.values()) == size == 8 * (2 + 2 * 8 + 2 * 64)
    assert moments.sums["image.0.count"].item() == 21 * 50


def test_sums_in_main_memory_are_those_on_the_device(world, monkeypatch):
    """As on a GPU: tokens wait until they are as many as channels, 32; none are lost."""
    expected, _ = collect(world)
    monkeypatch.setattr(devices, "free_memory", lambda _: 1)
    summed, once = [], activations.Moments._sum

    def look(self, stream, block, x, after):
        summed.append((stream, block, len(x)))
        once(self, stream, block, x, after)

    monkeypatch.setattr(activations.Moments, "_sum", look)
    moments, _ = collect(world)
    assert moments.sums.keys() == expected.sums.keys()
    for key, value in expected.sums.items():
        torch.testing.assert_close(moments.sums[key], value, rtol=1e-12, atol=1e-12)
    counts = [n for stream, block, n in summed if (stream, block) == ("text", 1)]
    assert sum(counts) == moments.sums["text.1.count"].item()
    assert len(counts) > 2 and min(counts[:-1]) >= 32 > max(counts) / 2


def test_waiting_tokens_do_not_grow():
    moments = activations.Moments(CPU, apart=True)
    for _ in range(20):
        moments.add("image", 0, torch.randn(3, 8), torch.randn(3, 8))
        moments.settle()
        assert sum(len(x) for x, _ in moments._waiting["image", 0]) < 8
    moments.settle(everything=True)
    assert moments.sums["image.0.count"].item() == 60


def test_held_out_tokens_never_enter_the_moments(world):
    transformer, reader = world
    everything, _ = collect(world)
    alone, _ = collect(world, rows=reader.rows(heldout=False))
    for key in everything.sums:
        torch.testing.assert_close(everything.sums[key], alone.sums[key], rtol=1e-5, atol=1e-5)
    assert everything.sums["image.0.count"].item() == 16 * len(reader.rows(heldout=False))
    nothing, sample = collect(world, rows=reader.rows(heldout=True))
    assert nothing.sums == {} and sample["image"]["heldout"].all()


def test_padding_is_left_out(world):
    _, reader = world
    rows = np.arange(4)  # one call of all four prompts
    batch, boundaries = materialised(world, rows)
    real = lengths(batch)
    assert min(real) < max(real)
    moments, sample = collect(world, rows)
    fit = ~batch.rows["heldout"]
    assert moments.sums["text.0.count"].item() == sum(np.array(real)[fit])
    text = sample["text"]
    for row, length in zip(rows, real, strict=True):
        here = text["token"][text["prompt"] == reader.index["prompt_index"][row]]
        assert len(here) == len(set(here)) == 3 and here.max() < length
    x = boundaries[2]["text"].double().numpy()
    picked = np.concatenate([x[i, : real[i]] for i in np.flatnonzero(fit)])
    np.testing.assert_allclose(moments.sums["text.2.x_sum"].numpy(), picked.sum(0), rtol=1e-9)


def test_a_sample_gives_the_same_tokens_whatever_it_is_batched_with(world):
    """As many as it has itself; probes are fitted on all of them."""
    about = ("prompt", "step", "timestep", "token", "heldout")
    batches = [collect(world, batch_size=size, sample_tokens=7) for size in (1, 3, 4)]
    (alone, samples), *others = batches
    for stream, sample in samples.items():
        values = np.stack(list(sample["value"]))
        for _, batched in others:
            for name in about:
                np.testing.assert_array_equal(batched[stream][name], sample[name])
            again = np.stack(list(batched[stream]["value"]))
            np.testing.assert_allclose(again, values, rtol=1e-4, atol=1e-4)
    for moments, _ in others:
        for key, value in alone.sums.items():
            torch.testing.assert_close(moments.sums[key], value, rtol=1e-5, atol=1e-5)
    counts = np.unique(np.diff(np.flatnonzero(np.diff(samples["text"]["prompt"]))))
    assert len(counts) > 1  # unlike prompts gave unlike numbers


@pytest.fixture(scope="module")
def captions(teacher, tmp_path_factory):
    """Calls of `teacher`, of which some have no text at all: one in a batch, then all of them."""

    def reader(lengths, heldout=()):
        given = tiny.arguments((5, *lengths))
        given = {k: v[1:] if hasattr(v, "shape") else v for k, v in given.items()}
        given["img_shapes"] = given["img_shapes"][1:]
        rows = tiny.places(len(lengths))
        rows["heldout"] = [row in heldout for row in range(len(lengths))]
        written = call_tables.to_tables(given, teacher(**given)[0], rows)
        path = tmp_path_factory.mktemp("captions") / "calls.parquet"
        call_tables.write(path, [table.schema for table in written], written, {})
        return calls.Reader(path)

    return reader


@pytest.mark.parametrize("size", [1, 3])
def test_a_sample_without_text_gives_none_of_it(teacher, captions, size):
    moments, samples = collect((teacher, captions((4, 0, 2))), batch_size=size)
    assert samples["text"]["prompt"].tolist() == [0, 0, 0, 2, 2]
    assert samples["image"]["prompt"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert moments.sums["text.3.count"].item() == 6
    assert all(np.isfinite(values).all() for values in samples["text"]["value"])


def test_a_stream_of_padding_alone_is_named(teacher, captions):
    with pytest.raises(UserError, match="the text stream of every call is padding alone"):
        collect((teacher, captions((0, 0))))
    with pytest.raises(UserError, match="the text stream of every call to fit on is padding"):
        collect((teacher, captions((0, 3), heldout=(1,))))


def test_padding_may_hold_nan(teacher, captions):
    """As after attention of queries that may see nothing; a real token may not."""
    reader, last = captions((4, 1)), teacher.transformer_blocks[-1]
    expected = collect((teacher, reader))
    for token in (1, 0):  # of the second sample: padding, its only real one

        def spoil(_module, _args, out, token=token):
            out[0][1, token] = torch.nan
            return out

        handle = last.register_forward_hook(spoil)
        try:
            if token:
                assert_same(expected, collect((teacher, reader)))
            else:
                with pytest.raises(UserError, match="the text stream after block 5 holds NaN"):
                    collect((teacher, reader))
        finally:
            handle.remove()


def test_picked_tokens_depend_on_the_row_only():
    masks = {"text": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()}
    both = call_tokens.pick_tokens(masks, "text", (2, 5), 2, np.array([8, 3]), 0)
    alone = call_tokens.pick_tokens(
        {"text": masks["text"][1:]}, "text", (1, 5), 2, np.array([3]), 0
    )
    assert np.array_equal(both[1], alone[0]) and both[1].max() < 3
    assert all(len(set(row)) == 2 for row in both)
    # The first tokens are a random part even when all are picked: no row prefers a position.
    every = np.stack(call_tokens.pick_tokens({}, "image", (200, 4), 4, np.arange(200), 0))
    assert (np.sort(every) == np.arange(4)).all()
    assert (np.bincount(every[:, 0], minlength=4) > 30).all()
    other = [
        call_tokens.pick_tokens({}, "image", (1, 500), 20, np.array([row]), seed)[0].tolist()
        for row, seed in ((3, 0), (4, 0), (3, 1))
    ]
    assert len({str(tokens) for tokens in other}) == 3


@pytest.fixture(scope="module")
def sampled(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    _, samples = collect(world)
    token_table.write_sample(path, samples, {"seed": "0"})
    return path, samples


def test_tokens_are_in_one_order_at_every_boundary(world, sampled):
    """Every stored token is the teacher's activation at the place that its row names."""
    transformer, reader = world
    path, _ = sampled
    table = tables.read(path, schemas.tokens(32)).drop_columns("value").to_pandas()
    tokens = token_table.TokenReader(path)
    assert tokens.boundaries == DEPTH + 1 and set(tokens.streams) == {"image", "text"}
    where = ["prompt", "step", "timestep", "token", "heldout"]
    known = {}
    for rows in (bucket[i : i + 4] for bucket in reader.buckets for i in range(0, len(bucket), 4)):
        batch, boundaries = materialised(world, rows)
        for s in range(len(rows)):
            place = tuple(batch.rows[k][s] for k in ("prompt_index", "step", "timestep"))
            known.setdefault(place, []).append(
                {(b, n): v[s] for b, both in enumerate(boundaries) for n, v in both.items()}
            )
    for stream in tokens.streams:
        part = table[table["stream"] == stream]
        first = part[part["boundary"] == 0][where].reset_index(drop=True)
        assert len(first) == 3 * len(reader)
        assert np.array_equal(tokens.heldout(stream), first["heldout"])
        assert np.array_equal(tokens.prompts(stream), first["prompt"])
        values = np.stack([tokens.values(b, stream) for b in range(DEPTH + 1)])
        for boundary in range(DEPTH + 1):
            here = part[part["boundary"] == boundary][where].reset_index(drop=True)
            assert here.equals(first)
        for j, row in first.iterrows():
            # Guidance calls twice at one place; the token is one of the two, at all boundaries.
            both = known[row["prompt"], row["step"], row["timestep"]]
            matches = [
                all(
                    np.array_equal(values[b, j], one[b, stream][int(row["token"])].numpy())
                    for b in range(DEPTH + 1)
                )
                for one in both
                if row["token"] < len(one[0, stream])
            ]
            assert any(matches), (stream, j)


def test_a_store_gives_back_what_it_got(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(4, n, 6)).astype(np.float32) for n in (3, 0, 2, 1)]
    store = token_store.Store(tmp_path / "a", (4, 9, 6))
    for part in parts:
        store.append(part)
    assert store.shape == (4, 6, 6)
    np.testing.assert_array_equal(np.stack(list(store)), np.concatenate(parts, axis=1))
    with open(tmp_path / "a", "r+b") as file:
        file.seek(4 * 9 * 6 * 2 + 5)
        file.write(b"!")
    store[1]
    with pytest.raises(UserError, match=f"a is not what was written; delete {tmp_path} and rerun"):
        store[2]


def test_a_full_disk_ends_a_store_in_one_line(tmp_path):
    (tmp_path / "image.tokens").symlink_to("/dev/full")
    store = token_store.Store(tmp_path / "image.tokens", (2, 4, 3))
    with pytest.raises(UserError, match=r"image\.tokens: No space left.*make room on this disk"):
        store.append(np.ones((2, 2, 3), np.float32))


class Killed(Exception):
    """In place of a kill."""


class Deadly(tiny.NoBar):
    """Ends the program after so many updates."""

    def __init__(self, updates):
        self.left, self.seen = updates, []

    def update(self, count):
        self.seen.append(count)
        self.left -= 1
        if not self.left:
            raise Killed


def collect_in(folder, world, bar, identity="i"):
    """In batches of 4, with a checkpoint every 8 rows."""
    transformer, reader = world
    options = ExtractSettings.of(
        {"batch_size": 4, "moment_tokens": 9, "sample_tokens": 3, "checkpoint_every": 8}
    )
    rows = np.arange(len(reader))
    given = modulation_inputs.Sums(transformer, [(1, "img_mod.1"), (5, "norm_out.linear")], CPU)
    collected = activations.collect(
        tiny.context(transformer, reader), rows, options, State(folder, identity), bar, given
    )
    return *collected, given.result()


def assert_same(one, other):
    assert one[0].sums.keys() == other[0].sums.keys() and one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[0].sums[key]) for key, value in one[0].sums.items())
    for stream, sample in one[1].items():
        for name, value in sample.items():
            np.testing.assert_array_equal(np.array(list(value)) if name == "value" else value,
                np.array(list(other[1][stream][name])) if name == "value"
                else other[1][stream][name])  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(
    world, tmp_path, monkeypatch, apart, killed_after
):
    monkeypatch.setattr(devices, "free_memory", lambda _: 1 if apart else None)
    whole = collect_in(tmp_path / "whole", world, Deadly(99))
    with pytest.raises(Killed):
        collect_in(tmp_path / "killed", world, Deadly(killed_after + 1))
    bar = Deadly(99)
    resumed = collect_in(tmp_path / "killed", world, bar)
    assert bar.seen[0] == 8 * (killed_after // 2)  # as far as the last checkpoint
    assert sum(bar.seen) == len(world[1])
    assert_same(whole, resumed)
    given, again = whole[2], resumed[2]
    assert given.places == again.places == {(1, "img_mod.1"): 0, (5, "norm_out.linear"): 0}
    assert all(torch.equal(x, again.tensors()[name]) for name, x in given.tensors().items())


def test_what_a_killed_run_left_is_used_only_if_it_is_whole_and_of_this_run(world, tmp_path):
    with pytest.raises(Killed):
        collect_in(tmp_path, world, Deadly(4))
    bar = Deadly(99)
    collect_in(tmp_path, world, bar, identity="another")
    assert bar.seen[0] == 0
    with pytest.raises(Killed):
        collect_in(tmp_path, world, Deadly(4), identity="third")
    path = tmp_path / "text.tokens"
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"text\.tokens is not what was written; delete"):
        collect_in(tmp_path, world, Deadly(99), identity="third")
    path.unlink()
    with pytest.raises(UserError, match=r"text\.tokens: No such file.*removed while"):
        collect_in(tmp_path, world, Deadly(99), identity="third")


def test_nan_activations_name_block_and_stream(world):
    transformer, reader = world
    bias = transformer.transformer_blocks[2].img_mlp.net[2].bias
    with torch.no_grad():
        kept, bias[0] = bias[0].item(), torch.inf
        try:
            with pytest.raises(UserError, match="the image stream after block 2 holds NaN"):
                collect(world, rows=np.arange(2))
        finally:
            bias[0] = kept


def test_a_truncated_token_file_is_named(sampled, tmp_path):
    path = tmp_path / "tokens.parquet"
    path.write_bytes(sampled[0].read_bytes()[:-9])
    with pytest.raises(UserError, match=r"tokens\.parquet: truncated or not parquet"):
        token_table.TokenReader(path)


@pytest.mark.parametrize("name", ["boundary", "stream", "value"])
def test_a_token_table_of_other_types_is_refused(sampled, tmp_path, name):
    table, path = tables.read(sampled[0]), tmp_path / "tokens.parquet"
    place = table.column_names.index(name)
    fields = (
        (table.drop([name]), f"column '{name}' is missing"),
        (
            table.set_column(place, name, pa.array(["0"] * len(table)).dictionary_encode()),
            f"column '{name}' is dictionary.*, not ",
        ),
    )
    for other, message in fields:
        tables.write(path, other, other.schema, {})
        with pytest.raises(UserError, match=rf"tokens\.parquet: {message}"):
            token_table.TokenReader(path)


def test_a_narrower_stream_keeps_its_width(sampled, tmp_path):
    """As Mochi's text has; the table is as wide as the widest."""
    _, samples = sampled
    narrow = samples["text"] | {"value": np.stack(list(samples["text"]["value"]))[..., :8]}
    path = tmp_path / "t.parquet"
    token_table.write_sample(path, samples | {"text": narrow}, {"seed": "0"})
    tokens = token_table.TokenReader(path)
    for stream, expected in (("image", samples["image"]), ("text", narrow)):
        for boundary, value in enumerate(expected["value"]):
            np.testing.assert_array_equal(tokens.values(boundary, stream), value)
