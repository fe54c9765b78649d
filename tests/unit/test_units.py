"""Units: which blocks go in together, whatever a selection holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcl.pruning.units import NewBlock, Unit, units_of

DEPTH = 14


@st.composite
def selections(draw):
    """Disjoint intervals, runs that cut none, linear FFNs of kept blocks and of intervals' starts,
    and the depth's end, after which nothing may read text."""
    cuts = draw(st.lists(st.booleans(), min_size=DEPTH - 1, max_size=DEPTH - 1))
    pieces, start = [], 0
    for block in range(DEPTH):
        if block == DEPTH - 1 or cuts[block]:
            pieces.append((start, block))
            start = block + 1
    runs, at = [], 0
    while at < len(pieces):
        length = draw(st.integers(1, 4))
        if length > 1 and at + length <= len(pieces):
            runs.append((pieces[at][0], pieces[at + length - 1][1]))
        at += length
    offered = [(first, stream) for first, _ in pieces for stream in ("image", "text")]
    linear = draw(st.lists(st.sampled_from(offered), unique=True))
    return pieces, draw(st.permutations(runs)), linear, draw(st.sampled_from([None, DEPTH - 1]))


@given(selections())
def test_units_of_any_selection(selection):
    pieces, runs, linear, unread = selection
    intervals = [piece for piece in reversed(pieces) if piece[1] > piece[0]]
    units = units_of(intervals, runs, linear, unread)
    every = [part for unit in units for part in unit.new_blocks]

    # In order, apart, and named after their ends.
    blocks = [block for part in every for block in range(part.first, part.last + 1)]
    assert blocks == sorted(set(blocks))
    assert [unit.name for unit in units] == [f"{u.first:02d}-{u.last:02d}" for u in units]

    # Every interval, every run and every linear FFN is there, and nothing else.
    assert {part.ends for part in every if part.last > part.first} == set(intervals)
    assert {(unit.first, unit.last) for unit in units if len(unit.new_blocks) > 1} == set(runs)
    for unit in units:
        assert len(unit.new_blocks) > 1 or unit.new_blocks[0].narrow or unit.first < unit.last
        assert unit.removed_blocks == sum(part.last - part.first for part in unit.new_blocks)
    without = {part.first for part in every if part.borrows or part.text == "lend"}
    wanted = {(b, s) for b, s in linear if not (s == "text" and b in without)}
    assert {(part.first, s) for part in every for s in part.linear_ffn} == wanted

    for unit in units:
        head, *others = unit.new_blocks
        lends = "lend" if unit.last == unread else "source"
        assert head.source is None and head.text == (lends if others else "own")
        end = unit.first - 1
        for part in unit.new_blocks:  # the new blocks of a run cover it
            assert part.first == end + 1
            end = part.last
        assert all(part.source == head.ends and part.borrows for part in others)
        closing = [part for part in others if part.text == "close"]
        assert closing == ([] if unit.last == unread else others[-1:])


def test_a_selection_with_everything():
    units = units_of([(8, 9), (1, 3)], [(5, 9)], [(0, "text"), (1, "image"), (8, "text")])
    source = (5, 5)
    run = (
        NewBlock(5, 5, text="source"),
        *(NewBlock(block, block, text="borrow", source=source) for block in (6, 7)),
        NewBlock(8, 9, text="close", source=source),
    )
    kept, student = NewBlock(0, 0, ("text",)), NewBlock(1, 3, ("image",))
    assert units == [Unit((kept,)), Unit((student,)), Unit(run)]
    assert [unit.name for unit in units] == ["00-00", "01-03", "05-09"]
    assert [unit.removed_blocks for unit in units] == [0, 2, 1]
    (unread,) = units_of([(8, 9)], [(5, 9)], [(5, "text"), (5, "image")], unread_after=9)
    assert unread.new_blocks[0] == NewBlock(5, 5, ("image",), "lend")
    assert {part.text for part in unread.new_blocks[1:]} == {"borrow"}
    assert units_of([]) == []


@pytest.mark.parametrize("streams", [["image", "text"], ["text", "image"]])
def test_a_part_is_the_same_in_whatever_order_its_streams_are_named(streams):
    assert units_of([], [], [(2, s) for s in streams]) == [
        Unit((NewBlock(2, 2, ("image", "text")),))
    ]
