"""Stage 1.2: candidate intervals by Eq. 5, then the cheapest set that meets the smallest budget.

    intervals.py --config config/config.yaml --cka results/digits/similarity/cka.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --intervals results/digits/intervals/intervals.parquet

Reads of the config: intervals, similarity.streams, and variants for the smallest budget: the
variants of larger budgets use subsets of the same students. Needs no torch.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from ppcl import config, errors, intervals, provenance, schemas, tables
from ppcl.errors import UserError


def grid(table: pd.DataFrame, stream: str, depth: int, path: Path) -> np.ndarray:
    """cka [first, last] of one stream (NaN where the table has no row)."""
    rows = table[table["stream"] == stream]
    if rows.empty:
        raise UserError(
            f"{path}: no rows for similarity.streams '{stream}'; "
            f"set it to one of {', '.join(sorted(set(table['stream'])))}"
        )
    values = np.full((depth, depth), np.nan)
    values[rows["start"] + 1, rows["end"]] = rows["cka"]
    return values


def measured_costs(path: Path, depth: int) -> np.ndarray:
    """velocity_error [first, last] (NaN where nobody measured)."""
    table = tables.read(path, schemas.SENSITIVITY).to_pandas()
    if table["last"].max() >= depth:
        raise UserError(f"{path} names blocks that this teacher lacks; delete it and rerun")
    values = np.full((depth, depth), np.nan)
    values[table["first"], table["last"]] = table["velocity_error"]
    return values


def model_facts(stamp: dict[str, str], path: Path) -> dict:
    """What extract recorded of the model and similarity handed on, and the noise level."""
    names = "block_parameters", "transformer_parameters", "seams", "untouchable", "delta_noise"
    try:
        return {name: json.loads(stamp[name]) for name in names}
    except KeyError as error:
        raise UserError(
            f"{path}: its provenance lacks {error}; delete it and activations/, and rerun"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or a JSON object")
    parser.add_argument("--cka", type=Path, required=True, help="input: CKA of runs, parquet")
    parser.add_argument(
        "--sensitivity", type=Path, help="input: measured costs, for intervals.cost: velocity"
    )
    parser.add_argument("--intervals", type=Path, required=True, help="output: intervals, parquet")
    options = parser.parse_args()
    settings = config.load(options.config)
    chosen, stream = settings["intervals"], settings["similarity"]["streams"]

    stamp = tables.provenance(options.cka)
    facts = model_facts(stamp, options.cka)
    sizes = facts["block_parameters"]
    depth = len(sizes)
    cka = grid(tables.read(options.cka, schemas.CKA).to_pandas(), stream, depth, options.cka)
    noise = facts["delta_noise"][stream]
    tolerance = noise if chosen["tolerance"] == "bootstrap" else chosen["tolerance"]

    # A block that the deciding stream does not pass has no CKA, so no interval may hold it.
    unknown = {block for block in range(depth) if np.isnan(cka[block, block])}
    runs = intervals.spans(depth, facts["seams"], unknown | set(facts["untouchable"]))
    chain = intervals.trend_chain(cka, runs, tolerance)
    budget = min(variant["budget"] for variant in settings["variants"])
    needed = intervals.parameters_needed(facts["transformer_parameters"], budget)
    limits = {
        "floor": chosen["cka_floor"],
        "protected": {
            *range(chosen["protect_first"]),
            *range(depth - chosen["protect_last"], depth),
        },
    }
    costs = 1 - cka
    if chosen["cost"] == "velocity":
        if options.sensitivity is None:
            raise UserError("intervals.cost is velocity: name the measured costs, --sensitivity")
        costs = measured_costs(options.sensitivity, depth)
    found = intervals.candidates(runs, chosen["segmentation"], chain)
    choices = intervals.priced(found, cka, costs)
    chain = intervals.priced(chain, cka, costs)
    plan = intervals.select(choices, sizes, needed, **limits)
    rows = intervals.rows(chain, plan, needed, tolerance, **limits)
    columns = schemas.INTERVALS.names
    stamp = provenance.stamp(settings, removed_blocks=plan.removed, removed_parameters=plan.saved)
    tables.write(options.intervals, pd.DataFrame(rows, columns=columns), schemas.INTERVALS, stamp)


if __name__ == "__main__":
    errors.run(main)
