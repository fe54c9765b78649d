"""The file in which `prune` leaves the selection: its units, and what each saves."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ppcl.errors import UserError
from ppcl.pruning.units import Unit, new_block_of, new_blocks_of
from ppcl.storage import texts


def unit_entry(
    unit: Unit, saved_parameters: int, saved_seconds: float, required: bool = False
) -> dict:
    """A unit as selection.json holds it."""
    return {
        "name": unit.name,
        "removed_blocks": unit.removed_blocks,
        "saved_parameters": saved_parameters,
        "required": required,
        "saved_seconds": None if math.isnan(saved_seconds) else saved_seconds,
        "new_blocks": [asdict(new_block) for new_block in unit.new_blocks],
    }


@dataclass(frozen=True)
class SelectionFile:
    """selection.json.

    Attributes:
        units: what is trained of the selection.
        distilled: what distill trains of it.
        closed: what is not, since its least-squares maps cost next to nothing.
        facts: the file's content; its `units` and `distilled` tell what each saves.
    """

    units: list[Unit]
    distilled: list[Unit]
    closed: list[Unit]
    facts: dict

    @property
    def required(self) -> set[str]:
        """Names of the units that every variant has, as far as they are trained."""
        return {entry["name"] for entry in self.facts["units"] if entry["required"]}


def read(path: Path) -> SelectionFile:
    """The selection that `prune` wrote.

    Raises:
        UserError: it is missing, or not a whole one.
    """
    facts = texts.read_sealed(path)
    try:
        for key in ("transformer_parameters", "blocks"):
            int(facts[key])
        units, distilled, closed = (_units(facts[key]) for key in ("units", "distilled", "closed"))
        selection = SelectionFile(units, distilled, closed, facts)
        for new_block in new_blocks_of([*selection.units, *selection.distilled, *selection.closed]):
            if not 0 <= new_block.first <= new_block.last < facts["blocks"]:
                raise ValueError(f"new block {new_block.name} is not of {facts['blocks']} blocks")
        return selection
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a whole selection ({error}); delete it and rerun"
        ) from error


def _units(entries: list[dict]) -> list[Unit]:
    units = [Unit(tuple(map(new_block_of, entry["new_blocks"]))) for entry in entries]
    for entry, unit in zip(entries, units, strict=True):
        if entry["name"] != unit.name:
            raise ValueError(f"unit {entry['name']} has the new blocks of {unit.name}")
        int(entry["saved_parameters"])
        bool(entry["required"])
        float(entry["saved_seconds"] or 0)
    return units
