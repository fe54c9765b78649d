"""Linear CKA, plain and debiased, and its resamples over calibration prompts.

Kornblith et al. 2019; debiased by HSIC_1, Song et al. 2012, here in feature space: O(n d^2) for n
tokens of d channels, no n x n matrix. float64 throughout, on any device that has it.

Most functions take one side, [n, d], or many at a time, [pairs, n, d]: with small sides, a call
takes longer than its product, so one call makes many products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ppcl.errors import UserError

CPU = torch.device("cpu")
MAX_GROUPS = 32
# Tokens that vary by less than this share of their level vary by rounding.
CONSTANT = 1e-12
NOT_FINITE = (
    "the held-out tokens hold NaN or infinity, so CKA is undefined. Set teacher.dtype to bfloat16 "
    "or float32 (of probes: raise probe.ridge), delete activations/ and rerun."
)
# Products are made in slabs of at most so many bytes: on a CPU few enough to stay in its cache.
SLAB_BYTES = 128 * 2**20
CPU_SLAB_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Resamples:
    """Bootstrap over calibration prompts.

    order [n]: permutation of the tokens that brings those of one group of prompts together;
    offsets [g + 1]: where each group starts in that order; weights [1 + draws, g] float64: how
    often each group counts. Row 0 is all ones, the estimate itself.
    """

    order: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray


def resamples(
    prompts: np.ndarray,
    draws: int,
    seed: int,
    estimator: str,
    every: np.ndarray | None = None,
) -> Resamples:
    """Draw `draws` resamples of at most 32 groups of prompts; `prompts` [n] is each token's prompt.

    every: each token's prompt in all streams, if a stream may lack some prompts. Draws of different
    streams then pick the same prompts.

    Whole prompts are drawn, since tokens of one image are not independent. "plain" draws the groups
    with replacement. "debiased" draws half of them without: a token that is drawn twice meets
    itself off the diagonal and brings back the very bias that HSIC_1 removes, while a half-sample
    has the same variance as a bootstrap sample (Efron 1982, ch. 8) and no token twice. Of an odd
    number of groups, it draws the smaller and the larger half in turns: their variances are those
    of a bootstrap times (g + 1) / (g - 1) and its inverse. Of one group there are no resamples.

    Raises UserError if there are no tokens.
    """
    if not len(prompts):
        raise UserError(
            "no held-out tokens: raise record.heldout_fraction or record.samples, and rerun"
        )
    known = np.unique(prompts if every is None else every)
    group = np.searchsorted(known, prompts) % MAX_GROUPS
    order = np.argsort(group, kind="stable")
    groups = min(MAX_GROUPS, len(known))
    offsets = np.searchsorted(group[order], np.arange(groups + 1))
    weights = np.ones((1 + draws if groups > 1 else 1, groups))
    generator = np.random.default_rng(seed)
    for number, row in enumerate(weights[1:]):
        if estimator == "debiased":
            left_out = (groups + 1 - number % 2) // 2
            row[generator.permutation(groups)[:left_out]] = 0
        else:
            row[:] = generator.multinomial(groups, np.full(groups, 1 / groups))
    return Resamples(order, offsets, weights)


def linear_cka(
    x: np.ndarray,
    y: np.ndarray,
    estimator: str = "plain",
    names: tuple[str, str] = ("x", "y"),
) -> float:
    """Linear CKA of x [n, d_x] and y [n, d_y], rows being the same n tokens.

    "plain": |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms of centred features; in [0, 1],
    biased upward when n < 10 d. "debiased": the same ratio of HSIC_1, numerator and denominators
    unbiased; in [-1, 1]. Both ignore translation, rotation and isotropic scale of either side.
    Raises UserError, which begins with the side's name, if it holds NaN or infinity or does not
    vary; and on fewer than 4 tokens with "debiased".
    """
    plan = resamples(np.zeros(len(x), int), 0, 0, estimator)
    pairs = zip((x, y), names, strict=True)
    one, two = (Side(prepare(float64(v), False, [name]), plan) for v, name in pairs)
    own_x, own_y = (hsic(side, side, plan, estimator) for side in (one, two))
    return float(ratio(hsic(one, two, plan, estimator), own_x, own_y, [" and ".join(names)])[0])


def float64(values: np.ndarray, device: torch.device = CPU) -> Tensor:
    """Values on a device, which has to know float64."""
    # A copy in any case: what was read from a file can't be written to, which torch warns of.
    return torch.from_numpy(np.array(values, np.float64)).to(device)


def slab_bytes(device: torch.device) -> int:
    """The most bytes of one kind of product at a time."""
    return CPU_SLAB_BYTES if device.type == "cpu" else SLAB_BYTES


def pairs_at_once(tokens: int, channels: int, groups: int, device: torch.device) -> int:
    """How many pairs of sides [tokens, channels] are computed at a time, at least one.

    So many that none of their tensors is larger than a slab: tokens [n, d], tokens on sums [n, g],
    products [g, d, d], and products with sums [g, g, g].
    """
    largest = max(tokens * max(channels, groups), groups * max(channels, groups) ** 2)
    return max(1, slab_bytes(device) // (8 * largest))


def prepare(tokens: Tensor, normalise: bool, names: Sequence[str]) -> Tensor:
    """Optionally L2-normalised tokens, centred: float64 [n, d], or [sides, n, d]. CKA ignores the
    shift, and centred tokens keep the sums below from cancelling.

    Raises UserError as `refuse_constant`.
    """
    if normalise:
        norms = torch.linalg.norm(tokens, dim=-1, keepdim=True)
        _refuse(~torch.isfinite(norms.amax((-2, -1))), names, NOT_FINITE)
        tokens = tokens / torch.where(norms > 0, norms, 1)
    mean = tokens.mean(-2)
    centred = tokens - mean.unsqueeze(-2)
    spread = torch.linalg.vector_norm(centred, dim=(-2, -1))
    refuse_constant(spread, mean, tokens.shape[-2], names)
    return centred


def refuse_constant(spread: Tensor, mean: Tensor, count: int, names: Sequence[str]) -> None:
    """Raises UserError, which begins with a side's name, if its tokens vary by rounding alone, or
    hold NaN or infinity.

    spread: square root of the sum of |x - mean|^2 over `count` tokens, of every side: [sides], or
    [] of one. mean: [sides, d], or [d]. names: of the sides, in order.
    """
    level = count**0.5 * torch.linalg.vector_norm(mean, dim=-1)
    _refuse(~torch.isfinite(spread + level), names, NOT_FINITE)
    _refuse(
        spread <= CONSTANT * torch.hypot(spread, level),
        names,
        f"the {count} held-out token(s) do not differ, so CKA is undefined. "
        "Record more prompts (record.samples, record.heldout_fraction) and rerun.",
    )


def _refuse(bad: Tensor, names: Sequence[str], reason: str) -> None:
    """Raises UserError for the first of the sides that is bad: bool [sides], or []."""
    if bad.any():
        raise UserError(f"{names[int(bad.reshape(-1).int().argmax())]}: {reason}")


class Side:
    """One side of CKA, or many: centred tokens x [..., n, d] in plan.order, and sums over groups of
    prompts.

    Without resamples all tokens are one group.
    """

    def __init__(self, x: Tensor, plan: Resamples):
        self.x = x
        offsets = plan.offsets if len(plan.weights) > 1 else plan.offsets[[0, -1]]
        self.groups = [slice(low, high) for low, high in pairwise(offsets.tolist())]
        self.sums = torch.stack([x[..., group, :].sum(-2) for group in self.groups], -2)

    def totals(self, each: Tensor) -> Tensor:
        """Sum of x_i each_i over the tokens i of each group: [..., g, d] from each [..., n]."""
        parts = [each[..., None, group] @ self.x[..., group, :] for group in self.groups]
        return torch.cat(parts, -2)

    @cached_property
    def on_sums(self) -> Tensor:
        """x_i on the sum of each group: [..., n, g]."""
        return self.x @ self.sums.mT

    @cached_property
    def squares(self) -> Tensor:
        """|x_i|^2: [..., n]."""
        return torch.linalg.vecdot(self.x, self.x)


def hsic(x: Side, y: Side, plan: Resamples, estimator: str) -> np.ndarray:
    """HSIC of linear kernels for every row of plan.weights: [1 + draws]; of many sides, or of many
    with one, [sides, 1 + draws].

    With A = sum x y^T, a = sum x, b = sum y over n weighted tokens:
    plain:    |A - a b^T / n|^2                                     (= |X^T Y|^2, centred)
    debiased: HSIC_1 = [ tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 (1'KL1) / (n-2) ] / (n (n-3))
              with the kernels' diagonals K_ii = |x_i|^2, L_ii = |y_i|^2 set to 0, so that
              tr(KL) = |A|^2 - sum K_ii L_ii,   1'K1 = |a|^2 - sum K_ii,
              1'KL1 = a'A b - a'(sum x L_ii) - b'(sum y K_ii) + sum K_ii L_ii

    A resample weights groups of prompts, A = sum_g w_g A_g, so that its |A|^2 = w'Gw with
    G_gh = <A_g, A_h>: g products of n_g d^2 and one Gram matrix serve all resamples.
    Raises UserError with "debiased" if a resample has fewer than 4 tokens.
    """
    weights = plan.weights if len(x.groups) == plan.weights.shape[1] else np.ones((1, 1))
    n = weights @ np.array([group.stop - group.start for group in x.groups], float)

    def form(matrix: Tensor) -> np.ndarray:
        return ((weights @ matrix.cpu().numpy()) * weights).sum(-1)

    square = form(_gram_of_products(x, y))
    a_a, b_b = form(x.sums @ x.sums.mT), form(y.sums @ y.sums.mT)
    # a'A b = sum_hgl w_h w_g w_l sum over i in h of (a_g x_i)(b_l y_i)
    batch = torch.broadcast_shapes(x.sums.shape[:-2], y.sums.shape[:-2])
    products = x.x.new_empty(*batch, *[len(x.groups)] * 3)
    for h, group in enumerate(x.groups):
        products[..., h, :, :] = x.on_sums[..., group, :].mT @ y.on_sums[..., group, :]
    three = products.flatten(-3, -2).cpu().numpy()
    two = (weights[:, :, None] * weights[:, None]).reshape(len(weights), -1)
    bilinear = ((two @ three) * weights).sum(-1)
    if estimator == "plain":
        n = np.maximum(n, 1)  # groups may hold none of this stream's tokens: all sums are 0
        return square - 2 * bilinear / n + a_a * b_b / n**2
    if n.min() < 4:
        raise UserError(
            f"similarity.estimator 'debiased' needs at least 4 held-out tokens in a resample, here "
            f"{int(n.min())}. Raise record.samples or set similarity.estimator to plain."
        )
    k, el = x.squares, y.squares
    k_sum, l_sum, k_l = (
        torch.stack([values[..., group].sum(-1) for group in x.groups], -1).cpu().numpy()
        @ weights.T
        for values in (k, el, k * el)
    )
    sums_k, sums_l = a_a - k_sum, b_b - l_sum
    crossed = form(x.sums @ x.totals(el).mT) + form(y.sums @ y.totals(k).mT)
    both = bilinear - crossed + k_l
    trace = square - k_l
    return (trace + sums_k * sums_l / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def _gram_of_products(x: Side, y: Side) -> Tensor:
    """<A_g, A_h> for all groups: float64 [..., g, g], with A_g = X_g^T Y_g.

    Columns of x go by in slabs, to bound the memory of g such matrices. Of a side with itself,
    whose A_g are symmetric, what lies below the diagonal is not computed twice.
    """
    batch = torch.broadcast_shapes(x.x.shape[:-2], y.x.shape[:-2])
    groups, columns = len(x.groups), x.x.shape[-1]
    gram = x.x.new_zeros(*batch, groups, groups)
    row = 8 * gram[..., 0].numel() * y.x.shape[-1]
    width = max(1, slab_bytes(x.x.device) // row)
    for start in range(0, columns, width):
        slab = x.x[..., start : start + width]
        parts = [(y.x, 1)] if x is not y else [(slab, 1), (x.x[..., start + width :], 2)]
        for other, times in (part for part in parts if part[0].shape[-1]):
            products = gram.new_empty(groups, *batch, slab.shape[-1], other.shape[-1])
            for product, group in zip(products, x.groups, strict=True):
                torch.matmul(slab[..., group, :].mT, other[..., group, :], out=product)
            flat = products.movedim(0, -3).flatten(-2)
            gram += times * (flat @ flat.mT)
    return gram


def ratio(
    cross: np.ndarray, own_x: np.ndarray, own_y: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """CKA from HSICs: cross / sqrt(own_x own_y), all [..., 1 + draws]; at most 1.

    cross: of the two sides of a pair; own_x, own_y: of each side with itself. names: of the pairs,
    in order. Raises UserError, which begins with a pair's name, if a side of
    it does not vary.
    """
    own_x, own_y = np.broadcast_arrays(own_x, own_y)
    still = ~((own_x[..., 0] > 0) & (own_y[..., 0] > 0))
    if still.any():
        raise UserError(
            f"{names[int(still.argmax())]}: a side does not vary over the held-out tokens, so CKA "
            "is undefined. Record more prompts (record.samples, record.heldout_fraction)."
        )
    # A resample can, rarely, hold tokens that do not vary; the estimate then takes its place.
    defined = (own_x > 0) & (own_y > 0)
    scale = np.sqrt(np.where(defined, own_x * own_y, 1))
    estimate = cross[..., :1] / scale[..., :1]
    return np.minimum(np.where(defined, cross / scale, estimate), 1.0)
