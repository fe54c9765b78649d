"""Which intervals, text runs and FFNs a model gives up: the cheapest set for its budgets, exactly.

Depth intervals and text runs are [first, last], inclusive. A text run (Eq. 8) holds whole parts,
that is kept blocks and whole intervals, and at least two of them: the first keeps its text stream,
the later ones borrow it. An FFN (Eq. 9) becomes linear in the block that starts a part; a borrowed
text stream has none. The cost of a set is the sum of its members' costs. Whatever counts
(parameters, blocks, seconds) adds up as well, so that the best set is a path over the depth
(ppcl.routes), whose nodes are the block reached and the text run that is open there. All budgets of
a config are met at once, in several measures if need be. PPCL, arXiv 2511.16156, stages 1.2 and 2.
Needs no torch.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ppcl import routes, schemas, tables
from ppcl.config import limits
from ppcl.errors import UserError
from ppcl.families import IMAGE, TEXT
from ppcl.pins import NOTHING, Ends, Ffn, Named, overlap
from ppcl.plans import Matrix, Unit
from ppcl.routes import Arc


@dataclass(frozen=True)
class Weights:
    """What is saved in one measure, each per block unless it says otherwise.

    block: if the block goes. text: if its text stream is borrowed. output: what a run that closes
    with it adds. ffn: (block, stream) -> if that FFN is linear. ranks: (matrix, rank, sixths of its
    outputs that are kept) -> if it has that rank. units: by name, of whole trained units.
    """

    block: Sequence[float]
    text: Sequence[float]
    output: Sequence[float]
    ffn: Mapping[Ffn, float] = field(default_factory=dict)
    ranks: Mapping[tuple[Matrix, int, int], float] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """What may be given up, and the cost of each.

    ranks: of each modulation matrix, the cost of every rank on offer. units: trained ones, by name,
    with their cost; they keep everything else off their blocks but ranks.
    """

    intervals: Mapping[Ends, float]
    runs: Mapping[Ends, float] = field(default_factory=dict)
    ffns: Mapping[Ffn, float] = field(default_factory=dict)
    ranks: Mapping[Matrix, Mapping[int, float]] = field(default_factory=dict)
    units: Mapping[str, tuple[Unit, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The chosen set in order of depth, its cost, and what it saves in every measure.

    bound: no set that meets the needs costs less; below the cost only if ppcl.routes had to thin.
    """

    intervals: tuple[Ends, ...]
    runs: tuple[Ends, ...]
    ffns: tuple[Ffn, ...]
    cost: float
    bound: float
    saved: Mapping[str, float]
    ranks: Mapping[Matrix, int] = field(default_factory=dict)
    units: tuple[str, ...] = ()


def needed(budget: float | Mapping[str, float], facts: Mapping[str, float]) -> dict[str, float]:
    """What has to go for a budget: measure (parameters, blocks or latency) -> how much of it.

    Args:
        budget: of the config's variants.
        facts: transformer_parameters, blocks, and transformer_seconds for latency.
    """
    found: dict[str, float] = {}
    for kind, value in limits(budget).items():
        if kind == "latency":
            amount = (1 - value) * facts["transformer_seconds"]
        elif kind == "blocks":
            amount = max(0, facts["blocks"] - value)
        elif kind == "parameters":
            amount = max(0, facts["transformer_parameters"] - value)
        else:
            kind, amount = "parameters", parameters_needed(facts["transformer_parameters"], value)
        found[kind] = max(amount, found.get(kind, 0))
    return found


def targets(variants: Iterable[Mapping], facts: Mapping[str, float]) -> dict[str, float]:
    """Per measure, what has to go for the smallest budget of all variants."""
    largest: dict[str, float] = {}
    for variant in variants:
        for measure, amount in needed(variant["budget"], facts).items():
            largest[measure] = max(amount, largest.get(measure, 0))
    return largest


def by_blocks(depth: int) -> Weights:
    """The measure that counts blocks."""
    return Weights([1] * depth, [0] * depth, [0] * depth)


