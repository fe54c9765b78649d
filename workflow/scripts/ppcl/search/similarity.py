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

All surrogates that end at the same block are compared together, some at a time: as many as fit in a
slab of memory (`cka.pairs_at_once`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.search.cka import (
    CPU,
    MAX_GROUPS,
    Resamples,
    Side,
    float64,
    hsic,
    pairs_at_once,
    prepare,
    ratio,
    refuse_constant,
    resamples,
    slab_bytes,
)
from ppcl.search.probes import Probe
from ppcl.settings import SimilaritySettings


def heldout(
    tokens, stream: str, options: SimilaritySettings, seed: int
) -> tuple[Callable, Resamples]:
    """How `surrogate_cka` reads one stream of a token_table.TokenReader, and its resamples.

    options: the config's `similarity`. The same seed for every stream: a resample draws the same
    prompts in each, so that the mean over streams has resamples of its own.
    """
    mask = tokens.heldout(stream)
    every = [tokens.prompts(other)[tokens.heldout(other)] for other in tokens.streams]
    draws = options.bootstrap, seed, options.estimator
    plan = resamples(tokens.prompts(stream)[mask], *draws, np.concatenate(every))
    return lambda boundary: tokens.values(boundary, stream)[mask], plan


def memory(
    shape: tuple[int, int], depth: int, options: SimilaritySettings, device: torch.device = CPU
) -> int:
    """The most bytes that `surrogate_cka` or `block_cka` needs, for `depth` boundaries.

    shape: [n, d] of the tokens at a boundary. options: the config's `similarity`. device: where it
    is computed, as that decides how many pairs are computed at a time.
    """
    tokens, channels = shape
    one, rank = tokens * channels, min(shape)
    groups = MAX_GROUPS if options.bootstrap else 1
    kept = one
    if _composes(options.bootstrap, options.estimator, options.normalise_tokens):
        kept = max(one, rank * (tokens + channels))  # a basis and a map; heat maps keep tokens
    if options.reference == "start":
        kept += one
    # Of a pair at work: tokens on their way, and sums over groups with their products.
    working = 5 * one + 2 * groups * (tokens + channels) + groups**3
    return 8 * (depth * kept + working) + 2 * slab_bytes(device)


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

    Memory: as `memory` tells; M n d float64 numbers, and as many again with reference "start" and,
    if n = d, with the plain estimator and no resamples. Time: M^2 / 2 times
    2 to 3 products of n d^2; one with the plain estimator and no resamples.
    Raises UserError naming stream and boundary on NaN or tokens that do not vary.
    """
    depth = len(probes)
    values = np.full((depth, depth, len(plan.weights)), np.nan)
    composed = _composes(len(plan.weights) - 1, estimator, normalise_tokens)
    kind = _Composed if composed else _Materialised

    def target(tokens: Tensor, boundary: int) -> tuple[Tensor, np.ndarray]:
        """Prepared tokens, with their HSIC [1 + draws]."""
        tokens = prepare(tokens, normalise_tokens, [f"stream {stream!r}, boundary {boundary}"])
        side = Side(tokens, plan)
        return tokens, hsic(side, side, plan, estimator)

    here = None
    for last in range(depth) if steps is None else steps:
        probe = probes[last]
        if probe is None:
            here = None
            continue
        if here is None:  # the first of a row of blocks that have probes
            here, began = _ordered(read, last, plan, stream, device), last
            length = sum(1 for _ in takewhile(lambda p: p is not None, probes[last:]))
            running = kind(length, here, normalise_tokens, plan, estimator)
            targets: list[tuple[Tensor, np.ndarray]] = []
        if reference == "start":
            targets.append(target(here, last))
        running.start(here)
        here = _ordered(read, last + 1, plan, stream, device)
        if reference == "end":
            tokens, own_other = target(here, last + 1)
            other = Side(tokens, plan)
        whole = float64(np.eye(*probe.weight.shape) + probe.weight, device)
        bias = float64(probe.bias, device)
        for some in running.slabs():
            firsts = range(began + some.start, began + some.stop)
            names = [f"stream {stream!r}, probes {first}-{last}" for first in firsts]
            if reference == "start":
                starts, owns = zip(*targets[some], strict=True)
                other, own_other = Side(torch.stack(starts), plan), np.stack(owns)
            cross, own = running.add(some, whole, bias, other, names)
            values[firsts, last] = ratio(cross, own, own_other, names)
    return np.moveaxis(values, -1, 0)


class _Composed:
    """Surrogates as maps of their start tokens, for the plain estimator without resamples.

    most: how many surrogates there may be. tokens [n, d]: the start tokens of the first one.
    """

    def __init__(
        self, most: int, tokens: Tensor, _normalise: bool, _plan: Resamples, _estimator: str
    ):
        (self._number, channels), rank = tokens.shape, min(tokens.shape)
        self._most, self._count = most, 0
        self._mean = tokens.new_empty(most, channels)
        self._basis = tokens.new_empty(most, self._number, rank)
        self._map = tokens.new_empty(most, channels, rank)

    def start(self, tokens: Tensor) -> None:
        """One more surrogate, which starts at these tokens [n, d]."""
        at, self._count = self._count, self._count + 1
        self._mean[at] = tokens.mean(0)
        self._basis[at], triangle = torch.linalg.qr(tokens - self._mean[at])
        self._map[at] = triangle.T

    def slabs(self) -> Iterator[slice]:
        """The surrogates, some at a time."""
        channels = self._map.shape[1]
        return _slabs(self._count, self._number, channels, 1, self._map.device)

    def add(
        self, some: slice, weight: Tensor, bias: Tensor, other: Side, names: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Another probe, x -> weight x + bias, at the end of some of them, whose names are given.

        Returns their HSIC with `other`, one for all or one for each, and with themselves: each
        [surrogates, 1].
        """
        self._map[some] = weight @ self._map[some]
        self._mean[some] = self._mean[some] @ weight.T + bias
        spread = torch.linalg.vector_norm(self._map[some], dim=(1, 2))
        refuse_constant(spread, self._mean[some], self._number, names)
        with_other = _square(self._map[some] @ (self._basis[some].mT @ other.x))
        return with_other, _square(self._map[some] @ self._map[some].mT)


def _square(matrices: Tensor) -> np.ndarray:
    """|matrix|^2 of each: [matrices, 1]."""
    return torch.linalg.vector_norm(matrices, dim=(1, 2)).square()[:, None].cpu().numpy()


class _Materialised:
    """Surrogates as their tokens, which are centred here unless they are to be normalised first.

    most: how many surrogates there may be. tokens [n, d]: the start tokens of the first one.
    """

    def __init__(self, most: int, tokens: Tensor, normalise: bool, plan: Resamples, estimator: str):
        self._normalise, self._how = normalise, (plan, estimator)
        self._count = 0
        self._mean = tokens.new_empty(most, tokens.shape[1])
        self._tokens = tokens.new_empty(most, *tokens.shape)

    def start(self, tokens: Tensor) -> None:
        """One more surrogate, which starts at these tokens [n, d]."""
        at, self._count = self._count, self._count + 1
        self._mean[at] = tokens.mean(0)
        self._tokens[at] = tokens if self._normalise else tokens - self._mean[at]

    def slabs(self) -> Iterator[slice]:
        """The surrogates, some at a time."""
        groups = len(self._how[0].offsets) - 1 if len(self._how[0].weights) > 1 else 1
        _, tokens, channels = self._tokens.shape
        return _slabs(self._count, tokens, channels, groups, self._tokens.device)

    def add(
        self, some: slice, weight: Tensor, bias: Tensor, other: Side, names: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Another probe, x -> weight x + bias, at the end of some of them, whose names are given.

        Returns their HSIC with `other`, one for all or one for each, and with themselves: each
        [surrogates, 1 + draws].
        """
        tokens = self._tokens[some]
        tokens.copy_(tokens @ weight.T)
        if self._normalise:
            tokens += bias
            tokens = prepare(tokens, True, names)
        else:
            # Centred tokens stay so without the bias: no pass over n d numbers to centre them anew.
            self._mean[some] = self._mean[some] @ weight.T + bias
            spread = torch.linalg.vector_norm(tokens, dim=(1, 2))
            refuse_constant(spread, self._mean[some], tokens.shape[1], names)
        side = Side(tokens, self._how[0])
        return hsic(side, other, *self._how), hsic(side, side, *self._how)


def _slabs(
    count: int, tokens: int, channels: int, groups: int, device: torch.device
) -> Iterator[slice]:
    """`count` sides [tokens, channels], some at a time."""
    some = pairs_at_once(tokens, channels, groups, device)
    return (slice(start, min(start + some, count)) for start in range(0, count, some))


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
    """Heat map: CKA between the outputs of every two of `blocks`, float64 [blocks, blocks].

    read(boundary) as in `surrogate_cka`; the output of block b is boundary b + 1. Symmetric with a
    unit diagonal. Only row 0 of `plan` is used (no resampling). Memory: len(blocks) n d float64.
    """
    plan = Resamples(plan.order, plan.offsets, plan.weights[:1])
    for number, block in enumerate(blocks):
        tokens = _ordered(read, block + 1, plan, stream, device)
        tokens = prepare(tokens, normalise_tokens, [f"stream {stream!r}, boundary {block + 1}"])
        if not number:
            outputs = tokens.new_empty(len(blocks), *tokens.shape)
        outputs[number] = tokens
    own = np.empty((len(blocks), 1))
    values = np.eye(len(blocks))
    for b in range(len(blocks)):
        side = Side(outputs[b], plan)
        own[b] = hsic(side, side, plan, estimator)
        for some in _slabs(b, outputs.shape[1], outputs.shape[2], 1, device):
            cross = hsic(Side(outputs[some], plan), side, plan, estimator)
            names = [
                f"stream {stream!r}, outputs of blocks {a} and {blocks[b]}" for a in blocks[some]
            ]
            similarities = ratio(cross, own[some], own[b], names)[:, 0]
            values[b, some] = values[some, b] = similarities
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
