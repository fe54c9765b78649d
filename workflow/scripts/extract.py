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
from ppcl.runtime import devices, stopping
from ppcl.storage import tensors
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import loop
from ppcl.transformer import calls


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
        "--no-moments", action="store_true", help="sum up none of them: nothing is probed"
    )
    args = parser.parse_args()
    settings = config.load(args.config)
    options, seed = settings.extract, settings.seed
    lowered = settings.modulation

    reader = calls.Reader(args.calls, memory=0)  # every row is read once
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    rows = choose_rows(reader, options.rows, seed)
    device = devices.choose(settings.device)
    transformer = pipelines.load_transformer(teacher, device, compiled=True)
    given = [m.key for m in modulation.matrices(transformer)] if lowered.enabled else []
    summed = modulation_inputs.Sums(transformer, given, device)
    identity = loop.identity(Path(__file__), settings, [args.calls], moments=not args.no_moments)
    # A folder of its own, so that a run of other settings can't write over its tokens.
    folder = args.state / identity[:16]
    with tqdm(total=len(rows), desc="extracting", unit="row") as bar:
        moments, samples = activations.collect(
            transformer,
            reader,
            rows,
            options,
            seed,
            device,
            folder,
            bar,
            identity,
            summed,
            sums=not args.no_moments,
        )
    fitted = rows[~reader.index["heldout"][rows]]
    conditioned = modulation_inputs.with_grid(
        transformer, summed.result(), reader, fitted, lowered, options.batch_size, seed, device
    )
    for stream, sample in samples.items():
        asked, found = len(rows) * options.sample_tokens, len(sample["token"])
        what = f"tokens of the {stream} stream in these {len(rows)} calls"
        errors.warn_of_fewer("extract.sample_tokens", asked, found, what)
    stamp = provenance.stamp(settings.given, rows=len(rows))
    stopping.ignore()
    tensors.write(args.moments, moments.sums, stamp)
    conditioning.write(args.conditioning, conditioned, stamp)
    token_table.write_sample(args.tokens, samples, stamp)


if __name__ == "__main__":
    program.run(main)
