"""Turns least times of blocks into the table that selection by a latency budget adds up.

Selection takes the best of many sets that save almost the same, so another run whose times differ
by a few thousandths would choose another set. Three things keep that from happening:

- Only short runs are timed, some of which even a busy machine leaves undisturbed. The transformer
  is never run as a whole: its time is the sum of those of its blocks and of what is around them.
- Blocks of one list do the same work and get one time, the median of the least times of some of
  them: TIMED, from the list's first to its last.
- Every time is rounded to a multiple of 1 / STEPS of the time of a block of the first list. A time
  halfway between two multiples may still go either way.

Needs no torch.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Steps that the time of a block is divided into: what a narrow block saves is rounded to them.
STEPS = 32
# The time around the blocks is rounded to multiples of so many steps: a quarter of a block.
AROUND = 8
WHOLE = "block"  # the kind of a block that is whole
# Blocks of a list that are timed, at most. With 8 of 24 blocks timed, runs on a quiet machine
# differed by a step.
TIMED = 24
# Rounds are at most so many times evaluate.latency_repeats: selection goes by these times, and a
# round is short.
ROUNDS = 2
# Rounds end when the sum of least times fell by no more than the share FALL in the last SETTLED.
FALL, SETTLED = 1e-3, 5


@dataclass(frozen=True)
class Savings:
    """Seconds that parts of blocks save, by block and part, and those of the whole transformer."""

    parts: dict[tuple[int, str], float]
    transformer: float


def timed(
    kinds: Mapping[int, Collection[str]], lists: Sequence[Sequence[int]]
) -> list[tuple[int, str]]:
    """The pairs (block, kind) to time: of each list at most TIMED blocks, evenly spaced from the
    first to the last, in all their kinds. A kind that none of these blocks has is timed on at most
    TIMED of the blocks that have it. Every timed block is timed as WHOLE too, to compare with.

    Args:
        kinds: block -> its kinds: WHOLE, and the parts that can be left out of it.
        lists: numbers of the blocks that do the same work, in data-flow order.
    """
    to_time = set()
    for alike in lists:
        some = _spaced(alike)
        for kind in {kind for block in alike for kind in kinds[block]}:
            picked = [block for block in some if kind in kinds[block]]
            picked = picked or _spaced([block for block in alike if kind in kinds[block]])
            to_time |= {(block, one) for block in picked for one in (kind, WHOLE)}
    return sorted(to_time)


def _spaced(numbers: Sequence[int]) -> list[int]:
    places = np.linspace(0, len(numbers) - 1, min(TIMED, len(numbers))).round().astype(int)
    return [numbers[place] for place in places]


def savings(
    least: Mapping[tuple[int, str], float],
    around: float,
    kinds: Mapping[int, Collection[str]],
    lists: Sequence[Sequence[int]],
) -> Savings:
    """What each part of a block saves if it goes, from least times.

    Args:
        least: seconds of what was `timed`, by block and kind: WHOLE, or the part that a narrow one
            lacks.
        around: seconds of the transformer without its blocks.
        kinds, lists: as for `timed`.
    """
    step = float(np.median([least[b, WHOLE] for b in lists[0] if (b, WHOLE) in least])) / STEPS
    parts: dict[tuple[int, str], float] = {}
    for alike in lists:
        for kind in {kind for block in alike for kind in kinds[block]}:
            # What a block saves when it goes is all of its time; a narrow one, the difference.
            saved = [
                least[block, WHOLE] - (0 if kind == WHOLE else least[block, kind])
                for block in alike
                if (block, kind) in least
            ]
            saving = step * max(0, round(float(np.median(saved)) / step))
            parts |= {(block, kind): saving for block in alike if kind in kinds[block]}
    whole = sum(seconds for (_, kind), seconds in parts.items() if kind == WHOLE)
    return Savings(parts, whole + AROUND * step * round(around / (AROUND * step)))


def least_times(rounds: Iterable[Mapping[str, float]]) -> tuple[dict[str, float], bool]:
    """The least seconds of every run, and whether their sum settled, which ends the rounds.

    Args:
        rounds: seconds by run, of one round after the other.
    """
    sums: list[float] = []
    least: dict[str, float] = {}
    for times in rounds:
        least = {name: min(seconds, least.get(name, seconds)) for name, seconds in times.items()}
        sums.append(sum(least.values()))
        if settled(sums):
            return least, True
    return least, False


def settled(sums: Sequence[float]) -> bool:
    """Whether sums of least times, after each round, have stopped falling."""
    return len(sums) > SETTLED and sums[-1 - SETTLED] - sums[-1] <= FALL * sums[-1]
