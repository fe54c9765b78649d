"""Linear maps in place of text streams and FFNs (stage 2), their files, and blocks made of them.

Eq. 8: in a run of blocks a..b, block a keeps its text stream; the later ones' attention gets
l_p^z(z_a) as text, and after block b the text stream is l^h(h_a). Eq. 9: the FFN of block q becomes
a residual linear map of the stream after attention. PPCL, arXiv 2511.16156, stage 2.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.pruning import narrow, students
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock
from ppcl.search import probes
from ppcl.storage import tensors
from ppcl.transformer import blocks
from ppcl.transformer.family import TEXT

Ends = tuple[int, int]


INPUT, OUTPUT = "text/input", "text/output"


LEAVES = "weight", "bias"


@dataclass(frozen=True)
class Map:
    """A residual linear map from an activation at one new block to an activation at another.

    source, target: (first, last) of these new blocks.

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
        """The map with this `name`. Raises ValueError if it is no map's."""
        kind, ends = name.split(".")
        source_first, source_last, first, last = map(int, re.split("[->]", ends))
        return cls(kind, (source_first, source_last), (first, last))


def maps_of(new_block: NewBlock) -> list[Map]:
    """The new linear maps of a new block."""
    maps = [Map(f"ffn/{stream}", new_block.ends, new_block.ends) for stream in new_block.linear_ffn]
    if new_block.source:
        maps.append(Map(INPUT, new_block.source, new_block.ends))
        if new_block.text == "close":
            maps.append(Map(OUTPUT, new_block.source, new_block.ends))
    return maps


def unread_after(transformer: nn.Module) -> int | None:
    """Index of the last block if nothing reads its text stream, else None."""
    last = blocks.block_sequence(transformer)[-1]
    return last.index if TEXT in blocks.family(transformer).unread else None


class Stored(Mapping[Map, probes.Probe]):
    """Maps in files, read when they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._files: dict[Map, Any] = {}
        for path in paths:
            file, _ = tensors.opened(path)
            names = [name for name in file.keys() if name.endswith(".weight")]
            try:
                files = {Map.named(name.removesuffix(".weight")): file for name in names}
            except ValueError as error:
                raise UserError(f"{path}: holds no maps ({error}); delete it and rerun") from error
            self._files |= files

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
        UserError: a file is missing, or not what the stage `width` wrote; or, when a map is asked
            for, no file has it.
    """
    return Stored(paths)


def closed(
    transformer: nn.Module, new_blocks: Sequence[NewBlock], maps: Mapping[Map, probes.Probe]
) -> Students:
    """Kept blocks as narrow as these new blocks, made from least-squares maps alone.

    Args:
        new_blocks: with first == last; the source of each text run is a kept block, too.
        maps: such as `stored`.

    Returns:
        Untrained copies of the teacher's blocks, in its dtypes, where its weights are kept.

    Raises:
        ValueError: a new block with first < last.
    """
    if grown := [new_block for new_block in new_blocks if new_block.first != new_block.last]:
        raise ValueError(f"new block {grown[0].name} is no kept block")
    return narrowed(transformer, whole_blocks(transformer, new_blocks), maps)


def narrowed(
    transformer: nn.Module, wholes: Students, maps: Mapping[Map, probes.Probe]
) -> Students:
    """Makes whole blocks as narrow as their new blocks, with fitted maps. In place."""
    for new_block, student in wholes.items():
        students.shaped(transformer, new_block, student)
        layers = narrow.maps(student)
        with torch.no_grad():
            for one in maps_of(new_block):
                probe = maps[one]
                layers[one.kind].weight.copy_(torch.from_numpy(probe.weight))
                layers[one.kind].bias.copy_(torch.from_numpy(probe.bias))
    return wholes


def whole_blocks(transformer: nn.Module, new_blocks: Iterable[NewBlock]) -> Students:
    """Copies of the teacher's blocks at which some new blocks start."""
    sequence = blocks.block_sequence(transformer)
    return {new_block: copy.deepcopy(sequence[new_block.first].module) for new_block in new_blocks}
