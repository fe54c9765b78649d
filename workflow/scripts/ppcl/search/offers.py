"""What variants may take: closed forms and trained units, at what each costs and saves alone.

Needs no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.selection_file import SelectionFile
from ppcl.pruning.units import Unit
from ppcl.search import candidates, measured, stored
from ppcl.search.candidates import Limits
from ppcl.search.savings import Weights
from ppcl.search.selection import Choices
from ppcl.search.sets import TRAINED, Set
from ppcl.settings import Settings


@dataclass(frozen=True)
class PriceFiles:
    """Tables of what is on offer, as far as the config asks for it.

    Attributes:
        width: prices of closed forms.
        latency: measured times.
        unit_costs: of each stage that trains, errors of its units.
        sizes: record/sizes.parquet, for budgets of bytes.
    """

    width: Path | None = None
    latency: Path | None = None
    unit_costs: Mapping[str, Path] = field(default_factory=dict)
    sizes: Path | None = None


@dataclass(frozen=True)
class Offer:
    """What variants may take.

    Attributes:
        closed: the price of every closed form: runs, ffns and ranks. No intervals, no units.
        units: trained ones, by name.
        errors: by name of a unit, each source -> velocity error of the teacher with it alone.
        weights: measure -> what each closed form and each unit saves.
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
        """The sources of a unit, each with its error; without `train`, no trained ones."""
        return {
            source: error
            for source, error in self.errors.get(name, {}).items()
            if train or source not in TRAINED
        }

    def trained(self, chosen: Set) -> dict[str, str]:
        """Those units of a set that are in `units`: name -> source. A closed form on the same
        blocks may have the same name, but is another unit."""
        return {
            member.unit.name: member.source
            for member in chosen.members
            if self.units.get(member.unit.name) == member.unit
        }

    def best(self, name: str, train: bool = True) -> str:
        """The source whose error alone is the least."""
        errors = self.sources(name, train)
        return min(errors, key=errors.__getitem__)

    def parameters_left(self, saved: Mapping[str, float]) -> int:
        """Parameters of a transformer that saves this: measure -> amount."""
        return round(self.facts["transformer_parameters"] - saved["parameters"])


def offered(
    settings: Settings,
    teacher: Mapping[str, float],
    files: PriceFiles,
    selection: SelectionFile | None,
    alone: Mapping[str, Mapping[str, float]],
) -> Offer:
    """All that variants may take.

    Args:
        settings: intervals, width and modulation, for constraints; choose.closed_forms.
        teacher: its transformer_parameters and blocks.
        alone: errors of untrained units, by name and source.
    """
    depth = int(teacher["blocks"])
    required, forbidden = constraints.of_config(settings, depth)
    closed, counted = _closed(files, depth, required, forbidden, settings)
    units = {unit.name: unit for unit in selection.units} if selection else {}
    _refuse_unpriced(required, closed, units.values())
    if not settings.choose.closed_forms:
        left = selection.closed if selection else ()
        linear = {(p.first, stream) for u in left for p in u.new_blocks for stream in p.linear_ffn}
        runs = {(unit.first, unit.last) for unit in left if len(unit.new_blocks) > 1}
        closed = replace(
            closed,
            runs={ends: cost for ends, cost in closed.runs.items() if ends in runs},
            ffns={ffn: cost for ffn, cost in closed.ffns.items() if ffn in linear},
        )
    entries = selection.facts["units"] if selection else []
    none = [0.0] * depth
    saving = {
        key: {entry["name"]: entry[key] for entry in entries}
        for key in ("removed_blocks", "saved_parameters")
    }
    weights = {
        "blocks": Weights(none, none, none, units=saving["removed_blocks"]),
        "parameters": replace(counted, units=saving["saved_parameters"]),
    }
    facts = dict(teacher)
    if files.latency:
        timed, facts["transformer_seconds"] = measured.timing(files.latency, depth)
        seconds = measured.saved_seconds(units.values(), files.latency)
        weights["latency"] = replace(timed, units=dict(zip(units, seconds, strict=True)))
    ranks = closed.modulations, counted.ranks.keys()
    saved_bytes, all_bytes = stored.measures(settings, files.sizes, depth, *ranks)
    for measure, each in saved_bytes.items():
        weights[measure] = stored.with_units(each, units.values(), closed.unread)
    facts |= all_bytes
    errors = {name: dict(alone.get(name, {})) for name in units}
    distilled = selection.distilled if selection else ()
    for stage, path in files.unit_costs.items():
        for name, error in measured.unit_errors(path).items():
            # With width.schedule: staged, distill has whole blocks where units may be narrow.
            if name in units and (stage != "distill" or units[name] in distilled):
                errors[name][stage] = error
    return Offer(closed, units, errors, weights, facts, required)


def _refuse_unpriced(required: constraints.Named, closed: Choices, units: Iterable[Unit]) -> None:
    """Raises UserError if something is required that neither a closed form nor a unit offers."""
    units = list(units)
    lists = (
        ("width.text", "runs", closed.runs, "width.longest or width.cka_floor leave it out"),
        ("width.ffn_image or width.ffn_text", "ffns", closed.ffns, "there is no such FFN"),
        ("modulation", "ranks", {block for block, _ in closed.ranks}, "it has no rank on offer"),
    )
    for key, kind, priced, why in lists:
        for item in sorted(getattr(required, kind) - set(priced)):
            if not any(
                constraints.holds(unit, constraints.Named(**{kind: frozenset([item])}))
                for unit in units
            ):
                raise UserError(
                    f"{key}: {constraints.shown(item)} is required, but was not measured: {why}; "
                    "change that or drop it"
                )


def _closed(
    files: PriceFiles,
    depth: int,
    required: constraints.Named,
    forbidden: constraints.Named,
    settings: Settings,
) -> tuple[Choices, Weights]:
    """Closed forms at their prices, and the parameters that each saves."""
    kinds = {"width": ("text", "ffn"), "modulation": ("modulation",)}
    wanted = [
        kind for key, some in kinds.items() if getattr(settings, key).enabled for kind in some
    ]
    closed = measured.closed(files.width, [0] * depth, wanted)
    protected = constraints.protected(settings, depth)
    limits = Limits(forbidden, protected, settings.width.cka_floor)
    choices = Choices(
        {},
        *candidates.usable_linear_maps(closed.rows, required, limits),
        candidates.usable_ranks(closed.rows, forbidden),
        modulations=closed.modulations,
        unread=closed.unread,
    )
    return choices, closed.weights
