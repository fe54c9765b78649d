"""What modulation matrices get: sums against inputs that are held whole, and the grid."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ppcl.closed_forms import modulation
from ppcl.digits import teacher
from ppcl.digits.recipe import TransformerRecipe
from ppcl.errors import UserError
from ppcl.extraction import activations, conditioning, modulation_inputs
from ppcl.extraction.conditioning import Conditioning, Moments
from ppcl.settings import ExtractSettings, ModulationSettings
from ppcl.storage import tensors
from ppcl.teacher import recording
from ppcl.transformer import blocks, call_tables, calls, families
from ppcl.transformer.context import State
from support import tiny, zoo_images, zoo_videos

CPU = torch.device("cpu")
GRID = ModulationSettings.of({"timesteps": 16, "guidance": [1.0, 10.0]})


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls):
    return tiny.load(tiny_teacher).transformer, calls.Reader(tiny_calls)


def keys(transformer):
    return [m.key for m in modulation.matrices(transformer)]


def summed(transformer, reader, tmp_path, batch_size=4):
    sums = modulation_inputs.Sums(transformer, keys(transformer), CPU)
    how = {"batch_size": batch_size, "moment_tokens": 3, "sample_tokens": 1}
    rows = np.arange(len(reader))
    activations.collect(
        tiny.context(transformer, reader),
        rows,
        ExtractSettings.of(how | {"checkpoint_every": 10**6}),
        State(tmp_path / "state", ""),
        tiny.NoBar(),
        modulations=sums,
    )
    return sums.result()


def direct(x):
    x = torch.cat(x).double()
    return Moments(float(len(x)), x.sum(0), torch.einsum("ni,nj->ij", x, x))


def assert_close(one, other, by=1e-9):
    assert one.count == pytest.approx(other.count)
    torch.testing.assert_close(one.sum, other.sum, rtol=by, atol=by)
    torch.testing.assert_close(one.outer, other.outer, rtol=by, atol=by)


@torch.no_grad()
def test_sums_are_those_of_the_fit_split(world, tmp_path):
    """Against temb, by a hook of our own; all matrices, the last AdaLN's too, share it."""
    transformer, reader = world
    sums, seen = summed(transformer, reader, tmp_path, batch_size=1), []
    handle = transformer.time_text_embed.register_forward_hook(
        lambda _m, _a, out: seen.append(nn.functional.silu(out))
    )
    for row in reader.rows(heldout=False):
        transformer(**reader.batch(np.array([row])).arguments)
    handle.remove()
    assert len(sums.entries) == 1 and set(sums.places) == set(keys(transformer))
    assert_close(sums.of((2, "txt_mod.1")), direct(seen))


def call(sums, linears, given, fit):
    with sums.watching():
        for matrix, linear in linears.items():
            for x in given[matrix]:
                linear(x)
    sums.take(np.array(fit))
    sums.settle()


def test_matrices_part_when_they_get_something_else(teacher):
    """What was summed up for both before stays both's; tokens count as samples, of which more than
    channels are summed up at once."""
    every = [(0, "img_mod.1"), (0, "txt_mod.1"), (3, "txt_mod.1"), (6, "norm_out.linear")]
    sums = modulation_inputs.Sums(teacher, every, CPU)
    linears = {m: sums._linears[m] for m in every}
    torch.manual_seed(0)
    a, b, c = (torch.randn(2, 32) for _ in range(3))
    tokens = torch.randn(2, 40, 32)
    call(sums, linears, dict.fromkeys(every, [a]), [True, True])
    assert sums.result().entries == [] and len(sums.leaders) == 1  # fewer than channels wait
    both = torch.cat([b, c])  # two conditionings a sample
    call(sums, linears, {every[0]: [both], every[1]: [b], every[2]: [b.clone()],
                         every[3]: [tokens]}, [True, False])  # fmt: skip
    call(sums, linears, {m: [] if m == every[3] else [c, b] for m in every}, [False, True])
    sums.sum_up(everything=True)
    summed_up = sums.result()
    places = [summed_up.places[m] for m in every]
    assert places[1] == places[2] and len(set(places)) == len(summed_up.entries) == 3
    assert_close(summed_up.of(every[0]), direct([a, b[:1], c[:1], c[1:], b[1:]]))
    assert_close(summed_up.of(every[1]), direct([a, b[:1], c[1:], b[1:]]))
    assert_close(summed_up.of(every[3]), direct([a, tokens[0]]))
    with pytest.raises(UserError, match="gets 3 conditionings for 2 samples"):
        call(sums, linears, dict.fromkeys(every, [torch.ones(3, 32)]), [True, True])


