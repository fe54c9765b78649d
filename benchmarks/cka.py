"""CKA of every run of blocks: feature space with running surrogates, against n x n kernels."""

from pathlib import Path

import numpy as np

from benchmarks import material, measuring
from benchmarks.material import CKA_BLOCKS, Size
from benchmarks.measuring import Ratio
from ppcl import probes, similarity

NAME = "similarity"
STREAMS = 2


def direct(tokens: list[np.ndarray], fitted: list[probes.Probe]) -> np.ndarray:
    """cka(u, k) by its definition [first, last]: every surrogate's activations (each from the one
    before it), then two n x n kernels, centred, for every pair."""
    depth = len(fitted)
    values = np.full((depth, depth), np.nan)
    for first in range(depth):
        running = tokens[first]
        for last in range(first, depth):
            running = fitted[last](running)
            values[first, last] = _kernel_cka(running, tokens[last + 1])
    return values


def _kernel_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of x and y [n, d] from their n x n kernels (Kornblith et al. 2019)."""
    centred = []
    for side in (x, y):
        kernel = side @ side.T
        kernel -= kernel.mean(0)
        kernel -= kernel.mean(1)[:, None]
        centred.append(kernel)
    k, el = centred
    return float(np.vdot(k, el) / np.sqrt(np.vdot(k, k) * np.vdot(el, el)))


def run(size: Size, folder: Path) -> list[Ratio]:
    """Measured on `cka_depth` blocks of one stream, extrapolated by the number of pairs."""
    depth = size.cka_depth
    tokens = material.tokens(size, 0, depth)
    fitted = [
        probes.solve(probes.Moments.of(x, y - x), 1e-6)
        for x, y in zip(tokens, tokens[1:], strict=False)
    ]
    whole = similarity.resamples(np.zeros(size.cka_tokens, int), 0, 0, "plain")
    drawn = similarity.resamples(np.arange(size.cka_tokens) // 8, 100, 0, "plain")

    def ours(resamples):
        return similarity.surrogate_cka(tokens.__getitem__, fitted, resamples)[0]

    kept: dict[str, np.ndarray] = {}
    times = measuring.interleaved(
        {
            "ours": lambda: kept.update(ours=ours(whole)),
            "bootstrap": lambda: ours(drawn),
            "direct": lambda: kept.update(direct=direct(tokens, fitted)),
            "probe": lambda: fitted[0](tokens[0]),
        },
        max(1, size.repeats // 2),
    )
    seconds = {name: measuring.least(values) for name, values in times.items()}
    pairs = depth * (depth + 1) // 2
    every = STREAMS * CKA_BLOCKS * (CKA_BLOCKS + 1) // 2
    scale = every / pairs
    scratch = scale * seconds["direct"] + STREAMS * seconds["probe"] * _extra_probes(CKA_BLOCKS)
    ours_all, direct_all = scale * seconds["ours"], scale * seconds["direct"]
    note = (
        f"{every} pairs, extrapolated from {pairs}; width {size.cka_width}, "
        f"{size.cka_tokens} tokens, no resamples"
    )
    finite = np.isfinite(kept["direct"])
    off = np.abs(kept["ours"] - kept["direct"])[finite].max()
    return [
        Ratio(NAME, "direct way / ours", direct_all, ours_all, "s", 20, True, note),
        Ratio(
            NAME,
            "every surrogate from its start / ours",
            scratch,
            ours_all,
            "s",
            note="a script that takes one pair at a time; " + note,
        ),
        Ratio(NAME, "greatest difference / 1e-4", float(off), 1e-4, "CKA", 1.0),
        Ratio(
            NAME,
            "ours with 100 resamples / without",
            scale * seconds["bootstrap"],
            ours_all,
            "s",
            note="what the error bars cost",
        ),
    ]


def _extra_probes(depth: int) -> int:
    """Probes that runs from scratch add to running ones: a run of length n applies n - 1 again."""
    return sum((depth - n + 1) * (n - 1) for n in range(1, depth + 1))
