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

The product of affine maps is affine, so a run of probes is one map A, and CKA ignores its shift.
With the start's centred tokens X = Q R, the surrogate's are X A^T = Q H^T for H = A R^T, and

    |Z^T Z| = |H H^T|,    |Z^T Y| = |H (Q^T Y)|        (Frobenius norms)

in one product of n d^2 per pair (`_Composed`). Resamples, the debiased estimator and normalised
tokens need every token of the surrogate (`_Materialised`). float64 throughout, on any device that
has it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ppcl.cka import (
    CPU,
    MAX_GROUPS,
    SLAB_BYTES,
    Resamples,
    Side,
    float64,
    hsic,
    prepare,
    ratio,
    refuse_constant,
    resamples,
)
from ppcl.errors import UserError
from ppcl.probes import Probe


def heldout(tokens, stream: str, options: dict, seed: int) -> tuple[Callable, Resamples]:
    """How `surrogate_cka` reads one stream of an token_table.TokenReader, and its resamples.

    options: the config's `similarity`. The same seed for every stream: a resample draws the same
    prompts in each, so that the mean over streams has resamples of its own.
    """
    mask = tokens.heldout(stream)
    every = [tokens.prompts(other)[tokens.heldout(other)] for other in tokens.streams]
    draws = options["bootstrap"], seed, options["estimator"]
    plan = resamples(tokens.prompts(stream)[mask], *draws, np.concatenate(every))
    return lambda boundary: tokens.values(boundary, stream)[mask], plan


def memory(shape: tuple[int, int], depth: int, options: Mapping) -> int:
    """Bytes of `surrogate_cka`, or of `block_cka`, for `depth` boundaries of tokens [n, d].

    options: the config's `similarity`.
    """
    tokens, channels = shape
    one, rank = tokens * channels, min(shape)
    groups = MAX_GROUPS if options["bootstrap"] else 1
    side = one + groups * (tokens + channels)
    if _composes(options["bootstrap"], options["estimator"], options["normalise_tokens"]):
        kept = max(one, rank * (tokens + channels))  # a basis and a map; heat maps keep tokens
    else:
        kept = side + (one if options["normalise_tokens"] else 0)
    if options["reference"] == "start":
        kept += side
    return 8 * (depth * kept + 4 * one) + 2 * SLAB_BYTES


def _composes(draws: int, estimator: str, normalise_tokens: bool) -> bool:
    return not draws and estimator == "plain" and not normalise_tokens


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
    device: torch.device = CPU,
) -> np.ndarray:
    """cka of Eq. 3 for every run of blocks of one stream: float64 [1 + draws, first, last].

    read(boundary) gives the held-out tokens [n, d] (none of which fitted a probe), in the same
    order at every boundary; each boundary is read once, in order. `probes` holds one entry per
    block, None where this stream does not pass a block; runs do not reach over such a block and
    their entries are NaN, as are those with last < first. Row 0 is the estimate, the others are
    the resamples of `plan`. normalise_tokens: L2-normalise every token (on both sides) first.
    steps: range(M), wrapped in a progress bar if one is wanted. device: where it is computed.

    Memory: as `memory` tells; M n d float64 numbers, and as many again with reference "start", with
    normalised tokens, and, if n = d, with the plain estimator and no resamples. Time: M^2 / 2 times
    2 to 3 products of n d^2; one with the plain estimator and no resamples.
    Raises UserError naming stream and boundary on NaN or tokens that do not vary.
    """
    depth = len(probes)
    values = np.full((len(plan.weights), depth, depth), np.nan)
    composed = _composes(len(plan.weights) - 1, estimator, normalise_tokens)
    kind = _Composed if composed else _Materialised
    running: dict[int, _Composed | _Materialised] = {}
    targets: dict[int, tuple[Side, np.ndarray]] = {}

    def target(tokens: Tensor, boundary: int) -> tuple[Side, np.ndarray]:
        name = f"stream {stream!r}, boundary {boundary}"
        side = Side(prepare(tokens, normalise_tokens, name), plan)
        return side, hsic(side, side, plan, estimator)

    here = None
    for last in range(depth) if steps is None else steps:
        probe = probes[last]
        if probe is None:
            running.clear()
            here = None
            continue
        if here is None:
            here = _ordered(read, last, plan, stream, device)
        if reference == "start":
            targets[last] = target(here, last)
        running[last] = kind(here, normalise_tokens, plan, estimator)
        here = _ordered(read, last + 1, plan, stream, device)
        if reference == "end":
            targets = dict.fromkeys(running, target(here, last + 1))
        whole = float64(np.eye(*probe.weight.shape) + probe.weight, device)
        bias = float64(probe.bias, device)
        for first, run in running.items():
            name = f"stream {stream!r}, probes {first}-{last}"
            run.add(whole, bias, name)
            other, own_other = targets[first]
            values[:, first, last] = ratio(run.with_other(other), run.own(), own_other, name)
    return values


