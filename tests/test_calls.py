"""Recording a stock pipeline's calls, storing them without loss, and replaying them."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import record
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl import calls, recording
from ppcl.errors import UserError

PROMPTS = ["a red 1 on blue", "a blue handwritten two on a red background"]


@pytest.fixture(scope="module")
def pipe(tiny_teacher):
    return tiny.load(tiny_teacher)


@pytest.fixture(scope="module")
def recorded(tiny_teacher, tmp_path_factory):
    """Two prompts of unlike length in one batch, so text is padded and masked."""
    path = tmp_path_factory.mktemp("calls") / "calls.parquet"
    return tiny.record(tiny_teacher, path, PROMPTS, batch=2, renoised=3)


def meta(count, **more):
    rows = {
        "sample": list(range(count)),
        "prompt_index": list(range(count)),
        "prompt": ["p"] * count,
        "seed": [0] * count,
        "kind": ["pipeline"] * count,
        "step": [0] * count,
        "branch": [0] * count,
        "timestep": [1.0] * count,
        "sigma": [0.5] * count,
        "heldout": [False] * count,
    }
    return rows | {name: [value] * count for name, value in more.items()}


def store(path, *every, shared=()):
    """Writes (arguments, output) calls; returns their reader."""
    found = [calls.to_table(given, out, meta(len(out)), shared) for given, out in every]
    calls.write(path, [table.schema for table in found], found, {})
    return calls.Reader(path)


# ---- the stock pipeline


def test_replay_gives_the_recorded_output_to_the_bit(pipe, recorded):
    reader = calls.Reader(recorded)
    steps, branches, renoised = tiny.SETTINGS["num_inference_steps"], 2, 3
    assert len(reader) == 2 * branches * (steps + renoised)
    assert {len(bucket) for bucket in reader.buckets} == {len(reader) // 2}  # one per branch
    masked = 0
    for first in range(0, len(reader), 2):  # as they were batched
        batch = reader.batch(np.array([first, first + 1]))
        with torch.no_grad():
            assert torch.equal(pipe.transformer(**batch.arguments)[0], batch.output)
        masked += "encoder_hidden_states_mask" in batch.arguments
        assert batch.arguments["img_shapes"] == [[(1, 4, 4)]] * 2
    assert masked == steps + renoised  # the negative prompt has no padding


def test_where_a_call_happened(recorded):
    reader = calls.Reader(recorded)
    called = reader.rows(kinds=("pipeline",))
    sigmas = np.array([1, 2 / 3, 1 / 3])  # three steps of an unshifted schedule
    index = {name: values[called] for name, values in reader.index.items()}
    assert index["step"].tolist() == [step for step in range(3) for _ in range(4)]
    assert index["branch"].tolist() == [0, 0, 1, 1] * 3
    np.testing.assert_allclose(index["sigma"], sigmas[index["step"]], rtol=1e-6)
    np.testing.assert_allclose(index["timestep"], 1000 * index["sigma"], rtol=1e-6)
    assert index["prompt"].tolist() == PROMPTS * 6
    assert index["heldout"].tolist() == [False, True] * 6
    for row in called:
        given = reader.batch(np.array([row])).arguments
        assert given["timestep"].item() == pytest.approx(reader.index["sigma"][row], rel=1e-6)


def test_recorded_states_are_those_of_the_pipeline(pipe, recorded):
    """The first state is the seed's noise, and a sample's states do not depend on its batch."""
    reader = calls.Reader(recorded)
    for sample in range(2):
        rows = np.flatnonzero((reader.index["sample"] == sample) & (reader.index["step"] == 0))
        state = reader.batch(rows[:1]).arguments["hidden_states"]
        generator = torch.Generator().manual_seed(sample)
        latents = pipe.prepare_latents(
            1, tiny.Z_DIM, 32, 32, torch.float32, torch.device("cpu"), generator
        )
        assert torch.equal(state, latents[0] if isinstance(latents, tuple) else latents)


def renoised_states(pipe, path):
    """(sigma, timestep argument, state, final latent) of every renoised row of the first branch."""
    reader = calls.Reader(path)
    rows = reader.rows(kinds=("renoised",))
    final = pipe(
        prompt=PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="latent",
        **tiny.SETTINGS | {"negative_prompt": [" ", " "]},
    ).images
    for row in rows[reader.index["branch"][rows] == 0]:
        batch = reader.batch(np.array([row]))
        clean = final[reader.index["sample"][row]]
        assert reader.index["timestep"][row] == pytest.approx(1000 * batch.rows["sigma"][0])
        given = batch.arguments
        yield batch.rows["sigma"][0], given["timestep"].item(), given["hidden_states"][0], clean


def test_renoised_states_interpolate_image_and_noise(pipe, recorded):
    found = list(renoised_states(pipe, recorded))
    assert len({sigma for sigma, *_ in found}) == len(found) == 6
    noises = []
    for sigma, timestep, state, clean in found:
        assert 1 / 3 <= sigma <= 1 and timestep == pytest.approx(sigma, rel=1e-6)
        noises.append(((state.double() - (1 - sigma) * clean.double()) / sigma).flatten())
    noise = torch.stack(noises)
    assert torch.linalg.vector_norm(torch.corrcoef(noise) - torch.eye(6), ord=torch.inf) < 0.3
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    clean = torch.stack([c.flatten().double() for *_, c in found])
    for one, other in zip(noise, clean, strict=True):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.3


def test_both_branches_see_the_same_renoised_state(recorded):
    reader = calls.Reader(recorded)
    rows = reader.rows(kinds=("renoised",))
    place = {key: reader.index[key][rows] for key in ("sample", "branch", "sigma")}
    for sigma in np.unique(place["sigma"]):
        one, other = rows[place["sigma"] == sigma]
        states = [reader.batch(np.array([row])).arguments for row in (one, other)]
        assert torch.equal(states[0]["hidden_states"], states[1]["hidden_states"])
        assert torch.equal(states[0]["timestep"], states[1]["timestep"])


def test_bfloat16_timesteps_are_the_sigmas(tiny_teacher, tmp_path):
    """The quotient of two bfloat16 timesteps is off by up to 1 %; sigma must not be."""
    pipe = tiny.load(tiny_teacher).to(torch.bfloat16)
    found = recording.record_batch(pipe, tiny.samples(PROMPTS), tiny.SETTINGS, 2, seed=0)
    path = tmp_path / "calls.parquet"
    calls.write(path, [table.schema for table in found], found, {})
    reader = calls.Reader(path)
    for row in reader.rows(kinds=("renoised",)):
        batch = reader.batch(np.array([row]))
        sigma = torch.tensor(batch.rows["sigma"][0])
        assert batch.arguments["timestep"].item() == sigma.to(torch.bfloat16).item()
        assert batch.output.dtype == torch.bfloat16
    first = reader.batch(np.array([0, 1]))
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**first.arguments)[0], first.output)
    whole = first.to_float32()
    assert whole.output.dtype == whole.arguments["hidden_states"].dtype == torch.float32
    assert whole.arguments["encoder_hidden_states_mask"].dtype == torch.int64


def test_one_step_can_not_be_renoised(pipe):
    once = tiny.SETTINGS | {"num_inference_steps": 1}
    assert len(recording.record_batch(pipe, tiny.samples(PROMPTS[:1]), once, 0, seed=0)) == 2
    with pytest.raises(UserError, match="record.renoised_per_sample: one denoising step"):
        recording.record_batch(pipe, tiny.samples(PROMPTS[:1]), once, 1, seed=0)


def test_nan_weights_are_named(tiny_teacher):
    pipe = tiny.load(tiny_teacher)
    one = tiny.samples(PROMPTS[:1])
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.nan
    with pytest.raises(UserError, match="the transformer's 'output' holds NaN"):
        recording.record_batch(pipe, one, tiny.SETTINGS, 0, seed=0)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = 0
        pipe.text_encoder.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the transformer's 'encoder_hidden_states' holds NaN"):
        recording.record_batch(pipe, one, tiny.SETTINGS, 0, seed=0)


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
    assert calls._decode(calls._encode(value, "a")) == value


def test_calls_with_other_shared_values_are_not_batched(tmp_path):
    def call(scale, **more):
        given = {"states": torch.ones(2, 3), "scale": torch.tensor(scale)}
        return given | more, torch.ones(2, 3)

    every = [call(1.0), call(2.0), call(1.0), call(1.0, mode="a"), call(1.0, mode="b")]
    reader = store(tmp_path / "c.parquet", *every)
    assert [bucket.tolist() for bucket in reader.buckets] == [[0, 1, 4, 5], [2, 3], [6, 7], [8, 9]]
    assert reader.batch(np.array([0, 4])).arguments["scale"] == 1
    assert reader.batch(np.array([3])).arguments["scale"] == 2


def test_tensors_in_containers_are_refused():
    with pytest.raises(UserError, match="Tensor inside the transformer argument 'controls'"):
        calls.to_table({"controls": [torch.ones(1)] * 3}, torch.ones(2, 1), meta(2), ())


def test_parts_are_merged_in_order(tmp_path):
    parts, values = [], torch.arange(12.0).reshape(6, 2)
    for number, part in enumerate(values.split(2)):
        parts.append(tmp_path / f"{number}.parquet")
        name = "states" if number < 2 else "other"
        store(parts[-1], ({name: part}, part + 100))
    calls.merge(parts, tmp_path / "all.parquet", {"made": "here"})
    reader = calls.Reader(tmp_path / "all.parquet")
    assert reader.provenance == {"made": "here"}
    assert [bucket.tolist() for bucket in reader.buckets] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(reader.batch(np.array([3, 1])).arguments["states"], values[[3, 1]])
    assert torch.equal(reader.batch(np.array([5])).arguments["other"], values[[5]])
    outputs = [reader.batch(np.array([row])).output[0] for row in range(6)]
    assert torch.equal(torch.stack(outputs), values + 100)


@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_truncated_file_is_named(recorded, tmp_path, kept):
    content = recorded.read_bytes()
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
    found = list(uneven.batches(rows, 2))
    assert [len(batch) for batch in found] == [2, 1, 2]
    assert sorted(np.concatenate([batch.numbers for batch in found])) == sorted(rows)


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


# ---- the split


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    st.integers(2, 20),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_a_prompt_is_never_on_both_sides(prompts, samples, fraction, seed):
    rows = [{"prompt": prompt} for prompt in prompts]
    given = {"samples": samples, "heldout_fraction": fraction, "prompts": "p.txt"}
    if len(set(prompts[:samples])) < 2:
        with pytest.raises(UserError, match=r"record\.prompts: p\.txt has only one prompt"):
            record.choose_samples(rows, given, seed)
        return
    found = record.choose_samples(rows, given, seed)
    assert len(found) == samples and len({s["seed"] for s in found}) == samples
    sides = [{s["prompt"] for s in found if s["heldout"] == side} for side in (False, True)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert all(rows[s["prompt_index"]]["prompt"] == s["prompt"] for s in found)
    used = len(set(prompts[:samples]))
    assert abs(len(sides[1]) - used * fraction) <= 1


def test_row_groups_are_calls(recorded):
    file = pq.ParquetFile(recorded)
    assert file.num_row_groups == 12
    assert {file.metadata.row_group(g).num_rows for g in range(12)} == {2}
