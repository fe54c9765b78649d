"""What variants may take: closed forms and trained units, at what each costs and saves alone.

Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ppcl.pruning import constraints
from ppcl.pruning.units import Unit
from ppcl.search.savings import Weights
from ppcl.search.selection import Choices
from ppcl.search.sets import TRAINED, Set


@dataclass(frozen=True)
class Offer:
    """What variants may take.

    Attributes:
        closed: the price of every closed form: runs, ffns and ranks. No intervals, no units.
        units: trained ones, by name.
        errors: of each, source -> velocity error of the teacher with it alone; every source that
            there is.
        weights: what everything saves; `units` among it.
        facts: transformer_parameters, blocks, and transformer_seconds for latency.
        required: what the config asks for.
    """

    closed: Choices
    units: Mapping[str, Unit]
    errors: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, Weights]
    facts: Mapping[str, float]
    required: constraints.Named = constraints.NOTHING

    def sources(self, name: str, train: bool = True) -> dict[str, float]:
        """Where a unit can be from, with its error; without training, it is untrained."""
        return {
            source: error
            for source, error in self.errors.get(name, {}).items()
            if train or source not in TRAINED
        }

    def trained(self, found: Set) -> dict[str, str]:
        """The trained units of a set, and where each is from. Closed forms that other variants take
        on the same blocks may have the same name, and are other units."""
        return {
            member.unit.name: member.source
            for member in found.members
            if self.units.get(member.unit.name) == member.unit
        }

    def best(self, name: str, train: bool = True) -> str:
        """The source whose error alone is the least."""
        found = self.sources(name, train)
        return min(found, key=found.get)

    def parameters_left(self, saved: Mapping[str, float]) -> int:
        """Parameters of a model that saves this in every measure."""
        return round(self.facts["transformer_parameters"] - saved["parameters"])