def test_a_file_gives_back_what_was_written(tmp_path):
    x = torch.randn(7, 3)
    one = Conditioning([direct([x])], {(0, "a"): 0, (4, "b.c"): 0})
    path = tmp_path / "c.safetensors"
    conditioning.write(path, one, {"seed": "0"})
    again = conditioning.read(path)
    assert again.places == one.places and (0, "b") not in again
    assert again.of((4, "b.c")).count == 7
    assert torch.equal(again.of((0, "a")).outer, one.entries[0].outer)
    with pytest.raises(UserError, match="modulation 'b' of block 0 gets; set modulation.enabled"):
        again.of((0, "b"))
    conditioning.write(path, Conditioning([], {}), {})
    assert conditioning.read(path).places == {}
    tensors.write(path, {"0.count": torch.ones(1)}, {"matrices": json.dumps([[0, "a", 0]])})
    with pytest.raises(UserError, match="holds no moments of modulations"):
        conditioning.read(path)


@torch.no_grad()
def test_the_grid_is_the_schedulers_whole_range(world, tmp_path):
    """Against the teacher's own embedding at timesteps 0 to 1000, whatever was recorded."""
    transformer, reader = world
    recorded, rows = summed(transformer, reader, tmp_path), reader.rows(heldout=False)
    both = modulation_inputs.with_grid(tiny.context(transformer, reader), recorded, rows, GRID, 5)
    times = torch.linspace(0, 1, GRID.timesteps)
    temb = transformer.time_text_embed(times, torch.zeros(1))
    grid = direct([nn.functional.silu(temb)])
    once = recorded.entries[0]
    share = modulation_inputs.RECORDED
    expected = once.weighted(share / once.count) + grid.weighted((1 - share) / 16)
    torch.testing.assert_close(both.entries[0].outer, expected.outer, rtol=1e-4, atol=1e-6)
    assert both.places == recorded.places
    off = modulation_inputs.with_grid(
        tiny.context(transformer, reader), recorded, rows, GRID.replace(timesteps=0), 5
    )
    assert off is recorded


@torch.no_grad()
def test_a_second_time_of_zero_is_a_sample_too(tmp_path):
    """As Qwen-Image-Edit 2511 has it: image tokens of pictures that are given count as clean, so
    image matrices get both conditionings, and text matrices one."""
    shape = {"blocks": 2, "heads": 1, "head_dim": 32, "axes_dims_rope": [8, 12, 12]}
    torch.manual_seed(0)
    made = teacher.make_transformer(TransformerRecipe.of(shape), tiny.Z_DIM, tiny.TEXT_WIDTH)
    settings = {k: v for k, v in made.config.items() if not k.startswith("_")}
    made = type(made)(**settings | {"zero_cond_t": True}).eval()
    arguments = tiny.arguments()
    arguments["img_shapes"] = [[(1, 2, 4), (1, 2, 4)]] * 2  # half of the tokens are a given picture
    rows = tiny.places(2) | {"heldout": [False, True], "timestep": [700.0] * 2}
    arguments["timestep"] = torch.tensor([0.7, 0.7])
    path = tmp_path / "calls.parquet"
    written = call_tables.to_tables(arguments, made(**arguments)[0], rows)
    call_tables.write(path, [table.schema for table in written], written, {})
    sums = summed(made, calls.Reader(path), tmp_path)
    temb = made.time_text_embed(torch.tensor([0.7, 0.0]), torch.zeros(1))
    expected = nn.functional.silu(temb)
    assert len(sums.entries) == 2
    assert_close(sums.of((1, "img_mod.1")), direct([expected]), 1e-6)
    for one in ((1, "txt_mod.1"), (2, "norm_out.linear")):
        assert_close(sums.of(one), direct([expected[:1]]), 1e-6)


@pytest.mark.parametrize("enabled", [True, False])
def test_extract_writes_nothing_where_no_modulation_is_wanted(
    world, tiny_teacher, tiny_calls, tmp_path, monkeypatch, enabled
):
    if not enabled:
        monkeypatch.setattr(modulation_inputs.Sums, "_rows", None)  # nothing may be computed
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": {"path": str(tiny_teacher)},
        "extract": {"rows": 8, "batch_size": 4, "moment_tokens": 4, "sample_tokens": 1},
        "modulation": {"enabled": enabled, "timesteps": 8},
    }
    made = {n: tmp_path / f"{n}.x" for n in ("tokens", "moments", "conditioning")}
    tiny.stage("extract", settings, calls=tiny_calls, state=tmp_path / "state", **made)
    written = conditioning.read(made["conditioning"])
    assert set(written.places) == (set(keys(world[0])) if enabled else set())
    assert [e.count for e in written.entries] == ([1.0] if enabled else [])


# ---- every family, at schedules that were not recorded

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
# How a pipeline tells its transformer the timestep, by what its source says.
TIME = {
    "qwen-image": lambda t: t / 1000,
    "flux": lambda t: t / 1000,
    "sd3": lambda t: t,
    "lumina2": lambda t: 1 - t / 1000,
    "z-image": lambda t: 1 - t / 1000,
    "hunyuan-image": lambda t: t,
    "hidream": lambda t: t,
    "hunyuan-video": lambda t: t,
    "cogvideox": lambda t: t,
    "mochi": lambda t: t,
}


