"""Recording a stock pipeline's calls: to the bit, at the right places, renoised rightly, split."""

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import record
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppcl.errors import UserError
from ppcl.evaluation import velocities
from ppcl.settings import RecordSettings
from ppcl.teacher import recording, steps
from ppcl.training import prices
from ppcl.transformer import blocks, call_tables, calls
from support import tiny

PROMPTS = ["a red 1 on blue", "a blue handwritten two on a red background"]


@pytest.fixture(scope="module")
def pipe(tiny_teacher):
    return tiny.load(tiny_teacher)


@pytest.fixture(scope="module")
def recorded(tiny_teacher, tmp_path_factory):
    """Two prompts of unlike length in one batch, so text is padded and masked."""
    path = tmp_path_factory.mktemp("calls") / "calls.parquet"
    return tiny.record(tiny_teacher, path, PROMPTS, batch=2, renoised=3)


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
    states = list(renoised_states(pipe, recorded))
    assert len({sigma for sigma, *_ in states}) == len(states) == 6
    noises = []
    for sigma, timestep, state, clean in states:
        assert 1 / 3 <= sigma <= 1 and timestep == pytest.approx(sigma, rel=1e-6)
        noises.append(((state.double() - (1 - sigma) * clean.double()) / sigma).flatten())
    noise = torch.stack(noises)
    assert torch.linalg.vector_norm(torch.corrcoef(noise) - torch.eye(6), ord=torch.inf) < 0.3
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    clean = torch.stack([c.flatten().double() for *_, c in states])
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
    tables = recording.record_batch(
        pipe, pipe.transformer, tiny.samples(PROMPTS), tiny.SETTINGS, 2, seed=0
    )
    path = tmp_path / "calls.parquet"
    call_tables.write(path, [table.schema for table in tables], tables, {})
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
    assert (
        len(
            recording.record_batch(
                pipe, pipe.transformer, tiny.samples(PROMPTS[:1]), once, 0, seed=0
            )
        )
        == 2
    )
    with pytest.raises(UserError, match="record.renoised_per_sample: one denoising step"):
        recording.record_batch(pipe, pipe.transformer, tiny.samples(PROMPTS[:1]), once, 1, seed=0)


def test_nan_weights_are_named(tiny_teacher):
    pipe = tiny.load(tiny_teacher)
    one = tiny.samples(PROMPTS[:1])
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.nan
    with pytest.raises(UserError, match="the transformer's 'output' holds NaN"):
        recording.record_batch(pipe, pipe.transformer, one, tiny.SETTINGS, 0, seed=0)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = 0
        pipe.text_encoder.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the transformer's 'encoder_hidden_states' holds NaN"):
        recording.record_batch(pipe, pipe.transformer, one, tiny.SETTINGS, 0, seed=0)


def test_a_call_of_unclear_samples_or_of_zero_answers_is_refused(pipe):
    two, place = tiny.samples(PROMPTS), {"step": 1, "branch": 0}
    family = blocks.family(pipe.transformer)
    for count in (1, 3):
        with pytest.raises(UserError, match=f"with {count} samples for 2 prompts.*batch_size to 1"):
            recording._tables({}, torch.ones(count, 4), two, place, family)
    one_is_zero = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    with pytest.raises(UserError, match=rf"zeros alone \(step 1, branch 0, prompt '{PROMPTS[1]}'"):
        recording._tables({}, one_is_zero, two, place, family)


def test_zero_answers_of_an_older_record_are_refused(pipe, tmp_path):
    path, given = tmp_path / "calls.parquet", tiny.arguments((3,))
    answered = torch.zeros_like(pipe.transformer(**given)[0])
    tables = call_tables.to_tables(given, answered, tiny.places(1))
    call_tables.write(path, [table.schema for table in tables], tables, {})
    reader, rows = calls.Reader(path), np.arange(1)
    with pytest.raises(UserError, match=r"calls\.parquet: recorded answers are all zero"):
        prices.error(tiny.context(pipe.transformer, reader), {}, rows, 1)
    with pytest.raises(UserError, match=r"calls\.parquet: recorded answers are all zero"):
        velocities.velocity_errors("p", pipe.transformer, reader, rows, 1, torch.device("cpu"))


def test_a_picture_starts_in_the_middle_of_the_schedule(pipe, tmp_path):
    path, picture = tmp_path / "calls.parquet", tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "gray").save(picture)
    edits = diffusers.QwenImageImg2ImgPipeline(**pipe.components)
    edits.set_progress_bar_config(disable=True)
    settings = tiny.SETTINGS | {"num_inference_steps": 4, "strength": 0.5}
    sample = [tiny.samples(PROMPTS)[0] | {"image": str(picture)}]
    tables = recording.record_batch(edits, edits.transformer, sample, settings, 3, seed=0)
    call_tables.write(path, [table.schema for table in tables], tables, {})
    reader = calls.Reader(path)
    called = reader.rows(kinds=("pipeline",))
    assert reader.index["step"][called].tolist() == [0, 0, 1, 1]
    assert reader.index["sigma"][called].tolist() == [0.5, 0.5, 0.25, 0.25]
    for row in range(len(reader)):
        sigma = reader.index["sigma"][row]
        given = reader.batch(np.array([row])).arguments["timestep"].item()
        assert 0.25 <= sigma <= 0.5 and given == pytest.approx(sigma, rel=1e-6)
        assert reader.index["timestep"][row] == pytest.approx(1000 * sigma, rel=1e-6)


