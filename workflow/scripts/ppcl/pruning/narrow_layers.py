"""What narrow blocks have in place of parts of stock ones; see narrow.py.

This file, block_class.py, narrow.py and pruned_class.py, in that order, travel as one beside
exported weights, so they need nothing but torch and diffusers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs  # torch needs it, too


class Residual(nn.Module):
    """x + W x + b."""

    # Not a subclass of nn.Linear: quantizers put their own Linear in place of those.
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Borrowed(nn.Module):
    """Stands for a norm that also returns gates, shifts and scales: x + W x + b, and zeros."""

    def __init__(self, linear: nn.Linear, extras: int):
        super().__init__()
        self.linear, self.extras = linear, extras

    def forward(self, x: Tensor, *_args, **_kwargs) -> tuple[Tensor, ...]:
        mapped = x + self.linear(x)
        return (mapped, *[mapped.new_zeros(len(x), x.shape[-1])] * self.extras)


class Open(nn.Module):
    """Adds what is cut out of a modulation: zeros, which nothing reads any more, from `at` on."""

    def __init__(self, at: int, width: int):
        super().__init__()
        self.at, self.width = at, width

    def forward(self, kept: Tensor) -> Tensor:
        cut = kept.new_zeros(*kept.shape[:-1], self.width)
        return torch.cat([kept[..., : self.at], cut, kept[..., self.at :]], dim=-1)


class Shut(nn.Module):
    """Stands for a modulation: shift 0, scale 0, gate 0."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, temb: Tensor) -> Tensor:
        return temb.new_zeros(*temb.shape[:-1], self.width)


class LowRank(nn.Module):
    """Stands for a modulation's Linear: up(down(x)), with the bias on `up` alone."""

    def __init__(self, inputs: int, outputs: int, rank: int, like: Tensor):
        super().__init__()
        self.down = zero_linear(inputs, rank, like, bias=False)
        self.up = zero_linear(rank, outputs, like)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def is_low_rank(module: nn.Module) -> TypeIs[LowRank]:
    """Whether it is a `LowRank`, of this module or of one beside exported weights."""
    return type(module).__name__ == LowRank.__name__


def drop(block: nn.Module, path: str, instead: Callable) -> None:
    """Puts a function in place of a submodule."""
    # A function and no module, which adapters (LoRA) made for stock blocks would find and wrap.
    parent, _, name = path.rpartition(".")
    delattr(block.get_submodule(parent), name)
    setattr(block.get_submodule(parent), name, instead)


def same(x: Tensor, *_args, **_kwargs) -> Tensor:
    """In place of a norm, or of a projection that is not needed."""
    return x


def nothing(x: Tensor, *_args, **_kwargs) -> Tensor:
    """In place of what adds to a stream."""
    return torch.zeros_like(x)


def zero_linear(inputs: int, outputs: int, like: Tensor, bias: bool = True) -> nn.Linear:
    """A Linear of zeros, with the dtype and device of a tensor."""
    # An initialisation would draw from the global generator, and be overwritten.
    kind = {"bias": bias, "device": like.device, "dtype": like.dtype}
    made: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, **kind)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made
