"""A variant's folder with its card, from small tables of what was measured of it."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ppcl.storage import schemas, seals, tables, texts
from ppcl.teacher import teacher_identity
from support import pruned, tiny

PIPELINE = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 2.0}
PIPELINE |= {"negative_prompt": " ", "somewhere": "/home/somebody/secret"}


def metrics() -> pd.DataFrame:
    rows = []

    def add(variant, name, value, teacher, low=np.nan, high=np.nan, more=False):
        rows.append([variant, name, value, teacher, np.nan, more, 8, low, high])

    for variant in ("teacher", "p50"):
        size = 1.0 if variant == "teacher" else 0.5
        add(variant, "parameters", 4e6 * size, 4e6)
        add(variant, "parameter_fraction", size, 1.0)
        add(variant, "latency_ratio", size, 1.0, size - 0.01, size + 0.01)
        add(variant, "velocity_error", 1 - size, 0.0, 0.4, 0.6)
        add(variant, "velocity_error_sigma_0.00_0.25", 1 - size, 0.0, 0.4, 0.6)
        add(variant, "all_correct", 0.9 * size, 0.9, 0.44, 0.46, more=True)
    add("p50", "psnr", 31.25, np.nan, 30.5, 32.0, more=True)
    add("p50", "all_correct_difference", -0.45, np.nan, -0.5, -0.4, more=True)
    return pd.DataFrame(rows, columns=schemas.METRICS.names)


def units() -> pd.DataFrame:
    rows = [
        ["p50", "interval", "01-03", 1, 3, "image text", "", 0, "distill"],
        ["p50", "interval", "05-07", 5, 7, "image text", "", 0, "subsets"],
        ["p50", "ffn", "00-00", 0, 0, "image text", "", 0, "refit-p50"],
        ["p50", "ffn", "09-09", 9, 9, "text", "", 0, "closed"],
        ["p50", "text", "20-23", 20, 23, "text", "", 0, "closed"],
        *(["p50", "modulation", "x", n, n, "", "img_mod.1", 2 + n, "closed"] for n in (4, 5)),
        ["p50", "modulation", "x", 24, 24, "", "norm_out.linear", 8, "closed"],
        ["p90", "ffn", "11-11", 11, 11, "text", "", 0, "closed"],
    ]
    known = [[*row, 1e-5, 1000, np.nan, False] for row in rows]
    return pd.DataFrame(known, columns=schemas.VARIANT_UNITS.names)


def pictures(prompts=("a red seven", "4 in red"), frames=1, source=b"") -> pd.DataFrame:
    sink = io.BytesIO()
    Image.fromarray(np.full((32 * frames, 32, 3), 99, np.uint8)).save(sink, "PNG")
    rows = [
        [variant, prompt, 7, sink.getvalue(), "", n, frames, source * (variant == "teacher")]
        for variant in ("teacher", "p50", "p90")
        for n, prompt in enumerate(prompts)
    ]
    return pd.DataFrame(rows, columns=schemas.IMAGES.names)


def describe(model: Path) -> dict:
    """Gives the folder of a variant p50, as `pruned.folder` wrote it, what `assemble` adds, and
    runs `describe` on it. Returns that program's options; files lie beside the folder `models`."""
    place = model.parent.parent
    named = teacher_identity.named(tiny.source(pruned.TEACHER))
    about = {"variant": {"name": "p50"}, "teacher": named, "parameter_fraction": 0.5}
    about["files"] = {"model_index.json": seals.file_digest(model / "model_index.json")}
    texts.write_sealed(model / "pruning.json", about | {"provenance": {}})
    paths = {name: place / f"{name}.parquet" for name in ("units", "metrics", "images")}
    tables.write(paths["units"], units(), schemas.VARIANT_UNITS, {"blocks": "24"})
    tables.write(paths["metrics"], metrics(), schemas.METRICS, {})
    tables.write(paths["images"], pictures(), schemas.IMAGES, {})
    options = paths | {"model": model, "card": place / "cards/p50", "variant": "p50"}
    run(options)
    return options


def run(options: dict) -> None:
    """Runs `describe`."""
    given = {"teacher": {"path": str(pruned.TEACHER)}, "pipeline": PIPELINE}
    tiny.stage("describe", given | {"record": {"samples": 640}}, **options)