def test_every_family_with_modulations_is_here():
    named = {n: f for n, f in families.FAMILIES.items() if any(b.modulations for b in f.lists)}
    assert {ZOO[name].family for name in TIME} == set(named)


@torch.no_grad()
def smooth(transformer):
    """Its embeddings of timestep and guidance change as slowly as trained ones do, where random
    weights take sines of all frequencies alike: those with a period of 300 timesteps are halved."""
    for name, module in transformer.named_modules():
        if name.endswith(("_embedder.linear_1", "_embedding.linear_1", "t_embedder.mlp.0")):
            half = module.in_features // 2
            frequencies = 10_000 ** (-torch.arange(half) / half)
            slow = 500 if "guidance" in name else 50  # guidance is counted in thousandths
            module.weight.mul_((1 / (1 + slow * frequencies)).repeat(2))


@torch.no_grad()
def given(transformer, reader, rows, matrices, times, guidance=None):
    """What matrices get in calls like these recorded ones, but at other times: [n, d] each."""
    sums, time = modulation_inputs.Sums(transformer, matrices, CPU), blocks.family(transformer).time
    short, inputs = blocks.emptied(transformer, {b for b, _ in matrices}), {m: [] for m in matrices}
    for row in rows:
        batch = reader.batch(np.repeat(row, len(times)))
        batch.arguments[time] = torch.as_tensor(times).to(batch.arguments[time].dtype)
        if guidance is not None:
            batch.arguments["guidance"].fill_(guidance)
        with sums.watching():
            short(**batch.arguments)
        for matrix in matrices:
            inputs[matrix] += sums._seen[matrix]
    return {matrix: torch.cat(x).double() for matrix, x in inputs.items()}


def wrong(linears, x, moments, rank):
    """Mean square error of maps of a rank, fitted to moments, on what their matrices get."""
    error = 0.0
    for matrix, linear in linears.items():
        made = modulation.reduced(linear.weight, linear.bias, moments.of(matrix), rank)
        answer = x[matrix] @ linear.weight.double().T + linear.bias.double()
        off = answer - (x[matrix] @ made.down.T @ made.up.T + made.bias)
        error += float(off.square().sum(1).mean())
    return error


def schedule(steps, shift):
    sigmas = np.linspace(1, 1 / steps, steps)
    return 1000 * shift * sigmas / (1 + (shift - 1) * sigmas)


@pytest.mark.parametrize("name", TIME)
def test_other_schedules_are_at_most_twice_as_wrong(name, tmp_path):
    """Steps, shifts and guidances that nobody recorded, of every family, against those that were;
    without the grid they are not, unless the conditioning has no more directions than the map."""
    one = ZOO[name]
    pipe = one.make(1)
    smooth(pipe.transformer)
    if name == "hunyuan-image":
        pipe.tokenizer_max_length = 16  # of 1000
    written, every = [], tiny.samples(["a red 1", "two", "a blue photo of a cat"])
    for sample in every:
        written += recording.record_batch(
            pipe, pipe.transformer, [sample], one.settings, 0, 0, False
        )
    path = tmp_path / "calls.parquet"
    call_tables.write(path, [table.schema for table in written], written, {})
    reader = calls.Reader(path)
    fit, transformer = reader.rows(heldout=False), pipe.transformer
    place = modulation_inputs.time_map(reader, fit, families.FAMILIES[one.family].time)
    (slope, offset), highest = place
    np.testing.assert_allclose(slope * np.arange(9) + offset, TIME[name](np.arange(9)))
    assert highest == 1000
    recorded = summed(transformer, reader, tmp_path)
    both = modulation_inputs.with_grid(
        tiny.context(transformer, reader), recorded, fit, GRID.replace(timesteps=96), 32
    )
    assert both.places == recorded.places and set(both.places) == set(keys(transformer))
    # Z-Image's blocks get it without SiLU, its last AdaLN with.
    assert len(both.entries) == (2 if name == "z-image" else 1)
    rows = fit[reader.index["step"][fit] == 0]
    steps = np.unique(reader.index["timestep"][fit])
    was = given(transformer, reader, rows, both.places, TIME[name](steps))
    others = {(4, 0.5): None, (7, 3.0): None, (12, 1.0): None}
    if "guidance" in reader.batch(fit[:1]).arguments:
        others[4, 1.0] = 7.0 * (1000 if name == "hunyuan-video" else 1)
    new = [
        given(transformer, reader, rows, both.places, TIME[name](schedule(*how)), guidance)
        for how, guidance in others.items()
    ]
    linears = {m: modulation_inputs.Sums(transformer, [m], CPU)._linears[m] for m in both.places}
    for rank in (2, 4, 8):
        was_off, *off = (wrong(linears, x, both, rank) for x in (was, *new))
        assert max(off) <= 2 * was_off, (rank, was_off, off)
    was_off, *off = (wrong(linears, x, recorded, 8) for x in (was, *new))
    assert max(off) > 10 * was_off
