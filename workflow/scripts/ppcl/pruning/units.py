"""What pruning does to a model, described without torch: new blocks, and the units they form.

A unit is one or more new blocks that are plugged into the teacher together or not at all. Units
never overlap, so every set of them gives a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ppcl.transformer.family import IMAGE, TEXT


@dataclass(frozen=True)
class NewBlock:
    """One new block in place of teacher blocks first..last (inclusive).

    With first == last it is a kept block that is narrower; otherwise a student, narrow or not.

    Attributes:
        linear_ffn: streams whose FFN is a residual linear map (Eq. 9).
        text: its role in a text run (Eq. 8).
            `own`: it is in no text run.
            `source`: it begins the run; it keeps its text stream and lends it.
            `lend`: it begins a run after which nothing reads text; it keeps only the part of its
            text stream that it lends.
            `borrow`: it has no text stream of its own.
            `close`: as `borrow`, and it ends the run, with a linear map that makes the text stream
            for the blocks that follow.
        source: (first, last) of the new block from which it borrows; None if it does not.
    """

    first: int
    last: int
    linear_ffn: tuple[str, ...] = ()
    text: str = "own"
    source: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """First and last block, such as 03-05. Weights have this key in files and logs."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def ends(self) -> tuple[int, int]:
        return self.first, self.last

    @property
    def lends(self) -> bool:
        """Whether other new blocks borrow its text stream."""
        return self.text in ("source", "lend")

    @property
    def borrows(self) -> bool:
        """Whether it has no text stream of its own."""
        return self.text in ("borrow", "close")

    @property
    def narrow(self) -> bool:
        """Whether it is anything but a stock block."""
        return bool(self.linear_ffn) or self.text != "own"


def new_block_of(entry: Mapping) -> NewBlock:
    """The new block of which `dataclasses.asdict` made this mapping, perhaps read back from JSON.

    Raises:
        ValueError, LookupError, TypeError: the mapping is of something else.
    """
    source = entry["source"] and tuple(entry["source"])
    return NewBlock(**{**entry, "linear_ffn": tuple(entry["linear_ffn"]), "source": source})


# A modulation matrix: (number of its block, path in the block), or, for the last AdaLN, (number of
# blocks, path in the transformer).
Matrix = tuple[int, str]


@dataclass(frozen=True)
class Modulation:
    """A Linear that maps the conditioning to shifts, scales and gates.

    Attributes:
        block: number of its block; the number of blocks for the model's last AdaLN.
        path: in the block, or in the transformer for the last AdaLN.
        inputs, outputs: number of input and output channels.
        bias: whether it has one; as a product of low rank it always has.
        ffn: the stream whose FFN, if it becomes linear, drops some of the outputs; empty if no FFN
            does.
        left: how many sixths of the outputs are left then.
        text: whether the matrix is dropped in a block that borrows its text stream.
    """

    block: int
    path: str
    inputs: int
    outputs: int
    bias: bool = True
    ffn: str = ""
    left: int = 3
    text: bool = False

    @property
    def key(self) -> Matrix:
        return self.block, self.path

    @property
    def shares(self) -> list[int]:
        """How many sixths of the outputs can be kept, ascending: 2 in a new block of role `lend`,
        `left` with a linear FFN, else all 6."""
        return sorted({2, self.left, 6})

    def parameters(self, rank: int | None = None, sixths: int = 6) -> int:
        """Number of parameters of the matrix (rank None) or of its product of low rank, bias
        included, with so many sixths of the outputs kept."""
        outputs = self.outputs * sixths // 6
        if rank is None:
            return outputs * (self.inputs + self.bias)
        return rank * (self.inputs + outputs) + outputs

    def saved(self, rank: int, sixths: int = 6) -> int:
        """Number of parameters that a rank saves, with so many sixths of the outputs kept with and
        without it."""
        return self.parameters(sixths=sixths) - self.parameters(rank, sixths)


@dataclass(frozen=True)
class Unit:
    """New blocks that are plugged in together: a single one, or all of a text run, in order."""

    new_blocks: tuple[NewBlock, ...]

    @property
    def first(self) -> int:
        return self.new_blocks[0].first

    @property
    def last(self) -> int:
        return self.new_blocks[-1].last

    @property
    def name(self) -> str:
        """Such as 03-05; unique, since units do not overlap."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def removed_blocks(self) -> int:
        return self.last - self.first + 1 - len(self.new_blocks)


def units_of(
    intervals: Iterable[tuple[int, int]],
    runs: Iterable[tuple[int, int]] = (),
    linear: Iterable[tuple[int, str]] = (),
    unread_after: int | None = None,
) -> list[Unit]:
    """The units of a selection, in order of depth.

    Args:
        intervals: (first, last) of depth students; disjoint.
        runs: (first, last) of text runs; disjoint, and none cuts an interval.
        linear: (block, stream) of FFNs that become linear; the block is kept or starts an interval.
            Text FFNs of new blocks in the roles `lend`, `borrow` and `close` are ignored, since
            these blocks have none.
        unread_after: the block after which nothing reads the text stream, if there is one. In a run
            that ends there, the first new block is `lend` instead of `source`, and the last is
            `borrow` instead of `close`.

    Raises:
        ValueError: a text run has a single new block, which would lend its text to none.
    """
    intervals = sorted(intervals)
    ffns: dict[int, set[str]] = {}
    for block, stream in linear:
        ffns.setdefault(block, set()).add(stream)
    inside = {block for first, last in runs for block in range(first, last + 1)}
    single = [(b, b) for b in inside | set(ffns) if not any(f <= b <= t for f, t in intervals)]
    pieces = sorted([*intervals, *single])

    def made(ends: tuple[int, int], text: str = "own", source: tuple[int, int] | None = None):
        linear_here = ffns.get(ends[0], set())
        if text not in ("own", "source"):
            linear_here = linear_here - {TEXT}
        return NewBlock(*ends, tuple(s for s in (IMAGE, TEXT) if s in linear_here), text, source)

    units = [Unit((made(ends),)) for ends in pieces if ends[0] not in inside]
    for first, last in runs:
        source, *others = (ends for ends in pieces if first <= ends[0] and ends[1] <= last)
        if not others:
            raise ValueError(f"the text run [{first},{last}] has a single new block")
        run = [made(source, "lend" if last == unread_after else "source")]
        for ends in others:
            closes = ends[1] == last and last != unread_after
            run.append(made(ends, "close" if closes else "borrow", source))
        units.append(Unit(tuple(run)))
    return sorted(units, key=lambda unit: unit.first)


def new_blocks_of(units: Iterable[Unit]) -> list[NewBlock]:
    """The new blocks of all units, in order."""
    return [new_block for unit in units for new_block in unit.new_blocks]
