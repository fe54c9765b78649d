"""Models of variants: the teacher with a set of units and low-rank modulations plugged in.

All programs make such models here: `choose` measures sets, `finetune` trains one, `assemble`
exports it, `pareto` compares sizes. Closed forms are made from stored sums and maps; students are
read from the file of the stage that each is from.
"""

import functools
from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ppcl.closed_forms import linear_maps, modulation
from ppcl.closed_forms.linear_map_refits import Refits
from ppcl.errors import UserError
from ppcl.export.variant_files import Files
from ppcl.extraction import conditioning
from ppcl.pruning import students
from ppcl.pruning.selection_file import SelectionFile
from ppcl.pruning.students import Students
from ppcl.pruning.units import Matrix, NewBlock
from ppcl.search.choosing import Measure
from ppcl.search.sets import CLOSED, REFIT, START, Member, Set
from ppcl.training import prices
from ppcl.transformer import blocks
from ppcl.transformer.context import State

# One piece of a model, with the ranks of its matrices: a unit from a source; or the number of a
# kept block; or, for the last AdaLN, the number of all blocks.
Piece = tuple[Member | int, tuple[tuple[Matrix, int], ...]]


class Workshop:
    """Makes pruned models of one teacher, which share all modules with it that they do not replace.

    Args:
        transformer: the teacher, which stays as it is.
        files: maps, conditioning and students.
        as_teacher: whether students get the teacher's types, as in an export; else they are as they
            were trained, float32.
        device: where students go; None: they stay on the CPU.
    """

    def __init__(
        self,
        transformer: nn.Module,
        files: Files,
        as_teacher: bool = True,
        device: torch.device | None = None,
    ):
        self._teacher, self._sources = transformer, files.students
        self._maps = linear_maps.stored(files.maps) if files.maps else {}
        self._refits = dict(files.refitted)
        self._conditioning = conditioning.read(files.conditioning) if files.conditioning else None
        self._as_teacher, self._device = as_teacher, device
        self._depth = len(blocks.block_sequence(transformer))
        self._made: dict[Piece, dict[tuple[int, int], nn.Module]] = {}

    def model(self, chosen: Set, keep: Iterable[Set] = ()) -> tuple[nn.Module, list[list[int]]]:
        """The model of a set, and the block map of `blocks.assembled`.

        Pieces that the last model has in common with this one are used again.

        Args:
            keep: further sets whose pieces stay in memory.

        Raises:
            UserError: a source lacks a unit or has it in other shapes; or modulations have ranks,
                and there are no sums over their inputs (`files.conditioning`).
        """
        pieces = self._pieces(chosen)
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

    def take(self, refits: Refits) -> None:
        """Adds refitted maps: from now on, units from these sources are made with them."""
        self._refits |= refits
        self._made = {
            piece: made
            for piece, made in self._made.items()
            if not isinstance(piece[0], Member) or piece[0].source not in refits
        }

    def _pieces(self, chosen: Set) -> list[Piece]:
        """What a set consists of, in order of depth."""
        ranks: dict[int, list[tuple[Matrix, int]]] = {}
        for matrix, rank in chosen.ranks:
            ranks.setdefault(matrix[0], []).append((matrix, rank))
        pieces: list[Piece] = []
        for member in chosen.members:
            own = [
                one
                for new_block in member.unit.new_blocks
                for one in ranks.pop(new_block.first, ())
            ]
            pieces.append((member, tuple(own)))
        return pieces + [(block, tuple(own)) for block, own in sorted(ranks.items())]

    def _make(self, pieces: Sequence[Piece]) -> dict[Piece, dict[tuple[int, int], nn.Module]]:
        """The blocks of some pieces of one set, by the ends of their new blocks."""
        members = [piece[0] for piece in pieces if isinstance(piece[0], Member)]
        taught = self._students(members)
        if self._as_teacher:
            model, _, block_map = students.plugged(self._teacher, taught)
        else:
            model, block_map = blocks.assembled(
                self._teacher, {new_block.ends: student for new_block, student in taught.items()}
            )
        ranks = {matrix: rank for piece in pieces for matrix, rank in piece[1]}
        if ranks:
            if self._conditioning is None:
                raise UserError(
                    "sets.json has modulations of low rank, which are fitted on their inputs: name "
                    "activations/conditioning.safetensors, --conditioning"
                )
            model = modulation.low_rank(model, block_map, ranks, self._conditioning)
        starts = {members[0]: number for number, members in enumerate(block_map)}
        sequence = blocks.block_sequence(model)
        made: dict[Piece, dict[tuple[int, int], nn.Module]] = {}
        for piece in pieces:
            of = piece[0]
            if of == self._depth:
                made[piece] = {(self._depth, self._depth): model.get_submodule(_last(model))}
                continue
            ends = (
                [new_block.ends for new_block in of.unit.new_blocks]
                if isinstance(of, Member)
                else [(of, of)]
            )
            made[piece] = {key: sequence[starts[key[0]]].module for key in ends}
        return made

    def _students(self, members: Sequence[Member]) -> Students:
        """The new blocks of units, before modulations become low-rank."""
        new_blocks: dict[str, list[NewBlock]] = {}
        for member in members:
            new_blocks.setdefault(member.source, []).extend(member.unit.new_blocks)
        unit_blocks: Students = {}
        for source, wanted in new_blocks.items():
            if source == CLOSED or source.startswith(REFIT):
                # The stubs of ChainMap ask for mutable mappings; this one is only read.
                refits: Any = self._refits.get(source, {})
                stored: Any = self._maps
                unit_blocks |= linear_maps.closed(self._teacher, wanted, ChainMap(refits, stored))
            elif source in self._sources:
                unit_blocks |= students.load(self._sources[source], self._teacher, wanted)
            else:
                raise UserError(
                    f"unit {wanted[0].name} is from {source}, of which no students are given; "
                    f"name them, --{source}"
                )
        for new_block, student in unit_blocks.items():
            if self._as_teacher:
                students.as_teacher(self._teacher, new_block, student)
            student.requires_grad_(not self._as_teacher).eval()
            if self._device is not None:
                student.to(self._device)
        return unit_blocks


