"""CKA of every run of blocks: composed maps or running surrogates in feature space, against
surrogates' activations and n x n kernels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmarks import material, measuring
from benchmarks.material import CKA_BLOCKS, Size
from benchmarks.measuring import Ratio
from ppcl.search import cka, probes, similarity

NAME = "similarity"
STREAMS = 2
PAIRS = CKA_BLOCKS * (CKA_BLOCKS + 1) // 2
DRAWS = 100


def surrogate(tokens: np.ndarray, fitted: list[probes.Probe]) -> np.ndarray:
    """Activations [n, d] of a run of probes, from its start."""
    for probe in fitted:
        tokens = probe(tokens)
    return tokens


def kernels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two n x n kernels of x and y [n, d]."""
    return x @ x.T, y @ y.T


def kernel_cka(k: np.ndarray, el: np.ndarray) -> float:
    """Linear CKA from n x n kernels, which are centred in place (Kornblith et al. 2019)."""
    for kernel in (k, el):
        kernel -= kernel.mean(0)
        kernel -= kernel.mean(1)[:, None]
    return float(np.vdot(k, el) / np.sqrt(np.vdot(k, k) * np.vdot(el, el)))


def resampled(k: np.ndarray, el: np.ndarray, rows: np.ndarray) -> float:
    """CKA of drawn tokens [n], some of them more than once."""
    return kernel_cka(k[np.ix_(rows, rows)], el[np.ix_(rows, rows)])


def run(size: Size, folder: Path) -> list[Ratio]:
    """Ours is measured at two depths, which tells what a block costs and what a pair does; the
    direct way, whose every pair costs the same but for the length of its run, on one pair."""
    depth = size.cka_depth
    tokens = material.tokens(size, 0, depth)
    fitted = [
        probes.solve(probes.Moments.of(x, y - x), 1e-6)
        for x, y in zip(tokens, tokens[1:], strict=False)
    ]
    prompts = np.arange(size.cka_tokens) // 8
    plans = {draws: cka.resamples(prompts, draws, 0, "plain") for draws in (0, DRAWS)}
    rows = np.random.default_rng(0).integers(size.cka_tokens, size=size.cka_tokens)

    def ours(draws: int, blocks: int) -> Callable[[], np.ndarray]:
        return lambda: similarity.surrogate_cka(tokens.__getitem__, fitted[:blocks], plans[draws])[
            0
        ]

    k, el = kernels(tokens[0], tokens[-1])
    runs = {
        "probe": lambda: surrogate(tokens[0], fitted[:1]),
        "pair": lambda: kernel_cka(*kernels(tokens[0], tokens[-1])),
        "draw": lambda: resampled(k, el, rows),
        **{(draws, n): ours(draws, n) for draws in plans for n in (depth // 2, depth)},
    }
    times = measuring.interleaved(runs, max(1, size.repeats // 2))
    seconds = {name: measuring.least(values) for name, values in times.items()}

    def whole(draws: int) -> float:
        """a blocks + b pairs, for all blocks, from two depths."""
        counts = [(n, n * (n + 1) / 2) for n in (depth // 2, depth)]
        measured = [seconds[draws, n] for n, _ in counts]
        block, pair = nnls(np.array(counts), measured)[0]  # neither takes less than no time
        return STREAMS * (CKA_BLOCKS * block + PAIRS * pair)

    steps = sum((CKA_BLOCKS - n + 1) * n for n in range(1, CKA_BLOCKS + 1))
    pairs = STREAMS * PAIRS * seconds["pair"]
    direct = pairs + STREAMS * steps * seconds["probe"]
    running = pairs + STREAMS * PAIRS * seconds["probe"]
    drawn = direct + STREAMS * PAIRS * DRAWS * seconds["draw"]
    values = ours(0, depth)()
    off = [
        values[first, last] - kernel_cka(*kernels(found, tokens[last + 1]))
        for first in range(depth)
        for last in range(first, depth)
        for found in [surrogate(tokens[first], fitted[first : last + 1])]
    ]
    note = (
        f"{STREAMS * PAIRS} pairs, extrapolated from {depth} blocks; width {size.cka_width}, "
        f"{size.cka_tokens} tokens"
    )
    without, with_bars = whole(0), whole(DRAWS)
    return [
        Ratio(NAME, "direct way / ours", direct, without, "s", 20, True, f"estimates; {note}"),
        Ratio(
            NAME,
            f"the same, both with {DRAWS} resamples",
            drawn,
            with_bars,
            "s",
            20,
            True,
            "as the stage does it by default; the direct way keeps a pair's kernels",
        ),
        Ratio(
            NAME,
            "direct way with running surrogates / ours",
            running,
            without,
            "s",
            note="a direct way that already has our first idea; estimates",
        ),
        Ratio(NAME, "greatest difference / 1e-4", float(np.abs(off).max()), 1e-4, "CKA", 1.0),
        Ratio(
            NAME,
            f"ours with {DRAWS} resamples / without",
            with_bars,
            without,
            "s",
            note="what the error bars cost",
        ),
    ]