class _Composed:
    """A surrogate as a map of its start, for the plain estimator without resamples."""

    def __init__(self, tokens: Tensor, _normalise: bool, _plan: Resamples, _estimator: str):
        self._count, self._mean = len(tokens), tokens.mean(0)
        self._basis, triangle = torch.linalg.qr(tokens - self._mean)
        self._map = triangle.T

    def add(self, weight: Tensor, bias: Tensor, name: str) -> None:
        """Another probe, x -> weight x + bias."""
        self._map, self._mean = weight @ self._map, weight @ self._mean + bias
        refuse_constant(torch.linalg.norm(self._map), self._mean, self._count, name)

    def own(self) -> np.ndarray:
        return _square(self._map @ self._map.T)

    def with_other(self, other: Side) -> np.ndarray:
        return _square(self._map @ (self._basis.T @ other.x))


def _square(matrix: Tensor) -> np.ndarray:
    """|matrix|^2: [1]."""
    return torch.linalg.norm(matrix).square().reshape(1).cpu().numpy()


class _Materialised:
    """A surrogate as its tokens, centred unless each is to be normalised first."""

    def __init__(self, tokens: Tensor, normalise: bool, plan: Resamples, estimator: str):
        self._normalise, self._how = normalise, (plan, estimator)
        self._mean = tokens.mean(0)
        self._tokens = tokens if normalise else tokens - self._mean
        self._side: Side

    def add(self, weight: Tensor, bias: Tensor, name: str) -> None:
        """Another probe, x -> weight x + bias."""
        self._tokens = self._tokens @ weight.T
        if self._normalise:
            self._tokens += bias
            self._side = Side(prepare(self._tokens, True, name), self._how[0])
            return
        # Centred tokens stay so without the bias: no pass over n d numbers to centre them again.
        self._mean = weight @ self._mean + bias
        refuse_constant(torch.linalg.norm(self._tokens), self._mean, len(self._tokens), name)
        self._side = Side(self._tokens, self._how[0])

    def own(self) -> np.ndarray:
        return hsic(self._side, self._side, *self._how)

    def with_other(self, other: Side) -> np.ndarray:
        return hsic(self._side, other, *self._how)


def block_cka(
    read: Callable[[int], np.ndarray],
    blocks: Sequence[int],
    plan: Resamples,
    *,
    estimator: str = "plain",
    normalise_tokens: bool = False,
    stream: str = "?",
    device: torch.device = CPU,
) -> np.ndarray:
    """Heat map: CKA between the outputs of every two of `blocks`, float64 [len(blocks)] * 2.

    read(boundary) as in `surrogate_cka`; the output of block b is boundary b + 1. Symmetric with a
    unit diagonal. Only row 0 of `plan` is used (no resampling). Memory: len(blocks) n d float64.
    """
    plan = Resamples(plan.order, plan.offsets, plan.weights[:1])
    outputs = []
    for block in blocks:
        tokens = _ordered(read, block + 1, plan, stream, device)
        name = f"stream {stream!r}, boundary {block + 1}"
        outputs.append(Side(prepare(tokens, normalise_tokens, name), plan))
    own = [hsic(output, output, plan, estimator) for output in outputs]
    values = np.eye(len(outputs))
    for a in range(len(outputs)):
        for b in range(a):
            cross = hsic(outputs[a], outputs[b], plan, estimator)
            name = f"stream {stream!r}, outputs of blocks {blocks[b]} and {blocks[a]}"
            values[a, b] = values[b, a] = ratio(cross, own[a], own[b], name)[0]
    return values


def _ordered(
    read: Callable[[int], np.ndarray],
    boundary: int,
    plan: Resamples,
    stream: str,
    device: torch.device,
) -> Tensor:
    tokens = np.asarray(read(boundary))
    if not np.isfinite(tokens).all():
        raise UserError(
            f"stream {stream!r}, boundary {boundary}: NaN or infinity in the recorded tokens. "
            "Set teacher.dtype to bfloat16 or float32, delete activations/ and rerun."
        )
    return float64(tokens[plan.order], device)
