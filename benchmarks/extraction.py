"""Extraction against the plain forwards of the same calls: seconds, and peak memory."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks import material, measuring
from benchmarks.material import Size
from benchmarks.measuring import Ratio
from ppcl.extraction import activations
from ppcl.settings import ExtractSettings
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context, State

NAME = "extract"
CPU = torch.device("cpu")
SAMPLED = 256  # tokens kept for CKA per stream, in all: 10 per channel do, however many calls


class _NoBar:
    def update(self, _count: int) -> None:
        pass


def settings(size: Size, kept: int | None = None, every: bool = False) -> ExtractSettings:
    """As the presets have it: 1 of 40 image tokens goes into the moments, or `every` one.

    kept: tokens of a call that are kept for CKA.
    """
    moment = size.side**2 if every else max(4, size.side**2 // 40)
    kept = kept or min(4, moment)
    tokens = {"moment_tokens": max(moment, kept), "sample_tokens": kept}
    return ExtractSettings.of({"batch_size": size.batch, "checkpoint_every": 512, **tokens})


def extract(teacher, path: Path, options: ExtractSettings):
    """As the stage does it, from opening the file, with nothing to resume from."""
    reader = calls.Reader(path, memory=0)
    rows = reader.rows()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        return activations.collect(
            Context(teacher, reader, 0, Accelerator(cpu=True)),
            rows,
            options,
            State(Path(folder), ""),
            _NoBar(),
        )


@torch.no_grad()
def forwards(teacher, path: Path, size: Size) -> None:
    """The same calls, and nothing kept."""
    reader = calls.Reader(path, memory=0)
    for batch in reader.batches(reader.rows(), size.batch):
        blocks.answer(teacher, batch.arguments)


def peak(what: str, path: str, size: Size, kept: int) -> int:
    """Peak bytes of loading a teacher and running it, in this process; kept as in `settings`."""

    def run():
        teacher = material.transformer(size)
        if what == "extract":
            extract(teacher, Path(path), settings(size, kept))
        else:
            forwards(teacher, Path(path), size)

    torch.set_num_threads(1)
    material.transformer(dataclasses.replace(size, blocks=1))  # what classes load at first use
    return measuring.process_peak(run)


def run(size: Size, folder: Path) -> list[Ratio]:
    """Both ratios of the issue, and how memory depends on the number of samples."""
    path = material.record(folder / "calls.parquet", size, size.rows)
    teacher = material.transformer(size)
    reader = calls.Reader(path)
    batches = list(reader.batches(reader.rows(), size.batch))

    @torch.no_grad()
    def plain():
        for batch in batches:
            blocks.answer(teacher, batch.arguments)

    few, every = settings(size), settings(size, every=True)
    times = measuring.interleaved(
        {
            "plain": plain,
            "extract": lambda: extract(teacher, path, few),
            "every": lambda: extract(teacher, path, every),
        },
        size.repeats,
    )
    seconds = {name: measuring.least(values) for name, values in times.items()}
    floor = seconds["plain"]
    note = f"{few.moment_tokens} of {size.side**2} image tokens a call; reading included"
    found = [
        Ratio(NAME, "seconds / plain forwards", seconds["extract"], floor, "s", 1.10, note=note),
        Ratio(
            NAME,
            "the same, every image token in the moments",
            seconds["every"],
            floor,
            "s",
            note="a model with few tokens a call, such as the embedded teacher",
        ),
    ]
    few_rows = min(16, size.rows)
    kept = max(1, SAMPLED // few_rows), max(1, SAMPLED // size.most_rows)
    many = material.record(folder / "many.parquet", size, size.most_rows)
    ones = {
        "plain": ("plain", path, kept[0]),
        "few": ("extract", path, kept[0]),
        "many": ("extract", many, kept[1]),
        "same": ("extract", many, kept[0]),
    }

    def mib(name: str, **how) -> float:
        what, where, tokens = ones[name]
        return measuring.fresh(peak, what, str(where), size, tokens, **how) / 2**20

    peaks = {name: mib(name) for name in ones}
    # Medians, as the allocator's own waste is another one every time.
    untidy = {
        name: float(np.median([mib(name, environment={}) for _ in range(size.repeats)]))
        for name in ("plain", "few")
    }
    counts = f"{size.most_rows} / {few_rows} samples"
    grown = size.most_rows * kept[0] * 2 * (size.blocks + 1) * size.width * 4 / 2**20
    alone, few_, many_, same = peaks.values()
    return [
        *found,
        Ratio(NAME, "peak / teacher alone", few_, alone, "MiB", 1.25),
        Ratio(
            NAME,
            "the same, with the allocator as it comes",
            untidy["few"],
            untidy["plain"],
            "MiB",
            note="above, freed memory goes back at once (measuring.TIDY)",
        ),
        Ratio(NAME, f"peak, {counts}", many_, few_, "MiB", 1.05),
        Ratio(
            NAME,
            f"peak, {counts}, each keeping as many tokens",
            same,
            few_,
            "MiB",
            1.05,
            note=f"the CKA sample is then {grown:.3g} MiB, on disk; above, equal in both",
        ),
    ]
