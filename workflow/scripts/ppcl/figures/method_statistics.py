"""Means and ratios of an ablation's methods over seeds, with 95 % intervals."""

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.special import stdtrit

RESAMPLES = 1000

TINY = 1e-12  # the teacher's own error is zero, which has no logarithm


def summary(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over seeds of each method and state, with a 95 % interval: mean, low, high, seeds.

    The mean of velocity_error is geometric, and its interval is computed on logarithms. Student's t
    gives the interval over seeds. Its standard deviation is taken to be the same for all methods,
    and pooled (per state) over those with several seeds, so that a method with one seed has an
    interval too. A method whose seeds chose different blocks has its own standard deviation. For
    velocity_error the bootstrap over prompts is added; the two are independent, so their squares
    add. A share's interval is clipped to 0 and 1.

    Args:
        table: as schemas.ABLATION.

    Returns:
        Columns mean, low, high and seeds, indexed by (method, state).
    """
    log = column == "velocity_error"
    scaled = table[column].astype(float)
    table = table.assign(scaled=np.log(np.maximum(scaled, TINY)) if log else scaled)
    groups = dict(list(table.groupby(["method", "state"], sort=False)))
    pooled = {
        state: _spread(g for key, g in groups.items() if key[1] == state and not _by_chance(g))
        for state in table["state"].unique()
    }
    rows = []
    for (method, state), seeds in groups.items():
        deviation, freedom = _spread([seeds]) if _by_chance(seeds) else pooled[state]
        reach = stdtrit(freedom, 0.975) * deviation / len(seeds) ** 0.5 if freedom else 0.0
        below = above = reach if seeds["group"].iloc[0] != "teacher" else 0.0
        if log:
            ends = np.maximum(seeds[[f"{column}_low", f"{column}_high"]].to_numpy(float), TINY)
            by_prompt = np.abs(np.log(ends) - seeds[["scaled"]].to_numpy()).mean(axis=0)
            # Over one prompt there is no interval, and the seeds' stays what it is.
            below, above = np.hypot([below, above], np.nan_to_num(by_prompt))
        mean, low, high = seeds["scaled"].mean() + np.array([0, -below, above])
        mean, low, high = np.exp([mean, low, high]) if log else np.clip([mean, low, high], 0, 1)
        rows.append([method, state, mean, low, high, len(seeds)])
    names = ["method", "state", "mean", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=names).set_index(["method", "state"])


def ratio(table: pd.DataFrame, method: str, other: str, state: str) -> tuple[float, float, float]:
    """A method's velocity error over another's, with a 95 % interval: value, low, high.

    Both are compared prompt by prompt, on the same calls, so that prompts which are hard for all
    methods do not widen the interval, as they do in `summary`. Geometric means over seeds; the
    squares of the bootstrap over prompts and of the spread over seeds (as in `summary`) add.
    """
    table = table[table["state"] == state]
    table = table.assign(scaled=np.log(np.maximum(table["velocity_error"], TINY)))
    groups = dict(list(table.groupby("method", sort=False)))
    pooled = _spread(seeds for seeds in groups.values() if not _by_chance(seeds))
    variance, freedoms, sums = 0.0, [], []
    for seeds in (groups[method], groups[other]):
        deviation, freedom = _spread([seeds]) if _by_chance(seeds) else pooled
        variance += deviation**2 / len(seeds)
        freedoms.append(freedom)
        sums.append(np.array([json.loads(text) for text in seeds["by_prompt"]]))
    # Log errors of each of the two methods, [seeds, resamples], on resampled prompts.
    prompts = sums[0].shape[-1]
    draws = np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))
    one, two = (
        np.log(np.maximum(errors[:, 0][:, draws].sum(-1) / errors[:, 1][:, draws].sum(-1), TINY))
        for errors in sums
    )
    value = groups[method]["scaled"].mean() - groups[other]["scaled"].mean()
    drawn = np.percentile(one.mean(0) - two.mean(0), [2.5, 97.5]) - value
    reach = stdtrit(min(freedoms), 0.975) * variance**0.5 if min(freedoms) else 0.0
    low, high = (np.hypot(reach, end) for end in drawn)
    middle, lowest, highest = (float(np.exp(v)) for v in (value, value - low, value + high))
    return middle, lowest, highest


def _by_chance(seeds: pd.DataFrame) -> bool:
    """Whether the seeds of a method chose different blocks."""
    return bool(seeds[["intervals", "text_runs", "linear_ffns"]].nunique().gt(1).any())


def _spread(groups: Iterable[pd.DataFrame]) -> tuple[float, int]:
    """Standard deviation of `scaled` within the groups, and its degrees of freedom."""
    every = [seeds["scaled"] for seeds in groups]
    freedom = sum(len(values) - 1 for values in every)
    squares = sum(((values - values.mean()) ** 2).sum() for values in every)
    return (float(squares / freedom) ** 0.5 if freedom else 0.0), freedom
