"""Better sets of intervals than sums of prices find: by the measured error of whole sets.

The error of a set is not the sum of its members' errors: students that stand for neighbouring
blocks spoil each other's inputs. A local search starts from a set and moves one removed block at a
time, wherever that lowers the error of the model with the whole set plugged in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ppcl.pins import Ends

Set = tuple[Ends, ...]


def removed(intervals: Iterable[Ends]) -> frozenset[int]:
    """The blocks that go: all of an interval but its first."""
    return frozenset(b for first, last in intervals for b in range(first + 1, last + 1))


def intervals_of(gone: Iterable[int]) -> Set:
    """The intervals that remove these blocks, each joined to the kept block before it."""
    found: list[list[int]] = []
    for block in sorted(gone):
        if found and found[-1][1] == block - 1:
            found[-1][1] = block
        else:
            found.append([block - 1, block])
    return tuple((first, last) for first, last in found)


def neighbours(chosen: Set, costs: Mapping[Ends, float], runs: Sequence[range]) -> list[Set]:
    """Sets that remove another block in place of one, cheapest sum of costs first.

    Args:
        costs: of every interval on offer. runs: where intervals may lie.
    """
    gone = removed(chosen)
    possible = {block for run in runs for block in run[1:]}
    found = {intervals_of((gone - {out}) | {into}) for out in gone for into in possible - gone}
    offered = [each for each in found if all(ends in costs for ends in each)]
    return sorted(offered, key=lambda each: (sum(costs[ends] for ends in each), each))


def refine(
    chosen: Sequence[Ends],
    costs: Mapping[Ends, float],
    runs: Sequence[range],
    error: Callable[[Set], float],
    tries: int,
) -> Set:
    """The set that steepest descent over `neighbours` ends with, as many blocks removed.

    Args:
        error: of the model with a set plugged in; asked once for each.
        tries: how many neighbours a step measures, those of least sum of costs.
    """
    best = tuple(sorted(chosen))
    known = {best: error(best)}
    while True:
        near = neighbours(best, costs, runs)[:tries]
        known |= {each: error(each) for each in near if each not in known}
        better = min(near, key=known.__getitem__, default=best)
        if known[better] >= known[best]:
            return best
        best = better
