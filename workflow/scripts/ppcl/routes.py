"""The cheapest path through a graph without cycles that gains enough on its way.

Selection over the depth of a model, and the choice of units for a variant, are this problem. At
each node the ways to it that may still become the answer are kept: the Pareto front of gains and
cost. Two rules keep the fronts small and the answer exact. A way is dropped if another to the same
node gains no less and costs no more; and if even the relaxed rest of the path, in which a price per
unit of gain (a Lagrange multiplier) replaces the need, would make it dearer than a path that is
known already. Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Ways kept at a node. Larger fronts are thinned on a grid: the only step that is not exact.
CAP = 20_000
# Relative; far above the rounding of sums, far below any cost that was measured.
SLACK = 1e-9


@dataclass(frozen=True)
class Arc:
    """From node `tail` to a later one. `chosen` is given back if the path takes it."""

    tail: int
    head: int
    cost: float
    gains: tuple[float, ...]
    chosen: tuple = ()


@dataclass(frozen=True)
class Route:
    """A path from node 0 to the last one; `chosen` of all its arcs, in order.

    bound: no path that gains enough costs less; equal to the cost unless a front was thinned.
    """

    cost: float
    gains: tuple[float, ...]
    chosen: tuple
    bound: float


@dataclass(frozen=True)
class _Front:
    """Ways to one node: cost [n], gains [n, measures], and the arc and way that each came by."""

    cost: np.ndarray
    gains: np.ndarray
    arc: np.ndarray
    way: np.ndarray

    def only(self, kept: np.ndarray) -> "_Front":
        return _Front(self.cost[kept], self.gains[kept], self.arc[kept], self.way[kept])


def most(arcs: Sequence[Arc]) -> np.ndarray:
    """The largest gain of any path, of each measure on its own."""
    return _reach(_Graph(arcs))[0]


def cheapest(arcs: Sequence[Arc], needed: Sequence[float], cap: int = CAP) -> Route | None:
    """The path of least cost whose gains are at least `needed` in every measure.

    Exact as long as no front exceeds `cap` ways. Larger ones keep the cheapest way per cell of a
    grid over the gains; the answer then costs no more than the least cost for needs that are
    larger by one cell per node on the path, and `Route.bound` says how low the least cost can be.
    None if no path gains enough; with thinned fronts and several needs, also if none was found.
    """
    graph, needed = _Graph(arcs), np.array(needed, float)
    reach = _reach(graph)
    if not _enough(reach[0], needed):
        return None
    relaxed = _Relaxed(graph, needed)
    known, exact = relaxed.known, True
    fronts = [_Front(np.zeros(1), np.zeros((1, len(needed))), np.full(1, -1), np.full(1, -1))]
    for node in range(1, graph.nodes):
        front = _arriving(graph, fronts, node)
        front = front.only(_enough(front.gains + reach[node], needed))
        front = front.only(relaxed.lower(node, front) <= known + SLACK * abs(known))
        front = front.only(_undominated(front.cost, front.gains))
        finished = relaxed.finished(node, front)
        known = min(known, finished.min(initial=np.inf))
        if len(front.cost) > cap:
            exact = False
            front = front.only(_thinned(front, finished, cap))
        fronts.append(front)
    return _best(graph, fronts, needed, None if exact else relaxed.bound)


class _Graph:
    """Arcs by the node that they enter, and arrays of the arcs that leave each node."""

    def __init__(self, arcs: Sequence[Arc]):
        self.arcs = list(arcs)
        self.nodes = max(arc.head for arc in arcs) + 1
        self.measures = len(self.arcs[0].gains)
        self.entering: list[list[int]] = [[] for _ in range(self.nodes)]
        leaving: list[list[int]] = [[] for _ in range(self.nodes)]
        for number, arc in enumerate(self.arcs):
            self.entering[arc.head].append(number)
            leaving[arc.tail].append(number)
        costs = np.array([arc.cost for arc in self.arcs])
        gains = np.array([arc.gains for arc in self.arcs], float)
        heads = np.array([arc.head for arc in self.arcs])
        self.costs, self.gains = costs, gains
        self.leaving = [(heads[numbers], costs[numbers], gains[numbers]) for numbers in leaving]


def _reach(graph: _Graph) -> np.ndarray:
    """The largest gain from every node to the goal [nodes, measures]; -inf where no way leads."""
    reach = np.full((graph.nodes, graph.measures), -np.inf)
    reach[-1] = 0
    for node in reversed(range(graph.nodes - 1)):
        heads, _, gains = graph.leaving[node]
        reach[node] = (gains + reach[heads]).max(axis=0, initial=-np.inf)
    return reach


def _enough(gains: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """Whether `gains` [..., measures] are enough, but for the rounding of their sums."""
    return (gains >= needed - 1e-12 * np.abs(needed)).all(axis=-1)


class _Relaxed:
    """The rest of the path where each unit of gain is paid for instead of being needed.

    For prices p >= 0 no path that gains enough costs less than
    min over paths of (cost - p gains) + p needed. The prices are searched for the best bound.
    """

    def __init__(self, graph: _Graph, needed: np.ndarray):
        self.graph, self.needed = graph, needed
        prices = self._search()
        self.prices = prices
        self.value, self.cost, self.gains = self._rest(prices)
        # What rounding can add to a bound.
        self.margin = 1e-13 * (prices @ np.abs(needed) + np.abs(self.value[0]))
        self.bound = float((self.value[0] + prices @ needed - self.margin).max())
        self.known = float(self._paid(0).min())

    def lower(self, node: int, front: _Front) -> np.ndarray:
        """What each way costs at least once it is finished and gains enough."""
        owed = (self.needed - front.gains) @ self.prices.T - self.margin
        return front.cost + (owed + self.value[node]).max(axis=1, initial=-np.inf)

    def finished(self, node: int, front: _Front) -> np.ndarray:
        """What each way costs if it is finished by the best of the relaxed rests; inf if none
        gains enough."""
        best = np.full(len(front.cost), np.inf)
        for cost, gains in zip(self.cost[node], self.gains[node], strict=True):
            total = np.where(_enough(front.gains + gains, self.needed), front.cost + cost, np.inf)
            best = np.minimum(best, total)
        return best

    def _paid(self, node: int) -> np.ndarray:
        return np.where(_enough(self.gains[node], self.needed), self.cost[node], np.inf)

    def _rest(self, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """min (cost - prices gains) from each node to the goal [nodes, prices], and the cost and
        gains [nodes, prices, measures] of the path that has it."""
        count = len(prices)
        value = np.full((self.graph.nodes, count), np.inf)
        cost = np.full(value.shape, np.inf)
        gains = np.zeros((*value.shape, self.graph.measures))
        value[-1] = cost[-1] = 0
        each = np.arange(count)
        for node in reversed(range(self.graph.nodes - 1)):
            heads, costs, gained = self.graph.leaving[node]
            if not len(heads):
                continue
            totals = costs[:, None] - gained @ prices.T + value[heads]
            best = totals.argmin(axis=0)
            value[node] = totals[best, each]
            cost[node] = costs[best] + cost[heads[best], each]
            gains[node] = gained[best] + gains[heads[best], each]
        return value, cost, gains

    def _search(self) -> np.ndarray:
        """Prices [rows, measures]: zero, the best found, and those of the cheapest known path.

        The bound is concave in the prices: a wide scan, then ever smaller random steps.
        """
        random = np.random.default_rng(0)
        zero = np.zeros((1, len(self.needed)))
        scale = np.maximum(np.abs(self.needed), np.abs(self.graph.gains).max(axis=0))
        unit = np.abs(self.graph.costs).sum() / np.where(scale > 0, scale, 1)
        tried, bounds, paid = [], [], []

        def look(prices: np.ndarray) -> None:
            value, cost, gains = self._rest(prices)
            tried.extend(prices)
            bounds.extend(value[0] + prices @ self.needed)
            paid.extend(np.where(_enough(gains[0], self.needed), cost[0], np.inf))

        look(np.concatenate([zero, unit * 2.0 ** np.arange(-40, 41)[:, None]]))
        step = 0.7
        for _ in range(24):
            best = int(np.argmax(bounds))
            look(tried[best] * np.exp(step * random.standard_normal((12, len(self.needed)))))
            step *= 1.0 if max(bounds) > bounds[best] else 0.75
        order = np.argsort(bounds, kind="stable")[::-1][:12]
        return np.array([*zero, *(tried[i] for i in order), tried[int(np.argmin(paid))]])


def _arriving(graph: _Graph, fronts: list[_Front], node: int) -> _Front:
    """Every way to a node: those to the tails of the arcs that enter it, and that arc."""
    found = [(np.zeros(0), np.zeros((0, graph.measures)), np.zeros(0, int), np.zeros(0, int))]
    for number in graph.entering[node]:
        tail = fronts[graph.arcs[number].tail]
        count = len(tail.cost)
        cost, gains = tail.cost + graph.costs[number], tail.gains + graph.gains[number]
        found.append((cost, gains, np.full(count, number), np.arange(count)))
    return _Front(*map(np.concatenate, zip(*found, strict=True)))


def _undominated(cost: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Indices of the ways that no other one beats, cheapest first; of equals, one stays."""
    order = np.lexsort((*-gains.T, cost))
    if gains.shape[1] == 0 or not len(order):
        return order[:1]
    if gains.shape[1] == 1:
        so_far = np.maximum.accumulate(gains[order, 0])
        return order[np.r_[True, so_far[1:] > so_far[:-1]]]
    kept = np.zeros(0, int)
    for start in range(0, len(order), 512):
        chunk = order[start : start + 512]
        if len(kept):
            beaten = (gains[kept][None] >= gains[chunk][:, None]).all(axis=2).any(axis=1)
            chunk = chunk[~beaten]
        inside = (gains[chunk][None] >= gains[chunk][:, None]).all(axis=2)
        earlier = np.tri(len(chunk), k=-1, dtype=bool)
        kept = np.concatenate([kept, chunk[~(inside & earlier).any(axis=1)]])
    return kept


