"""selection.json, which `prune` writes: the units of the selection, and what each saves."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ppcl.errors import UserError
from ppcl.pruning.units import Unit, new_block_of, new_blocks_of
from ppcl.storage import texts


def unit_entry(
    unit: Unit, saved_parameters: int, saved_seconds: float, required: bool = False
) -> dict:
    """A unit's entry in selection.json.

    Args:
        saved_seconds: per call of the transformer; NaN if no times were measured.
        required: whether the config requires any of it.
    """
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
        units: the units that are trained.
        distilled: the units that `distill` trains.
        closed: the units that are not trained, since they cost little as least squares makes them
            (width.floor).
        facts: the file's content. Its lists `units`, `distilled` and `closed` hold an entry per
            unit (`unit_entry`).
    """

    units: list[Unit]
    distilled: list[Unit]
    closed: list[Unit]
    facts: dict

    @property
    def required(self) -> set[str]:
        """Names of the trained units that the config requires, so that every variant has them."""
        return {entry["name"] for entry in self.facts["units"] if entry["required"]}


def read(path: Path) -> SelectionFile:
    """The selection that `prune` wrote.

    Raises:
        UserError: the file is missing, or not a whole selection.
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
