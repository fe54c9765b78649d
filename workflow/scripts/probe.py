"""Stage 1.1: fit one residual linear probe per block and stream, and judge it on held-out tokens.

    probe.py --config config/config.yaml --moments results/digits/activations/moments.safetensors \
        --tokens results/digits/activations/tokens.parquet \
        --probes-table results/digits/probes/probes.parquet \
        --probes results/digits/probes/probes.safetensors

Reads of the config: probe.
"""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.extraction.token_table import TokenReader
from ppcl.runtime import stopping
from ppcl.search import probes
from ppcl.storage import schemas, tables, tensors


def main() -> None:
    options = program.parser(
        __doc__, "config", reads=("moments", "tokens"), writes=("probes_table", "probes")
    ).parse_args()
    settings = config.load(options.config)

    stored, _ = tensors.read(options.moments)
    tokens = TokenReader(options.tokens)
    names = [key.split(".")[:2] for key in stored if key.endswith(".count")]
    fitted, rows = {}, []
    for stream, block in tqdm(sorted((s, int(b)) for s, b in names), desc="probes", unit="probe"):
        moments = probes.stored_moments(stored, stream, block)
        probe = probes.solve(moments, settings.probe.ridge, block, stream)
        heldout = tokens.heldout(stream)
        before, after = (tokens.values(boundary, stream) for boundary in (block, block + 1))
        x = before[heldout].astype(np.float64)
        y = after[heldout] - x
        fit = probes.residual_fit(probe, x, y)
        fitted[f"{stream}.{block}.weight"] = torch.from_numpy(probe.weight)
        fitted[f"{stream}.{block}.bias"] = torch.from_numpy(probe.bias)
        rows.append(
            {
                "block": block,
                "stream": stream,
                "r2_heldout": fit.r2,
                "cosine_heldout": fit.cosine,
                "condition_number": probe.condition_number,
                "tokens": moments.count,
                "r2_fit": probes.fit_r2(probe, moments),
                "tokens_heldout": len(x),
                "residual_norm": fit.residual_norm,
                "influence": 1 - probes.cosines(before, after).mean(),
            }
        )
    stamp = provenance.stamp(settings.given, probes=len(rows))
    stopping.ignore()
    tables.write(options.probes_table, pd.DataFrame(rows), schemas.PROBES, stamp)
    tensors.write(options.probes, fitted, stamp)


if __name__ == "__main__":
    program.run(main)
