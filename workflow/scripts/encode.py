"""Encodes the user's own pictures and captions (finetune.data), once, for fine-tuning.

The stock pipeline's autoencoder and text encoder do it; what its transformer would get of a picture
without noise is kept. A killed run goes on with the batches that are not encoded yet. Several
processes (torchrun, or launch.py) share the batches.

    python workflow/scripts/encode.py --config config/digits.yaml --data mine \
        --encoded results/digits/encode/mine.parquet --state results/digits/state/encode-mine
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.runtime import processes, stopping
from ppcl.storage import schemas, tables
from ppcl.teacher import encoding, pictures, pipelines, prompt_tokens, teacher_identity
from ppcl.transformer import call_tables

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCH = 8  # pictures at a time


def samples(given: Sequence[pictures.Picture], heldout_fraction: float, seed: int) -> list[dict]:
    """Rows of encoded.parquet without what is encoded; equal files are on one side of the split."""
    same: dict[str, list[int]] = {}
    for number, picture in enumerate(given):
        content = hashlib.sha256()
        for file in pictures.files([picture]):
            with open(file, "rb") as opened:
                content.update(hashlib.file_digest(opened, "sha256").digest())
        same.setdefault(content.hexdigest(), []).append(number)
    groups = list(same.values())
    count = min(max(1, round(len(groups) * heldout_fraction)), len(groups) - 1)
    drawn = np.random.default_rng(seed).permutation(len(groups))[:count]
    heldout = {number for group in drawn for number in groups[group]}
    return [
        {
            "sample": number,
            "file": str(picture.path),
            "prompt": picture.caption,
            "heldout": number in heldout,
        }
        for number, picture in enumerate(given)
    ]


def encode_parts(
    encoder: Callable[[], encoding.Encoder],
    accelerator: "Accelerator",
    parts: list[Path],
    batches: list[list[dict]],
) -> None:
    """Encodes every batch whose part is missing; processes take batches in turns.

    Args:
        encoder: makes the encoder, once something is missing.
        parts: the file of each batch; its provenance has the size of the pictures.
    """
    made_once = functools.cache(encoder)
    bar = tqdm(
        total=len(batches), desc="encoding", unit="batch", disable=not accelerator.is_main_process
    )
    for turn in processes.in_turns(accelerator, len(batches), parts[0].parent):
        bar.update(turn - bar.n)
        part, batch = parts[turn], batches[turn]
        if part.exists():
            continue
        size = made_once().layout.size
        shown = np.stack([pictures.opened(Path(s["file"]), size) for s in batch])
        made = made_once().rows(shown, {key: [s[key] for s in batch] for key in batch[0]})
        about = {"pixels": " x ".join(map(str, size))}
        with stopping.part():
            call_tables.write(part, [table.schema for table in made], made, about, schemas.ENCODED)
    bar.update(len(batches) - bar.n)
    bar.close()


def join(parts: list[Path], path: Path, stamp: dict[str, str]) -> None:
    """Joins the batches, one in memory at a time. A damaged one is told before anything is
    written."""
    for part in parts:
        file = tables.File(part)
        for number in range(len(file)):
            file.group(number)
    size = {"pixels": tables.provenance(parts[0])["pixels"]}
    call_tables.merge(parts, path, stamp | size, schemas.ENCODED)


def main() -> None:
    parser = program.parser(__doc__, "config", "state", writes=("encoded",))
    parser.add_argument("--data", required=True, metavar="PATH", help="finetune.data")
    args = parser.parse_args()
    settings = config.load(args.config)
    given = pictures.listed(args.data)
    accelerator = processes.accelerator(settings.device)
    (teacher,) = broadcast_object_list([teacher_identity.resolved(settings.teacher)])
    pipe = pipelines.load(teacher, accelerator.device)
    transformer = pipelines.denoiser(pipe, teacher)
    every = samples(given, settings.finetune.heldout_fraction, settings.seed)
    batches = pipelines.in_batches(pipe, every, BATCH)
    if accelerator.is_main_process:
        texts = [sample["prompt"] for sample in every]
        prompt_tokens.warn_of_cut(pipe, texts, settings.pipeline, "finetune.data")
    noted = teacher_identity.note(teacher)
    stamps = provenance.stamps(pictures.files(given))
    code = provenance.code_digest(Path(__file__))
    identity = provenance.digest([settings.given, every, stamps, noted, code])
    folder = args.state / identity[:16]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{number:06d}.parquet" for number in range(len(batches))]
    encode_parts(
        lambda: encoding.Encoder(pipe, transformer, settings.pipeline, every[0]["prompt"]),
        accelerator,
        parts,
        batches,
    )
    teacher_identity.refuse_changed(teacher)
    accelerator.wait_for_everyone()
    stopping.ignore()
    if accelerator.is_main_process:
        join(parts, args.encoded, provenance.stamp(settings.given, samples=len(every)) | noted)
    processes.finish(accelerator)


if __name__ == "__main__":
    program.run(main)
