"""What each variant is made of: closed forms and trained units, and the stage that each is from.

Units and ranks come from one exact search per variant (ppcl.search.selection) over everything that
is priced. Which of its students a unit takes is measured in the set in which it is used, since they
differ in how they stand each other's errors: those of `distill` know the teacher alone, those of
`subsets` each other. Needs no torch.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ppcl import provenance
from ppcl.errors import UserError
from ppcl.pruning import pins, plans
from ppcl.pruning.plans import Matrix, Unit
from ppcl.search import integer_programs, selection
from ppcl.search.selection import Choices, Weights
from ppcl.settings import Variant
from ppcl.storage import texts
from ppcl.transformer.families import IMAGE, TEXT

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
        pinned: what the config asks for.
    """

    closed: Choices
    units: Mapping[str, Unit]
    errors: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, Weights]
    facts: Mapping[str, float]
    pinned: pins.Named = pins.NOTHING

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


@dataclass(frozen=True)
class Choice:
    """A set for a variant.

    Attributes:
        cost: what its members cost alone, each at its best: what the search minimises.
        saved: measure -> how much of it goes.
        error: of the whole set, measured.
    """

    found: Set
    cost: float
    saved: Mapping[str, float]
    error: float = math.nan


@dataclass(frozen=True)
class Decided:
    """What a variant is, and all that was measured for it: in words -> the choice."""

    choice: Choice
    tried: Mapping[str, Choice]


def search(offer: Offer, wanted: Variant) -> Choice:
    """The set that costs least and meets a variant's budget, each trained unit at its best error.

    The cost of a set is the sum of what its members cost alone, so that a larger budget never
    costs more.

    Args:
        wanted: the variant's mapping in the config: name, budget and train.

    Raises:
        UserError: nothing that may be used meets the budget.
    """
    train = wanted.train
    units = {
        name: (unit, min(found.values()))
        for name, unit in offer.units.items()
        if (found := offer.sources(name, train))
    }
    needs = selection.targets([wanted], offer.facts)
    choices = replace(offer.closed, units=units)
    whose = f"variants: the budget of '{wanted.name}' needs"
    plan = selection.select(choices, offer.weights, needs, offer.pinned, whose)
    members = [Member(units[name][0], offer.best(name, train)) for name in plan.units]
    closed = plans.units((), plan.runs, plan.ffns, offer.closed.unread)
    members += [Member(unit, CLOSED) for unit in closed]
    members.sort(key=lambda member: member.unit.first)
    found = Set(tuple(members), tuple(sorted(plan.ranks.items())))
    return Choice(found, plan.cost, plan.saved)


def meets(choice: Choice, offer: Offer, wanted: Variant) -> bool:
    """Whether a variant may be this set: it is small and fast enough, and trained only if that is
    allowed."""
    needs = selection.targets([wanted], offer.facts)
    enough = all(
        integer_programs.enough(choice.saved[measure], need) for measure, need in needs.items()
    )
    trained = any(member.source in TRAINED for member in choice.found.members)
    return enough and (wanted.train or not trained)


# Velocity errors of sets; asked for the same set again, it gives the same.
Measure = Callable[[Sequence[Set]], list[float]]


def decide(
    offer: Offer, asked: Mapping[str, tuple[Variant, Choice]], measure: Measure, flips: bool = True
) -> dict[str, Decided]:
    """Where each variant's trained units are from, by error measured in the whole set.

    Tried are: each unit at its best alone, all of one stage, and then, one unit after the other,
    every other source of it. In the end each variant is the set of least error of all that were
    measured and that it may be, so that a larger budget has no larger error.

    Args:
        asked: variant -> its mapping in the config, and what `search` found for it.
        flips: whether single units are tried.
    """
    return settle(offer, asked, trials(offer, asked, measure, flips))