def test_a_step_taken_in_place_leaves_recorded_states_as_they_were(tiny_teacher):
    """Hand-written loops add to the latents, which the transformer got as they are."""
    pipe = tiny.load(tiny_teacher)
    kind = type(pipe.scheduler)

    class FlowMatchInPlace(kind):
        def step(self, model_output, timestep, sample, return_dict=True):
            after = super().step(model_output, timestep, sample, return_dict=False)[0]
            return (sample.copy_(after),)

    given = tiny.samples(PROMPTS[:1]), tiny.SETTINGS, 1, 0
    plain = recording.record_batch(pipe, pipe.transformer, *given)
    pipe.scheduler.__class__ = FlowMatchInPlace
    in_place = recording.record_batch(pipe, pipe.transformer, *given)
    for one, other in zip(in_place, plain, strict=True):
        assert one.equals(other)


class HandWritten(diffusers.QwenImagePipeline):
    """A loop of its own, without a scheduler."""

    per_frame = False

    @torch.no_grad()
    def __call__(self, prompt, generator, output_type, callback_on_step_end):
        texts, mask = self.encode_prompt(prompt=prompt, device=torch.device("cpu"))
        state = torch.stack([torch.randn(16, 16, generator=each) for each in generator])
        given = {"encoder_hidden_states": texts, "encoder_hidden_states_mask": mask}
        given |= {"img_shapes": [[(1, 4, 4)]] * len(state), "return_dict": False}
        for number in range(2):
            time = torch.full((len(state),), 1 - number / 2)
            state -= self.transformer(hidden_states=state, timestep=time, **given)[0] / 2
            told = 1000 * (time[0].repeat(2) if self.per_frame else time[0])
            callback_on_step_end(self, number, told, {"latents": state})


def test_a_pipeline_without_a_scheduler_has_timesteps_alone(pipe):
    made = HandWritten(**pipe.components | {"scheduler": None})
    given = made, made.transformer, tiny.samples(PROMPTS[:1]), {}
    first, second = recording.record_batch(*given, 0, seed=0)
    assert [first["timestep"][0].as_py(), second["timestep"][0].as_py()] == [1000, 500]
    assert np.isnan([first["sigma"][0].as_py(), second["sigma"][0].as_py()]).all()
    with pytest.raises(UserError, match="renoised_per_sample: states of a pipeline without sch"):
        recording.record_batch(*given, 1, seed=0)


def test_calls_of_frames_with_timesteps_of_their_own_have_none(pipe, tmp_path):
    made = HandWritten(**pipe.components | {"scheduler": None})
    made.per_frame = True
    one, path = tiny.samples(PROMPTS[:1]), tmp_path / "calls.parquet"
    tables = recording.record_batch(made, made.transformer, one, {}, 0, seed=0)
    call_tables.write(path, [table.schema for table in tables], tables, {})
    assert np.isnan(calls.Reader(path).index["timestep"]).all()


def test_timestep_0_tells_no_scale(pipe):
    given, schedule = {"timestep": torch.tensor([0.5])}, pipe.scheduler
    family = blocks.family(pipe.transformer)
    call = {"arguments": given, "level": steps.Level(0.0, 0.0)}
    with pytest.raises(UserError, match="gives the transformer 0.5 at the scheduler's timestep 0"):
        recording._timestep_scale([call], family, schedule)
    later = call | {"level": steps.Level(500.0, 0.5)}
    assert recording._timestep_scale([call, later], family, schedule) == 1 / 1000


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
    given = RecordSettings.of(given)
    if len(set(prompts[:samples])) < 2:
        with pytest.raises(UserError, match=r"record\.prompts: p\.txt has only one prompt"):
            record.choose_samples(rows, given, seed)
        return
    chosen = record.choose_samples(rows, given, seed)
    assert len(chosen) == samples and len({s["seed"] for s in chosen}) == samples
    sides = [{s["prompt"] for s in chosen if s["heldout"] == side} for side in (False, True)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert all(rows[s["prompt_index"]]["prompt"] == s["prompt"] for s in chosen)
    used = len(set(prompts[:samples]))
    # Two at least: one to select by, one to report on.
    assert abs(len(sides[1]) - max(2, used * fraction)) <= 1 and (len(sides[1]) > 1 or used == 2)


def test_row_groups_are_calls(recorded):
    file = pq.ParquetFile(recorded)
    assert file.num_row_groups == 12
    assert {file.metadata.row_group(g).num_rows for g in range(12)} == {2}
