"""Integer programs: which columns to take, so that they gain enough at the least total cost.

Solved by HiGHS through `scipy.optimize.milp`. Its tolerances are absolute, 1e-6, so costs are
scaled by the cost of the answer, and gains by what is needed. Of answers at the same cost, one with
fewer columns is preferred, and it is always the same one. Needs no torch.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

# The cost of the answer, and each need, after scaling.
SCALE = 1e5
# Once to twice this is added to each column's scaled cost, so that no two answers cost the same.
TIE = 2e-5
# Relative gap to the least cost that a solution may have while the scale is looked for.
ROUGH = 0.1
# Relative; for the rounding of sums.
ROUNDING = 1e-12

# (column -> coefficient, limit): the coefficients of the columns taken add up to at most the limit.
Row = tuple[Mapping[int, float], float]


@dataclass(frozen=True)
class Taken:
    """Numbers of the columns taken, ascending; their cost; a lower bound of the least cost."""

    columns: tuple[int, ...]
    cost: float
    bound: float


def cheapest(
    costs: Sequence[float],
    gains: Sequence[Sequence[float]],
    needs: Sequence[float],
    rows: Sequence[Row] = (),
    implied: Collection[int] = (),
) -> Taken | None:
    """The columns of least total cost that gain all that is needed and keep to the rows.

    Args:
        costs: of each column; none is negative.
        gains: of each column, in every measure.
        needs: in every measure; above zero.
        implied: numbers of columns that the rows decide, given the others; they break no ties.

    None if no columns do. Raises RuntimeError if the solver stops without an answer.
    """
    every, gained = np.array(costs, float), np.array(gains, float).reshape(len(costs), len(needs))
    if not len(every):
        return None if len(needs) else Taken((), 0.0, 0.0)
    rows = list(rows)
    for need, column in zip(needs, gained.T, strict=True):
        scaled = SCALE * column / need
        rows.append(({i: -g for i, g in enumerate(scaled) if g}, -SCALE * (1 - ROUNDING)))
    # Another number for each column, and a rather different one for its neighbours.
    ties = TIE * (1 + np.arange(len(every)) * (math.sqrt(5) - 1) / 2 % 1)
    ties[list(implied)] = 0
    # No column of the answer costs more than a whole solution: such columns are not offered.
    dearest, gap = every.max(), ROUGH
    while True:
        scale = SCALE / dearest if dearest > 0 else 1.0
        solution = _solved(scale * every + ties, rows, every <= dearest, gap)
        if solution is None:
            return None
        taken, low = solution
        cost = math.fsum(every[taken])
        if not all(map(enough, gained[taken].sum(axis=0), needs)):
            # Enough within the solver's tolerance alone: a row excludes this very solution.
            cut = {i: 1.0 if i in set(taken) else -1.0 for i in range(len(every))}
            rows.append((cut, len(taken) - 1))
        elif gap:
            gap = 0.0 if cost >= dearest / 8 else ROUGH
            dearest = cost
        else:
            bound = float(low - ties.sum()) / scale
            return Taken(tuple(taken.tolist()), cost, max(0.0, min(cost, bound)))


def most(gains: Sequence[float], rows: Sequence[Row]) -> float:
    """The largest total gain of columns that keep to the rows."""
    gained = np.array(gains, float)
    if not gained.any():
        return 0.0
    solution = _solved(-SCALE / np.abs(gained).max() * gained, rows, np.ones(len(gained), bool))
    return 0.0 if solution is None else math.fsum(gained[solution[0]])


def _solved(
    costs: np.ndarray, rows: Sequence[Row], offered: np.ndarray, gap: float = 0.0
) -> tuple[np.ndarray, float] | None:
    """Numbers of the columns taken, and a bound below their cost; None if the rows allow none."""
    start = np.cumsum([0, *(len(row) for row, _ in rows)])
    columns = np.array([i for row, _ in rows for i in row], int)
    values = np.array([v for row, _ in rows for v in row.values()], float)
    matrix = csr_array((values, columns, start), shape=(len(rows), len(costs)))
    result = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, offered.astype(float)),
        constraints=LinearConstraint(matrix, -np.inf, [most for _, most in rows]),
        options={"mip_rel_gap": gap},
    )
    if result.x is None:
        if result.status != 2:  # 2: infeasible
            raise RuntimeError(f"HiGHS stopped: {result.message}")
        return None
    bound = result.fun if result.mip_dual_bound is None else result.mip_dual_bound
    return np.flatnonzero(result.x > 0.5), bound


def enough(gained: float, need: float) -> bool:
    """Whether a sum of gains is what is needed, however it was rounded."""
    return gained >= need * (1 - ROUNDING)
