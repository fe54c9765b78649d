"""Pins and forbids: every contradiction is one message that names the key."""

import pytest

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Named
from ppcl.pruning.units import NewBlock, Unit
from ppcl.settings import Settings
from ppcl.transformer.family import IMAGE, TEXT


def given(**keys):
    """A complete config; keys such as text__require are those of width, modulation__require of
    modulation, others those of intervals."""
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
        require=[[3, 5]],
        forbid=[[3, 4]],
        text__require=[[2, 7]],
        ffn_image__require=[3],
        ffn_text__forbid=[0],
    )
    required, forbidden = constraints.of_config(Settings.of(settings), 8)
    assert (required.intervals, required.runs, required.ffns) == ({(3, 5)}, {(2, 7)}, {(3, IMAGE)})
    assert (forbidden.intervals, forbidden.runs) == ({(3, 4)}, set())
    assert forbidden.ffns == {(0, TEXT)}
    settings["modulation"] |= {"require": [6, 8], "forbid": [7]}
    required, forbidden = constraints.of_config(Settings.of(settings), 8)
    assert (required.ranks, forbidden.ranks) == ({6, 8}, {7})
    settings["width"]["enabled"] = False
    assert constraints.of_config(Settings.of(settings), 8)[0] == Named(
        frozenset({(3, 5)}), ranks=frozenset({6, 8})
    )
    settings["modulation"]["enabled"] = False
    assert constraints.of_config(Settings.of(settings), 8)[0] == Named(frozenset({(3, 5)}))
    settings["intervals"]["enabled"] = False
    assert constraints.of_config(Settings.of(settings), 8)[0] == constraints.NOTHING


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"require": [[5, 3]]}, r"intervals\.require: \[5,3\] has to be \[first, last\]"),
        ({"forbid": [[4, 4]]}, r"intervals\.forbid: \[4,4\] has to be"),
        ({"text__require": [[4, 4]]}, r"width\.text\.require: \[4,4\] has to be"),
        (
            {"require": [[3, 10]]},
            r"intervals\.require: \[3,10\] is beyond this teacher's blocks 0 to 9",
        ),
        ({"ffn_text__forbid": [10]}, r"width\.ffn_text\.forbid: block 10 is beyond"),
        (
            {"require": [[3, 5]], "forbid": [[3, 5]]},
            r"intervals\.require: \[3,5\] is also in interv",
        ),
        (
            {"ffn_image__require": [3], "ffn_image__forbid": [3]},
            r"width\.ffn_image\.require: block 3 is a",
        ),
        ({"require": [[3, 5], [5, 7]]}, r"intervals\.require: \[3,5\] and \[5,7\] overlap"),
        ({"text__require": [[3, 5], [0, 9]]}, r"width\.text\.require: \[0,9\] and \[3,5\] overlap"),
        (
            {"require": [[3, 5]], "text__require": [[4, 8]]},
            r"width\.text\.require: \[4,8\] and \[3,5\] of",
        ),
        (
            {"require": [[3, 5]], "text__require": [[3, 5]]},
            r"width\.text\.require: .* whole intervals and more",
        ),
        (
            {"require": [[3, 5]], "ffn_text__require": [4]},
            r"width\.ffn_text\.require: 4 goes with \[3,5\]",
        ),
        (
            {"text__require": [[3, 5]], "ffn_text__require": [5]},
            r"width\.ffn_text\.require: 5 has no text FFN",
        ),
        (
            {"require": [[0, 2]], "protect_first": 1},
            r"intervals\.require: \[0,2\] holds block 0, which",
        ),
        (
            {"ffn_image__require": [9], "protect_last": 1},
            r"width\.ffn_image\.require: block 9 holds block",
        ),
        (
            {"modulation__require": [11]},
            r"modulation\.require: block 11 is beyond .* 0 to 9, and 10, the last",
        ),
        (
            {"modulation__require": [10], "modulation__forbid": [10]},
            r"modulation\.require: block 10 is al",
        ),
        (
            {"require": [[3, 5]], "modulation__require": [4]},
            r"modulation\.require: 4 goes with \[3,5\] of int",
        ),
    ],
)
def test_contradictions(keys, message):
    with pytest.raises(UserError, match=message) as raised:
        constraints.of_config(Settings.of(given(**keys)), 10)
    assert "\n" not in str(raised.value)


def test_what_looks_like_a_contradiction_but_is_none():
    settings = given(
        require=[[3, 5], [6, 8]],
        text__require=[[3, 8]],
        ffn_image__require=[3, 6],
        ffn_text__require=[3],
        modulation__require=[0, 3, 6, 10],
        protect_first=3,
        protect_last=1,
    )
    assert len(constraints.of_config(Settings.of(settings), 10)[0].ffns) == 3
    assert constraints.of_config(Settings.of(given(require=[[80, 90]])))[
        0
    ].intervals  # a depth that is not known


def test_pins_of_a_teacher():
    settings = given(
        require=[[3, 5]],
        text__require=[[0, 2]],
        ffn_image__require=[1],
        ffn_text__require=[0],
        modulation__require=[6],
    )
    required, _ = constraints.of_config(Settings.of(settings), 6)
    fitting = {"seams": [0], "untouchable": (), "unseen": (), "ffns": {(1, IMAGE), (0, TEXT)}}
    fitting |= {"text_saved": [5] * 6, "modulated": {*range(7)}, "unread": 5}
    constraints.check(required, constraints.Prunable(**fitting))
    for changed, message in (
        ({"seams": [0, 4]}, r"intervals\.require: \[3,5\] .* of another kind from block 4 on"),
        ({"seams": [0, 2]}, r"width\.text\.require: \[0,2\] .* of another kind from block 2 on"),
        (
            {"untouchable": [1]},
            r"width\.text\.require: \[0,2\] .* block 1 of this teacher can't be",
        ),
        ({"unseen": [1, 4]}, r"intervals\.require: \[3,5\] .* block 4 does not pass the stream"),
        ({"text_saved": [0, 5, 5, 5, 5, 5]}, r"width\.text\.require: .* text stream of their own"),
        ({"ffns": {(0, TEXT)}}, r"width\.ffn_image\.require: block 1 can't be had"),
        (
            {"modulated": {*range(6)}},
            r"modulation\.require: block 6 can't be had: .* no modulation",
        ),
        (
            {"unread": 2},
            r"width\.ffn_text\.require: 0 has no text FFN in .* \[0,2\] of width",
        ),
    ):
        with pytest.raises(UserError, match=message):
            constraints.check(required, constraints.Prunable(**{**fitting, **changed}))


def test_a_unit_holds_what_is_named():
    run = Unit((NewBlock(3, 3, (), "source"), NewBlock(4, 6, (IMAGE,), "close", (3, 3))))
    for named, expected in (
        (Named(intervals=frozenset({(4, 6)})), True),
        (Named(intervals=frozenset({(4, 5), (3, 6)})), False),
        (Named(runs=frozenset({(3, 6)})), True),
        (Named(runs=frozenset({(2, 6)})), False),
        (Named(ffns=frozenset({(4, IMAGE)})), True),
        (Named(ffns=frozenset({(4, TEXT), (5, IMAGE)})), False),
        (constraints.NOTHING, False),
    ):
        assert constraints.holds(run, named) == expected
