"""Low-rank modulation: the closed form, and models of every family that hold products."""

from dataclasses import dataclass

import pytest
import torch
import zoo_images
import zoo_videos

from ppcl import blocks, families, modulation

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
ONE_EACH = {one.family: name for name, one in ZOO.items() if one.family in families.FAMILIES}


@dataclass(frozen=True)
class Sums:
    """Sums over inputs, as conditioning.py has them."""

    count: float
    sum: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def over(cls, inputs):
        inputs = inputs.double()
        return cls(len(inputs), inputs.sum(0), inputs.T @ inputs)


@pytest.fixture(scope="module")
def transformers():
    made = {}

    def of(name):
        if name not in made:
            made[name] = getattr(ZOO[name].make(2), ZOO[name].component)
        return made[name]

    return of


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_shapes(transformers, name):
    t = transformers(name)
    found = modulation.matrices(t)
    block_map = [[i] for i in range(len(blocks.block_sequence(t)))]

    class Cond:
        def of(self, key):
            m = {x.key: x for x in found}[key]
            return Sums.over(
                torch.randn(100, m.inputs, generator=torch.Generator().manual_seed(0)) + 1
            )

    made = modulation.low_rank(
        t, block_map, {m.key: min(m.inputs, m.outputs) for m in found}, Cond()
    )
    for m in found:
        old, new = (modulation._matrix(x, block_map, m.key) for x in (t, made))
        x = torch.randn(7, m.inputs)
        torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-5)
        assert blocks.parameter_count(new) == m.parameters(min(m.inputs, m.outputs))
        assert blocks.parameter_count(old) == m.parameters()