def timing(path: Path, depth: int) -> tuple[Weights, float]:
    """Seconds per call that can be saved, and those of the whole transformer, as `latency` timed
    them. What a text run adds where it closes counts as nothing."""
    table = tables.read(path, schemas.LATENCY).to_pandas()
    check_depth(path, table["block"], depth)
    found = {(row.part, row.block): row.seconds for row in table.itertuples()}

    def per_block(part: str) -> list[float]:
        return [found.get((part, block), 0.0) for block in range(depth)]

    ffns = {
        (block, stream): found[f"ffn_{stream}", block]
        for stream in (IMAGE, TEXT)
        for block in range(depth)
        if (f"ffn_{stream}", block) in found
    }
    try:
        whole = float(tables.provenance(path)["transformer_seconds"])
    except KeyError as error:
        raise UserError(f"{path}: its provenance lacks {error}; delete it and rerun") from error
    return Weights(per_block("block"), per_block(TEXT), [0.0] * depth, ffns), whole


def saved_seconds(units: Iterable[Unit], path: Path | None) -> list[float]:
    """Seconds per call that each unit saves, from `latency`'s table; NaN without one."""
    units = list(units)
    if path is None:
        return [math.nan] * len(units)
    depth = 1 + int(tables.read(path, schemas.LATENCY)["block"].to_numpy().max())
    weights, _ = timing(path, depth)
    return [
        saved(
            [part.key for part in unit.parts if part.last > part.first],
            [(unit.first, unit.last)] if len(unit.parts) > 1 else [],
            [(part.first, stream) for part in unit.parts for stream in part.linear_ffn],
            weights,
        )
        for unit in units
    ]


def check_depth(path: Path, blocks: Iterable[int], depth: int) -> None:
    """Raises UserError if a table names blocks that a teacher of this depth lacks."""
    if max(blocks, default=0) >= depth:
        raise UserError(f"{path} names blocks that this teacher lacks; delete it and rerun")


def parameters_needed(total: int, fraction: float) -> int:
    """Parameters that must go so that at most fraction * total stay."""
    # The small addend keeps 0.55 * 20 = 11.000000000000002 or 10.999999999999998 at 11.
    return max(0, total - math.floor(fraction * total + 1e-6))


def amount(measure: str, value: float) -> str:
    """In words, such as 1,234 parameters."""
    if measure == "latency":
        return f"{1000 * value:.4g} ms per call"
    return f"{round(value):,} {measure}"


def amounts(values: Mapping[str, float]) -> str:
    """Several, in words."""
    return " and ".join(amount(*item) for item in values.items()) or "nothing"


def select(
    choices: Choices,
    weights: Mapping[str, Weights],
    needs: Mapping[str, float],
    pinned: Named = NOTHING,
    cap: int = routes.CAP,
) -> Plan:
    """The cheapest set that holds all that is pinned and saves what is needed in every measure.

    Exact for one measure and for several, unless a front of ppcl.routes outgrows `cap`: then
    `Plan.bound` says how low the least cost can be. Where the pinned set is enough, it is the plan.

    Args:
        choices: hold what is pinned.
        weights: of the measures blocks, parameters and all that `needs` names.
        needs: measure -> how much has to go, as `targets` gives it.

    Raises UserError, with what can be reached and the keys to relax, if nothing saves enough.
    """
    needs = {measure: need for measure, need in needs.items() if need > 0}
    counted = [weights[measure] for measure in needs]
    only = Choices(
        *(
            {item: cost for item, cost in offered.items() if item in wanted}
            for offered, wanted in (
                (choices.intervals, pinned.intervals),
                (choices.runs, pinned.runs),
                (choices.ffns, pinned.ffns),
            )
        )
    )
    for offered in (only, choices):
        arcs = graph(offered, pinned, counted, len(weights["blocks"].block))
        route = routes.cheapest(arcs, list(needs.values()), cap)
        if route:
            return _plan(route, weights)
    reached = dict(zip(needs, routes.most(arcs), strict=True))
    raise UserError(
        f"variants: the smallest budgets need {amounts(needs)} removed; what may be used removes "
        f"at most {amounts(reached)}{'' if len(needs) == 1 else ' (each on its own)'}. Lower "
        "intervals.cka_floor, width.cka_floor, intervals.protect_first or intervals.protect_last, "
        "shorten the forbid lists, raise those budgets or, with measured costs, "
        "sensitivity.longest, or set intervals.segmentation to optimal."
    )


def saved(
    intervals: Iterable[Ends], runs: Iterable[Ends], ffns: Iterable[Ffn], weights: Weights
) -> float:
    """What a set saves in one measure."""
    gone = {block for first, last in intervals for block in range(first + 1, last + 1)}
    total = sum(weights.block[block] for block in gone)
    for first, last in runs:
        total -= weights.output[last]
        total += sum(weights.text[b] for b in range(first + 1, last + 1) if b not in gone)
    return total + sum(weights.ffn.get(ffn, 0) for ffn in ffns)


