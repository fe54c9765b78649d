"""What a LoRA is made of."""

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
        dtype: of the file's matrices; what is written has it, too.
    """

    layers: dict[str, Layer]
    others: dict[str, Tensor] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
