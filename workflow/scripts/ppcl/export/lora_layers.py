"""What a LoRA is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to a Linear W: scale * (b (a x) + bias); or, with magnitudes (DoRA), what
    makes the rows of W + scale b a that long.

    a: [p, inputs]. b: [outputs, p]. bias, magnitude: [outputs], or None. All float32.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def without(self, at: int, width: int) -> "Layer":
        """Without so many outputs from `at` on: a linear FFN cuts them out of a modulation."""
        kept = [*range(at), *range(at + width, len(self.b))]
        bias = None if self.bias is None else self.bias[kept]
        magnitude = None if self.magnitude is None else self.magnitude[kept]
        return replace(self, b=self.b[kept], bias=bias, magnitude=magnitude)

    def product(self) -> Tensor:
        """scale * b a [outputs, inputs]."""
        return self.scale * self.b @ self.a


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        layers: of the pruned component, by the path of their Linear in the teacher.
        others: tensors of other components (text encoders), by diffusers' own keys.
        unusable: key, or path of a layer -> why nothing can be made of it.
        dtype: what is written is of it: that of the file's matrices, or bfloat16 for one byte's.
    """

    layers: dict[str, Layer]
    others: dict[str, Tensor] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def dtype_of(stored: Mapping[str, Tensor]) -> torch.dtype:
    """What a file made of this one is written in: bfloat16 for a type of one byte, in which neither
    alphas nor scaled matrices keep their values."""
    matrices = [tensor.dtype for tensor in stored.values() if tensor.ndim > 1]
    dtype = matrices[0] if matrices else torch.float32
    return dtype if dtype.itemsize > 1 else torch.bfloat16
