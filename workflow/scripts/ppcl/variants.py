"""Models of variants: the teacher with a set of units and low-rank modulations plugged in.

One way for all who need one: `choose` measures sets, `finetune` trains one, `assemble` exports it,
`pareto` compares sizes. Closed forms are made from stored sums and maps, students read from the
stage that each is from.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ppcl import blocks, conditioning, modulation, students, width
from ppcl.errors import UserError
from ppcl.plans import Matrix, Part
from ppcl.sets import CLOSED, Member, Set
from ppcl.students import Students

# Makes up one piece of a model: a unit from a source, or a kept block, or the last AdaLN, each with
# the ranks of its matrices.
Piece = tuple[Member | int, tuple[tuple[Matrix, int], ...]]


class Workshop:
    """Makes models of one teacher; a model is the teacher's but for what differs.

    Args:
        transformer: the teacher, which stays as it is.
        files: source -> students.safetensors, of `start` and the stages that train.
        maps: width/maps.safetensors, for closed forms.
        conditioning_: activations/conditioning.safetensors, for ranks.
        as_teacher: whether students get the teacher's types, as in an export; else they are as they
            were trained, float32.
        device: where students go; None: they stay on the CPU.
    """

    def __init__(
        self,
        transformer: nn.Module,
        files: Mapping[str, Path],
        maps: Path | None = None,
        conditioning_: Path | None = None,
        as_teacher: bool = True,
        device: torch.device | None = None,
    ):
        self._teacher, self._files = transformer, files
        self._maps = width.stored(maps) if maps else {}
        self._conditioning = conditioning.read(conditioning_) if conditioning_ else None
        self._as_teacher, self._device = as_teacher, device
        self._depth = len(blocks.block_sequence(transformer))
        self._made: dict[Piece, dict[tuple[int, int], nn.Module]] = {}

    def model(self, found: Set, keep: Iterable[Set] = ()) -> tuple[nn.Module, list[list[int]]]:
        """The model of a set, and the block map of `blocks.assembled`.

        What the last model had in common with this one is used again.

        Args:
            keep: sets whose blocks stay in memory, too.

        Raises:
            UserError: a source lacks a unit, or its shapes are others; or nothing was told of what
                a modulation gets.
        """
        pieces = self._pieces(found)
        kept = {piece for one in keep for piece in self._pieces(one)} | set(pieces)
        self._made = {piece: made for piece, made in self._made.items() if piece in kept}
        missing = [piece for piece in pieces if piece not in self._made]
        if missing:
            self._made |= self._make(missing)
        modules: dict[tuple[int, int], nn.Module] = {}
        last = None
        for piece in pieces:
            made = self._made[piece]
            if piece[0] == self._depth:
                (last,) = made.values()
            else:
                modules |= made
        model, block_map = blocks.assembled(self._teacher, modules)
        if last is not None:
            model._modules[_last(self._teacher)] = last
        return model, block_map

    def _pieces(self, found: Set) -> list[Piece]:
        """What a set consists of, in order of depth."""
        ranks: dict[int, list[tuple[Matrix, int]]] = {}
        for matrix, rank in found.ranks:
            ranks.setdefault(matrix[0], []).append((matrix, rank))
        pieces: list[Piece] = []
        for member in found.members:
            own = [one for part in member.unit.parts for one in ranks.pop(part.first, ())]
            pieces.append((member, tuple(own)))
        return pieces + [(block, tuple(own)) for block, own in sorted(ranks.items())]

    def _make(self, pieces: Sequence[Piece]) -> dict[Piece, dict[tuple[int, int], nn.Module]]:
        """The blocks of some pieces of one set, by the ends of their parts."""
        members = [piece[0] for piece in pieces if isinstance(piece[0], Member)]
        taught = self._students(members)
        if self._as_teacher:
            model, _, block_map = students.plugged(self._teacher, taught)
        else:
            model, block_map = blocks.assembled(
                self._teacher, {part.key: student for part, student in taught.items()}
            )
        ranks = {matrix: rank for piece in pieces for matrix, rank in piece[1]}
        if ranks:
            if self._conditioning is None:
                raise UserError(
                    "sets.json has modulations of low rank, but nothing tells what they get: name "
                    "activations/conditioning.safetensors, --conditioning"
                )
            model = modulation.low_rank(model, block_map, ranks, self._conditioning)
        starts = {members[0]: number for number, members in enumerate(block_map)}
        sequence = blocks.block_sequence(model)
        made: dict[Piece, dict[tuple[int, int], nn.Module]] = {}
        for piece in pieces:
            of = piece[0]
            if of == self._depth:
                made[piece] = {(of, of): model._modules[_last(model)]}
                continue
            ends = [part.key for part in of.unit.parts] if isinstance(of, Member) else [(of, of)]
            made[piece] = {key: sequence[starts[key[0]]].module for key in ends}
        return made

    def _students(self, members: Sequence[Member]) -> Students:
        """The blocks of units, without ranks."""
        parts: dict[str, list[Part]] = {}
        for member in members:
            parts.setdefault(member.source, []).extend(member.unit.parts)
        found: Students = {}
        for source, wanted in parts.items():
            if source == CLOSED:
                found |= width.closed(self._teacher, wanted, self._maps)
            elif source in self._files:
                found |= students.load(self._files[source], self._teacher, wanted)
            else:
                raise UserError(
                    f"unit {wanted[0].name} is from {source}, of which no students are given; "
                    f"name them, --{source}"
                )
        for part, student in found.items():
            if self._as_teacher:
                students.as_teacher(self._teacher, part, student)
            student.requires_grad_(not self._as_teacher).eval()
            if self._device is not None:
                student.to(self._device)
        return found


def _last(transformer: nn.Module) -> str:
    """The attribute of a transformer that holds its last AdaLN."""
    return blocks.family(transformer).last_modulation.split(".")[0]
