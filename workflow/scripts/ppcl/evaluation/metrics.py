"""What is measured and how certain it is: pure functions of arrays, in float64.

Every metric that comes from samples is a ratio of two sums over them (a mean divides by their
number), so one bootstrap serves all: it draws prompts, not samples, since samples of one prompt
are alike and drawing them singly would promise too much.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from skimage.metrics import structural_similarity

TEACHER = "teacher"
LARGEST = 255  # of an 8-bit picture
# What rounding to 8 bits alone does to a picture, in squared steps: the error below which two
# pictures are as good as equal. It bounds PSNR at 58.9 dB instead of infinity.
ROUNDING_ERROR = 1 / 12
SIGMA_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
LOWER_IS_BETTER = (
    "velocity_error",
    "parameter",
    "modulation_parameters",
    "latency",
    "peak_memory",
    "stored",
)


class Estimate(NamedTuple):
    """A value with the 2.5 % and 97.5 % points of its bootstrap, and the samples behind it."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    samples: int = 1


# Model -> metric -> estimate.
Estimates = dict[str, dict[str, Estimate]]


def squared_errors(output: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(||output - target||^2, ||target||^2) of every sample, float64 [n].

    The relative velocity error is the ratio of their sums: ||v_s - v_t||^2 / ||v_t||^2.

    Args:
        output, target: [n, ...], same shape.
    """
    output, target = (a.reshape(len(a), -1).astype(np.float64) for a in (output, target))
    return np.square(output - target).sum(1), np.square(target).sum(1)


def sigma_buckets(sigma: np.ndarray) -> dict[str, np.ndarray]:
    """`sigma_0.00_0.25` and so on -> mask [n] of the samples with that noise level.

    A bucket holds its lower edge, the last one also 1. Empty buckets are left out; so is every
    sample outside of [0, 1], such as those of schedulers that know no sigma (NaN).
    """
    masks = {}
    for low, high in pairwise(SIGMA_EDGES):
        mask = (sigma >= low) & ((sigma < high) | ((sigma == high) & (high == SIGMA_EDGES[-1])))
        if mask.any():
            masks[f"sigma_{low:.2f}_{high:.2f}"] = mask
    return masks


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures; at most 58.9 dB (ROUNDING_ERROR)."""
    error = np.square(picture.astype(np.float64) - reference.astype(np.float64)).mean()
    return float(10 * np.log10(LARGEST**2 / max(error, ROUNDING_ERROR)))


SSIM_WINDOW = 11


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two 8-bit pictures [height, width, channels], mean over channels.

    With the settings of Wang et al. (2004): a Gaussian window of 11 x 11 pixels, sigma 1.5.
    Pictures that are smaller than that are mirrored at their edges.
    """
    beyond = [(0, max(0, SSIM_WINDOW - side)) for side in picture.shape[:2]]
    picture, reference = (np.pad(p, [*beyond, (0, 0)], "symmetric") for p in (picture, reference))
    return float(
        structural_similarity(
            picture,
            reference,
            channel_axis=-1,
            data_range=LARGEST,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


class PictureMetric(NamedTuple):
    """How like the teacher's a picture of the same prompt and seed is.

    Attributes:
        function: of the picture and the teacher's, 8-bit [height, width, channels].
        higher_is_better: false for a distance.
        by_frame: true: for a video it is the mean over its frames, since a window must not reach
            over two of them; false: all frames are compared as one picture.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    higher_is_better: bool
    by_frame: bool


PICTURE_METRICS = {
    "psnr": PictureMetric(psnr, higher_is_better=True, by_frame=False),
    "ssim": PictureMetric(ssim, higher_is_better=True, by_frame=True),
}


def likeness(picture: np.ndarray, reference: np.ndarray, frames: int = 1) -> dict[str, float]:
    """Every one of PICTURE_METRICS, by name.

    Args:
        picture, reference: 8-bit [height, width, channels]; of a video, with its frames one below
            the other.
        frames: how many of them.
    """
    single = list(zip(np.split(picture, frames), np.split(reference, frames), strict=True))
    return {
        name: float(np.mean([metric.function(*pair) for pair in single]))
        if metric.by_frame
        else metric.function(picture, reference)
        for name, metric in PICTURE_METRICS.items()
    }


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric of metrics.parquet is better."""
    if metric in PICTURE_METRICS:
        return PICTURE_METRICS[metric].higher_is_better
    return not metric.startswith(LOWER_IS_BETTER)


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    prompts: ArrayLike,
    resamples: int,
    seed: int,
) -> Estimate:
    """sum(numerators) / sum(denominators) with a 95 % bootstrap interval over prompts.

    Over one prompt there is none: its ends are NaN. The same prompts, resamples and seed draw the
    same prompts for every model.

    Args:
        numerators, denominators: one per sample [n].
        prompts: the prompt of every sample [n]; samples of one prompt are drawn together.
    """
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    count = group.max() + 1
    above = np.bincount(group, np.asarray(numerators, dtype=np.float64), count)
    below = np.bincount(group, np.asarray(denominators, dtype=np.float64), count)
    value = above.sum() / below.sum()
    if count < 2:
        return Estimate(value, samples=len(group))
    rng = np.random.default_rng(seed)
    # One resample at a time: a matrix of resamples x prompts would not fit for large sets.
    drawn = [rng.integers(count, size=count) for _ in range(resamples)]
    values = np.array([above[d].sum() / below[d].sum() for d in drawn])
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(group))


def mean(values: ArrayLike, prompts: ArrayLike, resamples: int, seed: int) -> Estimate:
    """Mean over samples with a 95 % bootstrap interval over prompts; see `ratio`."""
    return ratio(values, np.ones(np.shape(values)), prompts, resamples, seed)


def differences(
    scores: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    prompts: ArrayLike,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """`<metric>_difference` of every metric that both have: mean of score - reference, sample by
    sample, with a 95 % bootstrap interval over prompts.

    Most samples are alike in both, so it is far narrower than those of the two means.

    Args:
        scores, reference: metric -> one per sample [n]; the same prompts and seeds in one order.
        prompts: of every sample [n].
    """
    both = [name for name in scores if name in reference]
    falls = {name: np.subtract(scores[name], reference[name]) for name in both}
    return {f"{n}_difference": mean(fall, prompts, resamples, seed) for n, fall in falls.items()}


def median_ratio(times: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> Estimate:
    """median(times) / median(reference) with a 95 % bootstrap interval over rounds; over one
    round there is none, and its ends are NaN.

    Args:
        times, reference: seconds [rounds]; entries of one round were measured one after the
            other and are drawn together, so that a slow moment of the machine cancels.
    """
    value = float(np.median(times) / np.median(reference))
    if len(times) < 2:
        return Estimate(value, samples=len(times))
    drawn = np.random.default_rng(seed).integers(len(times), size=(resamples, len(times)))
    values = np.median(times[drawn], axis=1) / np.median(reference[drawn], axis=1)
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(times))


def rows(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[dict]:
    """Rows of metrics.parquet (schemas.METRICS) from model -> metric -> estimate.

    `teacher_value` is NaN for a metric that the teacher has none of (it is not compared with
    itself by PSNR or SSIM), and `relative_change` also where the teacher's value is zero.
    """
    table = []
    for model, metrics in estimates.items():
        for metric, estimate in metrics.items():
            of_teacher = estimates[TEACHER].get(metric, Estimate(float("nan"))).value
            defined = of_teacher != 0
            table.append(
                {
                    "variant": model,
                    "metric": metric,
                    "value": estimate.value,
                    "teacher_value": of_teacher,
                    "relative_change": estimate.value / of_teacher - 1 if defined else np.nan,
                    "higher_is_better": higher_is_better(metric),
                    "samples": estimate.samples,
                    "ci_low": estimate.low,
                    "ci_high": estimate.high,
                }
            )
    return table
