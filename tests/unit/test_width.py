"""Stage 2's least squares against literal ones, and blocks that are linear by construction."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from ppcl.closed_forms import linear_map_candidates, linear_map_fits, linear_maps
from ppcl.closed_forms.linear_maps import Map
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, Unit, new_blocks_of, units_of
from ppcl.settings import WidthSettings
from ppcl.training import prices
from ppcl.transformer import blocks, call_tables, calls
from support import tiny

CPU = torch.device("cpu")
D = 32  # channels of tiny's transformer


def recorded(transformer, path):
    """24 padded calls to fit on and 8 that are held out: more text tokens than channels."""
    tables = []
    for heldout, lengths, seed in ((False, (5, 3) * 12, 0), (True, (4, 5) * 4, 1)):
        call = tiny.arguments(lengths, seed)
        rows = tiny.places(len(lengths), heldout=heldout)
        tables += call_tables.to_tables(call, transformer(**call)[0], rows)
    call_tables.write(path, [table.schema for table in tables], tables, {})
    return calls.Reader(path)


@pytest.fixture(scope="module")
def many(teacher, tmp_path_factory):
    return recorded(teacher, tmp_path_factory.mktemp("width") / "calls.parquet")


def rows_of(reader):
    return reader.rows(heldout=False), reader.rows(heldout=True)


# ---- least squares


@pytest.fixture(scope="module")
def wholes(teacher):
    """Two students of depth, and a kept block between them."""
    student = tiny.transformer(blocks=2, seed=5, scale=0.2).transformer_blocks
    return {(0, 1): student[0], (2, 2): teacher.transformer_blocks[2], (3, 4): student[1]}


MAPS = [
    Map("ffn/image", (0, 1), (0, 1)),
    Map("ffn/text", (0, 1), (0, 1)),
    Map("ffn/image", (2, 2), (2, 2)),
    Map("text/input", (0, 1), (2, 2)),
    Map("text/input", (0, 1), (3, 4)),
    Map("text/output", (0, 1), (3, 4)),
]
OPTIONS = WidthSettings.of({"batch_size": 7, "ridge": 0})


@torch.no_grad()
def literal_tokens(transformer, wholes, one, batch):
    """Tokens x and y of a map, float64 [tokens, channels], by hooks of this test alone."""
    given, returned, inside, handles = {}, {}, {}, []
    for index, block in enumerate(transformer.transformer_blocks):
        handles += [
            block.register_forward_pre_hook(
                lambda _m, _args, kwargs, i=index: given.update({i: kwargs}), with_kwargs=True
            ),
            block.register_forward_hook(lambda _m, _a, out, i=index: returned.update({i: out})),
        ]
    transformer(**batch.arguments)
    for handle in handles:
        handle.remove()

    def run(ends):
        block, seen = wholes[ends], {}
        handles = [
            block.img_norm2.register_forward_pre_hook(lambda _m, a: seen.update(image=a[0])),
            block.txt_norm2.register_forward_pre_hook(lambda _m, a: seen.update(text=a[0])),
            block.attn.register_forward_pre_hook(
                lambda _m, _a, kwargs: seen.update(z=kwargs["encoder_hidden_states"]),
                with_kwargs=True,
            ),
        ]
        block(**given[ends[0]])
        for handle in handles:
            handle.remove()
        return seen

    inside = {ends: run(ends) for ends in {one.source, one.target}}
    x, y = {
        "ffn/image": lambda: (inside[one.target]["image"], returned[one.target[1]][1]),
        "ffn/text": lambda: (inside[one.target]["text"], returned[one.target[1]][0]),
        "text/input": lambda: (inside[one.source]["z"], inside[one.target]["z"]),
        "text/output": lambda: (returned[one.source[1]][0], returned[one.target[1]][0]),
    }[one.kind]()
    if one.kind != "ffn/image":
        real = batch.arguments["encoder_hidden_states_mask"].bool()
        x, y = x[real], y[real]
    return x.reshape(-1, D).double().numpy(), y.reshape(-1, D).double().numpy()


@pytest.fixture(scope="module")
def fits(teacher, many, wholes):
    return linear_map_fits.fit(tiny.context(teacher, many), wholes, MAPS, rows_of(many), OPTIONS)


def test_maps_are_literal_least_squares_with_all_tokens_in_memory(teacher, many, wholes, fits):
    assert list(fits) == MAPS
    for one, fit in fits.items():
        (x, y), (x_held, y_held) = (
            literal_tokens(teacher, wholes, one, many.batch(rows)) for rows in rows_of(many)
        )
        assert len(x) == (24 * 16 if one.kind == "ffn/image" else 12 * 8)
        with_one = np.hstack([x, np.ones((len(x), 1))])
        solution = np.linalg.lstsq(with_one, y - x, rcond=None)[0]
        error = np.linalg.norm(fit.probe.weight - solution[:-1].T) / np.linalg.norm(solution[:-1])
        assert error < 1e-3, one
        np.testing.assert_allclose(fit.probe.bias, solution[-1], atol=1e-3 * np.abs(solution).max())
        residual = y_held - x_held
        left = residual - x_held @ solution[:-1] - solution[-1]
        spread = np.square(residual - residual.mean(0)).sum()
        assert fit.error_heldout == pytest.approx(np.square(left).sum() / spread, rel=1e-3)
        assert fit.error_heldout > 1e-4


def test_passes_and_batches_change_nothing(teacher, many, wholes, fits, monkeypatch):
    monkeypatch.setattr(linear_map_fits, "SUMS_BYTES", 1)
    runs = []
    handle = teacher.register_forward_pre_hook(lambda *_: runs.append(1))
    one_by_one = linear_map_fits.fit(
        tiny.context(teacher, many), wholes, MAPS, rows_of(many), OPTIONS
    )
    handle.remove()
    assert len(runs) == len(MAPS) * (4 + 2)  # 24 and 8 calls, 7 at a time
    monkeypatch.setattr(linear_map_fits, "SUMS_BYTES", 2 * 4 * 8 * D**2)
    twos = linear_map_fits.fit(
        tiny.context(teacher, many), wholes, MAPS[::-1], rows_of(many), OPTIONS
    )
    larger = OPTIONS.replace(batch_size=24)
    at_once = linear_map_fits.fit(
        tiny.context(teacher, many), wholes, [*MAPS, *MAPS], rows_of(many), larger
    )
    for one, fit in fits.items():
        for same in (one_by_one, twos):
            np.testing.assert_array_equal(same[one].probe.weight, fit.probe.weight)
            assert same[one].error_heldout == fit.error_heldout
        assert at_once[one].error_heldout == pytest.approx(fit.error_heldout, rel=1e-3)


def test_calls_to_fit_and_to_judge_on_are_apart(many):
    fitted, judged = linear_map_fits.fit_rows(many, WidthSettings.of({"fit_rows": 8}), 3)
    assert len(fitted) == len(set(fitted)) == 8 and len(judged) == 2
    assert set(fitted) <= set(many.rows(heldout=False))
    assert set(judged) <= set(many.rows(heldout=True))
    assert set(linear_map_fits.fit_rows(many, WidthSettings.of({"fit_rows": 8}), 4)[0]) != set(
        fitted
    )
    assert len(linear_map_fits.fit_rows(many, WidthSettings.of({"fit_rows": 10**6}), 3)[0]) == 24


# ---- planted


def planted():
    """FFNs of block 1 are linear maps; blocks 3 to 5 leave the text alone, and what their
    attention gets of it are linear maps of each other."""
    transformer = tiny.transformer(blocks=6, scale=0.2)
    one = transformer.transformer_blocks[1]
    with torch.no_grad():
        for name in ("img", "txt"):
            modulation = getattr(one, f"{name}_mod")[1]
            modulation.weight[3 * D :] = 0
            modulation.bias[3 * D :] = torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(D)
            setattr(one, f"{name}_norm2", nn.Identity())
            linear = nn.Linear(D, D)
            linear.weight.normal_(0, 0.2)
            setattr(one, f"{name}_mlp", linear)
        for block in transformer.transformer_blocks[3:]:
            modulation = block.txt_mod[1]
            modulation.weight.zero_()
            for start in (2 * D, 5 * D):
                modulation.bias[start : start + D] = 0  # gates
    return transformer.requires_grad_(False)


def narrow_unit(transformer, unit, reader):
    wholes = {
        part.ends: m for part, m in linear_maps.whole_blocks(transformer, unit.new_blocks).items()
    }
    maps = [one for part in unit.new_blocks for one in linear_maps.maps_of(part)]
    fits = linear_map_fits.fit(
        tiny.context(transformer, reader), wholes, maps, rows_of(reader), OPTIONS
    )
    made = linear_maps.closed(
        transformer, unit.new_blocks, {one: fit.probe for one, fit in fits.items()}
    )
    return made, max(fit.error_heldout for fit in fits.values())


def test_planted_redundancy_is_found_and_costs_nothing(tmp_path):
    transformer = planted()
    reader = recorded(transformer, tmp_path / "calls.parquet")
    everything_alike = np.ones((6, 6))
    candidates = linear_map_candidates.ffn_candidates(transformer)
    candidates += linear_map_candidates.text_candidates(transformer, everything_alike, 3, 0.5)
    free, costs = set(), {}
    for unit in candidates:
        made, fit_error = narrow_unit(transformer, unit, reader)
        rows = reader.rows(heldout=True)
        key = (unit.name, *unit.new_blocks[0].linear_ffn)
        costs[key] = prices.error(tiny.context(transformer, reader), made, rows, 8)
        if fit_error < 1e-6:
            free.add(key)
    text = {("03-04",), ("04-05",), ("03-05",)}
    ffns = {("01-01", "image"), ("01-01", "text"), *((f"0{i}-0{i}", "text") for i in (3, 4, 5))}
    # Block 1 has weights of other shapes, so no run reaches into it.
    assert len(costs) == 12 + 3 + 2 and free == text | ffns
    assert max(costs[key] for key in free) < 1e-8
    # Nothing reads the last block's text, so only its image matters.
    assert min(cost for key, cost in costs.items() if key not in free) > 1e-5


def test_planted_units_cost_nothing_together(tmp_path, accelerator):
    transformer = planted()
    reader = recorded(transformer, tmp_path / "calls.parquet")
    units = units_of(
        [], [(3, 5)], [(1, "image"), (1, "text")], linear_maps.unread_after(transformer)
    )
    made = linear_map_fits.start(
        tiny.context(transformer, reader),
        students.start(transformer, new_blocks_of(units), "first"),
        OPTIONS.replace(fit_rows=24),
    )
    rows = reader.rows(heldout=True)
    assert prices.error(tiny.context(transformer, reader), made, rows, 8) < 1e-8
    # And they survive their file, to the bit.
    path = tmp_path / "students.safetensors"
    students.save(path, made, {})
    back = students.load(path, transformer, made)
    assert list(back) == list(made)
    for part, student in back.items():
        state = made[part].state_dict()
        assert (
            student.narrowed == made[part].narrowed and state.keys() == student.state_dict().keys()
        )
        assert all(torch.equal(value, state[k]) for k, value in student.state_dict().items())
    batch = reader.batch(rows)
    with torch.no_grad():
        answers = [students.plugged(transformer, s)[0](**batch.arguments)[0] for s in (made, back)]
    assert torch.equal(*answers)


# ---- candidates and sizes


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_text_candidates_are_all_runs_of_alike_blocks(teacher, longest, seed):
    rng = np.random.default_rng(seed)
    cka = rng.choice([0.2, 0.6, 0.9, np.nan], size=(6, 6), p=[0.1, 0.2, 0.6, 0.1])
    candidates = linear_map_candidates.text_candidates(teacher, cka, longest, 0.5)
    expected = {
        (first, last)
        for first in range(6)
        for last in range(first + 1, min(6, first + longest))
        if all(cka[first, k] >= 0.5 for k in range(first, last + 1))
    }
    assert {(unit.first, unit.last) for unit in candidates} == expected
    for unit in candidates:
        roles = [part.text for part in unit.new_blocks]
        middle = ["borrow"] * (len(roles) - 2)
        closed = ["source", *middle, "close"]
        assert roles == (["lend", *middle, "borrow"] if unit.last == 5 else closed)


def test_what_may_not_be_touched_is_no_candidate(teacher, monkeypatch):
    monkeypatch.setattr(blocks, "untouchable", lambda _model: {2: "the test says so"})
    monkeypatch.setattr(blocks, "seams", lambda _model: [0, 4])
    ffns = [
        (u.first, *u.new_blocks[0].linear_ffn)
        for u in linear_map_candidates.ffn_candidates(teacher)
    ]
    assert ffns == [(b, s) for b in (0, 1, 3, 4, 5) for s in ("image", "text")]
    candidates = linear_map_candidates.text_candidates(teacher, np.ones((6, 6)), 6, 0.5)
    assert [(unit.first, unit.last) for unit in candidates] == [(0, 1), (4, 5)]


LINEAR = D * D + D
FFN_SAVED = (4 * D * D + 4 * D) + (4 * D * D + D) + 3 * LINEAR - LINEAR
# Modulation, FFN and the attention's projections of output and query with its norm, of one head,
# go; one map comes.
TEXT_SAVED = 6 * LINEAR + (4 * D * D + 4 * D) + (4 * D * D + D) + 2 * LINEAR + D - LINEAR
# Two sixths of the modulation stay, and no map comes.
TEXT_LENT = TEXT_SAVED + LINEAR - 2 * LINEAR


def test_saved_parameters_in_closed_form(teacher):
    block = blocks.parameter_count(teacher.transformer_blocks[0])
    source = (1, 2)
    run = Unit(
        (
            NewBlock(1, 2, ("image",), "source"),
            NewBlock(3, 3, ("image",), "borrow", source),
            NewBlock(4, 4, (), "close", source),
        )
    )
    unread = Unit((NewBlock(4, 4, (), "lend"), NewBlock(5, 5, (), "borrow", (4, 4))))
    for unit, saved in (
        (Unit((NewBlock(1, 3),)), 2 * block),
        (Unit((NewBlock(1, 1, ("image",)),)), FFN_SAVED),
        (Unit((NewBlock(0, 1, ("image", "text")),)), block + 2 * FFN_SAVED),
        (run, block + 2 * FFN_SAVED + 2 * TEXT_SAVED - LINEAR),
        (unread, TEXT_LENT + TEXT_SAVED),
    ):
        assert linear_map_candidates.saved_parameters(teacher, unit) == saved
        model, _, _ = students.plugged(
            teacher,
            {
                part: students.shaped(teacher, part, student)
                for part, student in linear_maps.whole_blocks(teacher, unit.new_blocks).items()
            },
        )
        assert blocks.parameter_count(teacher) - blocks.parameter_count(model) == saved


def test_text_sizes_in_closed_form(teacher):
    sizes = linear_map_candidates.text_sizes(teacher)
    assert sizes == {
        "text_saved": [TEXT_SAVED] * 6,
        "text_output": [LINEAR] * 5 + [0],
        "text_lent": [TEXT_LENT] * 5 + [0],
    }
