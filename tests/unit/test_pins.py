"""Pins and forbids: every contradiction is one message that names the key."""

import pytest

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import pins
from ppcl.pruning.pins import Named
from ppcl.pruning.units import NewBlock, Unit
from ppcl.settings import Settings
from ppcl.transformer.family import IMAGE, TEXT


def given(**keys):
    """A complete config; keys such as text__pin are those of width, modulation__pin of modulation,
    others those of intervals."""
    wanted = {"intervals": {}, "width": {}, "modulation": {}}
    for key, value in keys.items():
        section, _, verb = key.rpartition("__")
        place = wanted.get(section or "intervals")
        if place is None:
            place = wanted["width"].setdefault(section, {})
        place[verb] = value
    return config.complete(wanted, "mine.yaml")


def test_lists_are_read_by_kind():
    settings = given(
        pin=[[3, 5]], forbid=[[3, 4]], text__pin=[[2, 7]], ffn_image__pin=[3], ffn_text__forbid=[0]
    )
    pinned, forbidden = pins.wishes(Settings.of(settings), 8)
    assert (pinned.intervals, pinned.runs, pinned.ffns) == ({(3, 5)}, {(2, 7)}, {(3, IMAGE)})
    assert (forbidden.intervals, forbidden.runs) == ({(3, 4)}, set())
    assert forbidden.ffns == {(0, TEXT)}
    settings["modulation"] |= {"pin": [6, 8], "forbid": [7]}
    pinned, forbidden = pins.wishes(Settings.of(settings), 8)
    assert (pinned.ranks, forbidden.ranks) == ({6, 8}, {7})
    settings["width"]["enabled"] = False
    assert pins.wishes(Settings.of(settings), 8)[0] == Named(
        frozenset({(3, 5)}), ranks=frozenset({6, 8})
    )
    settings["modulation"]["enabled"] = False
    assert pins.wishes(Settings.of(settings), 8)[0] == Named(frozenset({(3, 5)}))
    settings["intervals"]["enabled"] = False
    assert pins.wishes(Settings.of(settings), 8)[0] == pins.NOTHING


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pin": [[5, 3]]}, r"intervals\.pin: \[5,3\] has to be \[first, last\]"),
        ({"forbid": [[4, 4]]}, r"intervals\.forbid: \[4,4\] has to be"),
        ({"text__pin": [[4, 4]]}, r"width\.text\.pin: \[4,4\] has to be"),
        ({"pin": [[3, 10]]}, r"intervals\.pin: \[3,10\] is beyond this teacher's blocks 0 to 9"),
        ({"ffn_text__forbid": [10]}, r"width\.ffn_text\.forbid: block 10 is beyond"),
        ({"pin": [[3, 5]], "forbid": [[3, 5]]}, r"intervals\.pin: \[3,5\] is also in interv"),
        ({"ffn_image__pin": [3], "ffn_image__forbid": [3]}, r"width\.ffn_image\.pin: block 3 is a"),
        ({"pin": [[3, 5], [5, 7]]}, r"intervals\.pin: \[3,5\] and \[5,7\] overlap"),
        ({"text__pin": [[3, 5], [0, 9]]}, r"width\.text\.pin: \[0,9\] and \[3,5\] overlap"),
        ({"pin": [[3, 5]], "text__pin": [[4, 8]]}, r"width\.text\.pin: \[4,8\] and \[3,5\] of"),
        (
            {"pin": [[3, 5]], "text__pin": [[3, 5]]},
            r"width\.text\.pin: .* whole intervals and more",
        ),
        ({"pin": [[3, 5]], "ffn_text__pin": [4]}, r"width\.ffn_text\.pin: 4 goes with \[3,5\]"),
        ({"text__pin": [[3, 5]], "ffn_text__pin": [5]}, r"width\.ffn_text\.pin: 5 has no text FFN"),
        ({"pin": [[0, 2]], "protect_first": 1}, r"intervals\.pin: \[0,2\] holds block 0, which"),
        ({"ffn_image__pin": [9], "protect_last": 1}, r"width\.ffn_image\.pin: block 9 holds block"),
        (
            {"modulation__pin": [11]},
            r"modulation\.pin: block 11 is beyond .* 0 to 9, and 10, the last",
        ),
        (
            {"modulation__pin": [10], "modulation__forbid": [10]},
            r"modulation\.pin: block 10 is al",
        ),
        ({"pin": [[3, 5]], "modulation__pin": [4]}, r"modulation\.pin: 4 goes with \[3,5\] of int"),
    ],
)
def test_contradictions(keys, message):
    with pytest.raises(UserError, match=message) as raised:
        pins.wishes(Settings.of(given(**keys)), 10)
    assert "\n" not in str(raised.value)


def test_what_looks_like_a_contradiction_but_is_none():
    settings = given(
        pin=[[3, 5], [6, 8]],
        text__pin=[[3, 8]],
        ffn_image__pin=[3, 6],
        ffn_text__pin=[3],
        modulation__pin=[0, 3, 6, 10],
        protect_first=3,
        protect_last=1,
    )
    assert len(pins.wishes(Settings.of(settings), 10)[0].ffns) == 3
    assert pins.wishes(Settings.of(given(pin=[[80, 90]])))[0].intervals  # a depth that is not known


def test_pins_of_a_teacher():
    settings = given(
        pin=[[3, 5]], text__pin=[[0, 2]], ffn_image__pin=[1], ffn_text__pin=[0], modulation__pin=[6]
    )
    pinned, _ = pins.wishes(Settings.of(settings), 6)
    fitting = {"seams": [0], "untouchable": (), "unseen": (), "ffns": {(1, IMAGE), (0, TEXT)}}
    fitting |= {"text_saved": [5] * 6, "modulated": {*range(7)}, "unread": 5}
    pins.check(pinned, **fitting)
    for changed, message in (
        ({"seams": [0, 4]}, r"intervals\.pin: \[3,5\] .* of another kind from block 4 on"),
        ({"seams": [0, 2]}, r"width\.text\.pin: \[0,2\] .* of another kind from block 2 on"),
        ({"untouchable": [1]}, r"width\.text\.pin: \[0,2\] .* block 1 of this teacher can't be"),
        ({"unseen": [1, 4]}, r"intervals\.pin: \[3,5\] .* block 4 does not pass the stream"),
        ({"text_saved": [0, 5, 5, 5, 5, 5]}, r"width\.text\.pin: .* text stream of their own"),
        ({"ffns": {(0, TEXT)}}, r"width\.ffn_image\.pin: block 1 can't be had"),
        ({"modulated": {*range(6)}}, r"modulation\.pin: block 6 can't be had: .* no modulation"),
        (
            {"unread": 2},
            r"width\.ffn_text\.pin: 0 has no text FFN in .* \[0,2\] of width",
        ),
    ):
        with pytest.raises(UserError, match=message):
            pins.check(pinned, **{**fitting, **changed})


def test_a_unit_holds_what_is_named():
    run = Unit((NewBlock(3, 3, (), "source"), NewBlock(4, 6, (IMAGE,), "close", (3, 3))))
    for named, expected in (
        (Named(intervals=frozenset({(4, 6)})), True),
        (Named(intervals=frozenset({(4, 5), (3, 6)})), False),
        (Named(runs=frozenset({(3, 6)})), True),
        (Named(runs=frozenset({(2, 6)})), False),
        (Named(ffns=frozenset({(4, IMAGE)})), True),
        (Named(ffns=frozenset({(4, TEXT), (5, IMAGE)})), False),
        (pins.NOTHING, False),
    ):
        assert pins.holds(run, named) == expected
