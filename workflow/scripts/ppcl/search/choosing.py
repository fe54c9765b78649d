"""Which set each variant is: the cheapest within its budget, then the best sources of its units.

Units and ranks come from one exact search per variant (ppcl.search.selection) over everything that
is priced. The source of each trained unit is chosen by the measured error of whole sets, since
students differ in how well they tolerate each other's errors: those of `distill` know the teacher
alone, those of `subsets` were trained together. Needs no torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ppcl.pruning.units import units_of
from ppcl.search import budgets, integer_programs, selection
from ppcl.search.offers import Offer
from ppcl.search.sets import CLOSED, START, TRAINED, Member, Set
from ppcl.settings import Variant


@dataclass(frozen=True)
class Choice:
    """A set for a variant.

    Attributes:
        cost: sum of what its members cost alone, each at its best; the search minimises it.
        saved: measure -> how much of it goes.
        error: of the whole set, measured.
    """

    set: Set
    cost: float
    saved: Mapping[str, float]
    error: float = math.nan


@dataclass(frozen=True)
class Decided:
    """The choice for a variant; and all that were measured for it, by their names in words."""

    choice: Choice
    tried: Mapping[str, Choice]


def search(offer: Offer, wanted: Variant) -> Choice:
    """The set that costs least and meets a variant's budget, each trained unit at its best error.

    The cost of a set is the sum of what its members cost alone, so that a larger budget never
    costs more.

    Args:
        wanted: the variant, as in the config.

    Raises:
        UserError: nothing that may be used meets the budget.
    """
    train = wanted.train
    units = {
        name: (unit, min(errors.values()))
        for name, unit in offer.units.items()
        if (errors := offer.sources(name, train))
    }
    needs = budgets.targets([wanted], offer.facts)
    choices = replace(offer.closed, units=units)
    whose = f"variants: the budget of '{wanted.name}' needs"
    selected = selection.select(choices, offer.weights, needs, offer.required, whose)
    members = [Member(units[name][0], offer.best(name, train)) for name in selected.units]
    closed = units_of((), selected.runs, selected.ffns, offer.closed.unread)
    members += [Member(unit, CLOSED) for unit in closed]
    members.sort(key=lambda member: member.unit.first)
    chosen = Set(tuple(members), tuple(sorted(selected.ranks.items())))
    return Choice(chosen, selected.cost, selected.saved)


def meets(choice: Choice, offer: Offer, wanted: Variant) -> bool:
    """Whether a variant may be this set: it is small and fast enough, and trained only if that is
    allowed."""
    needs = budgets.targets([wanted], offer.facts)
    enough = all(
        integer_programs.enough(choice.saved[measure], need) for measure, need in needs.items()
    )
    trained = any(member.source in TRAINED for member in choice.set.members)
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
        asked: name -> the variant, as in the config, and what `search` found for it.
        flips: whether single units are tried.
    """
    return settle(offer, asked, trials(offer, asked, measure, flips))


def trials(
    offer: Offer, asked: Mapping[str, tuple[Variant, Choice]], measure: Measure, flips: bool = True
) -> dict[str, dict[str, Choice]]:
    """What `decide` tries: name of a variant -> what is tried, in words -> the measured choice."""
    free = {name: _free(offer, choice.set, wanted) for name, (wanted, choice) in asked.items()}
    begun = {name: _whole_stages(asked[name][1].set, units) for name, units in free.items()}
    # In one call, as the processes share out the sets of a call.
    errors = iter(measure([one for sets in begun.values() for one in sets.values()]))
    tried = {
        name: {
            words: replace(asked[name][1], set=one, error=next(errors))
            for words, one in sets.items()
        }
        for name, sets in begun.items()
    }
    for name, choices in tried.items() if flips else ():
        _flip(choices, free[name], measure)
    return tried


def settle(
    offer: Offer,
    asked: Mapping[str, tuple[Variant, Choice]],
    tried: Mapping[str, Mapping[str, Choice]],
) -> dict[str, Decided]:
    """For each variant the best of all sets, tried for any variant, that it may be (`meets`)."""
    pool = [(name, choice) for name, choices in tried.items() for choice in choices.values()]
    decided = {}
    for name, (wanted, _) in asked.items():
        allowed = [pair for pair in pool if meets(pair[1], offer, wanted)]
        # Among sets of equal error, the variant's own.
        of, best = min(allowed, key=lambda pair: (pair[1].error, pair[0] != name))
        borrowed = {} if of == name else {f"the set of {of}": best}
        decided[name] = Decided(best, {**tried[name], **borrowed})
    return decided


def as_last_trained(
    offer: Offer, asked: Mapping[str, tuple[Variant, Choice]], measure: Measure
) -> dict[str, Decided]:
    """As `decide`, but every unit is from the last stage that it may be from, and no set is another
    variant's."""
    sets = {}
    for name, (wanted, choice) in asked.items():
        train = wanted.train
        trained = offer.trained(choice.set)
        last = {unit: list(offer.sources(unit, train))[-1] for unit in trained}
        sets[name] = choice.set.having(last)
    decided = {}
    for (name, one), error in zip(sets.items(), measure(list(sets.values())), strict=True):
        chosen = replace(asked[name][1], set=one, error=error)
        decided[name] = Decided(chosen, {"each of its last training": chosen})
    return decided


def _free(offer: Offer, chosen: Set, wanted: Variant) -> dict[str, list[str]]:
    """Units of a set that may be from several stages, and these."""
    train = wanted.train
    sources = {name: list(offer.sources(name, train)) for name in offer.trained(chosen)}
    return {name: several for name, several in sources.items() if len(several) > 1}


def _whole_stages(start: Set, free: Mapping[str, list[str]]) -> dict[str, Set]:
    """A variant's sets whose units are each at its best alone, or all of one stage."""
    sets = {"each at its best alone": start}
    for source in (CLOSED, START, *TRAINED):
        if having := {name: source for name, sources in free.items() if source in sources}:
            sets[f"all of {source}"] = start.having(having)
    return sets


def _flip(tried: dict[str, Choice], free: Mapping[str, list[str]], measure: Measure) -> None:
    """For one unit after the other, measures the best set so far with the unit's other sources, and
    adds these sets to `tried`."""
    for name, sources in free.items():
        best = min(tried.values(), key=lambda choice: choice.error)
        others = [source for source in sources if source != best.set.sources[name]]
        sets = {f"{name} of {one}": best.set.having({name: one}) for one in others}
        for (words, one), error in zip(sets.items(), measure(list(sets.values())), strict=True):
            tried[words] = replace(best, set=one, error=error)


def told(offer: Offer, name: str, choice: Choice) -> str:
    """A variant's choice in words, for the log."""
    sources = [f"{unit} {source}" for unit, source in offer.trained(choice.set).items()]
    closed = len(choice.set.members) - len(sources)
    share = offer.parameters_left(choice.saved) / offer.facts["transformer_parameters"]
    return (
        f"{name}: {share:.4f} of the parameters, error {choice.error:.3g} (its members alone: "
        f"{choice.cost:.3g}): {', '.join(sources) or 'no trained units'}; {closed} units by "
        f"least squares, {len(choice.set.ranks)} modulations of low rank"
    )