def trials(
    offer: Offer, asked: Mapping[str, tuple[Variant, Choice]], measure: Measure, flips: bool = True
) -> dict[str, dict[str, Choice]]:
    """What `decide` tries for each variant, by what it is in words."""
    free = {name: _free(offer, choice.found, wanted) for name, (wanted, choice) in asked.items()}
    begun = {name: _whole_stages(asked[name][1].found, units) for name, units in free.items()}
    # All at once, as processes share out what is asked for at a time.
    errors = iter(measure([one for found in begun.values() for one in found.values()]))
    tried = {
        name: {
            words: replace(asked[name][1], found=one, error=next(errors))
            for words, one in found.items()
        }
        for name, found in begun.items()
    }
    for name, found in tried.items() if flips else ():
        _flip(found, free[name], measure)
    return tried


def settle(
    offer: Offer,
    asked: Mapping[str, tuple[Variant, Choice]],
    tried: Mapping[str, Mapping[str, Choice]],
) -> dict[str, Decided]:
    """The best of all that was tried that each variant may be."""
    pool = [(name, choice) for name, found in tried.items() for choice in found.values()]
    decided = {}
    for name, (wanted, _) in asked.items():
        allowed = [pair for pair in pool if meets(pair[1], offer, wanted)]
        # Of equally good ones its own.
        of, best = min(allowed, key=lambda pair: (pair[1].error, pair[0] != name))
        borrowed = {} if of == name else {f"the set of {of}": best}
        decided[name] = Decided(best, {**tried[name], **borrowed})
    return decided


def refitted(found: Set, variant: str) -> Set:
    """A set whose linear FFNs by least squares are fitted once more, in it."""
    return found.having(
        {
            member.unit.name: f"{REFIT}{variant}"
            for member in found.members
            if member.source == CLOSED and any(part.linear_ffn for part in member.unit.parts)
        }
    )


def as_last_trained(
    offer: Offer, asked: Mapping[str, tuple[Variant, Choice]], measure: Measure
) -> dict[str, Decided]:
    """As `decide`, but every unit is from the last stage that it may be from, and no set is another
    variant's."""
    found = {}
    for name, (wanted, choice) in asked.items():
        train = wanted.train
        trained = offer.trained(choice.found)
        last = {unit: list(offer.sources(unit, train))[-1] for unit in trained}
        found[name] = choice.found.having(last)
    decided = {}
    for (name, one), error in zip(found.items(), measure(list(found.values())), strict=True):
        chosen = replace(asked[name][1], found=one, error=error)
        decided[name] = Decided(chosen, {"each of its last training": chosen})
    return decided


def _free(offer: Offer, found: Set, wanted: Variant) -> dict[str, list[str]]:
    """Units of a set that may be from several stages, and these."""
    train = wanted.train
    sources = {name: list(offer.sources(name, train)) for name in offer.trained(found)}
    return {name: several for name, several in sources.items() if len(several) > 1}


def _whole_stages(start: Set, free: Mapping[str, list[str]]) -> dict[str, Set]:
    """A variant's sets whose units are each at its best alone, or all of one stage."""
    sets = {"each at its best alone": start}
    for source in (CLOSED, START, *TRAINED):
        if having := {name: source for name, sources in free.items() if source in sources}:
            sets[f"all of {source}"] = start.having(having)
    return sets


def _flip(found: dict[str, Choice], free: Mapping[str, list[str]], measure: Measure) -> None:
    """Adds sets to those that a variant has tried: the best, with one unit after the other from its
    other sources."""
    for name, sources in free.items():
        best = min(found.values(), key=lambda choice: choice.error)
        others = [source for source in sources if source != best.found.sources[name]]
        sets = {f"{name} of {one}": best.found.having({name: one}) for one in others}
        for (words, one), error in zip(sets.items(), measure(list(sets.values())), strict=True):
            found[words] = replace(best, found=one, error=error)


# ---- files


