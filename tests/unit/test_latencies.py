"""From least times to the table of savings, without a clock."""

import numpy as np
import pytest

from ppcl.evaluation import latencies
from ppcl.evaluation.latencies import AROUND, STEPS, WHOLE

# Two lists; a block of the second has no text, and its last one no image FFN either.
TRUE = {WHOLE: 7.0, "ffn_image": 5.4, "text": 5.27}
SECOND = {WHOLE: 4.0, "ffn_image": 2.9}
LISTS = [list(range(20)), list(range(20, 30))]


def times(seed: int = 0, noise: float = 0.0) -> dict:
    """Least times; other work only ever adds."""
    rng = np.random.default_rng(seed)
    every = [(b, kind, of) for b in LISTS[0] for kind, of in TRUE.items()]
    every += [(b, kind, of) for b in LISTS[1] for kind, of in SECOND.items()]
    least = {(b, kind): of * (1 + noise * rng.exponential()) for b, kind, of in every}
    del least[29, "ffn_image"]
    return least


KINDS = {block: [kind for one, kind in times() if one == block] for block, _ in times()}


def test_some_blocks_of_each_list_are_timed_from_the_first_to_the_last(monkeypatch):
    monkeypatch.setattr(latencies, "TIMED", 8)
    timed = latencies.timed(KINDS, LISTS)
    for alike in LISTS:
        whole = [block for block, kind in timed if kind == WHOLE and block in alike]
        assert len(whole) == latencies.TIMED
        assert (whole[0], whole[-1]) == (alike[0], alike[-1])
    images = [block for block, kind in timed if kind == "ffn_image" and block >= 20]
    assert len(images) == latencies.TIMED - 1 and images[-1] == 28  # the last has none
    assert all((block, WHOLE) in timed for block, _ in timed)
    rare = {block: (WHOLE, "text") if block == 1 else (WHOLE,) for block in range(40)}
    assert {(1, WHOLE), (1, "text")} < set(latencies.timed(rare, [list(range(40))]))
    assert latencies.timed({0: (WHOLE,), 1: (WHOLE, "text")}, [[0, 1]]) == [
        (0, WHOLE),
        (1, WHOLE),
        (1, "text"),
    ]


def test_what_is_not_timed_gets_what_its_list_has(monkeypatch):
    monkeypatch.setattr(latencies, "TIMED", 8)
    least = {key: value for key, value in times().items() if key in latencies.timed(KINDS, LISTS)}
    assert len(least) < len(times())
    assert latencies.savings(least, 13.0, KINDS, LISTS) == latencies.savings(
        times(), 13.0, KINDS, LISTS
    )


def test_savings_are_within_half_a_step():
    savings = latencies.savings(times(), 13.0, KINDS, LISTS)
    step = TRUE[WHOLE] / STEPS
    for block, kind in times():
        of = TRUE if block < 20 else SECOND
        expected = of[kind] if kind == WHOLE else of[WHOLE] - of[kind]
        assert savings.parts[block, kind] == pytest.approx(expected, abs=step / 2 + 1e-9)
        assert savings.parts[block, kind] / step == pytest.approx(
            round(savings.parts[block, kind] / step)
        )
    assert savings.parts.keys() == times().keys()
    blocks = sum(savings.parts[block, WHOLE] for one in LISTS for block in one)
    assert savings.transformer - blocks == pytest.approx(13.0, abs=AROUND * step / 2)


def test_the_shares_of_five_noisy_runs_are_the_same():
    """Also where all of a run is slower, and something else held up some blocks."""
    shares = []
    for seed in range(5):
        least = {k: (1 + 0.1 * seed) * v for k, v in times(seed, noise=0.01).items()}
        for block in (3, 8, 22):
            least[block, WHOLE] *= 1.5
        savings = latencies.savings(least, (1 + 0.1 * seed) * (14 + 0.1 * seed), KINDS, LISTS)
        shares.append({k: round(v / savings.transformer, 9) for k, v in savings.parts.items()})
    assert all(share == shares[0] for share in shares)


def test_no_part_saves_less_than_nothing():
    least = {(0, WHOLE): 1.0, (0, "text"): 1.2}
    assert latencies.savings(least, 0.0, {0: (WHOLE, "text")}, [[0]]).parts == {
        (0, WHOLE): 1.0,
        (0, "text"): 0.0,
    }


def test_rounds_end_when_times_have_settled():
    rounds = ({"a": 1 + 0.5**n, "b": 3.0 + (n % 2)} for n in range(20))
    least, settled = latencies.least_times(rounds)
    ended = 19 - len(list(rounds))
    assert settled and latencies.SETTLED < ended < 19
    assert least == {"a": 1 + 0.5**ended, "b": 3.0}
    assert 0.5 ** (ended - latencies.SETTLED) <= 4 * latencies.FALL < 0.5 ** (ended - 7)
    assert not latencies.least_times([{"a": 1.0}] * latencies.SETTLED)[1]
