"""What pruning does to a model, in words that need no torch: new blocks, and the units they form.

A unit is what is plugged into the teacher together or not at all; units never overlap, so every set
of them is a model.
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
        text: its role in a text run (Eq. 8). `own`: none; `source`: it keeps its text stream and
            lends it; `lend`: it keeps of it what it lends, as nothing reads text after the run;
            `borrow`: it has none of its own; `close`: nor has it, and it ends the run, which makes
            a text stream for the blocks that follow.
        source: ends of the new block that it borrows from.
    """

    first: int
    last: int
    linear_ffn: tuple[str, ...] = ()
    text: str = "own"
    source: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Such as 03-05; the key of its weights in files and logs."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def ends(self) -> tuple[int, int]:
        return self.first, self.last

    @property
    def lends(self) -> bool:
        """Whether others borrow its text stream."""
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
    """The new block of which `dataclasses.asdict` made this, perhaps by way of JSON.

    Raises:
        ValueError, LookupError, TypeError: it is of something else.
    """
    source = entry["source"] and tuple(entry["source"])
    return NewBlock(**{**entry, "linear_ffn": tuple(entry["linear_ffn"]), "source": source})


# A modulation matrix: its block, or the number of blocks for the last AdaLN, and its path in there.
Matrix = tuple[int, str]


@dataclass(frozen=True)
class Modulation:
    """A Linear that maps the conditioning to shifts, scales and gates.

    Attributes:
        block: number of its block; the number of blocks for the model's last AdaLN.
        path: in the block, or in the transformer for the last AdaLN.
        inputs, outputs: channels.
        bias: whether it has one; as a product of low rank it always has.
        ffn: the stream whose linear FFN leaves only some of it; empty if none does.
        left: how many sixths that are.
        text: whether it goes where the text stream is borrowed.
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
        """How many sixths of it there can be: in the source of a run that ends where nothing reads
        text, with a linear FFN, and else."""
        return sorted({2, self.left, 6})

    def parameters(self, rank: int | None = None, sixths: int = 6) -> int:
        """Of the matrix, or of its product of low rank, with so many sixths of its outputs kept."""
        outputs = self.outputs * sixths // 6
        if rank is None:
            return outputs * (self.inputs + self.bias)
        return rank * (self.inputs + outputs) + outputs

    def saved(self, rank: int, sixths: int = 6) -> int:
        """Parameters that a rank saves, with so many sixths of the outputs kept either way."""
        return self.parameters(sixths=sixths) - self.parameters(rank, sixths)


@dataclass(frozen=True)
class Unit:
    """New blocks in a row that go in together: one alone, or those of a text run."""

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
    """The units that a selection means, in order of depth.

    Args:
        intervals: (first, last) of depth students; disjoint.
        runs: (first, last) of text runs; disjoint, and none cuts an interval.
        linear: (block, stream) of FFNs that become linear; the block is kept or starts an interval.
            A borrowed text stream has no FFN, nor has one that nothing reads, so there its entry
            says nothing.
        unread_after: the block after which nothing reads the text stream, if there is one: a run
            that ends there makes no text stream, and its source none but what it lends.

    Raises:
        ValueError: a run of one new block, which would lend its text to nobody.
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
