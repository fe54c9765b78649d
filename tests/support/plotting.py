"""For tests of the figures: tables as a run could have written them, and running the program."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import plot
import pytest

from ppcl.figures.candidates import selected_spans
from ppcl.storage import schemas, tables
from ppcl.storage.schemas import Verdict


def chain_of(blocks: int, searches: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Consecutive intervals of two blocks or more that cover the depth."""
    inner = np.arange(2, blocks - 1, 2)
    cuts = np.sort(rng.choice(inner, searches - 1, replace=False))
    edges = [0, *cuts.tolist(), blocks]
    return list(zip(edges[:-1], [edge - 1 for edge in edges[1:]], strict=True))


def verdict(selected: bool) -> list[str]:
    """Verdict and reason of what nothing rules out."""
    return [Verdict.CHEAPEST if selected else Verdict.NOT_NEEDED, "in words"]


def search_tables(blocks: int, searches: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """cka, blocks, probes and intervals in which Delta falls inside an interval, then rises."""
    rng = np.random.default_rng(seed)
    chain = chain_of(blocks, searches, rng)
    ends = {first - 1: last for first, last in chain}
    rows = []
    for stream, scale in (("image", 1.0), ("text", 0.5), ("mean", 0.75)):
        for u in range(-1, blocks - 1):
            end = ends.get(u, u + 3)
            drop, cka = 0.02 * scale * rng.uniform(0.2, 3), 1.0
            for k in range(u + 1, blocks):
                drop *= rng.uniform(1.3, 1.8) if k > end else rng.uniform(0.6, 0.95)
                drop = min(drop, cka * 0.4)
                cka -= drop
                noise = 0.02 * drop + 2e-4
                rows.append(
                    [stream, u, k, cka, drop, cka - noise, cka + noise, drop - noise, drop + noise]
                )
    cka = pd.DataFrame(rows, columns=schemas.CKA.names)

    depth = np.arange(blocks)
    maps = []
    for stream, reach in (("image", blocks / 2), ("text", blocks / 5)):
        square = np.exp(-((np.abs(depth[:, None] - depth) / reach) ** 1.3))
        for a in depth:
            for b in depth:
                maps.append([stream, a, b, square[a, b]])

    linear = []
    for stream, offset in (("image", 0.0), ("text", 0.1)):
        for i in depth:
            r2 = np.clip(
                0.75 + offset - 0.4 * np.cos(9 * i / blocks) + rng.normal(0, 0.06), -1, 0.99
            )
            condition = 10 ** (3 + 5 * i / blocks + 2 * offset + rng.normal(0, 0.2))
            fit = [r2, 0.9 + 0.1 * r2, condition, 40000, r2 + 0.01, 9000, 0.3, 0.05]
            linear.append([i, stream, *fit])

    chosen = set(rng.permutation(len(chain))[: max(1, len(chain) // 2)].tolist())
    table = cka[cka["stream"] == "mean"].set_index(["start", "end"])["cka"]
    intervals = pd.DataFrame(
        [
            [f, v, v - f, table[f - 1, v], n in chosen, *verdict(n in chosen), "trend", 0.01, 5e-4]
            for n, (f, v) in enumerate(chain)
        ],
        columns=schemas.INTERVALS.names,
    )
    # Selection may also take a part of what the search found.
    longest = (intervals["last"] - intervals["first"]).idxmax()
    first, last = intervals.loc[longest, ["first", "last"]]
    if last - first > 2:
        intervals.loc[longest, ["selected", "verdict"]] = False, Verdict.COSTLIER
        part = [first, first + 1, 1, table[first - 1, first + 1], True, *verdict(True)]
        part += ["optimal", 0.01, 5e-4]
        intervals.loc[len(intervals)] = part
    return {
        "cka": cka,
        "blocks": pd.DataFrame(maps, columns=schemas.BLOCKS.names),
        "probes": pd.DataFrame(linear, columns=schemas.PROBES.names),
        "intervals": intervals,
    }


def width_table(intervals: pd.DataFrame, blocks: int, seed: int = 0) -> pd.DataFrame:
    """Candidates with protected blocks, a CKA floor and a selection of what costs least."""
    rng = np.random.default_rng(seed)
    spans = selected_spans(intervals)
    gone = {block for first, last in spans for block in range(first + 1, last + 1)}
    run = (blocks // 2, blocks // 2 + 3)
    rows = []

    def add(kind, first, last, stream, level, fit, cka, saved):
        error = level * rng.lognormal(0, 0.8) * (1 + 30 * np.exp(-first / 2))
        fit *= rng.lognormal(0, 0.5)
        ruled_out, selected = None, False
        if first < 2:
            ruled_out = Verdict.PROTECTED
        elif cka < 0.6:
            ruled_out = Verdict.LOW_CKA
        elif kind == "text":
            selected = (first, last) == run
        else:
            borrowed = stream == "text" and run[0] < first <= run[1]
            selected = error < 4e-4 and first not in gone and not borrowed
        known = [kind, first, last, stream, "", 0, fit, cka, saved, error, selected]
        rows.append([*known, *([ruled_out, "in words"] if ruled_out else verdict(selected))])

    def price(block, path, level):
        chosen = rng.choice([0, 2, 4, 8])
        for rank in (2, 4, 8):
            error = level * rng.lognormal(0, 0.3) * 4.0**-rank
            fields = [rank, 1e-3, np.nan, 1e4 * (9 - rank), error, rank == chosen]
            rows.append(["modulation", block, block, "", path, *fields, *verdict(rank == chosen)])

    for block in range(blocks + 1):
        for path in ("img_mod.1", "txt_mod.1") if block < blocks else ("norm_out.linear",):
            price(block, path, 1e-3)
    for block in range(blocks):
        add("ffn", block, block, "image", 3e-4, 0.15, np.nan, 4e4)
        if block < blocks - 1:
            add("ffn", block, block, "text", 2e-7 if block % 5 else 3e-5, 0.7, np.nan, 4e4)
    # Nothing reads the last block's text stream.
    add("ffn", blocks - 1, blocks - 1, "text", 0.0, 0.0, np.nan, 4e4)
    for first in range(blocks):
        for last in range(first + 1, min(first + 4, blocks)):
            cka = 0.9 if first == run[0] else rng.uniform(0.5, 1)
            add("text", first, last, "text", 2e-4 * (last - first), 0.5, cka, 5e4 * (last - first))
    return pd.DataFrame(rows, columns=schemas.WIDTH_CANDIDATES.names)


def variant_units() -> pd.DataFrame:
    """Members of three variants of 24 blocks: everything, closed forms alone, two FFNs."""
    rows = []

    def add(variant, kind, first, last, stream, source, path="", rank=0):
        unit = f"{first:02d}-{last:02d}"
        fields = [path, rank, source, 1e-5, 1000, np.nan, False]
        rows.append([variant, kind, unit, first, last, stream, *fields])

    for first, last, source in ((3, 6, "subsets"), (8, 10, "distill"), (14, 17, "start")):
        add("p55", "interval", first, last, "both", source)
    add("p55", "text", 18, 21, "text", "closed")
    for variant, count in (("p55", 12), ("p70", 20), ("p85", 2)):
        for block in range(count):
            stream = "text" if block % 2 else "image"
            source = {9: "distill", 10: f"refit-{variant}"}.get(block, "closed")
            add(variant, "ffn", block, block, stream, source)
    for variant in ("p55", "p70"):
        for block in range(25):
            for path in ("img_mod.1", "txt_mod.1") if block < 24 else ("norm_out.linear",):
                rank = 2 + block % 3
                add(variant, "modulation", block, block, "", "closed", path, rank)
    return pd.DataFrame(rows, columns=schemas.VARIANT_UNITS.names)


def block_facts(blocks: int, seam: int | None = None) -> pd.DataFrame:
    """Blocks of one kind or, from `seam` on, of two, as FLUX has them."""
    every = range(blocks)
    two = [seam is not None and block >= seam for block in every]
    names = ["single_transformer_blocks" if second else "transformer_blocks" for second in two]
    begins = [block in (0, seam) for block in every]
    rows = [every, names, begins, [""] * blocks, [100] * blocks]
    return pd.DataFrame(dict(zip(schemas.BLOCK_FACTS.names, rows, strict=True)))


def calibration_table(seed: int = 0) -> pd.DataFrame:
    """Prices of which the untrained student's foretells most, and CKA least."""
    rng = np.random.default_rng(seed)
    kinds = {"depth": (0.02, 40), "text": (3e-3, 16), "ffn_image": (1e-3, 20)}
    kinds["ffn_text"] = (2e-5, 20)
    rows = []
    for kind, (level, count) in kinds.items():
        ffn = kind.startswith("ffn")
        for first in range(count):
            trained = level * rng.lognormal(0, 1)
            cka = np.nan if ffn else 0.3 * trained**0.5 * rng.lognormal(0, 1)
            probe, untrained = 3 * rng.lognormal(0, 0.9), 4 * rng.lognormal(0, 0.4)
            last = first if ffn else first + 1 + first % 3
            rows.append([kind, first, last, cka, probe * trained, untrained * trained, trained])
    return pd.DataFrame(rows, columns=schemas.CALIBRATION.names)


def write(folder: Path, name: str, table: pd.DataFrame, blocks: int = 24) -> Path:
    path = folder / f"{name}.parquet"
    log = schemas.FINETUNE_LOG if "picture_loss" in table else schemas.VELOCITY_LOG
    schema = getattr(schemas, name.upper().replace("-", "_"), log)
    stamp = {"commit": "0123abc", "created": "2026-01-01", "blocks": str(blocks)}
    tables.write(path, table, schema, stamp)
    return path


def draw(*arguments) -> None:
    """Run the program in this process: most tests need no second start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        plot.main()


def svg_text(path: Path) -> str:
    """All text of an SVG file: labels are text, not outlines."""
    root = ElementTree.parse(path).getroot()
    return "\n".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text"))
