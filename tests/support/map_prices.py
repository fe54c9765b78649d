"""The prices of linear maps and low ranks, measured on a tiny teacher by the stage's program."""

import pandas as pd

from ppcl.closed_forms import modulation, modulation_prices
from ppcl.extraction import conditioning
from ppcl.storage import schemas, tables
from ppcl.transformer import calls
from support import tiny
from support.killing import TRAINING

EVALUATE = {"batch_size": 2, "velocity_rows": 4, "bootstrap": 10, "latency_repeats": 3}


def settings_of(teacher, **changed):
    how = TRAINING | {"steps": 6, "heldout_rows": 4}
    width = {"rows": 3, "fit_rows": 8, "batch_size": 4, "longest": 3, "steps": 6}
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": {"path": str(teacher)},
        "pipeline": {},
        "intervals": {},
        "prune": {"start": "first"},
        "width": width | {"schedule": "staged"},
        "modulation": {},
        "choose": {"rows": 4, "batch_size": 4},
        "distill": how,
        "subsets": how,
        "finetune": TRAINING,
        "pareto": {"budgets": 4},
        "evaluate": EVALUATE,
        "variants": [{"name": "fast", "budget": {"latency": 0.99}}],
    }
    return settings | changed


def similar(path, depth=5, text=0.9):
    rows = [
        [stream, a, b, 1.0 if a == b else text]
        for stream in ("image", "text")
        for a in range(depth)
        for b in range(depth)
    ]
    frame = pd.DataFrame(rows, columns=schemas.BLOCKS.names)
    # Block 3's text is unlike that of block 1.
    unlike = (frame["stream"] == "text") & (frame["block_a"] == 1) & (frame["block_b"] == 3)
    tables.write(path, frame.assign(cka=frame["cka"].mask(unlike, 0.1)), schemas.BLOCKS, {})
    return path


def conditioned(tiny_teacher, tiny_calls, path):
    """What matrices get in the calls to fit on, an entry each."""
    if path.exists():  # the order of a header's entries is not the same twice
        return path
    reader, transformer = calls.Reader(tiny_calls), tiny.load(tiny_teacher).transformer
    every = modulation.matrices(transformer)
    rows = reader.rows(heldout=False)
    seen = modulation_prices.inputs_of(tiny.context(transformer, reader), every, rows, 4)
    entries = [
        conditioning.Moments(float(len(x)), x.sum(0), x.T @ x)
        for x in (seen[one.key].double() for one in every)
    ]
    places = {one.key: place for place, one in enumerate(every)}
    conditioning.write(path, conditioning.Conditioning(entries, places), {})
    return path


def measure(tiny_teacher, tiny_calls, folder, name="w", without=(), **modulation):
    """The prices; `without` names inputs that the stage is not given."""
    settings = settings_of(tiny_teacher) | {"modulation": modulation}
    settings["width"]["enabled"] = "blocks" not in without
    path = folder / f"{name}.parquet"
    paths = {
        "blocks": similar(folder / "blocks.parquet"),
        "conditioning": conditioned(tiny_teacher, tiny_calls, folder / "conditioning.safetensors"),
    }
    paths = {key: value for key, value in paths.items() if key not in without}
    paths |= {"calls": tiny_calls, "state": folder / "state", "table": path}
    tiny.stage("width", settings, **paths, maps=folder / f"{name}.safetensors")
    return tables.read(path, schemas.WIDTH_MEASURED).to_pandas()
