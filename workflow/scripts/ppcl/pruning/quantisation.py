"""Quantised weights: the methods there are, and how many bytes weights take in each as stored.

Needs no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

GIB = 2**30
# Bytes of a weight in each type that a teacher may run in.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Method:
    """A way to store matrices of Linears in fewer bytes; computed is with weights of full precision
    that are made of them, call by call (weights only; bnb-int8 also rounds activations).

    Attributes:
        package: what diffusers needs for it. version: the one that is tested.
        cuda: whether diffusers has it on CUDA alone.
        per_value: bytes of each weight, its part of the scales of groups of weights included.
        per_row: bytes of what each output has besides; scaled: and a scale, of the type that the
            weights had.
        per_matrix: bytes that each matrix has besides, at most.
    """

    package: str
    version: str
    cuda: bool
    per_value: float
    per_row: int
    per_matrix: int
    scaled: bool = False


METHODS: Mapping[str, Method] = {
    # torchao's Int8WeightOnlyConfig: a scale per output, and a zero point, which is always 0.
    "int8": Method("torchao", "0.18.0", False, 1, 1, 0, scaled=True),
    # bitsandbytes' LLM.int8(): a float32 scale per output, a byte that names the layout.
    "bnb-int8": Method("bitsandbytes", "0.50.2", True, 1, 4, 1),
    # bitsandbytes' NF4 (QLoRA): half a byte, a float32 scale for every 64 weights; 16 levels in
    # float32 and a JSON text with each matrix.
    "nf4": Method("bitsandbytes", "0.50.2", True, 0.5 + 4 / 64, 0, 64 + 128),
}


@dataclass(frozen=True)
class Inventory:
    """What there is to store of some weights. Inventories add up, and may be subtracted.

    Attributes:
        parameters: all of them.
        kept: bytes of what no method quantises.
        values, rows, matrices: weights, outputs and number of the matrices that methods quantise.
        matrix_bytes, row_bytes: bytes of those weights, and of one of each output, unquantised.
    """

    parameters: int = 0
    kept: int = 0
    values: int = 0
    rows: int = 0
    matrices: int = 0
    matrix_bytes: int = 0
    row_bytes: int = 0

    def __add__(self, other: "Inventory") -> "Inventory":
        return Inventory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Inventory") -> "Inventory":
        return Inventory(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def stored(self, method: str | None) -> int:
        """Bytes as stored, quantised or (None) not; of nf4 at most."""
        if method is None:
            return self.kept + self.matrix_bytes
        how = METHODS[method]
        scales = how.per_row * self.rows + how.scaled * self.row_bytes
        values = math.ceil(how.per_value * self.values)
        return self.kept + values + scales + how.per_matrix * self.matrices
