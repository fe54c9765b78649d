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

    Of logarithms for velocity_error, whose mean is then the geometric one. Student's t over seeds:
    how far two trainings of one selection lie apart is taken to be alike for all methods, and
    pooled over those with several seeds (per state), so that one seed has an interval too. Where
    the seed decides the selection as well, the method's own spread counts. For velocity_error the
    bootstrap over prompts comes on top; the two are independent, so their squares add. A share's
    interval ends at 0 and 1.
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

    Prompt by prompt: both are measured on the same calls, so what a prompt adds to the error of all
    methods is no part of the interval, as it is of `summary`'s. Geometric means over seeds; the
    bootstrap over prompts and the spread over seeds (as in `summary`) add as squares.
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
    # Seeds of one method -> mean over them of log errors, of each resample of the prompts.
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
