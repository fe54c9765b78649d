"""What a model gives up: the cheapest set for its budgets, exactly.

Depth intervals and text runs are [first, last], inclusive. A text run (Eq. 8) holds kept blocks and
whole intervals, and at least two of them: the first keeps its text stream, the later ones borrow
it. An FFN (Eq. 9) becomes linear in a block that is kept or that starts an interval; a borrowed
text stream has none. A modulation matrix becomes a product of low rank. Some of its outputs may be
gone by then: with a linear FFN a part of them stays (most often half), a block that borrows its
text stream has no text matrix, and the first block of a run after which nothing reads text keeps a
third of it. Trained students go in as whole units, of which only the ranks are still chosen. The
cost of a set is the sum of its members' costs, and what is saved (parameters, blocks, seconds) adds
up as well: an integer program (ppcl.search.integer_programs), in which every member is a column and
every exclusion a row. All budgets of a config are met at once, in several measures if need be.
PPCL, arXiv 2511.16156, stages 1.2 and 2. Needs no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ppcl.errors import UserError
from ppcl.pruning.constraints import NOTHING, Ends, Ffn, Named
from ppcl.pruning.units import Matrix, Modulation, Unit
from ppcl.search import integer_programs, savings
from ppcl.search.budgets import amounts
from ppcl.search.savings import Weights
from ppcl.transformer.family import IMAGE, TEXT


@dataclass(frozen=True)
class Choices:
    """What may be given up, and the cost of each; no cost is negative.

    ranks: of each modulation matrix, the cost of every rank on offer. units: trained ones, by name,
    with their cost; on their blocks nothing else can be chosen but ranks. modulations: the matrices
    of `ranks`. unread: the block after which nothing reads the text stream, if there is one.
    """

    intervals: Mapping[Ends, float] = field(default_factory=dict)
    runs: Mapping[Ends, float] = field(default_factory=dict)
    ffns: Mapping[Ffn, float] = field(default_factory=dict)
    ranks: Mapping[Matrix, Mapping[int, float]] = field(default_factory=dict)
    units: Mapping[str, tuple[Unit, float]] = field(default_factory=dict)
    modulations: Mapping[Matrix, Modulation] = field(default_factory=dict)
    unread: int | None = None


@dataclass(frozen=True)
class Selection:
    """The chosen set in order of depth, its cost, and what it saves in every measure.

    bound: no set that meets the needs costs less; it lies below the cost by the solver's tolerance.
    """

    intervals: tuple[Ends, ...]
    runs: tuple[Ends, ...]
    ffns: tuple[Ffn, ...]
    cost: float
    bound: float
    saved: Mapping[str, float]
    ranks: Mapping[Matrix, int] = field(default_factory=dict)
    units: tuple[str, ...] = ()


def select(
    choices: Choices,
    weights: Mapping[str, Weights],
    needs: Mapping[str, float],
    required: Named = NOTHING,
    whose: str = "variants: the smallest budgets need",
) -> Selection:
    """The cheapest set that holds all that is required and saves what is needed in every measure.

    What is required may be held by a trained unit. Where the required set is enough, it is taken.

    Args:
        choices: hold what is required.
        weights: of the measures blocks, parameters and all that `needs` names.
        needs: measure -> how much has to go, as `targets` gives it.
        whose: how the message begins if nothing saves enough.

    Raises UserError, with what can be reached and the keys to relax, if nothing saves enough.
    """
    needs = {measure: need for measure, need in needs.items() if need > 0}
    columns = _Columns(choices, required, len(weights["blocks"].block))
    gains = {measure: columns.gains(weights[measure]) for measure in needs}
    wanted = list(needs.values())
    costs = [cost for *_, cost in columns.every]
    every = list(zip(*gains.values(), strict=True)) or [()] * len(costs)
    implied = [number for (kind, _), number in columns.number.items() if kind == "borrows"]
    cheapest = integer_programs.cheapest(costs, every, wanted, columns.rows, implied)
    if cheapest:
        return columns.selection(cheapest, weights)
    reached = {
        m: max(0.0, integer_programs.most(gained, columns.rows)) for m, gained in gains.items()
    }
    raise UserError(
        f"{whose} {amounts(needs)} removed; what may be used removes "
        f"at most {amounts(reached)}{'' if len(needs) == 1 else ' (each on its own)'}. Lower "
        "intervals.cka_floor, width.cka_floor, intervals.protect_first or intervals.protect_last, "
        "shorten the forbid lists, add lower ranks to modulation.ladder, raise those budgets or, "
        "with measured costs, sensitivity.longest, or set intervals.segmentation to optimal."
    )


# Names of columns: (kind, item). The item of `rank` is (matrix, rank, sixths of its outputs kept).
# `borrows` says that a block borrows its text stream: the runs and intervals taken decide that.
Column = tuple[str, Any]


class _Columns:
    """The integer program of a selection: a column for each member, a row for each exclusion."""

    def __init__(self, choices: Choices, required: Named, depth: int):
        self.choices = choices
        borrowers = {b for first, last in choices.runs for b in range(first + 1, last + 1)}
        self.every: list[tuple[str, Any, float]] = [
            *(("interval", ends, cost) for ends, cost in sorted(choices.intervals.items())),
            *(("run", ends, cost) for ends, cost in sorted(choices.runs.items())),
            *(("ffn", ffn, cost) for ffn, cost in sorted(choices.ffns.items())),
            *(("unit", name, cost) for name, (_, cost) in sorted(choices.units.items())),
            *(("borrows", block, 0.0) for block in sorted(borrowers)),
        ]
        self.number = {(kind, item): n for n, (kind, item, _) in enumerate(self.every)}
        self.rows: list[integer_programs.Row] = []
        self.holding, self.going, self.runs, self.ending = self._by_block(depth)
        self._exclude_overlaps(depth)
        for block in borrowers:
            self._borrow(block)
        for matrix in sorted(choices.ranks):
            self._low_rank(matrix, depth, matrix[0] in required.ranks)
        self._require(required)

    def gains(self, weights: Weights) -> list[float]:
        """What each column saves in one measure."""
        return [self._gain(kind, item, weights) for kind, item, _ in self.every]

    def selection(
        self, cheapest: integer_programs.Taken, weights: Mapping[str, Weights]
    ) -> Selection:
        taken = [self.every[column] for column in cheapest.columns]
        members: dict[str, list] = {
            kind: sorted(item for k, item, _ in taken if k == kind)
            for kind in ("interval", "run", "ffn", "unit", "rank")
        }
        saves = {
            measure: sum(self._gain(kind, item, each) for kind, item, _ in taken)
            for measure, each in weights.items()
        }
        return Selection(
            tuple(members["interval"]),
            tuple(members["run"]),
            tuple(members["ffn"]),
            cheapest.cost,
            cheapest.bound,
            saves,
            {matrix: rank for matrix, rank, _ in members["rank"]},
            tuple(sorted(members["unit"], key=lambda name: self.choices.units[name][0].first)),
        )

    def _gain(self, kind: str, item: Any, weights: Weights) -> float:
        if kind == "interval":
            return sum(weights.block[item[0] + 1 : item[1] + 1])
        if kind == "run":
            ends = item[1] == self.choices.unread
            return weights.source.get(item[0], 0) if ends else -weights.output[item[1]]
        if kind == "borrows":
            return weights.text[item]
        alone: dict[str, Mapping[Any, float]] = {
            "ffn": weights.ffn,
            "unit": weights.units,
            "rank": weights.ranks,
        }
        return alone[kind].get(item, 0)

    def _by_block(self, depth: int) -> tuple[list[list[int]], ...]:
        """For each block, columns of: units that hold it; intervals that remove it; runs that hold
        it; runs that start at it and end at `Choices.unread`."""
        lists: list[list[list[int]]] = [[[] for _ in range(depth)] for _ in range(4)]
        holding, going, runs, ending = lists
        for number, (kind, item, _) in enumerate(self.every):
            if kind == "unit":
                unit, _ = self.choices.units[item]
                for block in range(unit.first, unit.last + 1):
                    holding[block].append(number)
            elif kind == "interval":
                for block in range(item[0] + 1, item[1] + 1):
                    going[block].append(number)
            elif kind == "run":
                for block in range(item[0], item[1] + 1):
                    runs[block].append(number)
                if item[1] == self.choices.unread:
                    ending[item[0]].append(number)
        return holding, going, runs, ending

    def _at_most_one(self, columns: Iterable[int]) -> None:
        columns = dict.fromkeys(columns, 1.0)
        if len(columns) > 1:
            self.rows.append((columns, 1.0))

    def _only_with(self, columns: Iterable[int], others: Iterable[int]) -> None:
        """At most one of `columns`, and that only with one of `others`."""
        self.rows.append((dict.fromkeys(columns, 1.0) | dict.fromkeys(others, -1.0), 0.0))

    def _exclude_overlaps(self, depth: int) -> None:
        starting = [[] for _ in range(depth)]  # type: list[list[int]]
        for ends in self.choices.intervals:
            starting[ends[0]].append(self.number["interval", ends])
        for block in range(depth):
            going, held = self.going[block], self.holding[block]
            self._at_most_one([*starting[block], *going, *held])
            self._at_most_one([*self.runs[block], *held])
            # No run begins or ends inside an interval.
            runs = [(n, self.every[n][1]) for n in self.runs[block]]
            self._at_most_one([*going, *(n for n, (first, _) in runs if first == block)])
            if block:
                ended = [(n, self.every[n][1]) for n in self.runs[block - 1]]
                self._at_most_one([*going, *(n for n, (_, last) in ended if last == block - 1)])
            for stream in (IMAGE, TEXT):
                if ("ffn", (block, stream)) in self.number:
                    ffn = self.number["ffn", (block, stream)]
                    without = self._textless(block) if stream == TEXT else []
                    self._at_most_one([ffn, *going, *held, *without])
        for ends in self.choices.runs:
            if ends in self.choices.intervals:  # one new block, which would lend its text to nobody
                self._at_most_one([self.number["run", ends], self.number["interval", ends]])

    def _textless(self, block: int) -> list[int]:
        """Columns that remove what follows a block's text attention: it borrows its text stream, or
        is the first of a run that ends at `Choices.unread`."""
        borrows = self.number.get(("borrows", block))
        return [*([] if borrows is None else [borrows]), *self.ending[block]]

    def _borrow(self, block: int) -> None:
        """A block borrows if it is in a run, not as its first, and no interval removes it."""
        borrows, going = self.number["borrows", block], self.going[block]
        lent = [n for n in self.runs[block] if self.every[n][1][0] < block]
        self._only_with([borrows], lent)
        self._at_most_one([borrows, *going])
        self._only_with(lent, [borrows, *going])

    def _low_rank(self, matrix: Matrix, depth: int, required: bool) -> None:
        """Columns of a matrix: each rank with each share of its outputs that may be left."""
        block, modulation = matrix[0], self.choices.modulations[matrix]
        by_sixths: dict[int, list[int]] = {sixths: [] for sixths in (0, *modulation.shares)}
        if block < depth:
            lent = modulation.text and modulation.ffn  # else it does not make six outputs
            ffn = self.number.get(("ffn", (block, modulation.ffn)))
            borrows = self.number.get(("borrows", block)) if modulation.text else None
            by_sixths[0] += self.going[block]
            by_sixths[0] += [] if borrows is None else [borrows]
            by_sixths[2] += self.ending[block] if lent else []
            by_sixths[modulation.left] += [] if ffn is None else [ffn]
            for number in self.holding[block]:
                unit, _ = self.choices.units[self.every[number][1]]
                by_sixths[savings.sixths_left(unit, modulation, self.choices.unread)].append(number)
        ranks: dict[int, list[int]] = {}
        for sixths in modulation.shares:
            if sixths < 6 and not by_sixths[sixths]:
                continue
            ranks[sixths] = []
            for rank, cost in sorted(self.choices.ranks[matrix].items()):
                self.number["rank", (matrix, rank, sixths)] = len(self.every)
                ranks[sixths].append(len(self.every))
                self.every.append(("rank", (matrix, rank, sixths), cost))
            if sixths < 6:
                self._only_with(ranks[sixths], by_sixths[sixths])
        less = [n for sixths, numbers in by_sixths.items() if sixths < 6 for n in numbers]
        self._at_most_one([*less, *ranks[6]])
        if required:  # one of the ranks, unless the block borrows its text stream
            kept = [n for n in by_sixths[0] if n not in self.going[block]]
            kept = [n for n in kept if self.every[n][0] != "unit" or self._keeps(n, block)]
            self._at_least_one([*kept, *(n for columns in ranks.values() for n in columns)])

    def _keeps(self, number: int, block: int) -> bool:
        """Whether a block starts a new block of a unit."""
        return any(
            block == p.first for p in self.choices.units[self.every[number][1]][0].new_blocks
        )

    def _at_least_one(self, columns: Iterable[int]) -> None:
        self.rows.append((dict.fromkeys(columns, -1.0), -1.0))

    def _require(self, required: Named) -> None:
        """Whatever is required is taken, by itself or in a unit."""
        units = [(self.number["unit", name], u) for name, (u, _) in self.choices.units.items()]
        holding: dict[Column, list[int]] = {
            **{("interval", ends): [] for ends in required.intervals},
            **{("run", ends): [] for ends in required.runs},
            **{("ffn", ffn): [] for ffn in required.ffns},
        }
        for number, unit in units:
            has: set[Column] = {("interval", new_block.ends) for new_block in unit.new_blocks}
            has |= {("ffn", (p.first, stream)) for p in unit.new_blocks for stream in p.linear_ffn}
            has |= {("run", (unit.first, unit.last))} if len(unit.new_blocks) > 1 else set()
            for column in has & holding.keys():
                holding[column].append(number)
        for column, numbers in sorted(holding.items()):
            if column in self.number:
                numbers.append(self.number[column])
            self._at_least_one(numbers)
