"""Whether two results folders hold the same numbers: what a change that changes none has to show.

    python tools/same_results.py results/before results/test
    python tools/same_results.py results/before results/test prune/old.parquet=prune/new.parquet

Compares all parquet and safetensors files by value, to the bit (NaN equals NaN). `old=new` names a
file that the second folder has under another name. What differs from run to run is left out:
provenance, times and latencies (columns and metrics), peak memory, and what lies in state/. With a
budget of latency, what a run selects may differ as well.

Prints a line per difference, with its first value; the exit status is 1 if there is one.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

# In the names of what differs from run to run.
COLUMNS = "seconds|latency"
METRICS = "latency|memory"


def files(folder: Path) -> set[str]:
    """What is compared, relative to the folder."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    kept = {path for path in paths if path.parts[0] != "state"}
    return {path.as_posix() for path in kept if path.suffix in (".parquet", ".safetensors")}


def table_differences(old: Path, new: Path) -> Iterator[str]:
    """One sentence per column that differs."""
    tables = [without_measured_rows(pq.read_table(path)) for path in (old, new)]
    names, other = (table.column_names for table in tables)
    yield from (f"column {name}: gone" for name in names if name not in other)
    yield from (f"column {name}: new" for name in other if name not in names)
    before, after = (len(table) for table in tables)
    if before != after:
        yield f"{before} rows, now {after}"
        return
    for name in names:
        if name in other and not re.search(COLUMNS, name):
            yield from column_differences(name, *(table.column(name) for table in tables))


def without_measured_rows(table: pa.Table) -> pa.Table:
    """Without the metrics that differ from run to run, of a table with a row per metric."""
    if "metric" not in table.column_names:
        return table
    return table.filter(pc.invert(pc.match_substring_regex(table.column("metric"), METRICS)))


def column_differences(name: str, old: pa.ChunkedArray, new: pa.ChunkedArray) -> Iterator[str]:
    if old.type != new.type:
        yield f"column {name}: {old.type}, now {new.type}"
    elif not old.equals(new):  # for Arrow, NaN differs from itself: only then value by value
        pairs = enumerate(zip(old, new, strict=True))
        texts = ((row, repr(a.as_py()), repr(b.as_py())) for row, (a, b) in pairs)
        different = [(row, a, b) for row, a, b in texts if a != b]
        if different:
            row, a, b = different[0]
            rows = f"{len(different)} of {len(old)} rows differ"
            yield f"column {name}: {rows}, first row {row}: {a[:60]}, now {b[:60]}"


def tensor_differences(old: Path, new: Path) -> Iterator[str]:
    """One sentence per tensor that differs."""
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        names, other = before.keys(), after.keys()
        yield from (f"tensor {name}: gone" for name in names if name not in other)
        yield from (f"tensor {name}: new" for name in other if name not in names)
        for name in names:
            if name not in other:
                continue
            a, b = before.get_tensor(name), after.get_tensor(name)
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                was, now = (f"{x.dtype} {list(x.shape)}" for x in (a, b))
                yield f"tensor {name}: {was}, now {now}"
            elif not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b))):
                largest = (a.double() - b.double()).abs().max().item()
                yield f"tensor {name}: differs by up to {largest:.3g}"


def differences(old: Path, new: Path, renamed: dict[str, str]) -> Iterator[str]:
    """One line per difference of two results folders, each with the file that has it.

    renamed: file in `old` -> its name in `new`.
    """
    before, after = {renamed.get(name, name): name for name in files(old)}, files(new)
    yield from (f"{before[name]}: gone" for name in sorted(before.keys() - after))
    yield from (f"{name}: new" for name in sorted(after - before.keys()))
    for name in sorted(before.keys() & after):
        compare = table_differences if name.endswith(".parquet") else tensor_differences
        yield from (f"{name}: {text}" for text in compare(old / before[name], new / name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="results folder before the change")
    parser.add_argument("new", type=Path, help="results folder after it")
    parser.add_argument("renamed", nargs="*", metavar="old=new", help="a file that was renamed")
    options = parser.parse_args()
    for folder in (options.old, options.new):
        if not files(folder):
            parser.error(f"{folder} holds no parquet or safetensors file")
    if odd := [pair for pair in options.renamed if pair.count("=") != 1]:
        parser.error(f"{odd[0]} is not of the form old=new")
    renamed = dict(pair.split("=") for pair in options.renamed)
    if unknown := renamed.keys() - files(options.old):
        parser.error(f"{min(unknown)} is no parquet or safetensors file of {options.old}")

    lines = list(differences(options.old, options.new, renamed))
    print(*lines, sep="\n", end="\n" if lines else "")
    count = len(files(options.old))
    print(f"{count} files compared: {len(lines) or 'no'} difference{'s' * (len(lines) != 1)}")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