def graph(choices: Choices, pinned: Named, weights: Sequence[Weights], depth: int) -> list[Arc]:
    """All sets as paths from (0, 1) to (depth, 1).

    Node (b, 1): blocks before b are decided and no text run is open. Node (b, 0, a, lent): a run
    from block a is open; `lent` if a part after its first has borrowed already, so that it may
    close. An arc is one part, with or without linear FFNs, or the end of a run.
    """
    steps = []  # (tail, head, part, whether it borrows)
    parts = _parts(choices, pinned, depth)
    runs = _agreeing(choices.runs, pinned.runs)
    outside = [p for p in parts if not any(overlap(p, run) for run in pinned.runs)]
    steps += [((f, 1), (t + 1, 1), (f, t), False) for f, t in outside]
    for start in {first for first, _ in runs}:
        furthest = max(last for first, last in runs if first == start)
        inside = [p for p in parts if start <= p[0] and p[1] <= furthest]
        for first, last in inside:
            head = (last + 1, 0, start, first > start)
            if first == start:
                steps.append(((first, 1), head, (first, last), False))
            else:
                steps += [((first, 0, start, lent), head, (first, last), True) for lent in (0, 1)]
    keyed = [
        (tail, head, *_step(part, borrows, linear, choices, weights))
        for tail, head, part, borrows in steps
        for linear in _linear(part[0], borrows, choices, pinned)
    ]
    for first, last in runs:
        gains = tuple(-w.output[last] for w in weights)
        ends = (last + 1, 0, first, 1), (last + 1, 1)
        keyed.append((*ends, choices.runs[first, last], gains, (("run", (first, last)),)))
    nodes = sorted({(0, 1), (depth, 1), *(k for arc in keyed for k in arc[:2])})
    number = {key: at for at, key in enumerate(nodes)}
    return [Arc(number[tail], number[head], *rest) for tail, head, *rest in keyed]


def _parts(choices: Choices, pinned: Named, depth: int) -> list[Ends]:
    """Kept blocks and intervals that agree with the pinned intervals and FFNs."""
    kept = [(block, block) for block in range(depth)]
    return [
        part
        for part in _agreeing([*kept, *choices.intervals], pinned.intervals)
        if not any(part[0] < block <= part[1] for block, _ in pinned.ffns)
    ]


def _agreeing(found: Iterable[Ends], pinned: Iterable[Ends]) -> list[Ends]:
    """Those that are pinned or apart from all that is."""
    return [ends for ends in found if all(ends == p or not overlap(ends, p) for p in pinned)]


def _linear(
    block: int, borrows: bool, choices: Choices, pinned: Named
) -> Iterator[tuple[Ffn, ...]]:
    """Every set of FFNs that may be linear in the part that starts at a block."""
    musts = [ffn for ffn in ((block, IMAGE), (block, TEXT)) if ffn in pinned.ffns]
    if borrows and (block, TEXT) in musts:
        return
    free = [
        ffn
        for ffn in ((block, IMAGE), (block, TEXT))
        if ffn in choices.ffns and ffn not in musts and not (borrows and ffn[1] == TEXT)
    ]
    for count in range(len(free) + 1):
        for chosen in itertools.combinations(free, count):
            yield (*musts, *chosen)


def _step(
    part: Ends, borrows: bool, linear: tuple[Ffn, ...], choices: Choices, weights: Sequence[Weights]
) -> tuple[float, tuple[float, ...], tuple]:
    """Cost, gains and choice of a part."""
    first, last = part
    chosen = tuple(("ffn", ffn) for ffn in linear)
    cost = sum(choices.ffns[ffn] for ffn in linear)
    if last > first:
        chosen += (("interval", part),)
        cost += choices.intervals[part]
    gains = tuple(
        sum(w.block[first + 1 : last + 1])
        + (w.text[first] if borrows else 0)
        + sum(w.ffn.get(ffn, 0) for ffn in linear)
        for w in weights
    )
    return cost, gains, chosen


def _plan(route: routes.Route, weights: Mapping[str, Weights]) -> Plan:
    members = [
        tuple(sorted(item for kind, item in route.chosen if kind == wanted))
        for wanted in ("interval", "run", "ffn")
    ]
    total = {measure: saved(*members, each) for measure, each in weights.items()}
    return Plan(*members, route.cost, route.bound, total)
