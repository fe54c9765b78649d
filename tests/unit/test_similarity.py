"""CKA (Eq. 3, 4) against n x n Gram matrices, materialised surrogates and resampled tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import measuring
from ppcl.errors import UserError
from ppcl.search import cka, cka_draws, similarity
from ppcl.search.probes import Probe
from ppcl.settings import SimilaritySettings

seeds = st.integers(0, 2**32 - 1)
estimators = pytest.mark.parametrize("estimator", ["plain", "debiased"])


def hsic_0(k, el):
    """Biased HSIC from Gram matrices: tr(K H L H)."""
    centring = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ centring @ el @ centring)


def hsic_1(k, el):
    """Unbiased HSIC, Song et al. 2012, Eq. 5, to the letter."""
    n, one = len(k), np.ones(len(k))
    k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
    middle = one @ k @ one * (one @ el @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ el) + middle - 2 / (n - 2) * (one @ k @ el @ one)) / (n * (n - 3))


def gram_cka(x, y, estimator="plain"):
    hsic = {"plain": hsic_0, "debiased": hsic_1}[estimator]
    k, el = x @ x.T, y @ y.T
    return hsic(k, el) / np.sqrt(hsic(k, k) * hsic(el, el))


def unit_rows(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Model:
    """Teacher boundaries of a stack that is part linear, part not, and probes that fit it badly."""

    def __init__(self, seed=0, depth=4, tokens=40, width=5):
        generator = np.random.default_rng(seed)
        self.prompts = np.repeat(np.arange(tokens // 4) * 3 + 1, 4)
        self.boundaries = [generator.normal(size=(tokens, width)) + 2]
        self.probes = []
        for _ in range(depth):
            x, weight = self.boundaries[-1], generator.normal(size=(width, width))
            self.boundaries.append(x + np.tanh(x @ weight))
            self.probes.append(Probe(0.2 * generator.normal(size=(width, width)), np.ones(width)))

    def read(self, boundary):
        return self.boundaries[boundary].astype(np.float32)

    def surrogate(self, first, last):
        """T^[first-1 -> last](X): the teacher up to block first - 1, then probes."""
        z = self.read(first).astype(float)
        for probe in self.probes[first : last + 1]:
            z = np.array([token + probe.weight @ token + probe.bias for token in z])
        return z

    def plan(self, draws=0, estimator="plain"):
        return cka.resamples(self.prompts, draws, 0, estimator)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(6, 30), st.integers(1, 8), st.integers(1, 40))
def test_cka_equals_gram_form(seed, tokens, width_x, width_y):
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=(tokens, width_x)) + 2) * 10 ** generator.uniform(-2, 2, width_x)
    y = np.tanh(x[:, :1]) + generator.normal(size=(tokens, width_y))
    assert cka.linear_cka(x, y) == pytest.approx(gram_cka(x, y), abs=1e-9)
    debiased = cka.linear_cka(x, y, "debiased")
    assert debiased == pytest.approx(gram_cka(x, y, "debiased"), abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(1e-3, 1e3), st.sampled_from(["plain", "debiased"]))
def test_cka_invariances(seed, scale, estimator):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(30, 6)), generator.normal(size=(30, 4))
    y[:, 0] += x[:, 0]
    value = cka.linear_cka(x, y, estimator)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    moved = scale * x @ rotation + generator.normal(size=6)
    assert cka.linear_cka(moved, y, estimator) == pytest.approx(value, abs=1e-9)
    assert cka.linear_cka(y, x, estimator) == pytest.approx(value, abs=1e-12)
    assert cka.linear_cka(x, moved, estimator) == pytest.approx(1, abs=1e-9)
    assert (0 if estimator == "plain" else -1) <= value < 1
    stretched = x * [100, 1, 1, 1, 1, 1]
    assert abs(cka.linear_cka(x, stretched, estimator) - 1) > 1e-3


def test_debiased_is_unbiased_where_plain_is_not():
    generator = np.random.default_rng(0)
    pairs = [generator.normal(size=(2, 60, 40)) for _ in range(60)]
    assert np.mean([cka.linear_cka(x, y) for x, y in pairs]) > 0.3
    debiased = [cka.linear_cka(x, y, "debiased") for x, y in pairs]
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / np.sqrt(60) + 1e-3


def test_many_channels_go_by_in_slabs(monkeypatch):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(20, 7)), generator.normal(size=(20, 3))
    expected = cka.linear_cka(x, y, "debiased")
    monkeypatch.setattr(cka, "CPU_SLAB_BYTES", 8 * 3 * 2)  # two channels at a time
    assert cka.linear_cka(x, y, "debiased") == pytest.approx(expected, abs=1e-12)


@estimators
@pytest.mark.parametrize("reference", ["end", "start"])
@pytest.mark.parametrize("normalise", [False, True])
def test_surrogates_equal_materialised_ones(estimator, reference, normalise):
    model = Model()
    how = {"estimator": estimator, "reference": reference, "normalise_tokens": normalise}
    values = similarity.surrogate_cka(model.read, model.probes, model.plan(), **how)
    assert values.shape == (1, 4, 4)
    for first in range(4):
        for last in range(4):
            if last < first:
                assert np.isnan(values[0, first, last])
                continue
            z = model.surrogate(first, last)
            # T_k is the input of block k + 1; T_u, with u = first - 1, the input of block first.
            other = model.read(last + 1 if reference == "end" else first).astype(float)
            sides = [unit_rows(side) if normalise else side for side in (z, other)]
            expected = gram_cka(*sides, estimator)
            assert expected < 0.9999
            assert values[0, first, last] == pytest.approx(expected, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(3, 60), st.integers(1, 12), st.sampled_from(["end", "start"]))
def test_composed_maps_equal_materialised_tokens(seed, tokens, width, reference):
    """Fewer tokens than channels included."""
    model = Model(seed, depth=3, tokens=4 * tokens, width=width)
    how = {"reference": reference}
    composed = similarity.surrogate_cka(model.read, model.probes, model.plan(), **how)
    materialised = similarity.surrogate_cka(model.read, model.probes, model.plan(2), **how)
    np.testing.assert_allclose(composed[0], materialised[0], atol=1e-9)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("draws", [0, 2])
def test_probes_that_leave_one_token_for_all_are_named(draws, normalise):
    model = Model()
    model.probes[2] = Probe(-np.eye(5), np.ones(5))
    with pytest.raises(UserError, match="stream 'text', probes [012]-2: the 40 held-out"):
        similarity.surrogate_cka(
            model.read,
            model.probes,
            model.plan(draws),
            normalise_tokens=normalise,
            stream="text",
        )


def test_exact_probes_of_a_linear_stack_lose_nothing():
    model = Model()
    generator = np.random.default_rng(2)
    for i in range(4):
        weight = generator.normal(size=(5, 5))
        model.probes[i] = Probe(weight, np.zeros(5))
        model.boundaries[i + 1] = model.boundaries[i] @ (np.eye(5) + weight).T
    values = similarity.surrogate_cka(model.read, model.probes, model.plan())[0]
    np.testing.assert_allclose(values[np.triu_indices(4)], 1, atol=1e-6)
    start = similarity.surrogate_cka(model.read, model.probes, model.plan(), reference="start")[0]
    assert start[0, 3] < 0.9


@estimators
def test_every_boundary_is_read_once(estimator):
    model, seen = Model(), []

    def read(boundary):
        seen.append(boundary)
        return model.read(boundary)

    similarity.surrogate_cka(read, model.probes, model.plan(), estimator=estimator)
    assert seen == [0, 1, 2, 3, 4]


def test_a_block_without_probe_ends_runs():
    model = Model(depth=5)
    model.probes[2] = None
    values = similarity.surrogate_cka(model.read, model.probes, model.plan())[0]
    present = {tuple(map(int, pair)) for pair in np.argwhere(np.isfinite(values))}
    assert present == {(0, 0), (0, 1), (1, 1), (3, 3), (3, 4), (4, 4)}
    whole = similarity.surrogate_cka(model.read, Model(depth=5).probes, model.plan())[0]
    np.testing.assert_allclose(values[3, 4], whole[3, 4], atol=1e-12)


@estimators
def test_resamples_equal_resampled_tokens(estimator):
    model = Model(seed=3, tokens=60)
    plan = model.plan(6, estimator)
    values = similarity.surrogate_cka(model.read, model.probes, plan, estimator=estimator)
    groups = np.unique(model.prompts)
    assert len({tuple(row) for row in plan.weights}) > 3
    for draw, weights in enumerate(plan.weights):
        number = dict(zip(groups, weights.astype(int), strict=True))
        rows = np.repeat(np.arange(60), [number[prompt] for prompt in model.prompts])
        if estimator == "debiased" and draw:
            assert len(set(rows.tolist())) == len(rows) < 60
        expected = gram_cka(
            model.surrogate(1, 2)[rows], model.read(3).astype(float)[rows], estimator
        )
        assert values[draw, 1, 2] == pytest.approx(expected, abs=1e-8)


def resampled_cka(x, y, plan, estimator):
    """CKA [1 + draws] of one pair of sides in plan.order, of the tokens that each row draws."""
    sizes = np.diff(plan.offsets)
    drawn = [np.repeat(np.arange(len(x)), np.repeat(w.astype(int), sizes)) for w in plan.weights]
    return np.array([gram_cka(x[rows], y[rows], estimator) for rows in drawn])


@estimators
@pytest.mark.parametrize("one_for_all", [False, True])
def test_many_sides_at_once_are_each_pair_alone(estimator, one_for_all):
    """Groups of different sizes, and sides of different widths."""
    generator = np.random.default_rng(8)
    plan = cka.resamples(generator.permutation(np.arange(60) ** 2 // 300), 5, 0, estimator)
    assert len(set(np.diff(plan.offsets))) > 2
    x, y = generator.normal(size=(4, 60, 6)), generator.normal(size=(4, 60, 3))
    y[:, :, 0] += x[:, :, 0]
    x, y = (z - z.mean(1, keepdims=True) for z in (x, y))
    y = y[0] if one_for_all else y
    left, right = (cka.Side(torch.from_numpy(z), plan) for z in (x, y))
    pairs = (left, right), (left, left), (right, right)
    ratios = cka.ratio(*(cka.hsic(*pair, plan, estimator) for pair in pairs), list("abcd"))
    expected = [resampled_cka(x[k], y if one_for_all else y[k], plan, estimator) for k in range(4)]
    np.testing.assert_allclose(ratios, expected, atol=1e-9)


@estimators
@pytest.mark.parametrize("reference", ["end", "start"])
@pytest.mark.parametrize(
    ("draws", "normalise"), [(0, False), (3, False), (3, True)], ids=["composed", "kept", "unit"]
)
def test_slabs_of_any_size_give_the_same(monkeypatch, estimator, reference, draws, normalise):
    """From a column of a pair at a time to all pairs, with a block that has no probe between."""
    model = Model(depth=8)
    model.probes[2] = None
    plan, how = (
        model.plan(draws, estimator),
        {"estimator": estimator, "normalise_tokens": normalise},
    )

    def chunk_values():
        runs = similarity.surrogate_cka(model.read, model.probes, plan, reference=reference, **how)
        return runs, similarity.block_cka(model.read, [0, 1, *range(3, 8)], plan, **how)

    expected, sizes = chunk_values(), []
    slabs = similarity._slabs
    monkeypatch.setattr(similarity, "_slabs", lambda *of: note(slabs(*of)))

    def note(parts):
        for part in parts:
            sizes.append(part.stop - part.start)
            yield part

    most = set()
    for size in (1, 4000, 9000, 1 << 20):
        monkeypatch.setattr(cka, "CPU_SLAB_BYTES", size)
        sizes.clear()
        for values, others in zip(chunk_values(), expected, strict=True):
            np.testing.assert_allclose(values, others, rtol=0, atol=1e-13)
        most.add(max(sizes))
    assert {1, 6} <= most and len(most) > 2


def test_the_pair_that_does_not_vary_is_named():
    tokens = torch.from_numpy(np.random.default_rng(9).normal(size=(3, 8, 2)))
    tokens[1] = 4.0
    with pytest.raises(UserError, match="^b: the 8 held-out"):
        cka.prepare(tokens, False, list("abc"))
    tokens[0, 3, 1] = np.inf
    with pytest.raises(UserError, match="^a: .* NaN or infinity"):
        cka.prepare(tokens, True, list("abc"))
    one, own = np.ones((3, 1)), np.array([[1.0], [1.0], [0.0]])
    with pytest.raises(UserError, match="^c: a side does not vary"):
        cka.ratio(one, own, np.ones(1), list("abc"))


def test_at_most_32_groups_of_whole_prompts():
    prompts = np.random.default_rng(4).integers(0, 500, 3000)
    plan = cka.resamples(prompts, 10, 0, "plain")
    assert plan.weights.shape == (11, 32)
    assert (plan.weights[0] == 1).all()
    np.testing.assert_array_equal(plan.weights.sum(1), 32)
    np.testing.assert_array_equal(np.sort(plan.order), np.arange(3000))
    parts = np.split(prompts[plan.order], plan.offsets[1:-1])
    assert sum(len(np.unique(part)) for part in parts) == len(np.unique(prompts))
    again = cka.resamples(prompts, 10, 0, "plain")
    np.testing.assert_array_equal(plan.weights, again.weights)


def test_one_prompt_has_no_spread():
    plan = cka.resamples(np.zeros(20, int), 5, 0, "debiased")
    assert (plan.weights == 1).all()


@estimators
def test_bootstrap_spread_matches_fresh_samples(estimator):
    """The 95 % interval of one sample against the spread of the estimate over new samples."""
    generator = np.random.default_rng(5)

    def sample():
        x = generator.normal(size=(128, 3))
        return x, x + 1.5 * generator.normal(size=(128, 3))

    truth = np.std([cka.linear_cka(*sample(), estimator) for _ in range(200)])
    widths = []
    for _ in range(10):
        x, y = sample()
        plan = cka.resamples(np.arange(128), 200, 0, estimator)
        x, y = (cka.Side(cka.float64((z - z.mean(0))[plan.order]), plan) for z in (x, y))
        parts = [cka.hsic(*pair, plan, estimator) for pair in ((x, y), (x, x), (y, y))]
        draws = parts[0] / np.sqrt(parts[1] * parts[2])
        low, high = cka_draws.limits(draws)
        assert low < draws[0] < high
        widths.append((high - low) / (2 * 1.96))
    assert 0.7 < np.mean(widths) / truth < 1.4


def test_differences_are_eq_4():
    model = Model()
    similarities = similarity.surrogate_cka(model.read, model.probes, model.plan(2))
    delta = cka_draws.differences(similarities)
    for first in range(4):
        for last in range(first, 4):
            before = 1 if last == first else similarities[:, first, last - 1]
            np.testing.assert_allclose(
                delta[:, first, last], -(similarities[:, first, last] - before)
            )
    assert np.isnan(delta[:, 2, 1]).all()


def test_of_one_prompt_there_are_no_resamples():
    plan = similarity.resamples(np.zeros(9, int), 20, 0, "plain")
    assert plan.weights.shape == (1, 1)
    assert similarity.resamples(np.arange(9) % 2, 20, 0, "plain").weights.shape == (21, 2)


def test_limits_hold_the_estimate_and_follow_the_percentiles():
    generator = np.random.default_rng(6)
    draws = np.concatenate([[[0.5]], 0.6 + 0.1 * generator.normal(size=(4000, 1))])
    low, high = cka_draws.limits(draws)
    assert low[0] == pytest.approx(0.5 - 0.196, abs=0.01)
    assert high[0] == pytest.approx(0.5 + 0.196, abs=0.01)
    assert np.isnan(cka_draws.limits(draws[:1])).all()


def test_rise_noise_is_the_median_deviation_of_rises():
    generator = np.random.default_rng(7)
    delta = generator.normal(size=(300, 3, 3)) * 0.01
    delta[:, [1, 2, 2], [0, 0, 1]] = np.nan
    rises = [delta[1:, f, k] - delta[1:, f, k - 1] for f, k in ((0, 1), (0, 2), (1, 2))]
    expected = np.median([rise.std(ddof=1) for rise in rises])
    assert cka_draws.rise_noise(delta) == pytest.approx(expected)
    assert expected == pytest.approx(0.01 * np.sqrt(2), rel=0.1)
    assert cka_draws.rise_noise(delta[:1]) == 0


def test_mean_of_streams_skips_streams_that_lack_a_run():
    image, text = np.full((2, 2, 2), 0.8), np.full((2, 2, 2), 0.4)
    text[:, 0, 1] = np.nan
    image[:, 1, 0] = text[:, 1, 0] = np.nan
    mean = cka_draws.mean_of_streams([image, text])
    np.testing.assert_allclose(mean[0], [[0.6, 0.8], [np.nan, 0.6]])


@estimators
def test_heat_map_of_block_outputs(estimator):
    model = Model()
    values = similarity.block_cka(model.read, [0, 2, 3], model.plan(5), estimator=estimator)
    for row, a in enumerate([0, 2, 3]):
        for column, b in enumerate([0, 2, 3]):
            x, y = (model.read(block + 1).astype(float) for block in (a, b))
            assert values[row, column] == pytest.approx(gram_cka(x, y, estimator), abs=1e-9)


@pytest.mark.parametrize("estimator", ["plain", "debiased"])
def test_tokens_that_are_no_numbers_are_named(estimator):
    x, y = np.random.default_rng(0).normal(size=(2, 20, 3))
    for spoilt in (np.nan, np.inf):
        y[3, 1] = spoilt
        with pytest.raises(UserError, match="^the right: .* NaN or infinity"):
            cka.linear_cka(x, y, estimator, ("the left", "the right"))
    with pytest.raises(UserError, match="^y: .*do not differ"):
        cka.linear_cka(x, np.ones((20, 3)), estimator)


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_probes_that_overflow_are_named(draws, normalise):
    x = np.random.default_rng(0).normal(size=(3, 12, 2))
    plan = cka.resamples(np.arange(12), draws, 0, "plain")
    broken = Probe(np.full((2, 2), 1e200), np.zeros(2))
    sound = Probe(np.zeros((2, 2)), np.ones(2))
    with pytest.raises(UserError, match="^stream .*, probes 0-0: .* NaN or infinity"):
        similarity.surrogate_cka(lambda b: x[b], [broken, broken], plan, normalise_tokens=normalise)
    assert np.isfinite(
        similarity.surrogate_cka(lambda b: x[b], [sound, sound], plan)[:, 0, 1]
    ).all()


@estimators
def test_a_stream_that_lacks_prompts_is_resampled_as_the_others(estimator):
    """Samples may be without text; a resample is of the same prompts in all streams."""

    class Tokens:
        streams = ("image", "text")
        of = {"image": np.repeat(np.arange(9), 3), "text": np.repeat([0, 2, 3, 7, 8], 4)}

        def prompts(self, stream):
            return self.of[stream]

        def heldout(self, stream):
            return np.ones(len(self.of[stream]), bool)

    options = SimilaritySettings.of({"bootstrap": 20, "estimator": estimator})
    (_, image), (_, text) = (
        similarity.heldout(Tokens(), stream, options, 5) for stream in Tokens.streams
    )
    np.testing.assert_array_equal(image.weights, text.weights)
    x, y = np.random.default_rng(0).normal(size=(2, 20, 3))
    own = cka.resamples(Tokens.of["text"], 20, 5, estimator)
    sides = [[cka.Side(torch.from_numpy(v), plan) for v in (x, y)] for plan in (text, own)]
    assert cka.hsic(*sides[0], text, "plain")[0] == pytest.approx(
        cka.hsic(*sides[1], own, "plain")[0]
    )
    for row, weights in enumerate(text.weights):
        drawn = np.repeat(np.arange(20), weights[Tokens.of["text"]].astype(int))
        hsic = cka.hsic(*sides[0], text, "plain")[row]
        a, b = x[drawn], y[drawn]
        expected = np.square((a - a.mean(0)).T @ (b - b.mean(0))).sum()
        assert hsic == pytest.approx(expected, rel=1e-9)


def test_bad_tokens_name_stream_and_boundary():
    model = Model()
    model.boundaries[2][3, 1] = np.nan
    with pytest.raises(UserError, match=r"stream 'text', boundary 2: NaN"):
        similarity.surrogate_cka(model.read, model.probes, model.plan(), stream="text")
    model.boundaries[2][:] = 3.0
    with pytest.raises(UserError, match=r"stream 'text', boundary 2.*do not differ"):
        similarity.block_cka(model.read, [1, 2], model.plan(), stream="text")
    with pytest.raises(UserError, match="no held-out tokens"):
        cka.resamples(np.array([], int), 3, 0, "plain")
    with pytest.raises(UserError, match="at least 4"):
        cka.linear_cka(np.eye(3), np.eye(3)[::-1] * [1, 2, 3], "debiased")


@pytest.mark.parametrize("reference", ["end", "start"])
@pytest.mark.parametrize(
    ("draws", "normalise"), [(0, False), (3, False), (0, True)], ids=["composed", "kept", "unit"]
)
def test_memory_is_what_is_said(monkeypatch, reference, draws, normalise):
    """At least what torch allocates, and not much more; as many channels as tokens."""
    # Not smaller: the profiler keeps gigabytes of events of many small slabs.
    monkeypatch.setattr(cka, "CPU_SLAB_BYTES", 1 << 18)
    model = Model(depth=10, tokens=96, width=96)
    how = {"reference": reference, "estimator": "plain", "normalise_tokens": normalise}
    peak = measuring.torch_peak(
        lambda: similarity.surrogate_cka(model.read, model.probes, model.plan(draws), **how)
    )
    options = SimilaritySettings.of(how | {"bootstrap": draws})
    said = similarity.memory((96, 96), 10, options)
    assert 0.7 * said < peak <= said
