"""Records the transformer's own calls while the stock pipeline runs on the calibration prompts.

Later stages replay them, so they need no text encoder, no scheduler and no knowledge of the model.
A killed run goes on with the batches that are not recorded yet. Several processes (torchrun, or
launch.py) share the batches.

    python workflow/scripts/record.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet \
        --block-facts results/digits/record/blocks.parquet \
        --sizes results/digits/record/sizes.parquet --state results/digits/state/record
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from ppcl import program, provenance
from ppcl.closed_forms import stored_sizes
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.export import rehearsal
from ppcl.runtime import devices, processes, stopping
from ppcl.settings import RecordSettings, Settings, TeacherSettings
from ppcl.storage import schemas, tables
from ppcl.teacher import arguments, pipelines, prompt_tokens, prompts, recording, teacher_identity
from ppcl.transformer import block_facts, blocks, call_tables, calls, claims

if TYPE_CHECKING:  # ppcl has to come first: it puts off what diffusers imports for little
    from diffusers import DiffusionPipeline


class Recording(NamedTuple):
    """A resolved teacher, its pipeline and transformer, and the processes that record together."""

    teacher: TeacherSettings
    pipe: "DiffusionPipeline"
    transformer: nn.Module
    accelerator: Accelerator


def choose_samples(rows: list[dict], settings: RecordSettings, seed: int) -> list[dict]:
    """Calibration samples; the split is by prompt, so that no prompt is on both sides.

    Raises:
        UserError: there are not two different prompts to split.
    """
    # By text, not by row: a file may list a prompt twice.
    used = list(dict.fromkeys(row["prompt"] for row in rows[: settings.samples]))
    if len(used) < 2:
        raise UserError(
            f"record.prompts: {settings.prompts} has only one prompt; calibration needs two "
            "or more, to fit on and to hold out"
        )
    count = prompts.heldout_count(len(used), settings.heldout_fraction)
    heldout = {used[i] for i in np.random.default_rng(seed).permutation(len(used))[:count]}
    samples = pipelines.samples(rows, settings.samples, seed)
    return [sample | {"heldout": sample["prompt"] in heldout} for sample in samples]


def record_parts(
    context: Recording, parts: list[Path], batches: list[list[dict]], settings: Settings
) -> None:
    """Records every batch whose part is missing; processes take batches in turns.

    After the first one, the family's claims are verified, and an export is rehearsed.

    Args:
        parts: the file of each batch.
    """
    pipe, transformer, accelerator = context.pipe, context.transformer, context.accelerator
    folder = parts[0].parent
    # First the batch with the checks, which take time; then the largest first: prompts of unlike
    # length make batches of very unlike size.
    order = [0, *sorted(range(1, len(batches)), key=lambda number: -len(batches[number]))]
    bar = tqdm(
        total=len(batches), desc="recording", unit="batch", disable=not accelerator.is_main_process
    )
    for turn in processes.in_turns(accelerator, len(order), folder):
        bar.update(turn - bar.n)  # other processes took the turns in between
        part, batch = parts[order[turn]], batches[order[turn]]
        if not part.exists():
            recorded = recording.record_batch(
                pipe,
                transformer,
                batch,
                settings.pipeline,
                settings.record.renoised_per_sample,
                settings.seed,
                replayed=part == parts[0],
            )
            # Not around the calls too: those of a large teacher take longer than schedulers wait.
            with stopping.part():
                call_tables.write(part, [table.schema for table in recorded], recorded, {})
        if part == parts[0]:
            reader = calls.Reader(part)
            first = reader.batch(reader.buckets[0][:1])
            claims.verify(transformer, first.to(accelerator.device).arguments)
            exportable = folder / "exportable"
            rehearsal.rehearse(pipe, transformer, context.teacher, first.arguments, exportable)
    bar.update(len(order) - bar.n)
    bar.close()


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(__doc__, "config", "state", writes=("calls", "block_facts"))
    parser.add_argument("--sizes", type=Path, help=f"output: {program.FILES['sizes']}")
    return parser.parse_args()


def main() -> None:
    args = command_line()
    settings = config.load(args.config)
    rows = prompts.read(settings.record.prompts, "record.prompts")
    arguments.before_loading(settings.teacher, settings.pipeline, rows, "record.prompts")
    accelerator = processes.accelerator(settings.device)
    # One of the processes decides: the teacher may be replaced while they start.
    (teacher,) = broadcast_object_list([teacher_identity.resolved(settings.teacher)])
    pipe = pipelines.load(teacher, accelerator.device)
    transformer = pipelines.denoiser(pipe, teacher)
    if settings.teacher.compile:
        devices.compile_blocks([b.module for b in blocks.block_sequence(transformer)])
    samples = choose_samples(rows, settings.record, settings.seed)
    batches = pipelines.in_batches(pipe, samples, settings.record.batch_size)
    if accelerator.is_main_process:
        texts = [sample["prompt"] for sample in samples]
        prompt_tokens.warn_of_cut(pipe, texts, settings.pipeline, "record.prompts")
    code = provenance.code_digest(Path(__file__))
    pictures = provenance.stamps(prompts.pictures(rows))
    noted = teacher_identity.note(teacher)
    identity = provenance.digest([settings.given, rows, pictures, noted, code])
    folder = args.state / identity[:16]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{number:05d}.parquet" for number in range(len(batches))]
    record_parts(Recording(teacher, pipe, transformer, accelerator), parts, batches, settings)
    teacher_identity.refuse_changed(teacher)
    accelerator.wait_for_everyone()
    stopping.ignore()
    if accelerator.is_main_process:
        stamp = provenance.stamp(settings.given, samples=len(samples), prompts=len(rows)) | noted
        call_tables.merge(parts, args.calls, stamp)
        block_facts.write(args.block_facts, blocks.facts(transformer), stamp)
        if args.sizes:
            tables.write(args.sizes, stored_sizes.table(transformer), schemas.SIZES, stamp)
    processes.finish(accelerator)


if __name__ == "__main__":
    program.run(main)
