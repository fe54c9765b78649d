"""Rival selections: planted silent blocks must be found, mappings and ties against brute force."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ppcl.ablation import learned_masks, rivals
from ppcl.errors import UserError
from ppcl.extraction import activations, token_table
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock
from ppcl.search import cka_draws, intervals, probes, similarity
from ppcl.search.cka import resamples
from ppcl.settings import ExtractSettings, TrainingSettings
from ppcl.training import prices
from ppcl.transformer import blocks, call_tables, calls
from ppcl.transformer.context import State
from ppcl.transformer.family import IMAGE, TEXT
from support import tiny

DEPTH = 8
SCATTERED, IN_A_ROW = (1, 2, 4, 6), (4, 5, 6)
LOW, HIGH = 0.1, 0.9
RUNS = [range(DEPTH)]
seeds = st.integers(0, 2**32 - 1)


@st.composite
def layouts(draw, most=9):
    """Runs of blocks as `intervals.spans` makes them, and a number of blocks that may go."""
    depth = draw(st.integers(2, most))
    seams = draw(st.sets(st.integers(1, most), max_size=2))
    kept = draw(st.sets(st.integers(0, most), max_size=2))
    runs = intervals.spans(depth, seams, kept)
    possible = sum(len(run) - 1 for run in runs)
    assume(possible > 0)
    return depth, runs, draw(st.integers(1, possible))


def valid(gone, runs):
    """Whether blocks may go: each lies in a run, and no run loses all."""
    inside = [set(run) & set(gone) for run in runs]
    return set(gone) == set().union(*inside) and all(
        len(part) < len(run) for part, run in zip(inside, runs, strict=True)
    )


def record(transformer, path, timesteps=(LOW, HIGH)):
    """Calls of a transformer at each of some timesteps: 12 to fit on, 6 held out."""
    tables = []
    for number, (timestep, heldout) in enumerate(itertools.product(timesteps, (False, True))):
        count = 6 if heldout else 12
        given_ = tiny.arguments((5,) * count, seed=number)
        given_["timestep"] = torch.full((count,), timestep)
        rows = tiny.places(count, heldout=heldout, timestep=timestep)
        tables += call_tables.to_tables(given_, transformer(**given_)[0], rows)
    call_tables.write(path, [table.schema for table in tables], tables, {})
    return calls.Reader(path)


def planted(folder, silent):
    """A transformer with some silent blocks; its calls, tokens and moments."""
    transformer = tiny.transformer(DEPTH, scale=0.25)
    for block in silent:
        tiny.silence(transformer.transformer_blocks[block])
    reader = record(transformer, folder / "calls.parquet")
    moments, samples = activations.collect(
        tiny.context(transformer, reader),
        np.arange(len(reader)),
        ExtractSettings.of(
            {"batch_size": 12, "moment_tokens": 16, "sample_tokens": 5, "checkpoint_every": 99}
        ),
        State(folder, ""),
        tiny.NoBar(),
    )
    token_table.write_sample(folder / "tokens.parquet", samples, {})
    return transformer, reader, token_table.TokenReader(folder / "tokens.parquet"), moments


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("scattered"), SCATTERED)


@pytest.fixture(scope="module")
def in_a_row(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("in_a_row"), IN_A_ROW)


# ---- from blocks to intervals, and from intervals to students


@settings(max_examples=300, deadline=None)
@given(layouts(), seeds)
def test_merged_intervals_are_the_model_without_the_blocks(layout, seed):
    depth, runs, removed = layout
    gone = set(rivals.random_blocks(removed, runs, seed))
    starts = rivals.merged(gone, runs)
    assembled, block = [], 0
    while block < depth:
        ends = next((ends for ends in starts if ends[0] == block), (block, block))
        assembled.append(starts.get(ends, block))
        block = ends[1] + 1
    assert assembled == [block for block in range(depth) if block not in gone]
    for (first, last), kept in starts.items():
        (run,) = (run for run in runs if first in run)
        assert last in run and first < last
        assert kept == first or first == run.start  # the kept block before, if there is one


def test_merged_by_hand():
    two = [range(0, 5), range(5, 9)]
    assert rivals.merged([2, 3], two) == {(1, 3): 1}
    assert rivals.merged([0, 1], two) == {(0, 2): 2}
    assert rivals.merged([0, 2, 3], two) == {(0, 3): 1}
    assert rivals.merged([4, 5], two) == {(3, 4): 3, (5, 6): 6}  # not over the seam
    assert rivals.merged([], two) == {}
    with pytest.raises(UserError, match="ablation: blocks 5-8 would all go"):
        rivals.merged([5, 6, 7, 8], two)
    with pytest.raises(UserError, match="ablation: block 4 may not be pruned"):
        rivals.merged([4], [range(4)])


def test_started_students_are_the_deleted_model(teacher):
    """Plugged in, untrained, they give what the teacher gives without the blocks."""
    gone = [0, 2, 4]
    made = rivals.start(teacher, rivals.merged(gone, [range(6)]))
    assert list(made) == [NewBlock(0, 2), NewBlock(3, 4)]
    model, _ = blocks.assembled(teacher, {part.ends: m for part, m in made.items()})
    shorter = copy.deepcopy(teacher)
    for block in reversed(gone):
        del shorter.transformer_blocks[block]
    given_ = tiny.arguments()
    assert torch.equal(model(**given_)[0], shorter(**given_)[0])
    # What is said in words is done by students.
    (ours,) = rivals.start(teacher, {(1, 3): "average"}).values()
    (theirs,) = students.start(teacher, [NewBlock(1, 3)], "average").values()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@settings(max_examples=200, deadline=None)
@given(layouts(), seeds)
def test_lowest_scores_against_all_sets(layout, seed):
    depth, runs, removed = layout
    scores = np.random.default_rng(seed).integers(0, 6, depth).astype(float)
    gone = rivals.lowest(scores, removed, runs)
    assert len(gone) == removed and valid(gone, runs)
    every = (s for s in itertools.combinations(range(depth), removed) if valid(s, runs))
    assert scores[gone].sum() == min(scores[list(s)].sum() for s in every)


def test_a_score_that_is_nan_is_named():
    for bad in range(3):
        scores = np.where(np.arange(3) == bad, np.nan, [3, 1, 2])
        with pytest.raises(UserError, match=f"ablation: the score of block {bad} is nan"):
            rivals.lowest(scores, 1, [range(3)])
    # One that nobody asks for may be: a run's only block stays.
    assert rivals.lowest([np.nan, 3, 2], 1, [range(1), range(1, 3)]) == [2]


# ---- no measurement at all


@settings(max_examples=200, deadline=None)
@given(layouts(), seeds)
def test_uniform_and_random_keep_count_and_limits(layout, seed):
    depth, runs, removed = layout
    every = rivals.every_nth(removed, runs)
    drawn = rivals.random_blocks(removed, runs, seed)
    assert drawn == rivals.random_blocks(removed, runs, seed)
    for gone in (every, drawn):
        assert len(set(gone)) == removed and valid(gone, runs)
    if len(runs) == 1:
        gaps = np.diff(every)
        assert removed < 2 or gaps.max() - gaps.min() <= 1
    if removed < max(len(run) for run in runs):
        row = rivals.random_run(removed, runs, seed)
        (((first, last), kept),) = row.items()
        assert row == rivals.random_run(removed, runs, seed)
        assert last - first == removed and kept == first
        assert any(first in run and last in run for run in runs)


def test_every_nth_by_hand():
    assert rivals.every_nth(4, [range(12)]) == [2, 5, 7, 10]
    assert rivals.every_nth(6, [range(12)]) == [1, 3, 5, 7, 9, 11]
    assert rivals.every_nth(2, [range(1), range(1, 4), range(4, 7)]) == [3, 6]


def test_random_choices_cover_all_places():
    runs = [range(4), range(4, 10)]
    rows = [next(iter(rivals.random_run(3, runs, seed))) for seed in range(300)]
    places, counts = np.unique([first for first, _ in rows], return_counts=True)
    assert list(places) == [0, 4, 5, 6] and counts.min() > 50
    sets = [rivals.random_blocks(3, [range(10)], seed) for seed in range(300)]
    _, counts = np.unique(sets, return_counts=True)
    assert len(counts) == 10 and counts.min() > 60 and counts.max() < 130


# ---- from recorded tokens


@pytest.mark.parametrize("streams", [(IMAGE, TEXT), (IMAGE,), (TEXT,)])
def test_scores_of_tokens_find_silent_blocks(scattered, streams):
    _, _, tokens, _ = scattered
    influence = rivals.block_influence(tokens, streams)
    change = rivals.cka_change(tokens, streams, "plain")
    for scores in (influence, change, rivals.cka_change(tokens, streams, "debiased")):
        assert scores[list(SCATTERED)] == pytest.approx(0, abs=1e-9)
        assert np.delete(scores, SCATTERED).min() > 1e-3
        assert tuple(rivals.lowest(scores, len(SCATTERED), RUNS)) == SCATTERED
    # By the definition, one token at a time.
    values = [[tokens.values(b, s) for s in streams] for b in (3, 4)]
    cosines = [
        np.mean([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(before, after, strict=True)])
        for before, after in zip(*values, strict=True)
    ]
    assert influence[3] == pytest.approx(1 - np.mean(cosines), abs=1e-6)


def test_zero_tokens_agree_with_zero_tokens_alone():
    ends = {0: np.array([[0.0, 0], [0, 0], [3, 4]]), 1: np.array([[0.0, 0], [1, 0], [6, 8]])}
    tokens = SimpleNamespace(values=lambda boundary, _stream: ends[boundary])
    assert rivals.cosine(tokens, (IMAGE,), 0, 0) == pytest.approx((1 + 0 + 1) / 3)


def test_streamline_finds_the_silent_run(in_a_row, scattered):
    _, _, tokens, _ = in_a_row
    assert rivals.streamline(tokens, (IMAGE, TEXT), 2, RUNS) == {(4, 6): 4}
    # A run that reaches over a seam is none, and a protected block is in none.
    starts = rivals.streamline(tokens, (IMAGE, TEXT), 1, [range(5), range(5, 8)])
    assert starts == {(5, 6): 5}
    assert rivals.streamline(scattered[2], (IMAGE,), 1, RUNS) == {(1, 2): 1}


# ---- from the CKA of probes


def literal_growth(cka, threshold, run):
    """Intervals of one run, block by block."""
    grown, current = [], []
    for block in run:
        if current and cka[current[0], block] >= threshold:
            current.append(block)
            continue
        grown.append(current)
        current = [block] if cka[block, block] >= threshold else []
    return [(part[0], part[-1]) for part in [*grown, current] if len(part) > 1]


@settings(max_examples=200, deadline=None)
@given(layouts(), seeds, st.booleans())
def test_threshold_against_all_thresholds(layout, seed, rounded):
    depth, runs, removed = layout
    rng = np.random.default_rng(seed)
    cka = rng.uniform(size=(depth, depth))  # need not fall with the length of the run
    cka = np.round(cka, 1) if rounded else cka
    every = {
        threshold: [ends for run in runs for ends in literal_growth(cka, threshold, run)]
        for threshold in np.unique(cka)
    }
    count = {t: sum(last - first for first, last in grown) for t, grown in every.items()}
    best = max(t for t, number in count.items() if number >= removed)
    starts = rivals.cka_threshold(cka, removed, runs)
    assert sum(last - first for first, last in starts) == removed
    assert all(start == first for (first, _), start in starts.items())
    whole = dict(every[best])
    assert all(first in whole and last <= whole[first] for first, last in starts)
    if count[best] == removed:
        assert list(starts) == every[best]


def test_threshold_takes_back_where_cka_is_lowest():
    cka = np.full((5, 5), np.nan)
    cka[0, :2], cka[2, 2:5], cka[1, 1:] = (1, 0.9), (0.95, 0.9, 0.9), 0.1
    cka[3, 3:], cka[4, 4] = 0.1, 0.1
    assert rivals.cka_threshold(cka, 3, [range(5)]) == {(0, 1): 0, (2, 4): 2}
    cka[2, 4] = 0.91
    assert rivals.cka_threshold(cka, 2, [range(5)]) == {(2, 4): 2}
    cka[2, 4] = 0.9
    assert rivals.cka_threshold(cka, 2, [range(5)]) == {(2, 4): 2}  # (0, 1) is the first to go
    cka[:] = np.nan
    with pytest.raises(UserError, match="ablation: the probes' CKA allows no 2 blocks"):
        rivals.cka_threshold(cka, 2, [range(5)])


def test_threshold_finds_the_silent_run(in_a_row):
    _, _, tokens, moments = in_a_row
    draws = []
    for stream in tokens.streams:
        fitted = [
            probes.solve(probes.stored_moments(moments.sums, stream, block), 0)
            for block in range(DEPTH)
        ]
        held = tokens.heldout(stream)
        plan = resamples(tokens.prompts(stream)[held], 0, 0, "plain")
        draws.append(
            similarity.surrogate_cka(
                lambda b, held=held, stream=stream: tokens.values(b, stream)[held], fitted, plan
            )
        )
    cka = cka_draws.mean_of_streams(draws)[0]
    assert rivals.cka_threshold(cka, 2, RUNS) == {(4, 6): 4}
    assert rivals.grown(cka, 1 - 1e-6, RUNS) == {4: 6}


# ---- one block out


def test_one_block_out_finds_silent_blocks(scattered, accelerator, tmp_path):
    transformer, reader, _, _ = scattered
    rows = reader.rows(heldout=True)
    errors = rivals.skip_errors(
        tiny.context(transformer, reader, 0, accelerator), RUNS, [rows], 8, State(tmp_path, "")
    )[0]
    assert errors[list(SCATTERED)] == pytest.approx(0, abs=1e-9)
    assert tuple(rivals.lowest(errors, len(SCATTERED), RUNS)) == SCATTERED
    for block in (0, 3):  # deleted by hand
        shorter = copy.deepcopy(transformer)
        del shorter.transformer_blocks[block]
        error = power = 0
        for batch in reader.batches(rows, 100):
            error += (shorter(**batch.arguments)[0] - batch.output).square().sum().item()
            power += batch.output.square().sum().item()
        assert errors[block] == pytest.approx(error / power, rel=1e-5)
    assert len(transformer.transformer_blocks) == DEPTH


def test_one_block_out_goes_on_where_it_was_killed(scattered, accelerator, tmp_path, monkeypatch):
    transformer, reader, _, _ = scattered
    groups, measured = np.array_split(reader.rows(), 2), []

    def run(stop_after):
        def error(*_):
            if len(measured) == stop_after:
                raise KeyboardInterrupt
            measured.append(len(measured))
            return float(measured[-1])

        monkeypatch.setattr(prices.Judged, "error", error)
        context = tiny.context(transformer, reader, 0, accelerator)
        return rivals.skip_errors(context, RUNS, groups, 8, State(tmp_path, "one"))

    with pytest.raises(KeyboardInterrupt):
        run(stop_after=DEPTH + 3)  # in the second group
    assert run(stop_after=None).tolist() == np.arange(2 * DEPTH).reshape(2, DEPTH).tolist()


def test_one_block_out_leaves_out_what_may_not_go(scattered, accelerator):
    transformer, reader, _, _ = scattered
    rows = reader.rows(heldout=True)[:2]
    runs = [range(1), range(2, 4), range(5, 8)]
    errors = rivals.skip_errors(
        tiny.context(transformer, reader, 0, accelerator), runs, [rows, rows], 8
    )
    assert np.isfinite(errors).tolist() == [[b in (2, 3, 5, 6, 7) for b in range(DEPTH)]] * 2
    assert rivals.lowest(errors[0], 2, runs) == [2, 6]


def test_timestep_groups_split_levels_not_rows(scattered):
    _, reader, _, _ = scattered
    rows = reader.rows(heldout=False)
    low, high = rivals.timestep_groups(reader, rows, 2)
    assert set(reader.index["timestep"][low]) == {LOW}
    assert set(reader.index["timestep"][high]) == {HIGH}
    assert sorted([*low, *high]) == list(rows)
    with pytest.raises(UserError, match="ablation: 3 groups of 2 timesteps"):
        rivals.timestep_groups(reader, rows, 3)
    several = SimpleNamespace(index={"timestep": np.array([1.0, np.nan])})
    with pytest.raises(UserError, match="frames have a timestep each"):
        rivals.timestep_groups(several, np.arange(2), 1)


@torch.no_grad()
def awake_at_high_only(transformer, block):
    """Gives a block modulations that are zero at timestep LOW, whatever the image, and not at HIGH.

    The gates are linear in silu(temb), so a rank-one weight that is orthogonal to it at LOW closes
    them there.
    """
    timesteps, nothing = torch.tensor([LOW, HIGH]), torch.zeros(1)
    low, high = torch.nn.functional.silu(transformer.time_text_embed(timesteps, nothing)).double()
    direction = high - low * (low @ high) / (low @ low)
    direction /= direction @ high
    for modulation in (block.img_mod[1], block.txt_mod[1]):
        weight = torch.outer(modulation.bias.double().sign(), direction)
        modulation.weight.copy_(weight)
        modulation.bias.zero_()


def test_amber_ranks_by_the_noise_level_that_counts(tmp_path, accelerator):
    transformer = tiny.transformer(5, scale=0.2)
    sometimes, weak = 1, 3
    awake_at_high_only(transformer, transformer.transformer_blocks[sometimes])
    with torch.no_grad():
        for modulation in (m[1] for b in (weak,) for m in _modulations(transformer, b)):
            modulation.weight.mul_(0.3)
            modulation.bias.mul_(0.3)
    reader, runs = record(transformer, tmp_path / "calls.parquet"), [range(5)]
    groups = rivals.timestep_groups(reader, reader.rows(heldout=True), 2)
    errors = rivals.skip_errors(tiny.context(transformer, reader, 0, accelerator), runs, groups, 8)
    assert errors[0, sometimes] < 1e-9 < 1e-4 < errors[0, weak]
    assert errors[1, sometimes] > 2 * errors[1, weak]

    def first_to_go(weights):
        return rivals.lowest(rivals.over_timesteps(errors, weights), 1, runs)

    assert first_to_go([1, 0]) == [sometimes]
    assert first_to_go([0, 1]) == [weak]
    # Where the two tie is where the weighted means say.
    gain, loss = errors[0, weak] - errors[0, sometimes], errors[1, sometimes] - errors[1, weak]
    tie = gain / (gain + loss)  # the share of HIGH at which both score alike
    assert first_to_go([1 - 0.9 * tie, 0.9 * tie]) == [sometimes]
    assert first_to_go([2 * (1 - 1.1 * tie), 2.2 * tie]) == [weak]
    np.testing.assert_allclose(rivals.over_timesteps(errors), errors.mean(0))


def _modulations(transformer, block):
    return [getattr(transformer.transformer_blocks[block], name) for name in ("img_mod", "txt_mod")]


# ---- learned depth masks


OPTIONS = TrainingSettings.of({"steps": 60, "lr": 1e-2, "batch_size": 8})


@pytest.mark.parametrize(("size", "seed"), [(4, 0), (4, 1), (8, 0)])
def test_learned_masks_find_silent_blocks(scattered, accelerator, tmp_path, size, seed):
    transformer, reader, _, _ = scattered
    before = copy.deepcopy(transformer.state_dict())
    groups = learned_masks.local_groups(len(SCATTERED), RUNS, size)
    context = tiny.context(transformer, reader, seed, accelerator)
    gone = learned_masks.learned_masks(context, groups, 2, OPTIONS, State(tmp_path, "test"))
    assert tuple(gone) == SCATTERED
    assert all(torch.equal(v, before[k]) for k, v in transformer.state_dict().items())
    assert not any(m._forward_hooks for m in transformer.modules())


def test_learned_masks_resume_to_the_bit(scattered, accelerator, tmp_path, monkeypatch):
    transformer, reader, _, _ = scattered
    groups, trained, temperatures = learned_masks.local_groups(4, RUNS, 4), [], {}
    options = OPTIONS.replace(steps=4, checkpoint_every=2)

    class Kept(learned_masks.DepthMasks):
        def __init__(self, *args):
            super().__init__(*args)
            trained.append(self)

        def sample(self, seed, temperature):
            if seed[1] == stop:
                raise KeyboardInterrupt
            temperatures[seed[1]] = temperature
            super().sample(seed, temperature)

    monkeypatch.setattr(learned_masks, "DepthMasks", Kept)

    def run(name):
        context = tiny.context(transformer, reader, 0, accelerator)
        return learned_masks.learned_masks(
            context, groups, 2, options, State(tmp_path / name, "test")
        )

    stop = None
    run("whole")
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    stop = None
    run("killed")
    whole, _, resumed = (masks.state_dict() for masks in trained)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
    assert any(v.any() for k, v in whole.items() if k.startswith("logits"))
    high, low = learned_masks.TEMPERATURES
    expected = [high, 0.75 * high + 0.25 * low, 0.5 * (high + low), 0.25 * high + 0.75 * low]
    assert [temperatures[step] for step in range(4)] == pytest.approx(expected)


def test_gradients_pass_checkpointed_blocks(scattered):
    transformer = copy.deepcopy(scattered[0])
    gradients = []
    for checkpointed in (False, True):
        masks = learned_masks.DepthMasks(
            transformer, learned_masks.local_groups(4, RUNS, 4), 2, seed=0
        )
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        masks.sample((0,), 1.0)
        with masks.attached():
            transformer.train()(**tiny.arguments())[0].square().sum().backward()
        gradients.append([p.grad for p in (*masks.logits, *masks.up)])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, rtol=1e-4, atol=1e-6)


def test_learned_masks_depend_on_the_seed_alone(scattered):
    transformer = scattered[0]
    groups = learned_masks.local_groups(4, RUNS, 4)

    def drawn(seed):
        masks = learned_masks.DepthMasks(transformer, groups, 2, seed)
        masks.sample((seed, 3, 2), 1.0)
        return [g.item() for g in masks.gates.values()], masks.state_dict()

    (gates, state), (same, alike), (other, _) = drawn(5), drawn(5), drawn(6)
    assert gates == same and gates != other and sum(gates) == 4
    assert all(torch.equal(v, alike[k]) for k, v in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_skip_blocks_and_keep_the_others(scattered, dtype):
    transformer = copy.deepcopy(scattered[0]).to(dtype)
    masks = learned_masks.DepthMasks(transformer, learned_masks.local_groups(4, RUNS, 8), 2, seed=0)
    given_ = tiny.arguments()
    given_ |= {k: v.to(dtype) for k, v in given_.items() if torch.is_tensor(v)}
    gone = (0, 3)
    masks.gates = {b: torch.tensor(float(b not in gone)) for b in range(DEPTH)}
    with masks.attached():
        gated = transformer(**given_)[0]
        # All there is to learn gets a gradient, the teacher none.
        masks.sample((0,), 1.0)
        transformer(**given_)[0].float().square().sum().backward()
    assert masks.logits[0].grad.abs().sum() > 0
    assert sum(p.grad is not None and p.grad.any() for p in masks.up) > 0
    assert all(p.grad is None for p in transformer.parameters())
    for block in reversed(gone):
        del transformer.transformer_blocks[block]
    expected = transformer(**given_)[0]
    assert gated.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(gated, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(1, 5))
def test_local_groups_remove_what_is_wanted(layout, size):
    _, runs, removed = layout
    groups = learned_masks.local_groups(removed, runs, size)
    assert [b for group, _ in groups for b in group] == [b for run in runs for b in run]
    assert sum(gone for _, gone in groups) == removed
    everything = [b for group, gone in groups for b in group[len(group) - gone :]]
    assert valid(everything, runs)  # whatever the masks choose: counts decide that
    for group, gone in groups:
        assert len(group) <= size and any(set(group) <= set(run) for run in runs)
        masks = learned_masks.schemes(len(group), gone).int().tolist()
        literal = itertools.product((0, 1), repeat=len(group))
        assert sorted(masks) == sorted(list(m) for m in literal if sum(m) == len(group) - gone)


def test_two_of_four_is_the_default_scheme_for_half():
    assert learned_masks.local_groups(4, RUNS, 4) == [(range(4), 2), (range(4, 8), 2)]
    assert learned_masks.local_groups(4, RUNS, 2) == [(range(b, b + 2), 1) for b in (0, 2, 4, 6)]
    with pytest.raises(UserError, match="ablation: .* masks of 60 blocks are too many"):
        learned_masks.schemes(60, 25)


# ---- more than there is


@pytest.mark.parametrize(
    "choose",
    [
        lambda n, runs: rivals.every_nth(n, runs),
        lambda n, runs: rivals.random_blocks(n, runs, 0),
        lambda n, runs: rivals.random_run(n, runs, 0),
        lambda n, runs: rivals.lowest(np.zeros(8), n, runs),
        lambda n, runs: rivals.streamline(None, (IMAGE,), n, runs),
        lambda n, runs: rivals.cka_threshold(np.ones((8, 8)), n, runs),
        lambda n, runs: learned_masks.local_groups(n, runs, 4),
    ],
)
@pytest.mark.parametrize(
    ("removed", "runs"), [(7, [range(4), range(4, 8)]), (0, [range(8)]), (1, []), (1, [range(1)])]
)
def test_too_many_blocks_are_refused(choose, removed, runs):
    with pytest.raises(UserError, match=f"ablation: {removed} blocks can't be removed"):
        choose(removed, runs)


def test_runs_are_shorter_than_all_blocks():
    with pytest.raises(UserError, match="ablation: 4 blocks can't be removed here .* at most 3"):
        rivals.random_run(4, [range(4), range(4, 8)], 0)
