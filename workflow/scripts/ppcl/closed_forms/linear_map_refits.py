"""Linear FFNs fitted once more, in the set in which they are used, and the file of these maps."""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ppcl import provenance
from ppcl.closed_forms import linear_maps
from ppcl.closed_forms.linear_maps import LEAVES, Map
from ppcl.extraction import activations
from ppcl.pruning import narrow
from ppcl.pruning.units import NewBlock
from ppcl.search import probes
from ppcl.search.sets import REFIT, Set
from ppcl.settings import WidthSettings
from ppcl.storage import tensors
from ppcl.training.tail import Tail, streams_before
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context


@torch.no_grad()
def refit(
    context: Context,
    model: nn.Module,
    block_map: list[list[int]],
    new_blocks: Iterable[NewBlock],
    rows: np.ndarray,
    options: WidthSettings,
) -> dict[Map, probes.Probe]:
    """Fits linear FFNs of kept blocks once more by least squares: from their inputs in `model` to
    the teacher's streams behind their blocks. Returns the new maps.

    In order of depth: each map is put into the model before the next is fitted, so that later ones
    make up for the errors that earlier ones leave.

    Args:
        model: the teacher with these and other new blocks, on the device; its linear FFNs change.
        block_map: of `blocks.assembled`.
        rows: numbers of the calls to fit on.
        options: batch_size, ridge.
    """
    transformer, device = context.transformer, context.device
    wanted = {new_block.first: new_block for new_block in new_blocks if new_block.linear_ffn}
    starts = [members[0] for members in block_map]
    batches = [b.to(device) for b in context.reader.batches(rows, options.batch_size, device)]
    whole, lean = (_Walk(one, batches) for one in (transformer, model))
    refitted = {}
    for old in sorted(wanted):
        layers = narrow.maps(blocks.block_sequence(model)[starts.index(old)].module)
        maps = {
            one.kind: one for one in linear_maps.maps_of(wanted[old]) if one.kind.startswith("ffn/")
        }
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
            probe = refitted[one] = probes.solve(moments, options.ridge, one.ends, kind)
            layers[kind].weight.copy_(torch.from_numpy(probe.weight))
            layers[kind].bias.copy_(torch.from_numpy(probe.bias))
    return refitted


class _Walk:
    """Goes through a transformer's blocks once, in order, with some batches side by side."""

    def __init__(self, transformer: nn.Module, batches: list[calls.Batch]):
        self._transformer, self._batches = transformer, batches
        self._first = 0
        self._streams: list[blocks.Streams] = [{} for _ in batches]

    def at(self, number: int, layers: Mapping[str, nn.Module]) -> list[blocks.Streams]:
        """Each batch's inputs of some layers of a block; the walk stays before the block.

        layers: key -> layer; the inputs have the same keys.
        """
        late = self._go_to(number)
        inputs = []
        for batch, streams in zip(self._batches, self._streams, strict=True):
            seen: blocks.Streams = {}

            def see(_module, args, kind: str, seen: blocks.Streams = seen) -> None:
                seen[kind] = args[0]

            handles = [
                layer.register_forward_pre_hook(functools.partial(see, kind=kind))
                for kind, layer in layers.items()
            ]
            running = late.model(streams) if late else self._transformer
            with blocks.watch([self._block(number)], stop_after=number) as run:
                run(running, batch.arguments)
            for handle in handles:
                handle.remove()
            inputs.append(seen)
        return inputs

    def behind(self, number: int) -> list[blocks.Streams]:
        """Each batch's streams that a block returns; the walk stays before the block."""
        late = self._go_to(number)
        outputs = []
        for batch, streams in zip(self._batches, self._streams, strict=True):
            seen: blocks.Streams = {}
            running = late.model(streams) if late else self._transformer
            block = self._block(number)

            def see(_block, streams: blocks.Streams, seen: blocks.Streams = seen) -> None:
                seen.update(streams)

            with blocks.watch([block], None, see, number) as run:
                run(running, batch.arguments)
            outputs.append(seen)
        return outputs

    def _block(self, number: int) -> blocks.Block:
        return blocks.block_sequence(self._transformer)[number]

    def _go_to(self, number: int) -> Tail | None:
        late = Tail(self._transformer, self._first) if self._first else None
        if number == self._first:
            return late
        for at, batch in enumerate(self._batches):
            running = late.model(self._streams[at]) if late else None
            self._streams[at] = streams_before(self._transformer, number, batch.arguments, running)
        self._first = number
        return Tail(self._transformer, number)


# The maps that were fitted once more for a variant, by the name of their source in its set
# (`sets.REFIT` and the variant's name).
Refits = Mapping[str, Mapping[Map, probes.Probe]]


def write(path: Path, refits: Refits, stamp) -> None:
    """Writes variants/maps.safetensors. refits: source -> maps."""
    state = {
        f"{source.removeprefix(REFIT)}/{one.name}.{leaf}": torch.from_numpy(getattr(probe, leaf))
        for source, maps in refits.items()
        for one, probe in maps.items()
        for leaf in LEAVES
    }
    tensors.write(path, {name: value.float() for name, value in state.items()}, stamp)


def digest(refits: Refits, chosen: Set) -> str:
    """Digest of the refitted maps that a set uses; the same before `write` and after `read`."""
    used = set(chosen.sources.values())
    return provenance.digest(
        [
            [source, one.name, *(_digest(getattr(probe, leaf)) for leaf in LEAVES)]
            for source, maps in sorted(refits.items())
            if source in used
            for one, probe in sorted(maps.items(), key=lambda item: item[0].name)
        ]
    )


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


def read(path: Path) -> dict[str, dict[Map, probes.Probe]]:
    """What `write` wrote.

    Raises:
        UserError: it is missing, or something else.
    """
    state, _ = tensors.read(path)
    refits: dict[str, dict[Map, probes.Probe]] = {}
    for name in [name for name in state if name.endswith(".weight")]:
        variant, _, of = name.removesuffix(".weight").partition("/")
        weight, bias = (state[f"{variant}/{of}.{leaf}"].double().numpy() for leaf in LEAVES)
        maps = refits.setdefault(f"{REFIT}{variant}", {})
        maps[Map.named(of)] = probes.Probe(weight, bias)
    return refits
