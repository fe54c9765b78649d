"""Stage 1.2: how like the teacher a run of probes is (Eq. 3, 4), and the CKA heat map of blocks.

Numbering. Blocks are 0..M-1; boundary b is the input of block b, boundary M the last output; T_u,
the output of block u, is boundary u + 1, and u = -1 means the embeddings (boundary 0). The
surrogate T^[u->k] runs the teacher up to and including block u, then the probes u+1..k:

    z = T_u(X);   for block in u+1..k:  z = z + W_block z + b_block

one matrix product per added block. Results are indexed [first, last] with first = u + 1 and
last = k: the replaced run of blocks, inclusive.

What a surrogate is compared with (`reference`):
- "end":   cka(u, k) = CKA(T^[u->k](X), T_k(X)). Did the probes do what blocks u+1..k do?
- "start": cka(u, k) = CKA(T^[u->k](X), T_u(X)). How far do the probes move away from where they
  began? The literal index in one printing of Eq. 3. It never sees the blocks' own outputs.
Either way cka(u, u) = 1, which Eq. 4 needs for its first difference:

    delta(u, k) = -(cka(u, k) - cka(u, k - 1))

Linear CKA, Kornblith et al. 2019; debiased by HSIC_1, Song et al. 2012, here in feature space:
O(n d^2) for n tokens of d channels, no n x n matrix. NumPy float64 throughout.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ppcl.errors import UserError
from ppcl.families import IMAGE, JOINT, TEXT
from ppcl.probes import Probe

MAX_GROUPS = 32
SLAB_BYTES = 128 * 2**20


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


def resamples(prompts: np.ndarray, draws: int, seed: int, estimator: str) -> Resamples:
    """Draw `draws` resamples of at most 32 groups of prompts; `prompts` [n] is each token's prompt.

    Whole prompts are drawn, since tokens of one image are not independent. "plain" draws the groups
    with replacement. "debiased" draws half of them without: a token that is drawn twice meets
    itself off the diagonal and brings back the very bias that HSIC_1 removes, while a half-sample
    has the same variance as a bootstrap sample (Efron 1982, ch. 8) and no token twice.

    Raises UserError if there are no tokens.
    """
    if not len(prompts):
        raise UserError(
            "no held-out tokens: raise record.heldout_fraction or record.samples, and rerun"
        )
    _, rank = np.unique(prompts, return_inverse=True)
    group = rank % MAX_GROUPS
    order = np.argsort(group, kind="stable")
    groups = int(group.max()) + 1
    offsets = np.searchsorted(group[order], np.arange(groups + 1))
    weights = np.ones((1 + draws, groups))
    generator = np.random.default_rng(seed)
    if groups > 1:
        for row in weights[1:]:
            if estimator == "debiased":
                row[generator.permutation(groups)[: groups // 2]] = 0
            else:
                row[:] = generator.multinomial(groups, np.full(groups, 1 / groups))
    return Resamples(order, offsets, weights)


def heldout(tokens, stream: str, options: dict, seed: int) -> tuple[Callable, Resamples]:
    """How `surrogate_cka` reads one stream of an activations.TokenReader, and its resamples.

    options: the config's `similarity`. The same seed for every stream: a resample draws the same
    prompts in each, so that the mean over streams has resamples of its own.
    """
    mask = tokens.heldout(stream)
    draws = options["bootstrap"], seed, options["estimator"]
    plan = resamples(tokens.prompts(stream)[mask], *draws)
    return lambda boundary: tokens.values(boundary, stream)[mask], plan


def linear_cka(x: np.ndarray, y: np.ndarray, estimator: str = "plain") -> float:
    """Linear CKA of x [n, d_x] and y [n, d_y], rows being the same n tokens.

    "plain": |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms of centred features; in [0, 1],
    biased upward when n < 10 d. "debiased": the same ratio of HSIC_1, numerator and denominators
    unbiased; in [-1, 1]. Both ignore translation, rotation and isotropic scale of either side.
    Raises UserError if a side does not vary, or on fewer than 4 tokens with "debiased".
    """
    plan = resamples(np.zeros(len(x), int), 0, 0, estimator)
    x, y = _prepare(x, False, "x"), _prepare(y, False, "y")
    own_x, own_y = (_hsic(side, side, plan, estimator) for side in (x, y))
    return float(_ratio(_hsic(x, y, plan, estimator), own_x, own_y)[0])


def surrogate_cka(
    read: Callable[[int], np.ndarray],
    probes: Sequence[Probe | None],
    plan: Resamples,
    *,
    reference: str = "end",
    estimator: str = "plain",
    normalise_tokens: bool = False,
    stream: str = "?",
    steps: Iterable[int] | None = None,
) -> np.ndarray:
    """cka of Eq. 3 for every run of blocks of one stream: float64 [1 + draws, first, last].

    read(boundary) gives the held-out tokens [n, d] (none of which fitted a probe), in the same
    order at every boundary; each boundary is read once, in order. `probes` holds one entry per
    block, None where this stream does not pass a block; runs do not reach over such a block and
    their entries are NaN, as are those with last < first. Row 0 is the estimate, the others are
    the resamples of `plan`. normalise_tokens: L2-normalise every token (on both sides) first.
    steps: range(M), wrapped in a progress bar if one is wanted.

    Memory: M n d float64 numbers, for one running surrogate per start, and as many again with
    reference "start". Time: about M^2 / 2 times 3 products of n d^2.
    Raises UserError naming stream and boundary on NaN or tokens that do not vary.
    """
    depth = len(probes)
    values = np.full((len(plan.weights), depth, depth), np.nan)
    running: dict[int, np.ndarray] = {}
    starts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def side(tokens: np.ndarray, name: str) -> np.ndarray:
        return _prepare(tokens, normalise_tokens, f"stream {stream!r}, {name}")

    here = None
    for last in range(depth) if steps is None else steps:
        probe = probes[last]
        if probe is None:
            running.clear()
            here = None
            continue
        if here is None:
            here = _ordered(read, last, plan, stream)
        running[last] = here
        if reference == "start":
            start = side(here, f"boundary {last}")
            starts[last] = (start, _hsic(start, start, plan, estimator))
        here = _ordered(read, last + 1, plan, stream)
        if reference == "end":
            end = side(here, f"boundary {last + 1}")
            target = (end, _hsic(end, end, plan, estimator))
        for first, tokens in running.items():
            running[first] = probe(tokens)
            z = side(running[first], f"probes {first}-{last}")
            own = _hsic(z, z, plan, estimator)
            other, own_other = target if reference == "end" else starts[first]
            values[:, first, last] = _ratio(_hsic(z, other, plan, estimator), own, own_other)
    return values


def block_cka(
    read: Callable[[int], np.ndarray],
    blocks: Sequence[int],
    plan: Resamples,
    *,
    estimator: str = "plain",
    normalise_tokens: bool = False,
    stream: str = "?",
) -> np.ndarray:
    """Heat map: CKA between the outputs of every two of `blocks`, float64 [len(blocks)] * 2.

    read(boundary) as in `surrogate_cka`; the output of block b is boundary b + 1. Symmetric with a
    unit diagonal. Only row 0 of `plan` is used (no resampling). Memory: len(blocks) n d float64.
    """
    plan = Resamples(plan.order, plan.offsets, plan.weights[:1])
    outputs = [
        _prepare(
            _ordered(read, block + 1, plan, stream),
            normalise_tokens,
            f"stream {stream!r}, boundary {block + 1}",
        )
        for block in blocks
    ]
    own = [_hsic(output, output, plan, estimator) for output in outputs]
    values = np.eye(len(outputs))
    for a in range(len(outputs)):
        for b in range(a):
            cross = _hsic(outputs[a], outputs[b], plan, estimator)
            values[a, b] = values[b, a] = _ratio(cross, own[a], own[b])[0]
    return values


def differences(cka: np.ndarray) -> np.ndarray:
    """delta of Eq. 4 for cka [..., first, last]: the loss of CKA by adding block `last`.

    On the diagonal (one probe) it is 1 - cka, as cka(u, u) = 1.
    """
    before = np.concatenate([np.ones_like(cka[..., :1]), cka[..., :-1]], axis=-1)
    diagonal = np.arange(cka.shape[-1])
    before[..., diagonal, diagonal] = 1
    return before - cka


def limits(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval (low, high) around row 0 of [1 + draws, ...], from the other rows: resamples.

    2.5 and 97.5 percentile of the resamples about their own mean, moved to the estimate: a resample
    holds fewer distinct tokens, so its plain CKA is biased upward and would miss the estimate.
    Without resamples both limits are the estimate.
    """
    estimate, others = draws[0], draws[1:]
    if not len(others):
        return estimate.copy(), estimate.copy()
    low, high = np.percentile(others - others.mean(0), [2.5, 97.5], axis=0)
    return estimate + np.minimum(low, 0), estimate + np.maximum(high, 0)


