"""Moments of the inputs of modulation (AdaLN) matrices, from which low-rank maps are made.

They are kept in activations/conditioning.safetensors. Matrices that get the same inputs share an
entry there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.pruning.units import Matrix
from ppcl.storage import seals, tensors


@dataclass(frozen=True)
class Moments:
    """Sums over the inputs x [d] of a matrix; float64, on the CPU.

    Attributes:
        count: number of inputs, or the sum of their weights.
        sum: [d], the sum of x.
        outer: [d, d], the sum of x x^T.
    """

    count: float
    sum: Tensor
    outer: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def weighted(self, weight: float) -> "Moments":
        """The moments of the same inputs, each counted `weight` times."""
        return Moments(weight * self.count, weight * self.sum, weight * self.outer)


class Conditioning:
    """Moments of the inputs of a transformer's modulation matrices.

    Args:
        entries: the moments. Matrices that get the same inputs share an entry.
        places: matrix -> the index of its entry.
    """

    def __init__(self, entries: Sequence[Moments], places: Mapping[Matrix, int]):
        self.entries, self.places = list(entries), dict(places)

    def __contains__(self, matrix: Matrix) -> bool:
        return matrix in self.places

    def of(self, matrix: Matrix) -> Moments:
        """The moments of one matrix.

        Raises:
            UserError: there are none.
        """
        if matrix not in self.places:
            block, path = matrix
            raise UserError(
                f"nothing is known of what the modulation '{path}' of block {block} gets; set "
                "modulation.enabled to true, delete activations/ of this run, and rerun"
            )
        return self.entries[self.places[matrix]]

    def tensors(self) -> dict[str, Tensor]:
        """`<index>.count` [1], `<index>.sum` [d], `<index>.outer` [d, d] of each entry; float64."""
        by_name: dict[str, Tensor] = {}
        for place, entry in enumerate(self.entries):
            by_name[f"{place}.count"] = torch.tensor([entry.count], dtype=torch.float64)
            by_name |= {f"{place}.sum": entry.sum, f"{place}.outer": entry.outer}
        return by_name

    def described(self) -> str:
        """The matrices and the indices of their entries: JSON, a list of [block, path, index]."""
        return json.dumps([[*matrix, place] for matrix, place in self.places.items()])

    @classmethod
    def stored(cls, held: Mapping[str, Tensor], described: str) -> "Conditioning":
        """The conditioning of which `tensors` made `held`, and `described` made `described`.

        Raises:
            LookupError, ValueError, TypeError: they are of something else.
        """
        places = {(block, path): place for block, path, place in json.loads(described)}
        entries = [
            Moments(held[f"{n}.count"].item(), held[f"{n}.sum"], held[f"{n}.outer"])
            for n in range(len({name.split(".")[0] for name in held}))
        ]
        return cls(entries, places)


def write(path: Path, conditioning: Conditioning, provenance: Mapping[str, str]) -> None:
    """Writes conditioning.safetensors."""
    metadata = dict(provenance) | {"matrices": conditioning.described()}
    tensors.write(path, conditioning.tensors(), metadata)


def read(path: Path) -> Conditioning:
    """Reads what `write` wrote.

    Raises:
        UserError: as `tensors.read`, or the file holds something else.
    """
    held, metadata = tensors.read(path)
    try:
        return Conditioning.stored(held, metadata["matrices"])
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: holds no moments of modulations ({error!r}); {seals.REMAKE}"
        ) from error