def _thinned(front: _Front, finished: np.ndarray, cap: int) -> np.ndarray:
    """Indices of the cheapest way per cell of a grid over the gains, of `cap` cells at most, and of
    the way that the cheapest known path goes on from, so that an answer is never lost."""
    cells = int(cap ** (1 / front.gains.shape[1]))
    low, high = front.gains.min(axis=0), front.gains.max(axis=0)
    step = np.where(high > low, high - low, 1) / cells
    cell = np.minimum((front.gains - low) // step, cells - 1)
    order = np.argsort(front.cost, kind="stable")
    _, first = np.unique(cell[order], axis=0, return_index=True)
    return np.union1d(order[first], finished.argmin())


def _best(
    graph: _Graph, fronts: list[_Front], needed: np.ndarray, bound: float | None
) -> Route | None:
    goal = fronts[-1]
    enough = np.flatnonzero(_enough(goal.gains, needed))
    if not len(enough):
        return None
    end = way = enough[goal.cost[enough].argmin()]
    node, chosen = graph.nodes - 1, []
    while node:
        arc, way = graph.arcs[fronts[node].arc[way]], fronts[node].way[way]
        chosen[:0] = arc.chosen
        node = arc.tail
    cost = float(goal.cost[end])
    return Route(
        cost, tuple(goal.gains[end].tolist()), tuple(chosen), cost if bound is None else bound
    )