def entry(found: Set) -> dict:
    """A set as JSON."""
    return {
        "units": [
            {
                "name": member.unit.name,
                "source": member.source,
                "parts": [asdict(part) for part in member.unit.parts],
            }
            for member in found.members
        ],
        "ranks": [[block, path, rank] for (block, path), rank in found.ranks],
    }


def of_entry(found: Mapping) -> Set:
    """The set of which `entry` made this.

    Raises:
        ValueError, LookupError, TypeError: it is of something else.
    """
    members = []
    for one in found["units"]:
        unit = Unit(tuple(map(plans.part, one["parts"])))
        source = one["source"]
        if source not in (CLOSED, START, *TRAINED) and not source.startswith(REFIT):
            raise ValueError(f"unit {unit.name} is from nowhere")
        members.append(Member(unit, source))
    ranks = tuple(((int(block), str(path)), int(rank)) for block, path, rank in found["ranks"])
    return Set(tuple(members), ranks)


def write(path: Path, offer: Offer, choices: Mapping[str, Choice], stamp: Mapping) -> None:
    """Writes sets.json: every variant's set, and what each unit costs alone from each source."""
    variants = {
        name: entry(choice.found)
        | {
            "parameters": left(offer, choice),
            "saved": dict(choice.saved),
            "predicted_error": choice.cost,
            "velocity_error": choice.error,
        }
        for name, choice in choices.items()
    }
    errors = {name: dict(found) for name, found in offer.errors.items()}
    texts.write_sealed(path, {"variants": variants, "alone": errors, "provenance": dict(stamp)})


def write_one(path: Path, offer: Offer, choice: Choice, refits: str) -> None:
    """Writes sets/<variant>.json: what this one is built from, and nothing that is measured.

    While the variant stays the same, so does the file, to the byte, and what is made from it (a
    fine-tune) is not made again because other variants, or times, changed.

    refits: digest of its maps that were fitted once more.
    """
    facts = entry(choice.found) | {"parameters": left(offer, choice), "refits": refits}
    texts.write_sealed(path, {"variants": {path.stem: facts}, "alone": {}})


def left(offer: Offer, choice: Choice) -> int:
    """Parameters that a choice's model has."""
    return round(offer.facts["transformer_parameters"] - choice.saved["parameters"])


@dataclass(frozen=True)
class Written:
    """sets.json, or what `write_one` writes.

    Attributes:
        sets: of every variant.
        parameters: of each, what its model has.
        alone: by trained unit, source -> velocity error of the teacher with it alone.
        facts: of every variant, what the file says of it.
    """

    sets: Mapping[str, Set]
    parameters: Mapping[str, int]
    alone: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Mapping]

    def of(self, variant: str) -> Set:
        """A variant's set.

        Raises:
            UserError: there is none.
        """
        if variant not in self.sets:
            raise UserError(
                f"--variant: --sets has no variant '{variant}'; it has {', '.join(self.sets)}"
            )
        return self.sets[variant]


def read(path: Path) -> Written:
    """What `write` or `write_one` wrote.

    Raises:
        UserError: it is missing, or something else.
    """
    found = texts.read_sealed(path)
    try:
        variants = found["variants"]
        return Written(
            {name: of_entry(one) for name, one in variants.items()},
            {name: int(one["parameters"]) for name, one in variants.items()},
            {
                name: {source: float(error) for source, error in errors.items()}
                for name, errors in found["alone"].items()
            },
            variants,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds no variants' sets ({error!r}); delete it and rerun"
        ) from error


