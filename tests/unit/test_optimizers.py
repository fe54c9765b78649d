"""8-bit AdamW beside the usual: what it keeps, resuming, and what is said where it is missing."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.storage import tensors
from ppcl.training import loop, optimizers
from support.loop_parts import OPTIONS, Stop, stop_at, weights

EIGHT = loop.Optimisation(**vars(OPTIONS) | {"optimizer": "adamw8bit", "lr": 0.003})


@pytest.fixture
def bitsandbytes(monkeypatch):
    """The package, which `make test` keeps apart."""
    monkeypatch.syspath_prepend(Path(sys.prefix) / "alone")
    pytest.importorskip("bitsandbytes", reason="make test installs it")


class Part(nn.Module):
    """A matrix that is large enough for 8-bit moments, a small vector, and what is unused."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(80, 64, generator=generator) / 8)
        self.bias = nn.Parameter(torch.zeros(80))
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self, x):
        target = torch.randn(80, 64, generator=torch.Generator().manual_seed(9)) / 8
        return (x @ (self.weight - target).T + self.bias).square().mean()


@pytest.fixture
def train(accelerator, tmp_path):
    def call(modules, options, identity="one", before=lambda _step: None):
        def losses(step):
            before(step)
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
            for name, module in modules.items():
                yield name, module.loss(x), {}

        path = tmp_path / identity / "checkpoint.safetensors"
        return loop.train(modules, losses, options, accelerator, path, identity), path

    return call


def parts(names="ab"):
    return {name: Part(ord(name)) for name in names}


def distance(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in one)


def test_8_bit_moments_learn_as_the_others_do_in_a_fifth_of_the_memory(bitsandbytes, train):
    usual, small = parts(), parts()
    options = loop.Optimisation(**vars(EIGHT) | {"optimizer": "adamw"})
    logs, paths = zip(train(usual, options, "usual"), train(small, EIGHT, "small"), strict=True)
    start = weights(parts())
    moved = distance(weights(usual), start)
    assert 0 < distance(weights(small), weights(usual)) < 0.2 * moved
    losses = [[row["loss"] for row in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1][-1] < losses[1][0]
    kept = []
    for path in paths:
        state, _ = tensors.read(path)
        # The table of the byte's values is the same for all, and kept once by the optimizer.
        names = [k for k in state if k.endswith("/a/weight") and not k.startswith("qmap")]
        kept.append(sum(state[k].nbytes for k in names if not k.startswith(("weight", "step"))))
    assert kept[0] == 8 * 80 * 64 and kept[1] == 2 * (80 * 64 + 4 * 80 * 64 // 256)


def test_resumed_is_uninterrupted_to_the_bit(bitsandbytes, train):
    whole, modules = parts(), parts()
    train(whole, EIGHT, "whole")
    with pytest.raises(Stop):
        train(modules, EIGHT, "stopped", stop_at(9))
    modules = parts()
    ran = []
    train(modules, EIGHT, "stopped", ran.append)
    assert ran[0] == 8
    one, other = weights(modules), weights(whole)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_module_ends_the_same_whoever_trains_beside_it(bitsandbytes, train):
    alone, together = parts("a"), parts()
    train(alone, EIGHT, "alone")
    train(together, EIGHT, "together")
    one, other = weights(alone), weights({"a": together["a"]})
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_without_the_package_it_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="adamw8bit needs the package bitsandbytes .* to adamw"):
        train(parts(), EIGHT)


def test_other_devices_are_refused(bitsandbytes):
    groups = [{"params": [nn.Parameter(torch.zeros(1, device="meta"))]}]
    with pytest.raises(UserError, match="adamw8bit does not run on meta"):
        optimizers.adamw("adamw8bit", groups, 0.1, (0.9, 0.95), 0.0)
