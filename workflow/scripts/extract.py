"""Replays recorded calls through the teacher and keeps what probes and CKA need.

    python workflow/scripts/extract.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet --state results/digits/state/extract \
        --tokens results/digits/activations/tokens.parquet \
        --moments results/digits/activations/moments.safetensors \
        --conditioning results/digits/activations/conditioning.safetensors
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppcl import errors, program, provenance
from ppcl.closed_forms import modulation
from ppcl.configuration import config
from ppcl.extraction import activations, conditioning, modulation_inputs, token_table
from ppcl.runtime import stopping
from ppcl.storage import tensors
from ppcl.teacher import opening
from ppcl.training import loop
from ppcl.transformer import calls
from ppcl.transformer.context import State


def choose_rows(reader: calls.Reader, count: int, seed: int) -> np.ndarray:
    """Half of the rows from the fit split, half held out (CKA needs as many tokens as the fit)."""
    rng = np.random.default_rng(seed)
    pools = reader.rows(heldout=False), reader.heldout_rows("select")
    for pool, what in zip(pools, ("to fit on", "held out to select by"), strict=True):
        errors.warn_of_fewer("half of extract.rows", count // 2, len(pool), f"calls {what}")
    return np.sort(np.concatenate([rng.permutation(pool)[: count // 2] for pool in pools]))


def main() -> None:
    parser = program.parser(
        __doc__, "config", "state", reads=("calls",), writes=("tokens", "moments", "conditioning")
    )
    parser.add_argument(
        "--no-moments", action="store_true", help="write no sums: no probes are to be fitted"
    )
    args = parser.parse_args()
    settings = config.load(args.config)
    options, lowered = settings.extract, settings.modulation

    reader = calls.Reader(args.calls, memory=0)  # every row is read once
    context = opening.opened(settings, reader, compiled=True)
    rows = choose_rows(reader, options.rows, settings.seed)
    matrices = modulation.matrices(context.transformer) if lowered.enabled else []
    summed = modulation_inputs.Sums(
        context.transformer, [matrix.key for matrix in matrices], context.device
    )
    identity = loop.identity(Path(__file__), settings, [args.calls], moments=not args.no_moments)
    # A folder of its own, so that a run of other settings can't write over its tokens.
    state = State(args.state / identity[:16], identity)
    with tqdm(total=len(rows), desc="extracting", unit="row") as bar:
        moments, samples = activations.collect(
            context, rows, options, state, bar, summed, sums=not args.no_moments
        )
    fitted = rows[~reader.index["heldout"][rows]]
    conditioned = modulation_inputs.with_grid(
        context, summed.result(), fitted, lowered, options.batch_size
    )
    for stream, sample in samples.items():
        asked, kept = len(rows) * options.sample_tokens, len(sample["token"])
        what = f"tokens of the {stream} stream in these {len(rows)} calls"
        errors.warn_of_fewer("extract.sample_tokens", asked, kept, what)
    stamp = provenance.stamp(settings.given, rows=len(rows))
    stopping.ignore()
    tensors.write(args.moments, moments.sums, stamp)
    conditioning.write(args.conditioning, conditioned, stamp)
    token_table.write_sample(args.tokens, samples, stamp)


if __name__ == "__main__":
    program.run(main)
