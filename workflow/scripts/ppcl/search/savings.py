"""What is saved in one measure (parameters, blocks, seconds), by whatever a set may hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ppcl.pruning.constraints import Ends, Ffn
from ppcl.pruning.units import Matrix, Modulation, Unit


@dataclass(frozen=True)
class Weights:
    """What is saved in one measure.

    Attributes:
        block: of each block, what is saved if it goes.
        text: of each block, what is saved if it borrows its text stream.
        output: of each block, what a text run that ends there adds by the map at its end.
        ffn: (block, stream) -> what that FFN saves if it is linear.
        ranks: (matrix, rank, sixths of its outputs that are kept) -> what that rank saves.
        units: name -> what that trained unit saves as a whole.
        source: first block of a text run -> what it saves if the run ends at `Choices.unread`; such
            a run has no map at its end.
    """

    block: Sequence[float]
    text: Sequence[float]
    output: Sequence[float]
    ffn: Mapping[Ffn, float] = field(default_factory=dict)
    ranks: Mapping[tuple[Matrix, int, int], float] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    source: Mapping[int, float] = field(default_factory=dict)


def by_blocks(depth: int) -> Weights:
    """The measure that counts blocks."""
    return Weights([1] * depth, [0] * depth, [0] * depth)


def saved(
    intervals: Iterable[Ends],
    runs: Iterable[Ends],
    ffns: Iterable[Ffn],
    weights: Weights,
    unread: int | None = None,
) -> float:
    """What a set of intervals, text runs and FFNs saves in one measure.

    unread: as in `Choices`.
    """
    gone = {block for first, last in intervals for block in range(first + 1, last + 1)}
    total = sum(weights.block[block] for block in gone)
    for first, last in runs:
        total += weights.source.get(first, 0) if last == unread else -weights.output[last]
        total += sum(weights.text[b] for b in range(first + 1, last + 1) if b not in gone)
    return total + sum(weights.ffn.get(ffn, 0) for ffn in ffns)


def sixths_left(unit: Unit, modulation: Modulation, unread: int | None) -> int:
    """Sixths of a modulation matrix's outputs that a trained unit keeps: 0 if the matrix goes."""
    new_block = next(
        (new_block for new_block in unit.new_blocks if new_block.first == modulation.block), None
    )
    if new_block is None or (modulation.text and new_block.borrows):
        return 0
    lends = new_block is unit.new_blocks[0] and len(unit.new_blocks) > 1
    if modulation.text and modulation.ffn and lends and unit.last == unread:
        return 2
    return modulation.left if modulation.ffn and modulation.ffn in new_block.linear_ffn else 6
