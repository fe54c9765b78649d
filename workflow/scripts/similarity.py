"""Stage 1.2: CKA of every run of probes with the teacher (Eq. 3, 4), and of all pairs of blocks.

    similarity.py --config config/config.yaml --probes results/digits/probes/probes.safetensors \
        --tokens results/digits/activations/tokens.parquet \
        --cka results/digits/similarity/cka.parquet \
        --blocks results/digits/similarity/blocks.parquet

On the configured device, if it has float64 and room for the tokens of all boundaries; else on the
CPU. Reads of the config: seed, device, similarity (without streams: all of them are written). The
noise level of Delta's rise, per stream, is written into cka.parquet's provenance as `delta_noise`.
"""

import json
import logging
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.extraction.token_table import TokenReader
from ppcl.runtime import devices, stopping
from ppcl.search import cka_draws, probes, similarity
from ppcl.settings import Settings
from ppcl.storage import schemas, tables, tensors

log = logging.getLogger(__name__)


def cka_rows(stream: str, draws: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Rows of cka.parquet for one stream, and the noise level of Delta's rise.

    draws: CKA [1 + resamples, first, last]; the first is of all prompts.
    """
    delta = cka_draws.differences(draws)
    (low, high), (delta_low, delta_high) = cka_draws.limits(draws), cka_draws.limits(delta)
    first, last = np.nonzero(np.isfinite(draws[0]))
    at = (first, last)
    rows = pd.DataFrame(
        {
            "stream": stream,
            "start": first - 1,
            "end": last,
            "cka": draws[0][at],
            "delta": delta[0][at],
            "cka_low": low[at],
            "cka_high": high[at],
            "delta_low": delta_low[at],
            "delta_high": delta_high[at],
        }
    )
    return rows, cka_draws.rise_noise(delta)


def block_rows(stream: str, blocks: list[int], values: np.ndarray) -> pd.DataFrame:
    """Rows of blocks.parquet for one stream, from CKA of all ordered pairs [blocks, blocks]."""
    return pd.DataFrame(
        {
            "stream": stream,
            "block_a": np.repeat(blocks, len(blocks)),
            "block_b": np.tile(blocks, len(blocks)),
            "cka": values.ravel(),
        }
    )


def compare(
    tokens: TokenReader,
    stream: str,
    fitted: list[probes.Probe | None],
    settings: Settings,
    wanted: torch.device,
) -> tuple[np.ndarray, pd.DataFrame]:
    """CKA of the runs of one stream [1 + draws, first, last], and its rows of blocks.parquet.

    Args:
        fitted: its probes, by block; None for a block without the stream.
        wanted: the device to compute on, if it has room; else it is the CPU.
    """
    chosen = settings.similarity
    how: dict[str, Any] = {key: getattr(chosen, key) for key in ("estimator", "normalise_tokens")}
    read, plan = similarity.heldout(tokens, stream, chosen, settings.seed)
    present = [i for i, probe in enumerate(fitted) if probe is not None]
    shape = read(present[0]).shape
    needed = similarity.memory(shape, len(present), chosen, wanted)
    here: dict[str, Any] = {"stream": stream, "device": devices.with_room(wanted, needed)}
    if here["device"] != wanted:
        room = needed / 2**30
        log.warning("stream %s: on the CPU: %s has no %.3g GiB free", stream, wanted, room)
    progress = tqdm(range(len(fitted)), desc=f"runs, {stream}, {here['device']}", unit="block")
    draws = similarity.surrogate_cka(
        read, fitted, plan, reference=chosen.reference, steps=progress, **here, **how
    )
    values = similarity.block_cka(read, present, plan, **here, **how)
    return draws, block_rows(stream, present, values)


def main() -> None:
    options = program.parser(
        __doc__, "config", reads=("probes", "tokens"), writes=("cka", "blocks")
    ).parse_args()
    settings = config.load(options.config)
    chosen = settings.similarity
    weights, _ = tensors.read(options.probes)
    tokens = TokenReader(options.tokens)
    depth = tokens.boundaries - 1
    wanted = devices.statistics_device(devices.choose(settings.device))
    devices.use_threads(weights.values(), wanted)
    draws, blocks = {}, []
    for stream in tokens.streams:
        fitted = probes.of_stream(weights, stream, depth)
        draws[stream], of_stream = compare(tokens, stream, fitted, settings, wanted)
        blocks.append(of_stream)
    if chosen.bootstrap and all(len(values) == 1 for values in draws.values()):
        log.warning(
            "the tokens are of one held-out prompt, over which there are no resamples: no "
            "intervals, and a noise level of 0 for intervals.tolerance: bootstrap; record more "
            "prompts, or raise record.heldout_fraction"
        )
    draws = cka_draws.with_joint(draws)

    frames, noise = [], {}
    for stream, values in draws.items():
        rows, noise[stream] = cka_rows(stream, values)
        frames.append(rows)
    stamp = provenance.stamp(settings.given, blocks=depth, bootstrap=chosen.bootstrap)
    levels = {"delta_noise": json.dumps(noise)}
    stopping.ignore()
    tables.write(options.cka, pd.concat(frames), schemas.CKA, stamp | levels)
    tables.write(options.blocks, pd.concat(blocks), schemas.BLOCKS, stamp)


if __name__ == "__main__":
    program.run(main)
