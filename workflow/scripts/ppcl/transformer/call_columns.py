"""Names of the tensor columns in calls.parquet: a small language, which `CallColumn` owns.

calls.parquet has a column for each tensor that the transformer gets, and one for its output. The
column's name says how a batch of rows becomes that tensor again:

    name      = [ mark ] argument [ "@" dimension ] "/" [ shape ] "/" dtype
    mark      = "=" | "*"
    argument  = part { "." part }
    dimension = number
    shape     = number { "x" number }
    number    = a whole number, 1 or more
    dtype     = what torch calls it: "float32", "bfloat16", "bool", ...

    hidden_states/16x4/bfloat16   the samples' [16, 4], stacked: [batch, 16, 4]
    timestep//float32             a number per sample: [batch]
    =img_ids/16x3/float32         one tensor [16, 3] for all samples, which the first row holds
    *cap_feats/7x32/float32       a list with a tensor [7, 32] per sample
    layers@1/2x5/float32          the samples' [2, 5], stacked along dimension 1: [2, batch, 5]
    rotary.0/16x8/float32         entry 0 of the tuple, list or mapping `rotary`

The shape is part of the name because a prompt's length varies: a row fills the column of its shape,
and is null in the same argument's columns of other shapes.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

# Arrow has no bfloat16, and its booleans are single bits: columns of both hold integers of the same
# bytes.
_STORED_AS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}
_ARROW = {
    torch.float32: pa.float32(),
    torch.float64: pa.float64(),
    torch.float16: pa.float16(),
    torch.int64: pa.int64(),
    torch.int32: pa.int32(),
    torch.int16: pa.int16(),
    torch.uint8: pa.uint8(),
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_ARROW, *_STORED_AS)}

_ARGUMENT = r"[^=*/@][^/@]*"
_NUMBER = r"[1-9][0-9]*"
_NAME = re.compile(
    rf"(?P<mark>[=*]?)(?P<argument>{_ARGUMENT})(@(?P<dimension>{_NUMBER}))?"
    rf"/(?P<shape>({_NUMBER}(x{_NUMBER})*)?)/(?P<dtype>[a-z0-9]+)"
)


class Held(StrEnum):
    """How a column holds an argument; the value is the mark at the beginning of the column's name.

    STACKED: the argument is the samples' tensors, stacked. SHARED: it is one tensor for all
    samples. LISTED: it is the list of the samples' tensors.
    """

    STACKED = ""
    SHARED = "="
    LISTED = "*"


@dataclass(frozen=True)
class CallColumn:
    """A tensor column of calls.parquet.

    Attributes:
        argument: name of the transformer's argument, followed by dots and keys for an entry inside
            it; or `output`.
        shape: of one sample's tensor; of the whole tensor if it is shared.
        dtype: of the tensor; the file may hold integers of the same bytes.
        held: how the rows become the argument.
        batch_dim: the argument's batch dimension; 0 unless its rows are stacked.

    Raises:
        ValueError: no column can hold such a tensor; says why.
    """

    argument: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    held: Held = Held.STACKED
    batch_dim: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(_ARGUMENT, self.argument):
            raise ValueError(f"'{self.argument}' can't be the name of a recorded argument")
        if self.dtype not in _DTYPES.values():
            raise ValueError(f"'{self.argument}' is of {self.dtype}, which can't be recorded")
        if min(self.shape, default=1) < 1:
            raise ValueError(
                f"'{self.argument}' is of shape {list(self.shape)}, which holds nothing"
            )
        if self.batch_dim < 0 or (self.batch_dim and self.held is not Held.STACKED):
            raise ValueError(f"'{self.argument}' can't have a batch dimension {self.batch_dim}")

    @classmethod
    def parse(cls, name: str) -> "CallColumn":
        """The column that has this name.

        Raises:
            ValueError: the name does not follow the grammar above.
        """
        matched = _NAME.fullmatch(name)
        if matched is None or matched["dtype"] not in _DTYPES:
            raise ValueError(f"column '{name}' is no tensor's")
        return cls(
            matched["argument"],
            tuple(int(size) for size in matched["shape"].split("x") if size),
            _DTYPES[matched["dtype"]],
            Held(matched["mark"]),
            int(matched["dimension"] or 0),
        )

    @property
    def name(self) -> str:
        """The column's name, from which `parse` makes the column again."""
        argument = f"{self.argument}@{self.batch_dim}" if self.batch_dim else self.argument
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.held}{argument}/{'x'.join(map(str, self.shape))}/{dtype}"

    @property
    def arrow_type(self) -> pa.DataType:
        """The column's type in the file."""
        return pa.fixed_shape_tensor(_ARROW[_STORED_AS.get(self.dtype, self.dtype)], self.shape)

    def check(self, field: pa.Field) -> None:
        """Raises ValueError if a file's column of this name has another type."""
        kind = field.type
        tensors = isinstance(kind, pa.FixedShapeTensorType)
        if not tensors or tuple(kind.shape) != self.shape or kind != self.arrow_type:
            raise ValueError(f"column '{field.name}' is {kind}")

    def to_arrow(self, tensor: Tensor) -> pa.Array:
        """A tensor [rows, *shape] of this dtype, on the CPU, as rows of the file."""
        stored = tensor.view(_STORED_AS[self.dtype]) if self.dtype in _STORED_AS else tensor
        flat = pa.array(stored.contiguous().numpy().ravel())
        storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(self.shape, dtype=int)))
        return pa.ExtensionArray.from_storage(self.arrow_type, storage)

    def to_torch(self, rows: pa.Array) -> Tensor:
        """Rows of the file, none of them null, as a tensor [rows, *shape] of this dtype."""
        values = torch.from_numpy(rows.storage.flatten().to_numpy(zero_copy_only=False).copy())
        return values.view(self.dtype).reshape(len(rows), *self.shape)

    def joined(self, samples: list[Tensor]) -> Tensor | list[Tensor]:
        """The argument of a batch, from its samples' tensors [*shape]."""
        match self.held:
            case Held.SHARED:
                return samples[0]
            case Held.LISTED:
                return samples
            case Held.STACKED:
                return torch.stack(samples, self.batch_dim)


def inside(argument: str, key: int | str) -> str:
    """The name of an entry of an argument that is a tuple, list or mapping."""
    return f"{argument}.{key}"


def outermost(argument: str) -> str:
    """The transformer's argument of a name that `inside` may have made."""
    return argument.partition(".")[0]
