"""What a config requires and forbids: intervals, text runs (Eq. 8), linear FFNs (Eq. 9), and
modulations of low rank.

Reads neither torch nor diffusers, so that Snakefiles can import it.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ppcl.errors import UserError
from ppcl.pruning.units import Unit
from ppcl.settings import Settings
from ppcl.transformer.family import IMAGE, TEXT

Ends = tuple[int, int]
Ffn = tuple[int, str]


@dataclass(frozen=True)
class Named:
    """What the `require` lists, or the `forbid` lists, of a config name.

    Attributes:
        intervals: (first, last) of intervals.
        runs: (first, last) of text runs.
        ffns: (block, stream) of FFNs that become linear.
        ranks: blocks whose modulations become low-rank, numbered as in `units.Modulation.block`.
    """

    intervals: frozenset[Ends] = frozenset()
    runs: frozenset[Ends] = frozenset()
    ffns: frozenset[Ffn] = frozenset()
    ranks: frozenset[int] = frozenset()


NOTHING = Named()


def of_config(settings: Settings, depth: int | None = None) -> tuple[Named, Named]:
    """What the config requires, and what it forbids. Lists of sections that are not enabled count
    as empty.

    Args:
        depth: number of blocks of the teacher, if known.

    Raises:
        UserError: a required item contradicts another required one, is forbidden, or holds a
            protected block; or the teacher lacks a block that a list names. Names the config key.
    """
    required, forbidden = (_named(settings, verb, depth) for verb in ("require", "forbid"))
    for key, one, other in _listed(required, forbidden):
        if both := sorted(one & other):
            raise UserError(
                f"{key}.require: {shown(both[0])} is also in {key}.forbid; remove it from one of "
                "them"
            )
    for key, ends in (("intervals", required.intervals), ("width.text", required.runs)):
        for left, right in itertools.pairwise(sorted(ends)):
            if overlap(left, right):
                raise UserError(
                    f"{key}.require: {shown(left)} and {shown(right)} overlap; drop one"
                )
    for run, interval in itertools.product(required.runs, required.intervals):
        if overlap(run, interval) and (run == interval or not within(interval, run)):
            raise UserError(
                f"width.text.require: {shown(run)} and {shown(interval)} of intervals.require "
                "contradict each other: a text run holds whole intervals and more; change one of "
                "them"
            )
    _check_required_ffns(required)
    for block, (first, last) in itertools.product(sorted(required.ranks), required.intervals):
        if first < block <= last:
            raise UserError(
                f"modulation.require: {block} goes with [{first},{last}] of intervals.require, "
                f"whose student starts from block {first}; require {first} or drop one of them"
            )
    kept = protected(settings, depth)
    for key, one, _ in _listed(required, forbidden):
        for item in sorted(one) if key != "modulation" else ():
            if inside := sorted(kept & set(_blocks(item))):
                raise UserError(
                    f"{key}.require: {shown(item)} holds block {inside[0]}, which intervals."
                    "protect_first or protect_last keeps; lower that or drop it"
                )
    return required, forbidden


def protected(settings: Settings, depth: int | None) -> set[int]:
    """Numbers of the blocks that intervals.protect_first and protect_last keep as they are; without
    a `depth`, those of protect_first alone."""
    first, last = settings.intervals.protect_first, settings.intervals.protect_last
    return {*range(first)} | (set() if depth is None else {*range(max(0, depth - last), depth)})


@dataclass(frozen=True)
class Prunable:
    """What can be pruned of a teacher.

    Attributes:
        seams: first block of each run of like blocks (`blocks.seams`).
        untouchable: blocks that can't be pruned.
        unseen: blocks without CKA in the stream that decides (similarity.streams), so that no
            interval may hold them.
        ffns: (block, stream) of the FFNs that were measured.
        text_saved: per block, how many parameters it saves if it borrows its text stream.
        modulated: blocks with a modulation of which a rank was measured, numbered as in
            `units.Modulation.block`.
        unread: the block after which nothing reads the text stream; None if there is none.
    """

    seams: Collection[int]
    untouchable: Collection[int]
    unseen: Collection[int]
    ffns: Collection[Ffn]
    text_saved: Sequence[float]
    modulated: Collection[int]
    unread: int | None


def check(required: Named, teacher: Prunable) -> None:
    """Raises UserError for requirements that this teacher can't meet."""
    for key, one, _ in _listed(required, required):
        for item in sorted(one):
            blocks = _blocks(item)
            hidden = [block for block in blocks if block in teacher.unseen]
            if key == "modulation":
                if item in teacher.modulated:
                    continue
                why = "there is no modulation matrix of its own that could have a rank on offer"
            elif cannot := [block for block in blocks if block in teacher.untouchable]:
                why = f"block {cannot[0]} of this teacher can't be pruned"
            elif key == "intervals" and (
                hidden := [block for block in blocks if block in teacher.unseen]
            ):
                why = f"block {hidden[0]} does not pass the stream of similarity.streams"
            elif crossed := [seam for seam in teacher.seams if seam in blocks[1:]]:
                why = f"the teacher's blocks are of another kind from block {crossed[0]} on"
            elif key == "width.text" and not all(teacher.text_saved[block] for block in blocks):
                why = "not all of these blocks have a text stream of their own"
            elif key.startswith("width.ffn") and item not in teacher.ffns:
                why = "this block has no such FFN"
            else:
                continue
            raise UserError(f"{key}.require: {shown(item)} can't be had: {why}; drop it")
    for first, last in required.runs:
        if last == teacher.unread and (first, TEXT) in required.ffns:
            raise UserError(
                f"width.ffn_text.require: {first} has no text FFN in the text run [{first},{last}] "
                "of width.text.require, after which nothing reads the text; drop one of them"
            )


