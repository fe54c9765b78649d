"""Low-rank modulation: AdaLN matrices as products, fitted in closed form to their real inputs.

A block's modulation matrices see the conditioning alone, such as silu(temb), which varies in few
directions. Let W [out, d] be such a matrix, m the mean and C [d, d] the covariance of its real
inputs, and A any matrix with A A^T = C. The map of rank r whose outputs have the least mean squared
error follows from the singular value decomposition W A = V S U^T; V_r is the first r columns of V:

    up = V_r,   down = V_r^T W,   bias' = bias + (I - V_r V_r^T) W m

(reduced-rank regression, centred on the mean). It needs no [out, out] matrix, and one
decomposition serves all ranks. None of this is in the PPCL paper (docs/stages.md, "Closed forms").
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ppcl.pruning import narrow, narrow_layers
from ppcl.pruning.narrow_layers import LowRank
from ppcl.pruning.units import Matrix, Modulation
from ppcl.runtime import devices
from ppcl.transformer import blocks

EPSILON = torch.finfo(torch.float64).eps


class Moments(Protocol):
    """Sums over recorded inputs of a matrix, float64: count; sum [d]; outer [d, d] = sum of
    x x^T."""

    @property
    def count(self) -> float: ...

    @property
    def sum(self) -> Tensor: ...

    @property
    def outer(self) -> Tensor: ...


class Conditioning(Protocol):
    """Moments of what each modulation matrix gets."""

    def of(self, matrix: Matrix) -> Moments: ...


@dataclass(frozen=True)
class Factors:
    """W x + b as up (down x) + bias: down [r, d], up [out, r], bias [out], float64."""

    down: Tensor
    up: Tensor
    bias: Tensor


# ---- which matrices there are


def matrices(transformer: nn.Module) -> list[Modulation]:
    """All modulation matrices in order of data flow, the last AdaLN's at the end; none that are
    products already, as in a teacher that is a pruned pipeline."""
    of, sequence = blocks.family(transformer), blocks.block_sequence(transformer)
    matrices = []
    for block in sequence:
        text = block.width.text
        borrowed = (text.norm, text.modulation or text.norm) if text else ()
        cut = {parts.modulation: stream for stream, parts in block.width.ffn.items()}
        for path in block.list.modulations:
            if linear := _linear(block.module, path):
                stream = cut.get(path, "")
                left = 3
                if stream:
                    ffn = block.width.ffn[stream]
                    channels = narrow.width_of(block.module.get_submodule(ffn.ffn))
                    gone = channels * (ffn.parts[1] - ffn.parts[0])
                    left = 6 * (linear.out_features - gone) // linear.out_features
                matrices.append(
                    Modulation(
                        block=block.index,
                        path=path,
                        inputs=linear.in_features,
                        outputs=linear.out_features,
                        bias=linear.bias is not None,
                        ffn=stream,
                        left=left,
                        text=any(path.startswith(f"{place}.") for place in borrowed),
                    )
                )
    if of.last_modulation and (linear := _linear(transformer, of.last_modulation)):
        bias = linear.bias is not None
        shape = linear.in_features, linear.out_features
        matrices.append(Modulation(len(sequence), of.last_modulation, *shape, bias))
    return matrices


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    """The matrix at a path of a stock block; None if it is gone, or a product."""
    place = narrow.held(module, path)
    layer = module.get_submodule(place) if place else None
    return layer if isinstance(layer, nn.Linear) else None


def parameter_count(transformer: nn.Module) -> int:
    """Parameters of all modulation matrices of a model, pruned or not, products of low rank
    included."""
    of, sequence = blocks.family(transformer), blocks.block_sequence(transformer)
    places = [(block.module, path) for block in sequence for path in block.list.modulations]
    places += [(transformer, of.last_modulation)] if of.last_modulation else []
    return sum(
        blocks.parameter_count(module.get_submodule(place))
        for module, path in places
        if (place := narrow.held(module, path))
    )


# ---- closed form


@dataclass(frozen=True)
class Spread:
    """How recorded inputs are distributed, float64.

    Attributes:
        mean: [d].
        variances: [d], along the principal directions, the largest first.
        directions: [d, d], whose columns are the principal directions.
        rank: number of directions whose variance is above rounding.
    """

    mean: Tensor
    variances: Tensor
    directions: Tensor
    rank: int

    @classmethod
    def of(cls, moments: Moments, device: torch.device | None = None) -> "Spread":
        """From sums over inputs; computed and kept on the device."""
        total, outer = moments.sum.to(device), moments.outer.to(device)
        mean = total / moments.count
        second = outer / moments.count
        variances, directions = torch.linalg.eigh(second - torch.outer(mean, mean))
        # Rounding leaves variances of this size where the true one is 0.
        least = len(mean) * EPSILON * second.trace()
        rank = int((variances > least).sum())
        return cls(mean, variances.flip(0).clamp(min=0), directions.flip(1), rank)

    def root(self, rank: int) -> Tensor:
        """A [d, k] with A A^T = C, for products of this rank.

        Up to `self.rank`, k is `self.rank`: directions with no variance are left out. Beyond it,
        k is d, and C has a ridge of eps * trace(C) / d: so all directions of W are found, last of
        all those in which no recorded input varies.
        """
        if rank <= self.rank:
            return self.directions[:, : self.rank] * self.variances[: self.rank].sqrt()
        ridge = EPSILON * max(float(self.variances.mean()), EPSILON)
        return self.directions * (self.variances + ridge).sqrt()


def reduced(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    """The best product of a rank for a matrix on recorded inputs (the formula: this module's
    docstring).

    Args:
        weight: [out, d]; bias: [out], or None.

    Raises:
        ValueError: a matrix of this shape has no such rank.
    """
    return reductions(weight, bias, Spread.of(moments, weight.device), [rank])[rank]


def reductions(
    weight: Tensor, bias: Tensor | None, spread: Spread, ranks: list[int]
) -> dict[int, Factors]:
    """As `reduced`, of several ranks at the price of one.

    Args:
        spread: of the inputs, on the weight's device.
    """
    if not 1 <= min(ranks) <= max(ranks) <= min(weight.shape):
        raise ValueError(f"a matrix {list(weight.shape)} can't have ranks {ranks}")
    weight = weight.detach().double()
    offset = 0 if bias is None else bias.detach().double()
    answers = weight @ spread.mean
    basis, _, _ = torch.linalg.svd(weight @ spread.root(max(ranks)), full_matrices=False)
    factors = {}
    for rank in ranks:
        up = basis[:, :rank]
        kept = up @ (up.T @ answers)
        factors[rank] = Factors(up.T @ weight, up, offset + answers - kept)
    return factors


# ---- in a model


@torch.no_grad()
def low_rank(
    model: nn.Module,
    block_map: list[list[int]],
    ranks: Mapping[Matrix, int],
    conditioning: Conditioning,
) -> nn.Module:
    """A model with matrices as products of low rank. Each is fitted to the weights that the model
    has there: those of a student, or of a matrix that a linear FFN has cut, if that is what it has.
    It shares all else with the model, which stays as it is.

    Args:
        model: an assembled transformer, or the teacher itself.
        block_map: of `blocks.assembled`.
        ranks: matrix -> rank. A matrix's block is the first teacher block that a new block stands
            for, or the number of the teacher's blocks for the last AdaLN.

    Raises:
        ValueError: the model has no such matrix, or it is a product already.
    """
    made = shaped(model, block_map, ranks)
    last: tuple[Moments, Spread] | None = None
    for matrix, rank in sorted(ranks.items()):
        old, new = (matrix_in(one, block_map, matrix) for one in (model, made))
        # `shaped` has checked that the one is a Linear, and has made the other.
        assert isinstance(old, nn.Linear) and narrow_layers.is_low_rank(new)
        device = devices.statistics_device(old.weight.device)
        moments = conditioning.of(matrix)
        if last is None or not torch.equal(moments.outer, last[0].outer):  # most are the same
            last = moments, Spread.of(moments, device)
        bias = None if old.bias is None else old.bias.to(device)
        factors = reductions(old.weight.to(device), bias, last[1], [rank])[rank]
        put(new, factors)
    return made


@torch.no_grad()
def put(product: LowRank, factors: Factors) -> None:
    """Gives a product of `shaped` its weights."""
    product.down.weight.copy_(factors.down)
    product.up.weight.copy_(factors.up)
    product.up.bias.copy_(factors.bias)


def shaped(model: nn.Module, block_map: list[list[int]], ranks: Mapping[Matrix, int]) -> nn.Module:
    """As `low_rank`, but the products are zero: for counts, and to be loaded into."""
    by_place: dict[str, dict[str, int]] = {}
    for matrix, rank in ranks.items():
        place, path = _place(model, block_map, matrix)
        by_place.setdefault(place, {})[path] = rank
    made = _fork(model)
    for place, paths in by_place.items():
        block = _forked(made, place)
        for path in paths:
            _forked(block, narrow.held(block, path).rpartition(".")[0])
        narrow.lower(block, paths)
    return made


def matrix_in(model: nn.Module, block_map: list[list[int]], matrix: Matrix) -> nn.Linear | LowRank:
    """A matrix of an assembled model, or the product in its place; arguments as of `low_rank`."""
    place, path = _place(model, block_map, matrix)
    block = model.get_submodule(place)
    return narrow.matrix(block, narrow.held(block, path))


def _place(model: nn.Module, block_map: list[list[int]], matrix: Matrix) -> tuple[str, str]:
    """Path of the module that holds a matrix, and the matrix's path in that module: in its block,
    or in the last AdaLN.

    Raises:
        ValueError: there is none.
    """
    number, path = matrix
    if number == block_map[-1][-1] + 1:
        place, _, path = path.rpartition(".")
    else:
        starts = [members[0] for members in block_map]
        if number not in starts:
            raise ValueError(f"the model has no block that starts with block {number}")
        module = blocks.block_sequence(model)[starts.index(number)].module
        place = next(name for name, submodule in model.named_modules() if submodule is module)
    if not narrow.held(model.get_submodule(place), path):
        raise ValueError(f"block {number} of the model has no modulation {path}")
    return place, path


def _forked(module: nn.Module, path: str) -> nn.Module:
    """Makes forks of all modules on a path, in place, and returns the last of them."""
    for name in path.split(".") if path else ():
        fork = _fork(module.get_submodule(name))
        module._modules[name] = fork
        module = fork
    return module


def _fork(module: nn.Module) -> nn.Module:
    """A copy with the same weights, submodules and hooks, whose submodules can be replaced."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)  # an offloading hook's, which runs the original
    for name in vars(nn.Module()):  # all that a copy would share: submodules, weights, hooks
        if isinstance(own := vars(module)[name], dict):
            made.__dict__[name] = own.copy()
    return made
