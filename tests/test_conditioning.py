"""What modulation matrices get: sums against inputs that are held whole, and the grid."""

import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from ppcl import activations, calls, conditioning, modulation, modulation_inputs, tensors
from ppcl.conditioning import Conditioning, Moments
from ppcl.errors import UserError

CPU = torch.device("cpu")
GRID = {"timesteps": 16, "guidance": [1.0, 10.0]}


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls):
    return tiny.load(tiny_teacher).transformer, calls.Reader(tiny_calls)


def keys(transformer):
    return [m.key for m in modulation.matrices(transformer)]


def summed(transformer, reader, tmp_path, batch_size=4):
    found = modulation_inputs.Sums(transformer, keys(transformer), CPU)
    options = {"batch_size": batch_size, "moment_tokens": 3, "sample_tokens": 1}
    rows = np.arange(len(reader))
    activations.collect(
        transformer,
        reader,
        rows,
        options | {"checkpoint_every": 10**6},
        0,
        CPU,
        tmp_path / "state",
        tiny.NoBar(),
        modulations=found,
    )
    return found.result()


def direct(x):
    x = torch.cat(x).double()
    return Moments(float(len(x)), x.sum(0), torch.einsum("ni,nj->ij", x, x))


def assert_close(one, other):
    assert one.count == pytest.approx(other.count)
    torch.testing.assert_close(one.sum, other.sum, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.outer, other.outer, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_sums_are_those_of_the_fit_split(world, tmp_path):
    """Against temb, by a hook of our own; all matrices, the last AdaLN's too, share it."""
    transformer, reader = world
    found, seen = summed(transformer, reader, tmp_path, batch_size=1), []
    handle = transformer.time_text_embed.register_forward_hook(
        lambda _m, _a, out: seen.append(nn.functional.silu(out))
    )
    for row in reader.rows(heldout=False):
        transformer(**reader.batch(np.array([row])).arguments)
    handle.remove()
    assert len(found.entries) == 1 and set(found.places) == set(keys(transformer))
    assert_close(found.of((2, "txt_mod.1")), direct(seen))


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
    found = sums.result()
    places = [found.places[m] for m in every]
    assert places[1] == places[2] and len(set(places)) == len(found.entries) == 3
    assert_close(found.of(every[0]), direct([a, b[:1], c[:1], c[1:], b[1:]]))
    assert_close(found.of(every[1]), direct([a, b[:1], c[1:], b[1:]]))
    assert_close(found.of(every[3]), direct([a, tokens[0]]))
    with pytest.raises(UserError, match="gets 3 conditionings for 2 samples"):
        call(sums, linears, dict.fromkeys(every, [torch.ones(3, 32)]), [True, True])


def test_a_file_gives_back_what_was_written(tmp_path):
    x = torch.randn(7, 3)
    one = Conditioning([direct([x])], {(0, "a"): 0, (4, "b.c"): 0})
    path = tmp_path / "c.safetensors"
    conditioning.write(path, one, {"seed": "0"})
    found = conditioning.read(path)
    assert found.places == one.places and (0, "b") not in found
    assert found.of((4, "b.c")).count == 7
    assert torch.equal(found.of((0, "a")).outer, one.entries[0].outer)
    with pytest.raises(UserError, match="modulation 'b' of block 0 gets; set modulation.enabled"):
        found.of((0, "b"))
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
    found = modulation_inputs.with_grid(transformer, recorded, reader, rows, GRID, 5, 0, CPU)
    times = torch.linspace(0, 1, GRID["timesteps"])
    temb = transformer.time_text_embed(times, torch.zeros(1))
    grid = direct([nn.functional.silu(temb)])
    once = recorded.entries[0]
    share = min(len(np.unique(reader.index["timestep"][rows])), 16) / 16
    expected = once.weighted(share / once.count) + grid.weighted(1 / 16)
    torch.testing.assert_close(found.entries[0].outer, expected.outer, rtol=1e-4, atol=1e-6)
    assert found.places == recorded.places
    off = modulation_inputs.with_grid(
        transformer, recorded, reader, rows, GRID | {"timesteps": 0}, 5, 0, CPU
    )
    assert off is recorded
