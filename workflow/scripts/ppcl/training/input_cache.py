"""The teacher's streams at the first block that a job needs, kept on disk, so that it starts there.

Every step draws other rows, so streams are kept by row. They are computed before the first step,
for all rows that the steps will draw, in batches of a fixed make-up: what a step reads does not
depend on when it was computed, and a killed job ends with the weights of an uninterrupted one. The
batches have the size of a process's share of a step. In batches of one shape, activations of a
sample are mostly the same to the bit whatever else is in the batch; then students are the same to
the bit with and without the cache. Otherwise (padding up to the longest text, experts that share
out tokens), activations differ by rounding.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from ppcl import provenance
from ppcl.errors import UserError, disk_is_full
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.runtime import processes, stopping
from ppcl.settings import DistillSettings
from ppcl.storage import tensors, texts
from ppcl.training import shards, tail
from ppcl.transformer import blocks, calls, diffusers_model
from ppcl.transformer.context import Context, State

log = logging.getLogger(__name__)

CACHE_DISABLED = "disabled.json"
OPEN = 1024  # most files that are kept mapped; the kernel allows some 65,000


def drawn(reader: calls.Reader, options: DistillSettings, seed: int) -> np.ndarray:
    """Numbers of the rows that the steps of a training draw, each once, in order."""
    rows = reader.rows(heldout=False)
    draws = (reader.draw(rows, options.batch_size, (seed, s)) for s in range(options.steps))
    return np.unique(np.concatenate(list(draws)))


def caching(reader: calls.Reader, options: DistillSettings, seed: int) -> shards.Caching:
    """How the distillation with these options (config's `distill`) caches streams."""
    if options.cache_inputs == "never" or options.mode != "independent":
        return shards.NEVER
    visits = options.steps * options.batch_size
    return shards.Caching(options.cache_inputs, len(drawn(reader, options, seed)) / visits)


class InputCache:
    """The streams at a job's first needed block, of every row that its steps draw.

    Args:
        new_blocks: those that the job teaches; the teacher must run from the first block that they
            need (`shards.first_needed`) on.
        options: config's `distill`.
        state: folder for the files, and the training's identity. `student_stage` removes the files.
        reserve: bytes that must stay free on the disk.
    """

    def __init__(
        self,
        context: Context,
        new_blocks: Sequence[NewBlock],
        options: DistillSettings,
        state: State,
        reserve: int = 0,
    ):
        self.first = shards.first_needed(new_blocks)
        self._transformer, self._reader = context.transformer, context.reader
        self._accelerator = context.accelerator
        self._folder, self._reserve = state.folder, reserve
        self._required = options.cache_inputs == "always"
        self._tail: tail.Tail | None = None
        size = -(-options.batch_size // context.accelerator.num_processes)
        rows = drawn(context.reader, options, context.seed)
        self._groups = list(_groups(context.reader, rows, size))
        self._place = {row: (n, i) for n, g in enumerate(self._groups) for i, row in enumerate(g)}
        self._identity = provenance.digest([state.identity, self.first, size])
        self._open: dict[int, Any] = {}
        self._checked: set[int] = set()
        self._ready = False

    def model(self, rows: np.ndarray, arguments: dict[str, Any]) -> nn.Module:
        """What to run in the transformer's place for the call of these rows; the transformer itself
        if the disk has no room for the cache. To be called within autocast.

        The first call fills the cache, by all processes together.

        Args:
            rows: numbers of the rows, this process's part of the step's batch.
            arguments: of the transformer's call for them.

        Raises:
            UserError: a file is not what was written; or, where the config says `always`, the disk
                is full; or the cached streams are not those of the teacher on this batch.
        """
        if not self._ready:
            self._prepare()
            if self._tail:
                self._verify(rows, arguments)
            self._ready = True
        return self._tail.model(self._streams(rows)) if self._tail else self._transformer

    def _prepare(self) -> None:
        main = self._accelerator.is_main_process
        if self._disabled():
            return
        if main:
            self._put_away()
        self._accelerator.wait_for_everyone()
        reason = self._fill()
        # All or none: a step of one process must not differ from that of another.
        failed = torch.tensor([float(bool(reason))], device=self._accelerator.device)
        if not self._accelerator.reduce(failed, reduction="sum").item():
            self._tail = tail.Tail(self._transformer, self.first)
            return
        reason = reason or "another process says why"
        if main and not self._required:  # if required, a rerun with room goes on from the files
            shutil.rmtree(self._folder, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        if self._required:
            raise UserError(
                f"{self._folder}: no room for the teacher's streams ({reason}); free some, or set "
                "distill.cache_inputs to never, which lets the teacher run from its first block"
            )
        if main:
            # A resumed job must not decide anew, or its steps would differ from those before.
            texts.write_sealed(self._folder / CACHE_DISABLED, {"identity": self._identity})
            log.warning("%s: the teacher runs from its first block (%s)", self._folder, reason)

    def _disabled(self) -> bool:
        path = self._folder / CACHE_DISABLED
        disabled = path.exists() and texts.read_sealed(path)["identity"] == self._identity
        # The main process's answer, for all: it looked before it removes or writes the file.
        return bool(processes.of_main(self._accelerator, torch.tensor(int(disabled))))

    def _fill(self) -> str:
        """Writes this process's share of the missing files; says why, if it can't."""
        rank, count = self._accelerator.process_index, self._accelerator.num_processes
        mine = range(rank, len(self._groups), count)
        for number in tqdm(mine, desc="caching", unit="batch", disable=rank > 0, mininterval=2):
            if self._is_there(number):
                continue
            rows = self._groups[number]
            batch = self._reader.batch(rows).to(self._accelerator.device)
            with self._accelerator.autocast():
                streams = tail.streams_before(self._transformer, self.first, batch.arguments)
            size = sum(value.nbytes for value in streams.values())
            if reason := self._short_of_room(size * self._missing()):
                return reason
            written = {"identity": self._identity, "rows": _text(rows)}
            try:
                tensors.write(self._path(number), streams, written)
            except (UserError, OSError, SafetensorError) as error:
                if not disk_is_full(error):
                    raise
                return str(error)
            if stopping.warned():  # what is written is kept
                stopping.end()
        return ""

    def _put_away(self) -> None:
        """Removes files of other settings, inputs or code, and damaged ones."""
        foreign = 0
        for path in self._folder.glob("*.safetensors"):
            try:
                if tensors.metadata(path).get("identity") == self._identity:
                    continue
                foreign += 1
            except UserError as error:
                log.warning("%s; it is made again", error)
            path.unlink(missing_ok=True)
        if foreign:
            text = "%s: %s files belong to other settings or inputs; they are made again"
            log.warning(text, self._folder, foreign)

    def _missing(self) -> int:
        """How many files are not there, of all processes."""
        return len(self._groups) - sum(1 for _ in self._folder.glob("*.safetensors"))

    def _short_of_room(self, needed: int) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed + self._reserve <= free:
            return ""
        gib = 2**30
        return (
            f"{needed / gib:.3g} GiB are to be written, {self._reserve / gib:.3g} GiB must stay "
            f"free for checkpoints, and {free / gib:.3g} GiB are free"
        )

    def _is_there(self, number: int) -> bool:
        """Whether a killed run left this file; removes it if it is not what was to be written."""
        if not self._path(number).exists():
            return False
        try:
            self._opened(number)
        except UserError as error:
            log.warning("%s; it is made again", error)
            self._path(number).unlink(missing_ok=True)
            return False
        return True

    def _opened(self, number: int):
        """An open file; all of it is checked when it is opened for the first time."""
        if number not in self._open:
            if len(self._open) >= OPEN:
                self._open.clear()
            path = self._path(number)
            file, written = tensors.opened(path, check=number not in self._checked)
            wanted = {"identity": self._identity, "rows": _text(self._groups[number])}
            if written != wanted:
                raise UserError(f"{path} belongs to other settings or inputs; delete it and rerun")
            self._checked.add(number)
            self._open[number] = file
        return self._open[number]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"

    def _streams(self, rows: np.ndarray) -> dict[str, list[Tensor]]:
        streams: dict[str, list[Tensor]] = {}
        for number, place in (self._place[row] for row in rows.tolist()):
            file = self._opened(number)
            for stream in file.keys():
                streams.setdefault(stream, []).append(file.get_slice(stream)[place])
        return streams

    def _verify(self, rows: np.ndarray, arguments: dict[str, Any]) -> None:
        """Compares the cached streams with those of the whole teacher, on the batch of one step:
        the family registry could be wrong. Raises UserError if they differ by more than rounding.
        """
        whole = tail.streams_before(self._transformer, self.first, arguments)
        assert self._tail is not None, "it is made before it is verified"
        running = self._tail.model(self._streams(rows))
        try:
            late = tail.streams_before(self._transformer, self.first, arguments, running)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._folder}: this teacher can't start at block {self.first} ({error}); set "
                "distill.cache_inputs to never"
            ) from error
        low = self._accelerator.mixed_precision == "bf16"
        own = diffusers_model.of(self._transformer).dtype
        computed = [torch.bfloat16 if low else torch.float32, own]
        masks = blocks.token_masks(blocks.family(self._transformer), arguments, whole)
        worst, equal = 0.0, True
        for stream, ran in whole.items():
            kept = late[stream]
            if kept.shape != ran.shape:
                raise UserError(
                    f"{self._folder}: if the blocks before block {self.first} are skipped, it gets "
                    f"a {stream} stream of shape {list(kept.shape)} instead of {list(ran.shape)}; "
                    "set distill.cache_inputs to never"
                )
            if stream in masks:
                kept, ran = kept[masks[stream]], ran[masks[stream]]
            equal &= torch.equal(kept, ran)
            off = float((kept - ran).float().norm() / ran.float().norm().clamp_min(1e-30))
            worst = max(worst, off)
            if not off <= max(torch.finfo(kind).eps for kind in computed) ** 0.5:
                raise UserError(
                    f"{self._folder}: the {stream} stream before block {self.first} depends on "
                    f"what else is in the batch (relative difference {off:.2g}); "
                    "set distill.cache_inputs to never"
                )
        if self._accelerator.is_main_process:
            count = len(self._place)
            size = sum(self._path(n).stat().st_size for n in range(len(self._groups)))
            print(
                f"{self._folder}: streams before block {self.first} of {count} rows, "
                f"{size / 2**20:.4g} MiB; in the first step's batch "
                + ("equal to the bit" if equal else f"equal but for rounding ({worst:.1g})"),
                flush=True,
            )


def of_job(
    context: Context,
    units: Sequence[Unit],
    taught: Students,
    options: DistillSettings,
    state: State,
) -> InputCache | None:
    """The cached streams of a job of distill that owns these units; None if `cache_inputs` decides
    against a cache (`shards.cached`).

    The main process prints where the teacher starts.
    """
    how, kept = caching(context.reader, options, context.seed), None
    if shards.cached(units, how):
        # Two checkpoints, each of weights, two moments and the average, are there while one is
        # replaced.
        tensors_each = 4 if options.ema else 3
        weights = sum(p.nbytes for student in taught.values() for p in student.parameters())
        reserve = 2 * tensors_each * weights
        kept = InputCache(context, list(taught), options, state.within("inputs"), reserve)
    if context.accelerator.is_main_process and units:
        print(shards.explain(units, how), flush=True)
    return kept


def _groups(reader: calls.Reader, rows: np.ndarray, size: int):
    """The rows in batches of `size`; a bucket's last batch repeats its own rows to be full."""
    for bucket in reader.buckets:
        members = np.intersect1d(bucket, rows)
        for start in range(0, len(members), size):
            yield np.resize(members[start : start + size], size)


def _text(rows: np.ndarray) -> str:
    return " ".join(map(str, rows.tolist()))
