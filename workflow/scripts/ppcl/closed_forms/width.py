"""Stage 2: which text streams and FFNs may become linear maps, and where those maps start.

Eq. 8: in a run of blocks a..b, block a keeps its text stream; the later ones' attention gets
l_p^z(z_a) as text, and after block b the text stream is l^h(h_a). Eq. 9: the FFN of block q becomes
a residual linear map of the stream after attention. All maps start from least squares, as probes
do: their sums over tokens are added up while the teacher runs. PPCL, arXiv 2511.16156, stage 2.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ppcl import provenance
from ppcl.errors import UserError, warn_of_fewer
from ppcl.extraction import activations
from ppcl.pruning import narrow, students
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock, Unit, units_of
from ppcl.runtime import stopping
from ppcl.search import intervals, probes
from ppcl.settings import WidthSettings
from ppcl.storage import tensors
from ppcl.training import entrance, teaching
from ppcl.transformer import blocks, calls, inside_block
from ppcl.transformer.family import TEXT

log = logging.getLogger(__name__)

Ends = tuple[int, int]
INPUT, OUTPUT = "text/input", "text/output"
LEAVES = "weight", "bias"
# Sums of one pass over the calls: x x^T and x y^T in float64, of fitted and of held-out tokens.
SUMS_BYTES = 8 << 30


@dataclass(frozen=True)
class Map:
    """A residual linear map of an activation at `source` to one at `target`, ends of new blocks.

    kind: `ffn/<stream>` (stream after attention -> stream after the block), `text/input`
    (z_a -> z_p) or `text/output` (h_a -> text stream after the run).
    """

    kind: str
    source: Ends
    target: Ends

    @property
    def ends(self) -> str:
        """Names it in sums and errors."""
        return "{:02d}-{:02d}>{:02d}-{:02d}".format(*self.source, *self.target)

    @property
    def name(self) -> str:
        """Names its tensors in files."""
        return f"{self.kind}.{self.ends}"

    @classmethod
    def named(cls, name: str) -> "Map":
        """The map of such a `name`."""
        kind, ends = name.split(".")
        source_first, source_last, first, last = map(int, re.split("[->]", ends))
        return cls(kind, (source_first, source_last), (first, last))


@dataclass(frozen=True)
class Fit:
    """A fitted map, and 1 - R^2 of its residual on held-out tokens."""

    probe: probes.Probe
    error_heldout: float


def maps_of(new_block: NewBlock) -> list[Map]:
    """The new linear maps of a new block."""
    found = [
        Map(f"ffn/{stream}", new_block.ends, new_block.ends) for stream in new_block.linear_ffn
    ]
    if new_block.source:
        found.append(Map(INPUT, new_block.source, new_block.ends))
        if new_block.text == "close":
            found.append(Map(OUTPUT, new_block.source, new_block.ends))
    return found


def unread_after(transformer: nn.Module) -> int | None:
    """The last block, if nothing reads its text stream."""
    last = blocks.block_sequence(transformer)[-1]
    return last.index if TEXT in blocks.family(transformer).unread else None


# ---- least squares


@torch.no_grad()
def fit(
    transformer: nn.Module,
    wholes: Mapping[Ends, nn.Module],
    maps: Iterable[Map],
    reader: calls.Reader,
    rows: tuple[np.ndarray, np.ndarray],
    options: WidthSettings,
    device: torch.device,
) -> dict[Map, Fit]:
    """Least squares for every map (Eq. 1, with other ends), and its error on held-out calls.

    Args:
        wholes: ends that `maps` names -> the block there before it becomes narrow, on the device;
            it runs on the teacher's activation before it.
        rows: numbers of the calls to fit on, and of those to judge on.
        options: batch_size, ridge.

    Raises:
        UserError: NaN or infinity in an activation.
    """
    every = list(dict.fromkeys(maps))
    found = {}
    for group in _groups(every, transformer):
        found |= _fit(transformer, wholes, group, reader, rows, options, device)
    return found


def _fit(
    transformer: nn.Module,
    wholes: Mapping[Ends, nn.Module],
    maps: list[Map],
    reader: calls.Reader,
    rows: tuple[np.ndarray, np.ndarray],
    options: WidthSettings,
    device: torch.device,
) -> dict[Map, Fit]:
    """As `fit`, in one pass over the calls."""
    sums = [activations.Moments(device) for _ in rows]
    for numbers, moments in zip(rows, sums, strict=True):
        for batch in reader.batches(numbers, options.batch_size, device):
            _add(transformer, wholes, maps, batch.to(device), moments)
    found = {}
    for one in maps:
        fitted, judged = (
            probes.stored_moments(moments.sums, one.kind, one.ends) for moments in sums
        )
        probe = probes.solve(fitted, options.ridge, one.ends, one.kind)
        found[one] = Fit(probe, 1 - probes.fit_r2(probe, judged))
    return found


def _groups(maps: list[Map], transformer: nn.Module, least: int = 1) -> Iterator[list[Map]]:
    """As many maps as their sums fit in memory; each group costs a pass over the calls.

    least: how many groups there are, if so many maps.
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
    transformer: nn.Module,
    maps: Iterable[Map],
    reader: calls.Reader,
    options: WidthSettings,
    seed: int,
    accelerator: Accelerator,
    folder: Path,
    identity: str,
) -> tuple[list[Path], dict[Map, float]]:
    """As `fit` for the teacher's own blocks, shared out over the processes; a killed run keeps what
    it has fitted.

    Args:
        options: the config's `width`.
        folder: for the files, which processes share.
        identity: digest of what decides the maps. Files of another identity are not used.

    Returns:
        The files of all processes, whose tensors are in the teacher's main type, and the held-out
        error of every map.
    """
    wholes = {(b.index, b.index): b.module for b in blocks.block_sequence(transformer)}
    # In order of depth, so that the teacher need not run to its end for all of them.
    every = sorted(dict.fromkeys(maps), key=lambda one: (one.target, one.source, one.kind))
    rank, count = accelerator.process_index, accelerator.num_processes
    rows = fit_rows(reader, options, seed) if every else ()
    groups = list(_groups(every, transformer, least=count))
    files = [folder / f"maps-{number}.safetensors" for number in range(len(groups))]
    for path, group in list(zip(files, groups, strict=True))[rank::count]:
        of = provenance.digest([identity, [one.name for one in group]])
        if _is_of(path, of):
            continue
        found = _fit(transformer, wholes, group, reader, rows, options, accelerator.device)
        state = {}
        for one, fit in found.items():
            for leaf in LEAVES:
                value = torch.from_numpy(getattr(fit.probe, leaf))
                state[f"{one.name}.{leaf}"] = value.to(transformer.dtype)
        errors = {one.name: fit.error_heldout for one, fit in found.items()}
        with stopping.part():
            tensors.write(path, state, {"identity": of, "errors": json.dumps(errors)})
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


