"""Inputs of modulation matrices, and their sums."""

from dataclasses import dataclass

import torch

WIDTH, LAST = 32, (6, "norm_out.linear")


@dataclass(frozen=True)
class Sums:
    """Sums over inputs, as conditioning.py has them."""

    count: float
    sum: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def over(cls, inputs: torch.Tensor) -> "Sums":
        inputs = inputs.double()
        return cls(len(inputs), inputs.sum(0), inputs.T @ inputs)


class Recorded:
    """The same inputs for all matrices, [samples, d]."""

    def __init__(self, inputs: torch.Tensor):
        self.inputs = inputs

    def of(self, _matrix) -> Sums:
        return Sums.over(self.inputs)


def inputs_of(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Like silu(temb): a few directions of very unequal size, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = 4.0 ** -torch.arange(width)
    return torch.randn(count, width, generator=generator) * scale + 3
