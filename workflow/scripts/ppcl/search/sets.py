"""Sets: what is plugged into a teacher, and where each unit of it is from. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from ppcl import provenance
from ppcl.pruning.units import Matrix, Unit, new_block_of

# Least squares; start weights; and the stages that train, in their order.
CLOSED, START = "closed", "start"


TRAINED = ("distill", "narrow", "subsets")


# And the name of a variant: least squares once more, in its set.
REFIT = "refit-"


@dataclass(frozen=True)
class Member:
    """A unit of a set, and where its blocks are from."""

    unit: Unit
    source: str


@dataclass(frozen=True)
class Set:
    """What is plugged into the teacher: units in order of depth, and ranks of modulations.

    No two units overlap. A rank is that of the block's own matrix, or of the one of the student
    that starts at this block.
    """

    members: tuple[Member, ...] = ()
    ranks: tuple[tuple[Matrix, int], ...] = ()

    @property
    def units(self) -> list[Unit]:
        return [member.unit for member in self.members]

    @property
    def sources(self) -> dict[str, str]:
        """By unit."""
        return {member.unit.name: member.source for member in self.members}

    @property
    def first(self) -> int:
        """The first block that differs from the teacher; the number of blocks, if it is behind all
        of them."""
        starts = [unit.first for unit in self.units] + [matrix[0] for matrix, _ in self.ranks]
        return min(starts, default=0)

    @property
    def key(self) -> str:
        """Digest of all of it: sets with one key are one model."""
        return provenance.digest(entry(self))

    def having(self, sources: Mapping[str, str]) -> "Set":
        """The same units and ranks, with other sources of some units."""
        return replace(
            self,
            members=tuple(
                replace(member, source=sources.get(member.unit.name, member.source))
                for member in self.members
            ),
        )


def refitted(chosen: Set, variant: str) -> Set:
    """A set whose linear FFNs by least squares are fitted once more, in it."""
    return chosen.having(
        {
            member.unit.name: f"{REFIT}{variant}"
            for member in chosen.members
            if member.source == CLOSED
            and any(new_block.linear_ffn for new_block in member.unit.new_blocks)
        }
    )


def entry(chosen: Set) -> dict:
    """A set as JSON."""
    return {
        "units": [
            {
                "name": member.unit.name,
                "source": member.source,
                "new_blocks": [asdict(new_block) for new_block in member.unit.new_blocks],
            }
            for member in chosen.members
        ],
        "ranks": [[block, path, rank] for (block, path), rank in chosen.ranks],
    }


def of_entry(stored: Mapping) -> Set:
    """The set of which `entry` made this.

    Raises:
        ValueError, LookupError, TypeError: it is of something else.
    """
    members = []
    for one in stored["units"]:
        unit = Unit(tuple(map(new_block_of, one["new_blocks"])))
        source = one["source"]
        if source not in (CLOSED, START, *TRAINED) and not source.startswith(REFIT):
            raise ValueError(f"unit {unit.name} is from nowhere")
        members.append(Member(unit, source))
    ranks = tuple(((int(block), str(path)), int(rank)) for block, path, rank in stored["ranks"])
    return Set(tuple(members), ranks)