def measuring(workshop: Workshop, judged: prices.Judged, state: State | None = None) -> Measure:
    """A function that measures the velocity errors of sets, each set once.

    state: as for `prices.measure`, whose errors it raises.
    """
    known: dict[str, float] = {}

    def model(one: Set) -> nn.Module:
        return workshop.model(one)[0]

    def measure(asked: Sequence[Set]) -> list[float]:
        new = {one.key: one for one in asked if one.key not in known}
        changes = {
            key: prices.Change(one.first, functools.partial(model, one)) for key, one in new.items()
        }
        errors = prices.measure(judged, changes, state)
        known.update(zip(new, errors, strict=True))
        return [known[one.key] for one in asked]

    return measure


def untrained(selection: SelectionFile | None, files: Files) -> dict[str, Member]:
    """Every unit of the selection that can be had without training, by name.

    Only training makes narrow students of intervals, with width.schedule: staged.
    """
    if selection is None:
        return {}
    maps = linear_maps.stored(files.maps) if files.maps else {}
    members = {}
    for unit in selection.units:
        wanted = [one for new_block in unit.new_blocks for one in linear_maps.maps_of(new_block)]
        if not unit.removed_blocks and all(one in maps for one in wanted):
            members[unit.name] = Member(unit, CLOSED)
        elif START in files.students and unit in selection.distilled:
            members[unit.name] = Member(unit, START)
    return members


def _last(transformer: nn.Module) -> str:
    """The attribute of a transformer that holds its last AdaLN."""
    return blocks.family(transformer).last_modulation.split(".")[0]
