"""Stage 1.1: one residual linear map per block and stream, fitted by least squares (Eq. 1, 2).

A probe stands in for block i on one stream: x -> x + W x + b. It is solved from sums over tokens
(the moments that `extract` adds up while the teacher runs), so neither memory nor time grows with
the number of calibration samples. The least-squares solution already is the minimum of L_fit
(Eq. 2) on the fitting tokens, so there is no gradient refinement here: it could only stop early,
and the ridge term does that job in closed form.

PPCL, arXiv 2511.16156, section on linear probes. NumPy float64 throughout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ppcl.errors import UserError

EPSILON = np.finfo(np.float64).eps
# A channel whose standard deviation is below a millionth of its root mean square varies by no more
# than the rounding of float32 activations; dividing by that noise would amplify it without bound.
CONSTANT_CHANNEL = 1e-12


@dataclass(frozen=True)
class Moments:
    """Sums over the fitting tokens of one block and stream, float64.

    count: number of tokens; x_sum [d_in]; x_x [d_in, d_in] = sum of x x^T; y_sum [d_out];
    x_y [d_in, d_out] = sum of x y^T; y_y = sum of |y|^2, with y = T_i(x) - x, the block's residual.
    """

    count: int
    x_sum: np.ndarray
    x_x: np.ndarray
    y_sum: np.ndarray
    x_y: np.ndarray
    y_y: float

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Moments":
        """Moments of tokens x [n, d_in] and residuals y [n, d_out] held in memory."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return cls(len(x), x.sum(0), x.T @ x, y.sum(0), x.T @ y, float(np.square(y).sum()))


def stored_moments(sums: Mapping, stream: str, block: int | str) -> Moments:
    """The moments of one block and stream, by their names in `activations.Moments.sums` or its file
    (tensors)."""
    names = ("count", "x_sum", "x_x", "y_sum", "x_y", "y_y")
    moments = {name: sums[f"{stream}.{block}.{name}"].cpu().double().numpy() for name in names}
    return Moments(
        **moments | {"count": int(moments["count"].item()), "y_y": float(moments["y_y"].item())}
    )


@dataclass(frozen=True)
class Probe:
    """Residual linear map x -> x + W x + b: weight [d_out, d_in], bias [d_out], float64.

    condition_number: of the centred covariance of X as it is, before channels are standardised.
    At most 1 / eps = 4.5e15, which says "singular to float64": fewer tokens than channels, a
    constant channel, or channels that are exact combinations of others.
    """

    weight: np.ndarray
    bias: np.ndarray
    condition_number: float = 1.0

    def residual(self, x: np.ndarray) -> np.ndarray:
        """W x + b for tokens x [n, d_in], as float64 [n, d_out]."""
        return np.asarray(x, np.float64) @ self.weight.T + self.bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x + W x + b: the stand-in for the block's output."""
        return x + self.residual(x)


@dataclass(frozen=True)
class Fit:
    """How a probe does on tokens: see `residual_fit`."""

    r2: float
    cosine: float
    residual_norm: float


def solve(moments: Moments, ridge: float, block: int | str = "?", stream: str = "?") -> Probe:
    """Solve Eq. 1 with an intercept: W = C_yx (C_xx + penalty)^-1, b = mean(y) - W mean(x).

    Channels are standardised to unit variance before the solve. Real transformers have a few
    channels hundreds of times larger than the rest; a penalty scaled to the raw trace would be
    theirs alone and would flatten every other channel. The penalty is ridge * trace(C) / d on the
    standardised covariance (so `ridge` is in units of a channel's variance), which leaves the
    solution equivariant to a rescaling of any channel. Channels that do not vary get weight 0;
    their effect is in the bias. Directions without variance (fewer tokens than channels) get
    weight 0 too, i.e. with ridge 0 the result is the minimum-norm least-squares solution.

    `block` and `stream` only name the probe in errors.
    Raises UserError on NaN or infinity in the moments and on fewer than two tokens.
    """
    where = f"block {block}, stream {stream!r}"
    if moments.count < 2:
        raise UserError(
            f"{where}: {moments.count} fitting token(s); a probe needs at least 2. "
            "Raise record.samples or lower record.heldout_fraction."
        )
    for name in ("x_sum", "x_x", "y_sum", "x_y", "y_y"):
        if not np.isfinite(getattr(moments, name)).all():
            raise UserError(
                f"{where}: NaN or infinity in the moment {name!r}. The teacher overflowed on this "
                "block: set teacher.dtype to bfloat16 or float32, delete activations/ and "
                "rerun."
            )
    mean_x, mean_y = moments.x_sum / moments.count, moments.y_sum / moments.count
    covariance = moments.x_x / moments.count - np.outer(mean_x, mean_x)
    covariance = (covariance + covariance.T) / 2
    cross = moments.x_y / moments.count - np.outer(mean_x, mean_y)

    variance = covariance.diagonal()
    live = variance > CONSTANT_CHANNEL * moments.x_x.diagonal() / moments.count
    weight = np.zeros((len(mean_y), len(mean_x)))
    if live.any():
        scale = np.sqrt(variance[live])
        values, vectors = np.linalg.eigh(covariance[np.ix_(live, live)] / np.outer(scale, scale))
        penalised = values.clip(min=0) + ridge * values.mean()
        # Rounding leaves eigenvalues of this size where the true one is 0; they carry no direction.
        usable = penalised > live.sum() * EPSILON * values[-1]
        inverse = np.where(usable, 1 / np.where(usable, penalised, 1), 0)
        projected = vectors.T @ (cross[live] / scale[:, None])
        standardised = vectors @ (inverse[:, None] * projected)
        weight[:, live] = (standardised / scale[:, None]).T
    return Probe(weight, mean_y - weight @ mean_x, _condition_number(covariance))


