"""CKA of runs and its resamples, as numbers: Eq. 4, intervals, the streams' mean, the noise level.

`cka` and `delta` are float64 [1 + draws, first, last], as `similarity.surrogate_cka` gives them:
row 0 is the estimate, the others are resamples of the calibration prompts; NaN where there is no
run.
"""

from collections.abc import Sequence

import numpy as np

from ppcl.transformer.family import IMAGE, JOINT, TEXT


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
    Without resamples there is no interval: both limits are NaN.
    """
    estimate, others = draws[0], draws[1:]
    if not len(others):
        return np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
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
    """Streams' CKA [1 + draws, first, last], with a `mean` over the given streams; blocks that have
    one joint sequence now count for image and for text."""
    completed = dict(draws)
    if JOINT in draws:
        for stream in (IMAGE, TEXT):
            own = draws.get(stream, np.full_like(draws[JOINT], np.nan))
            completed[stream] = np.where(np.isfinite(own), own, draws[JOINT])
    return completed | {"mean": mean_of_streams(list(draws.values()))}


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