def rows(offer: Offer, name: str, choice: Choice) -> list[dict]:
    """A variant's rows of units.parquet; what they save adds up to what the variant does."""
    found = []
    for member in choice.found.members:
        unit = member.unit
        if offer.units.get(unit.name) == unit:
            streams = {stream for part in unit.parts for stream in part.linear_ffn}
            kind = "interval" if unit.removed_blocks else "text" if len(unit.parts) > 1 else "ffn"
            row = {
                "kind": kind,
                "stream": " ".join(s for s in (IMAGE, TEXT) if s in streams or kind != "ffn"),
                "velocity_error": offer.errors[unit.name][member.source],
                "pinned": pins.holds(unit, offer.pinned),
            }
            saved = {measure: w.units[unit.name] for measure, w in offer.weights.items()}
            found.append(_row(name, unit.name, unit.first, unit.last, member.source, saved, row))
            continue
        for kind, item in _closed(unit):
            cost = (offer.closed.runs if kind == "text" else offer.closed.ffns)[item]
            ends = item if kind == "text" else (item[0], item[0])
            row = {
                "kind": kind,
                "stream": TEXT if kind == "text" else item[1],
                "velocity_error": cost,
                "pinned": item in offer.pinned.runs | offer.pinned.ffns,
            }
            saved = {
                measure: selection.saved(
                    (),
                    [item] if kind == "text" else [],
                    [item] if kind == "ffn" else [],
                    each,
                    offer.closed.unread,
                )
                for measure, each in offer.weights.items()
            }
            found.append(_row(name, unit.name, *ends, member.source, saved, row))
    holding = {b: m for m in choice.found.members for b in range(m.unit.first, m.unit.last + 1)}
    for (block, path), rank in choice.found.ranks:
        matrix, member = (block, path), holding.get(block)
        sixths = 6
        if member:
            modulation = offer.closed.modulations[matrix]
            sixths = selection.sixths_left(member.unit, modulation, offer.closed.unread)
        row = {
            "kind": "modulation",
            "stream": "",
            "path": path,
            "rank": rank,
            "velocity_error": offer.closed.ranks[matrix][rank],
            "pinned": block in offer.pinned.ranks,
        }
        saved = {m: w.ranks.get((matrix, rank, sixths), 0.0) for m, w in offer.weights.items()}
        unit = member.unit.name if member else f"{block:02d}-{block:02d}"
        found.append(_row(name, unit, block, block, CLOSED, saved, row))
    return found


def _closed(unit: Unit) -> Iterable[tuple[str, tuple]]:
    """The text run and the linear FFNs of a unit of kept blocks."""
    if len(unit.parts) > 1:
        yield "text", (unit.first, unit.last)
    for part in unit.parts:
        for stream in part.linear_ffn:
            yield "ffn", (part.first, stream)


def _row(
    variant: str,
    unit: str,
    first: int,
    last: int,
    source: str,
    saved: Mapping[str, float],
    more: Mapping,
) -> dict:
    return {
        "variant": variant,
        "unit": unit,
        "first": first,
        "last": last,
        "path": "",
        "rank": 0,
        "source": source,
        "saved_parameters": round(saved["parameters"]),
        "saved_seconds": saved.get("latency", math.nan),
    } | dict(more)


def trial_rows(offer: Offer, name: str, decided: Decided) -> list[dict]:
    """A variant's rows of measured.parquet."""
    return [
        {
            "variant": name,
            "tried": words,
            "sources": json.dumps(offer.trained(choice.found)),
            "parameters": left(offer, choice),
            "predicted_error": choice.cost,
            "velocity_error": choice.error,
            "chosen": choice == decided.choice,
        }
        for words, choice in decided.tried.items()
    ]


def told(offer: Offer, name: str, choice: Choice) -> str:
    """A variant's choice in words, for the log."""
    sources = [f"{unit} {source}" for unit, source in offer.trained(choice.found).items()]
    closed = len(choice.found.members) - len(sources)
    share = left(offer, choice) / offer.facts["transformer_parameters"]
    return (
        f"{name}: {share:.4f} of the parameters, error {choice.error:.3g} (its members alone: "
        f"{choice.cost:.3g}): {', '.join(sources) or 'no trained units'}; {closed} units by "
        f"least squares, {len(choice.found.ranks)} modulations of low rank"
    )
