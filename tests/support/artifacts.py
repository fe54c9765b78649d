"""What artifacts say, without what differs between two runs: times and measurements."""

from pathlib import Path

import torch

from ppcl.export import assembly
from ppcl.storage import tables, tensors, texts

MEASURED = ("seconds", "latency", "peak_memory")


def content(path: Path):
    """What an artifact says, without times and what is measured in seconds and bytes.

    Raises UserError unless it is whole.
    """
    if path.is_dir() and not (path / assembly.CARD).exists():
        files = {file.name: file.read_bytes() for file in path.glob("[!.]*")}
        return files | {"": "figures"}
    if path.is_dir():
        assembly.verify(path)
        card = texts.read_sealed(path / assembly.CARD)
        return {**card["files"], "units": card["units"]}
    if path.suffix == ".safetensors":
        read, about = tensors.read(path)
        # Views of bytes: NaN equals itself.
        read = {k: t.contiguous().flatten().view(torch.uint8).tolist() for k, t in read.items()}
        return read | {"": _undated(about)}
    if path.suffix == ".json":
        fields = texts.read_sealed(path)
        return fields | {"provenance": _undated(fields.get("provenance", {}))}
    table = tables.read(path)
    if "metric" in table.column_names:
        kept = [not any(m in name for m in MEASURED) for name in table["metric"].to_pylist()]
        table = table.filter(kept)
    names = [name for name in table.column_names if not any(m in name for m in MEASURED)]
    return repr(table.select(names).to_pylist()), _undated(tables.provenance(path))


def _undated(stamp: dict) -> dict:
    # Nor by the commit, for somebody may work on this repository meanwhile.
    stamp = {key: value for key, value in stamp.items() if key not in ("created", "commit")}
    return {key: value for key, value in stamp.items() if not any(m in key for m in MEASURED)}
