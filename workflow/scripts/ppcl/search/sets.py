"""Sets: what is plugged into a teacher, and where each unit of it is from. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from ppcl import provenance
from ppcl.pruning.units import Matrix, Unit, new_block_of

# Sources of a unit's weights: least squares; start weights, untrained.
CLOSED, START = "closed", "start"

# The stages that train it, in their order.
TRAINED = ("distill", "narrow", "subsets")

# Followed by a variant's name: least squares, fitted once more in that variant's set.
REFIT = "refit-"


@dataclass(frozen=True)
class Member:
    """A unit of a set, and the source of its weights."""

    unit: Unit
    source: str


@dataclass(frozen=True)
class Set:
    """What is plugged into the teacher: units in order of depth, and ranks of modulations.

    No two units overlap. A rank belongs to a matrix of the teacher's block or, if a student starts
    at this block, to the student's.
    """

    members: tuple[Member, ...] = ()
    ranks: tuple[tuple[Matrix, int], ...] = ()

    @property
    def units(self) -> list[Unit]:
        return [member.unit for member in self.members]

    @property
    def sources(self) -> dict[str, str]:
        """Name of a unit -> source."""
        return {member.unit.name: member.source for member in self.members}

    @property
    def first(self) -> int:
        """The first block that differs from the teacher; the number of blocks if only the last
        AdaLN does; 0 for an empty set."""
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
    """The same set, but with linear FFNs of least squares fitted once more, in this set."""
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
    """The set that `entry` turned into JSON.

    Raises:
        ValueError, LookupError, TypeError: this is not the JSON of a set.
    """
    members = []
    for one in stored["units"]:
        unit = Unit(tuple(map(new_block_of, one["new_blocks"])))
        source = one["source"]
        if source not in (CLOSED, START, *TRAINED) and not source.startswith(REFIT):
            raise ValueError(f"unit {unit.name} has the unknown source {source!r}")
        members.append(Member(unit, source))
    ranks = tuple(((int(block), str(path)), int(rank)) for block, path, rank in stored["ranks"])
    return Set(tuple(members), ranks)