class Stored(Mapping[Map, probes.Probe]):
    """Maps in files, read when they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._files: dict[Map, Any] = {}
        for path in paths:
            file, _ = tensors.opened(path)
            names = [name for name in file.keys() if name.endswith(".weight")]
            try:
                found = {Map.named(name.removesuffix(".weight")): file for name in names}
            except ValueError as error:
                raise UserError(f"{path}: holds no maps ({error}); delete it and rerun") from error
            self._files |= found

    def __getitem__(self, one: Map) -> probes.Probe:
        if one not in self._files:
            raise UserError(
                f"{self._paths[0]} has no map {one.name}; it is of other settings: delete it and "
                "rerun"
            )
        leaves = (self._files[one].get_tensor(f"{one.name}.{leaf}") for leaf in LEAVES)
        return probes.Probe(*(leaf.double().numpy() for leaf in leaves))

    def __contains__(self, one: object) -> bool:
        return one in self._files

    def __iter__(self) -> Iterator[Map]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def stored(*paths: Path) -> Stored:
    """The least-squares maps of width/maps.safetensors, or of `fit_to_files`.

    Raises:
        UserError: one is missing, or not what the stage `width` wrote; or, later, there is no map
            that is asked for.
    """
    return Stored(paths)


def closed(
    transformer: nn.Module, new_blocks: Sequence[NewBlock], maps: Mapping[Map, probes.Probe]
) -> Students:
    """Kept blocks as narrow as these new blocks, made from least-squares maps alone.

    Args:
        new_blocks: with first == last, of text runs whose source is a kept block, too.
        maps: such as `stored`.

    Returns:
        Copies of the teacher's blocks, in its types, where it rests; untrained.
    """
    if grown := [new_block for new_block in new_blocks if new_block.first != new_block.last]:
        raise ValueError(f"new block {grown[0].name} is no kept block")
    return narrowed(transformer, whole_blocks(transformer, new_blocks), maps)


def narrowed(
    transformer: nn.Module, wholes: Students, maps: Mapping[Map, probes.Probe]
) -> Students:
    """The whole blocks of some new blocks, made as narrow as these, with fitted maps. In place."""
    for new_block, student in wholes.items():
        students.shaped(transformer, new_block, student)
        layers = narrow.maps(student)
        with torch.no_grad():
            for one in maps_of(new_block):
                probe = maps[one]
                layers[one.kind].weight.copy_(torch.from_numpy(probe.weight))
                layers[one.kind].bias.copy_(torch.from_numpy(probe.bias))
    return wholes


def start(
    transformer: nn.Module,
    wholes: Students,
    reader: calls.Reader,
    options: WidthSettings,
    seed: int,
    device: torch.device,
) -> Students:
    """The students made narrow, their maps fitted on recorded calls; in place, on the CPU.

    Args:
        transformer: the teacher, on the device.
        options: the config's `width`.
    """
    maps = [one for new_block in wholes for one in maps_of(new_block)]
    if maps:
        for student in wholes.values():
            student.to(device)
        by_ends = {new_block.ends: student for new_block, student in wholes.items()}
        rows = fit_rows(reader, options, seed)
        fits = fit(transformer, by_ends, maps, reader, rows, options, device)
        narrowed(transformer, wholes, {one: found.probe for one, found in fits.items()})
    return {new_block: student.cpu() for new_block, student in wholes.items()}


def fit_rows(
    reader: calls.Reader, options: WidthSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Calls to fit maps on, and a quarter as many held-out ones to judge them on."""
    fitted = np.random.default_rng(seed).permutation(reader.rows(heldout=False))
    count = options.fit_rows
    warn_of_fewer("width.fit_rows", count, len(fitted), "recorded calls to fit on")
    return fitted[:count], reader.sample_heldout("select", max(1, count // 4), seed)


@torch.no_grad()
def refit(
    transformer: nn.Module,
    model: nn.Module,
    block_map: list[list[int]],
    new_blocks: Iterable[NewBlock],
    reader: calls.Reader,
    rows: np.ndarray,
    options: WidthSettings,
    device: torch.device,
) -> dict[Map, probes.Probe]:
    """Linear FFNs of kept blocks once more by least squares, on what they get in a model, towards
    what the teacher has behind their blocks. In order of depth, each put into the model at once, so
    that it makes up for what those before it leave.

    Args:
        model: of such new blocks and others, on the device; its linear FFNs change.
        block_map: of `blocks.assembled`.
        rows: numbers of the calls to fit on.
        options: batch_size, ridge.
    """
    wanted = {new_block.first: new_block for new_block in new_blocks if new_block.linear_ffn}
    starts = [members[0] for members in block_map]
    batches = [b.to(device) for b in reader.batches(rows, options.batch_size, device)]
    whole, lean = (_Walk(one, batches) for one in (transformer, model))
    found = {}
    for old in sorted(wanted):
        layers = narrow.maps(blocks.block_sequence(model)[starts.index(old)].module)
        maps = {one.kind: one for one in maps_of(wanted[old]) if one.kind.startswith("ffn/")}
        sums = activations.Moments(device)
        given = lean.at(starts.index(old), {kind: layers[kind] for kind in maps})
        for batch, before, after in zip(batches, given, whole.behind(old), strict=True):
            for kind, one in maps.items():
                stream = kind.removeprefix("ffn/")
                x, y = before[kind], after[stream].to(before[kind].dtype)
                masks = blocks.token_masks(blocks.family(transformer), batch.arguments, {stream: x})
                if stream in masks:
                    x, y = x[masks[stream]], y[masks[stream]]
                sums.add(kind, one.ends, x.flatten(0, -2), y.flatten(0, -2))
        for kind, one in maps.items():
            moments = probes.stored_moments(sums.sums, kind, one.ends)
            probe = found[one] = probes.solve(moments, options.ridge, one.ends, kind)
            layers[kind].weight.copy_(torch.from_numpy(probe.weight))
            layers[kind].bias.copy_(torch.from_numpy(probe.bias))
    return found


class _Walk:
    """A transformer that goes through its blocks once, for some calls side by side."""

    def __init__(self, transformer: nn.Module, batches: list[calls.Batch]):
        self._transformer, self._batches = transformer, batches
        self._first, self._streams = 0, [{} for _ in batches]

    def at(self, number: int, layers: Mapping[str, nn.Module]) -> list[blocks.Streams]:
        """What layers of a block get, of each call; the walk stays before the block."""
        late = self._go_to(number)
        found = []
        for batch, streams in zip(self._batches, self._streams, strict=True):
            seen: blocks.Streams = {}
            handles = [
                layer.register_forward_pre_hook(
                    lambda _m, args, k=k, s=seen: s.update({k: args[0]})
                )
                for k, layer in layers.items()
            ]
            running = late.model(streams) if late else self._transformer
            with blocks.watch([self._block(number)], stop_after=number) as run:
                run(running, batch.arguments)
            for handle in handles:
                handle.remove()
            found.append(seen)
        return found

    def behind(self, number: int) -> list[blocks.Streams]:
        """What a block returns, of each call; the walk stays before the block."""
        late = self._go_to(number)
        found = []
        for batch, streams in zip(self._batches, self._streams, strict=True):
            seen: blocks.Streams = {}
            running = late.model(streams) if late else self._transformer
            block = self._block(number)
            with blocks.watch([block], None, lambda _b, s, k=seen: k.update(s), number) as run:
                run(running, batch.arguments)
            found.append(seen)
        return found

    def _block(self, number: int) -> blocks.Block:
        return blocks.block_sequence(self._transformer)[number]

    def _go_to(self, number: int) -> entrance.Entrance | None:
        late = entrance.Entrance(self._transformer, self._first) if self._first else None
        if number == self._first:
            return late
        for at, batch in enumerate(self._batches):
            running = late.model(self._streams[at]) if late else None
            self._streams[at] = entrance.streams_before(
                self._transformer, number, batch.arguments, running
            )
        self._first = number
        return entrance.Entrance(self._transformer, number)


# ---- candidates


def ffn_candidates(transformer: nn.Module) -> list[Unit]:
    """One linear FFN each, of every block and stream that has one."""
    untouchable = blocks.untouchable(transformer)
    return [
        Unit((NewBlock(block.index, block.index, (stream,)),))
        for block in blocks.block_sequence(transformer)
        if block.index not in untouchable
        for stream in block.width.ffn
    ]


def text_candidates(
    transformer: nn.Module, cka: np.ndarray, longest: int, floor: float
) -> list[Unit]:
    """Runs of up to `longest` kept blocks whose text outputs are alike.

    Args:
        cka: [blocks, blocks] of the blocks' text outputs; NaN where there is none.
        floor: the least CKA of any block of a run with the first.
    """
    sequence = blocks.block_sequence(transformer)
    without = {b.index for b in sequence if not b.width.text}
    without |= set(blocks.untouchable(transformer))
    runs = intervals.spans(len(sequence), blocks.seams(transformer), without)
    return [
        unit
        for first, last in intervals.all_within(runs, longest)
        if np.nan_to_num(cka[first, first : last + 1]).min() >= floor
        for unit in units_of([], [(first, last)], (), unread_after(transformer))
    ]


def whole_blocks(transformer: nn.Module, new_blocks: Iterable[NewBlock]) -> Students:
    """Copies of the teacher's blocks at which some new blocks start."""
    sequence = blocks.block_sequence(transformer)
    return {new_block: copy.deepcopy(sequence[new_block.first].module) for new_block in new_blocks}


def saved_parameters(transformer: nn.Module, unit: Unit, sizes: Sequence[int] | None = None) -> int:
    """How many parameters fewer a model with the unit has.

    sizes: `blocks.parameters_of_blocks` of the transformer, for whoever asks of many units.
    """
    sequence = blocks.block_sequence(transformer)
    sizes = sizes or blocks.parameters_of_blocks(transformer)
    before = sum(sizes[unit.first : unit.last + 1])
    for new_block in unit.new_blocks:
        module = sequence[new_block.first].module
        before -= sizes[new_block.first] - blocks.parameter_count(module)  # its companions stay
        before -= blocks.parameter_count(students.shaped(transformer, new_block, _empty(module)))
    return before


def _empty(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without a copy of the weights on the way."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(weight): weight.to("meta") for weight in weights})


def text_sizes(transformer: nn.Module) -> dict[str, list[int]]:
    """Per block: parameters that it saves as a borrower (`text_saved`), those of the map with
    which a run that ends there makes a text stream again (`text_output`), and what it saves as the
    source of a run that ends where nothing reads text (`text_lent`); 0 where there is none."""
    found: dict[str, list[int]] = {"text_saved": [], "text_output": [], "text_lent": []}
    unread = unread_after(transformer)
    reached = unread is not None and blocks.block_sequence(transformer)[unread].width.text
    saving = partial(saved_parameters, transformer, sizes=blocks.parameters_of_blocks(transformer))
    for block in blocks.block_sequence(transformer):
        here = (block.index, block.index)
        saved = output = lent = 0
        if block.width.text:
            lender = (-1, -1)
            borrower = Unit((NewBlock(*here, text="borrow", source=lender),))
            closing = Unit((NewBlock(*here, text="close", source=lender),))
            saved = saving(borrower)
            if block.index != unread:
                output = saved - saving(closing)
            if reached and block.index != unread:
                lent = saving(Unit((NewBlock(*here, text="lend"),)))
        found["text_saved"].append(saved)
        found["text_output"].append(output)
        found["text_lent"].append(lent)
    return found
