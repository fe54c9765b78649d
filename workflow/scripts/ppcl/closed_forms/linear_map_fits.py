"""Least squares for linear maps, from sums over tokens that are added up while the teacher runs."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ppcl import provenance
from ppcl.closed_forms import linear_maps
from ppcl.closed_forms.linear_maps import INPUT, LEAVES, OUTPUT, Ends, Map
from ppcl.errors import UserError, warn_of_fewer
from ppcl.extraction import activations
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import stopping
from ppcl.search import probes
from ppcl.settings import WidthSettings
from ppcl.storage import tensors
from ppcl.training import teaching
from ppcl.transformer import blocks, calls, diffusers_model, inside_block
from ppcl.transformer.context import Context, State
from ppcl.transformer.family import TEXT

log = logging.getLogger(__name__)


# Most bytes of the sums of one pass over the calls. A map has four: x x^T and x y^T in float64, of
# the tokens to fit on and of held-out ones.
SUMS_BYTES = 8 << 30


@dataclass(frozen=True)
class Fit:
    """A fitted map, and 1 - R^2 of its residual on held-out tokens."""

    probe: probes.Probe
    error_heldout: float


@torch.no_grad()
def fit(
    context: Context,
    wholes: Mapping[Ends, nn.Module],
    maps: Iterable[Map],
    rows: tuple[np.ndarray, np.ndarray],
    options: WidthSettings,
) -> dict[Map, Fit]:
    """Least squares for every map (Eq. 1, between other activations), and its error on held-out
    calls.

    Args:
        wholes: ends that `maps` names -> the block there before it becomes narrow, on the device;
            it runs on the teacher's activation before it.
        rows: numbers of the calls to fit on, and of those to judge on.
        options: batch_size, ridge.

    Raises:
        UserError: NaN or infinity in an activation, or fewer than two tokens.
    """
    every = list(dict.fromkeys(maps))
    fits: dict[Map, Fit] = {}
    for group in _groups(every, context.transformer):
        fits |= _fit(context, wholes, group, rows, options)
    return fits


def _fit(
    context: Context,
    wholes: Mapping[Ends, nn.Module],
    maps: list[Map],
    rows: tuple[np.ndarray, np.ndarray],
    options: WidthSettings,
) -> dict[Map, Fit]:
    """As `fit`, in one pass over the calls."""
    device = context.device
    sums = [activations.Moments(device) for _ in rows]
    for numbers, moments in zip(rows, sums, strict=True):
        for batch in context.reader.batches(numbers, options.batch_size, device):
            _add(context.transformer, wholes, maps, batch.to(device), moments)
    fits = {}
    for one in maps:
        fitted, judged = (
            probes.stored_moments(moments.sums, one.kind, one.ends) for moments in sums
        )
        probe = probes.solve(fitted, options.ridge, one.ends, one.kind)
        fits[one] = Fit(probe, 1 - probes.fit_r2(probe, judged))
    return fits


def _groups(maps: list[Map], transformer: nn.Module, least: int = 1) -> Iterator[list[Map]]:
    """Groups of maps whose sums fit in SUMS_BYTES; each group costs a pass over the calls.

    least: no group has more than ceil(maps / least) maps, so that so many processes share them out.
    """
    shapes = (p.shape for b in blocks.block_sequence(transformer) for p in b.module.parameters())
    channels = max(min(shape) for shape in shapes if len(shape) == 2)
    size = max(1, min(SUMS_BYTES // (4 * 8 * channels**2), -(-len(maps) // least)))
    for start in range(0, len(maps), size):
        yield maps[start : start + size]


def _add(
    transformer: nn.Module,
    wholes: Mapping[Ends, nn.Module],
    maps: list[Map],
    batch: calls.Batch,
    moments: activations.Moments,
) -> None:
    """Adds one batch's tokens to the sums of all maps."""
    sequence = blocks.block_sequence(transformer)
    family = blocks.family(transformer)
    new_blocks = {ends: NewBlock(*ends) for one in maps for ends in (one.source, one.target)}
    wanted = {e for one in maps if one.kind != OUTPUT for e in (one.source, one.target)}
    inside: dict[Ends, blocks.Streams] = {}
    with ExitStack() as stack:
        for ends in wanted:  # the teacher's own blocks run once
            if wholes[ends] is sequence[ends[0]].module:
                inside[ends] = stack.enter_context(inside_block.taps(sequence[ends[0]]))
        lessons = teaching.teacher_states(transformer, list(new_blocks.values()), batch.arguments)
    for ends in wanted - inside.keys():
        block = blocks.Block(ends[0], wholes[ends], sequence[ends[0]].list)
        bound = teaching.fitting(lessons[new_blocks[ends]].bound, block.module)
        with inside_block.taps(block) as seen:
            block.module(**bound)
        inside[ends] = seen
    for one in maps:
        stream = one.kind.removeprefix("ffn/") if one.kind.startswith("ffn/") else TEXT
        after = lessons[new_blocks[one.target]].target[stream]
        if one.kind == OUTPUT:
            before = lessons[new_blocks[one.source]].target[stream]
        else:
            before = inside[one.source][one.kind]
        if one.kind == INPUT:
            after = inside[one.target][one.kind]
        masks = blocks.token_masks(family, batch.arguments, {stream: before})
        if stream in masks:
            before, after = before[masks[stream]], after[masks[stream]]
        moments.add(one.kind, one.ends, before.flatten(0, -2), after.flatten(0, -2))