def _condition_number(covariance: np.ndarray) -> float:
    values = np.linalg.eigvalsh(covariance)
    largest = float(values[-1])
    if largest <= 0:
        return 1 / EPSILON
    return largest / max(float(values[0]), EPSILON * largest)


def of_stream(weights: Mapping, stream: str, depth: int) -> list[Probe | None]:
    """The stream's probe of every block from the tensors of probes.safetensors; None for a block
    that the stream does not pass."""
    return [
        Probe(weights[f"{stream}.{i}.weight"].numpy(), weights[f"{stream}.{i}.bias"].numpy())
        if f"{stream}.{i}.weight" in weights
        else None
        for i in range(depth)
    ]


def fit_r2(probe: Probe, moments: Moments) -> float:
    """R^2 of the residual on the fitting tokens, from their moments alone."""
    mean_x, mean_y = moments.x_sum / moments.count, moments.y_sum / moments.count
    covariance = moments.x_x / moments.count - np.outer(mean_x, mean_x)
    cross = moments.x_y / moments.count - np.outer(mean_x, mean_y)
    total = float(moments.y_y / moments.count - mean_y @ mean_y)
    offset = probe.weight @ mean_x + probe.bias - mean_y
    error = (
        total
        - 2 * np.sum(probe.weight * cross.T)
        + np.sum((probe.weight @ covariance) * probe.weight)
        + offset @ offset
    )
    return _r2(error, total, moments.x_x.trace() / moments.count + moments.y_y / moments.count)


def residual_fit(probe: Probe, x: np.ndarray, y: np.ndarray) -> Fit:
    """Judge a probe on tokens it was not fitted on: x [n, d_in] and residuals y = T_i(x) - x.

    r2: 1 - |probe residual - y|^2 / |y - mean y|^2, over all tokens and channels (1 - relative
    residual error; negative when a constant would do better).
    cosine: mean over tokens of the cosine between x + W x + b and T_i(x) = x + y.
    residual_norm: root mean square of y over that of x: how much the block changes its stream.
    Raises UserError if there are no tokens.
    """
    if not len(x):
        raise UserError(
            "no held-out tokens: raise record.heldout_fraction or record.samples, and rerun"
        )
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    predicted = probe.residual(x)
    energy = float(np.square(x).sum())
    r2 = _r2(
        float(np.square(predicted - y).sum()),
        float(np.square(y - y.mean(0)).sum()),
        energy + float(np.square(y).sum()),
    )
    cosine = cosines(x + predicted, x + y).mean()
    residual_norm = np.sqrt(np.square(y).sum() / energy) if energy > 0 else 0.0
    return Fit(r2, float(cosine), float(residual_norm))


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine of every token of x [n, d] with the same token of y [n, d], float64 [n].

    1 for two zero tokens; 0 if only one of the two is zero.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    both_zero = ~(x.any(1) | y.any(1))
    return np.where(both_zero, 1.0, (x * y).sum(1) / np.where(norms > 0, norms, 1))


def _r2(error: float, total: float, energy: float) -> float:
    """1 - error / total; 1 if both vanish against the tokens' energy (an identity block)."""
    floor = energy * CONSTANT_CHANNEL**2
    if total <= floor:
        return 1.0 if error <= floor else 1 - error / max(floor, np.finfo(np.float64).tiny)
    return 1 - error / total
