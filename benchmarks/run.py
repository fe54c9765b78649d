"""Measures the library against floors and alternatives, and prints and stores the ratios.

    python benchmarks/run.py --size small
    python benchmarks/run.py --size medium --only distill --output results.parquet

One thread, one process; what is compared runs in turns. See benchmarks/README.md.
"""

# ruff: noqa: E402 (threads are counted, and paths searched, when libraries are imported)

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in job.sh
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself otherwise

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow" / "scripts")]

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import cka, extraction, late, material, options, teaching, variants, whole
from benchmarks.material import Size
from benchmarks.measuring import Ratio

BENCHMARKS: dict[str, Callable[[Size, Path], list[Ratio]]] = {
    "extract": extraction.run,
    "similarity": cka.run,
    "distill": teaching.floor,
    "distill-memory": teaching.memory,
    "late-start": late.run,
    "naive": teaching.naive,
    "options": options.run,
    "variants": variants.run,
    "start-up": whole.start_up,
    "dry-run": whole.dry_run,
    "interval-plots": whole.interval_plots,
    "free": whole.free,
}


def measure(names: list[str], size: Size) -> list[Ratio]:
    """Runs benchmarks one after the other, and prints each ratio when it is there."""
    found = []
    for name in names:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            ratios = BENCHMARKS[name](size, Path(folder))
        for ratio in ratios:
            print(ratio, flush=True)
            if ratio.note:
                print(f"{'':<12}{ratio.note}", flush=True)
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"{'':<12}{name}: {time.perf_counter() - began:.0f} s, load {load}", flush=True)
        found += ratios
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(material.SIZES), default="small")
    parser.add_argument(
        "--only",
        choices=list(BENCHMARKS),
        nargs="+",
        metavar="NAME",
        help=f"some of: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--output", type=Path, help="parquet file for the ratios")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(asked.only or list(BENCHMARKS), material.SIZES[asked.size])
    if asked.output:
        table = pa.Table.from_pandas(pd.DataFrame([ratio.row() for ratio in found]))
        about = {"size": asked.size, "load": repr(os.getloadavg()), "torch": torch.__version__}
        pq.write_table(table.replace_schema_metadata(about), asked.output)


if __name__ == "__main__":
    main()