def mean_of_streams(draws: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over streams of [1 + draws, first, last], over those that have the run (NaN if none)."""
    stacked = np.stack(draws)
    present = np.isfinite(stacked)
    number = present.sum(0)
    total = np.where(present, stacked, 0).sum(0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def with_joint(draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The streams' [1 + draws, first, last] where blocks that have one joint sequence count for
    image and for text, and the streams' mean."""
    found = dict(draws)
    if JOINT in draws:
        for stream in (IMAGE, TEXT):
            own = draws.get(stream, np.full_like(draws[JOINT], np.nan))
            found[stream] = np.where(np.isfinite(own), own, draws[JOINT])
    return found | {"mean": mean_of_streams(list(draws.values()))}


def rise_noise(delta: np.ndarray) -> float:
    """Noise level of delta(u, k) - delta(u, k-1), the rise that Eq. 5 looks for.

    The median over all (u, k) of the rise's standard deviation over the resamples; delta is
    [1 + draws, first, last]. 0 without resamples, or where no run has two blocks.
    """
    rises = np.diff(delta[1:], axis=-1)
    if len(rises) < 2:
        return 0.0
    spread = rises.std(axis=0, ddof=1)
    spread = spread[np.isfinite(spread)]
    return float(np.median(spread)) if len(spread) else 0.0


def _ordered(
    read: Callable[[int], np.ndarray], boundary: int, plan: Resamples, stream: str
) -> np.ndarray:
    tokens = np.asarray(read(boundary), np.float64)
    if not np.isfinite(tokens).all():
        raise UserError(
            f"stream {stream!r}, boundary {boundary}: NaN or infinity in the recorded tokens. "
            "Set teacher.dtype to bfloat16 or float32, delete activations/ and rerun."
        )
    return tokens[plan.order]


def _prepare(tokens: np.ndarray, normalise: bool, name: str) -> np.ndarray:
    """Optionally L2-normalised tokens, centred: float64 [n, d]. CKA ignores the shift, and
    centred tokens keep the sums below from cancelling."""
    tokens = np.asarray(tokens, np.float64)
    if normalise:
        norms = np.linalg.norm(tokens, axis=1, keepdims=True)
        tokens = tokens / np.where(norms > 0, norms, 1)
    centred = tokens - tokens.mean(0)
    if np.abs(centred).max(initial=0) <= 1e-12 * np.abs(tokens).max(initial=0):
        raise UserError(
            f"{name}: the {len(tokens)} held-out token(s) do not differ, so CKA is undefined. "
            "Record more prompts (record.samples, record.heldout_fraction) and rerun."
        )
    return centred


def _hsic(x: np.ndarray, y: np.ndarray, plan: Resamples, estimator: str) -> np.ndarray:
    """HSIC of linear kernels for every row of plan.weights, from sums over each group of prompts.

    x [n, d_x], y [n, d_y] in plan.order -> [1 + draws]. A resample is a weighted sum of the groups'
    X^T Y, so it costs groups * d_x * d_y, not a pass over the tokens. Columns of x go by in slabs,
    to bound the memory of groups + draws such matrices.

    With A = sum x y^T, a = sum x, b = sum y over n weighted tokens:
    plain:    |A - a b^T / n|^2                                     (= |X^T Y|^2, centred)
    debiased: HSIC_1 = [ tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 (1'KL1) / (n-2) ] / (n (n-3))
              with the kernels' diagonals K_ii = |x_i|^2, L_ii = |y_i|^2 set to 0, so that
              tr(KL) = |A|^2 - sum K_ii L_ii,   1'K1 = |a|^2 - sum K_ii,
              1'KL1 = a'A b - a'(sum x L_ii) - b'(sum y K_ii) + sum K_ii L_ii
    """
    weights, offsets = plan.weights, plan.offsets

    def totals(values: np.ndarray) -> np.ndarray:
        return weights @ np.add.reduceat(values, offsets[:-1], axis=0)

    n = weights @ np.diff(offsets)
    a, b = totals(x), totals(y)
    square, bilinear = np.zeros(len(weights)), np.zeros(len(weights))
    width = max(1, SLAB_BYTES // (8 * sum(weights.shape) * y.shape[1]))
    for start in range(0, x.shape[1], width):
        slab = x[:, start : start + width]
        products = np.stack([slab[low:high].T @ y[low:high] for low, high in pairwise(offsets)])
        sums = (weights @ products.reshape(len(products), -1)).reshape(-1, *products.shape[1:])
        square += np.einsum("wij,wij->w", sums, sums)
        bilinear += ((sums @ b[:, :, None])[:, :, 0] * a[:, start : start + width]).sum(1)
    a_a, b_b = np.square(a).sum(1), np.square(b).sum(1)
    if estimator == "plain":
        return square - 2 * bilinear / n + a_a * b_b / n**2
    if n.min() < 4:
        raise UserError(
            f"similarity.estimator 'debiased' needs at least 4 held-out tokens in a resample, here "
            f"{int(n.min())}. Raise record.samples or set similarity.estimator to plain."
        )
    k, el = np.square(x).sum(1), np.square(y).sum(1)
    k_l = totals(k * el)
    trace = square - k_l
    sums_k, sums_l = a_a - totals(k), b_b - totals(el)
    both = (
        bilinear - (a * totals(x * el[:, None])).sum(1) - (b * totals(y * k[:, None])).sum(1) + k_l
    )
    return (trace + sums_k * sums_l / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def _ratio(cross: np.ndarray, own_x: np.ndarray, own_y: np.ndarray) -> np.ndarray:
    """CKA; rounding may leave it a hair above 1."""
    if own_x[0] <= 0 or own_y[0] <= 0:
        raise UserError(
            "a representation does not vary over the held-out tokens, so its CKA is undefined. "
            "Record more prompts (record.samples, record.heldout_fraction)."
        )
    # A resample can, rarely, hold tokens that do not vary; it then says nothing: the estimate.
    defined = (own_x > 0) & (own_y > 0)
    scale = np.sqrt(np.where(defined, own_x * own_y, 1))
    return np.minimum(np.where(defined, cross / scale, cross[0] / scale[0]), 1.0)