def holds(unit: Unit, named: Named) -> bool:
    """Whether a unit holds any of the named intervals, text runs or FFNs."""
    ffns = {
        (new_block.first, stream)
        for new_block in unit.new_blocks
        for stream in new_block.linear_ffn
    }
    inside = [run for run in named.runs if within(run, (unit.first, unit.last))]
    ends = {(new_block.first, new_block.last) for new_block in unit.new_blocks}
    return bool(ffns & named.ffns or ends & named.intervals or inside)


def _named(settings: Settings, verb: str, depth: int | None) -> Named:
    width = settings.width
    sections = {
        "intervals": (settings.intervals, settings.intervals.enabled),
        "modulation": (settings.modulation, settings.modulation.enabled),
        "width.text": (width.text, width.enabled),
        "width.ffn_image": (width.ffn_image, width.enabled),
        "width.ffn_text": (width.ffn_text, width.enabled),
    }
    lists = {
        key: getattr(section, verb) if enabled else ()
        for key, (section, enabled) in sections.items()
    }
    for key, items in lists.items():
        for item in items:
            blocks = [item] if isinstance(item, int) else item
            if len(blocks) == 2 and blocks[0] >= blocks[1]:
                raise UserError(
                    f"{key}.{verb}: {shown(item)} has to be [first, last] with last > first"
                )
            # The number of blocks, as if it were a block, stands for the last AdaLN.
            more = key == "modulation"
            if depth is not None and max(blocks) >= depth + more:
                raise UserError(
                    f"{key}.{verb}: {shown(item)} is beyond this teacher's blocks 0 to "
                    f"{depth - 1}{f', and {depth}, the last modulation' if more else ''}"
                )
    linear = [(b, IMAGE) for b in lists["width.ffn_image"]]
    linear += [(b, TEXT) for b in lists["width.ffn_text"]]
    return Named(
        frozenset(map(tuple, lists["intervals"])),
        frozenset(map(tuple, lists["width.text"])),
        frozenset(linear),
        frozenset(lists["modulation"]),
    )


def _listed(one: Named, other: Named) -> Iterator[tuple[str, frozenset, frozenset]]:
    """For each kind of item: its config key, and the items of `one` and of `other`."""
    yield "intervals", one.intervals, other.intervals
    yield "width.text", one.runs, other.runs
    for stream in (IMAGE, TEXT):
        ours, theirs = (
            frozenset(f for f in named.ffns if f[1] == stream) for named in (one, other)
        )
        yield f"width.ffn_{stream}", ours, theirs
    yield "modulation", one.ranks, other.ranks


def _check_required_ffns(required: Named) -> None:
    for block, stream in sorted(required.ffns):
        key = f"width.ffn_{stream}.require: {block}"
        for first, last in required.intervals:
            if first < block <= last:
                raise UserError(
                    f"{key} goes with [{first},{last}] of intervals.require, whose student starts "
                    f"from block {first}; require {first} or drop one of them"
                )
        for first, last in required.runs:
            if stream == TEXT and first < block <= last:
                raise UserError(
                    f"{key} has no text FFN of its own in the text run [{first},{last}] of "
                    "width.text.require; drop one of them"
                )


def _blocks(item: Ends | Ffn | int) -> range:
    """The blocks of an interval or a text run, or the one block of an FFN or a modulation."""
    first, last = (item, item) if isinstance(item, int) else item
    return range(first, (first if isinstance(last, str) else last) + 1)


def shown(item: Ends | Ffn | list[int] | int) -> str:
    if isinstance(item, int) or isinstance(item[1], str):
        return f"block {item if isinstance(item, int) else item[0]}"
    return f"[{item[0]},{item[1]}]"


def overlap(one: Ends, other: Ends) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def within(inner: Ends, outer: Ends) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