def fit_to_files(
    context: Context, maps: Iterable[Map], options: WidthSettings, state: State
) -> tuple[list[Path], dict[Map, float]]:
    """As `fit` for the teacher's own blocks, shared out over the processes; what a killed run has
    fitted is kept.

    Args:
        options: the config's `width`.
        state: folder for the files, and the identity of the fits.

    Returns:
        The files of all processes, whose tensors are in the transformer's dtype, and the held-out
        error (1 - R^2) of every map.
    """
    transformer, accelerator = context.transformer, context.accelerator
    wholes = {(b.index, b.index): b.module for b in blocks.block_sequence(transformer)}
    # In order of depth, so that the teacher need not run to its end for all of them.
    every = sorted(dict.fromkeys(maps), key=lambda one: (one.target, one.source, one.kind))
    rank, count = accelerator.process_index, accelerator.num_processes
    none = np.empty(0, np.int64)
    rows = fit_rows(context.reader, options, context.seed) if every else (none, none)
    groups = list(_groups(every, transformer, least=count))
    files = [state.folder / f"maps-{number}.safetensors" for number in range(len(groups))]
    for path, group in list(zip(files, groups, strict=True))[rank::count]:
        of = provenance.digest([state.identity, [one.name for one in group]])
        if _is_of(path, of):
            continue
        fits = _fit(context, wholes, group, rows, options)
        leaves = {}
        for one, fit in fits.items():
            for leaf in LEAVES:
                value = torch.from_numpy(getattr(fit.probe, leaf))
                leaves[f"{one.name}.{leaf}"] = value.to(diffusers_model.of(transformer).dtype)
        errors = {one.name: fit.error_heldout for one, fit in fits.items()}
        with stopping.part():
            tensors.write(path, leaves, {"identity": of, "errors": json.dumps(errors)})
    accelerator.wait_for_everyone()
    told = [json.loads(tensors.metadata(path)["errors"]) for path in files]
    return files, {Map.named(name): error for of in told for name, error in of.items()}


def _is_of(path: Path, identity: str) -> bool:
    """Whether a killed run left a whole file of this identity."""
    if not path.exists():
        return False
    try:
        _, metadata = tensors.opened(path)
    except UserError as error:
        log.warning("%s; it is made again", error)
        return False
    return metadata.get("identity") == identity


def start(context: Context, wholes: Students, options: WidthSettings) -> Students:
    """Makes whole blocks as narrow as their new blocks, in place, with linear maps fitted on
    recorded calls; returns them on the CPU.

    Args:
        options: the config's `width`.
    """
    maps = [one for new_block in wholes for one in linear_maps.maps_of(new_block)]
    if maps:
        for student in wholes.values():
            student.to(context.device)
        by_ends = {new_block.ends: student for new_block, student in wholes.items()}
        rows = fit_rows(context.reader, options, context.seed)
        fits = fit(context, by_ends, maps, rows, options)
        fitted = {one: fit_.probe for one, fit_ in fits.items()}
        linear_maps.narrowed(context.transformer, wholes, fitted)
    return {new_block: student.cpu() for new_block, student in wholes.items()}


def narrowed(
    context: Context, new_blocks: Iterable[NewBlock], distilled: Students, options: WidthSettings
) -> tuple[Students, Students]:
    """Students as narrow as the new blocks, with fitted linear maps: made from distilled students,
    and from the teacher's blocks where a new block stands for one.

    Args:
        distilled: whole students, changed in place. options: the config's `width`.

    Returns:
        The students, on the CPU; and on the device, the whole blocks of intervals that borrow text,
        as they were before (`students.uncut`).
    """
    wholes = students.whole(context.transformer, new_blocks, distilled)
    uncut = students.uncut(wholes)  # before `start`, which narrows in place
    made = start(context, wholes, options)
    for block in uncut.values():
        block.to(context.device)
    return made, uncut


def fit_rows(
    reader: calls.Reader, options: WidthSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the calls to fit maps on, and of a quarter as many held-out ones to judge them
    on."""
    fitted = np.random.default_rng(seed).permutation(reader.rows(heldout=False))
    count = options.fit_rows
    warn_of_fewer("width.fit_rows", count, len(fitted), "recorded calls to fit on")
    return fitted[:count], reader.sample_heldout("select", max(1, count // 4), seed)
