"""Probes (Eq. 1, 2) against numpy.linalg.lstsq on the tokens themselves, and where they must be
exact: a linear block, whatever the scales of its channels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.search import probes
from ppcl.search.probes import Moments, Probe

seeds = st.integers(0, 2**32 - 1)


def linear_block(generator, tokens, width):
    """Tokens of a correlated stream, and the residual of an exactly linear block."""
    x = generator.normal(size=(tokens, width)) @ generator.normal(size=(width, width))
    weight, bias = generator.normal(size=(width, width)), generator.normal(size=width)
    return x, x @ weight.T + bias, weight, bias


def lstsq(x, y):
    """Least squares with an intercept, from the tokens: (weight [d_out, d_in], bias)."""
    design = np.hstack([x, np.ones((len(x), 1))])
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def test_solve_is_least_squares_on_a_block_that_is_not_linear():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(200, 6)) + 3
    y = np.tanh(x @ generator.normal(size=(6, 6))) + generator.normal(size=(200, 6))
    probe = probes.solve(Moments.of(x, y), ridge=0)
    weight, bias = lstsq(x, y)
    np.testing.assert_allclose(probe.weight, weight, atol=1e-9)
    np.testing.assert_allclose(probe.bias, bias, atol=1e-9)
    # Eq. 2: no map near the solution has a smaller loss.
    loss = np.square(probe.residual(x) - y).sum()
    for _ in range(20):
        near = Probe(probe.weight + 1e-3 * generator.normal(size=(6, 6)), probe.bias)
        assert np.square(near.residual(x) - y).sum() > loss


def test_ridge_is_a_fraction_of_the_standardised_variance():
    generator = np.random.default_rng(2)
    x, y, _, _ = linear_block(generator, 300, 5)
    x[:, 2] *= 1e4
    centred, target = x - x.mean(0), y - y.mean(0)
    scale = centred.std(0)
    z = centred / scale
    covariance = z.T @ z / len(z)
    penalty = 0.1 * np.trace(covariance) / 5 * np.eye(5)
    expected = (np.linalg.inv(covariance + penalty) @ (z.T @ target) / len(z)).T / scale
    np.testing.assert_allclose(probes.solve(Moments.of(x, y), 0.1).weight, expected, rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 12), st.sampled_from([1e-4, 1.0, 1e4]))
def test_a_linear_block_is_recovered_exactly(seed, width, scale):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(8 * width + 8, width)) + generator.normal(size=width)
    x[:, 0] *= scale
    weight, bias = generator.normal(size=(width, width)), generator.normal(size=width)
    y = x @ weight.T + bias
    probe = probes.solve(Moments.of(x, y), ridge=0)
    # A channel of scale 1e4 is known to that much less: compare what it does to the tokens.
    np.testing.assert_allclose(probe.residual(x), y, atol=1e-8 * np.abs(y).max())
    assert probes.residual_fit(probe, x, y).r2 > 1 - 1e-10


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(1e-4, 1e4))
def test_rescaling_a_channel_does_not_change_the_probe(seed, scale):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(60, 4)) + 1
    y = np.sin(x) + 0.1 * generator.normal(size=(60, 4))
    scaled = x * np.array([1, scale, 1, 1])
    before = probes.solve(Moments.of(x, y), 1e-2).residual(x)
    after = probes.solve(Moments.of(scaled, y), 1e-2).residual(scaled)
    np.testing.assert_allclose(after, before, atol=1e-7)


def test_constant_channels_get_no_weight():
    generator = np.random.default_rng(3)
    x, _, _, _ = linear_block(generator, 100, 5)
    x[:, 1], x[:, 4] = 7e3, 0
    weight, bias = generator.normal(size=(5, 5)), generator.normal(size=5)
    y = x @ weight.T + bias
    probe = probes.solve(Moments.of(x, y), ridge=0)
    assert not probe.weight[:, [1, 4]].any()
    np.testing.assert_allclose(probe.weight[:, [0, 2, 3]], weight[:, [0, 2, 3]], atol=1e-6)
    np.testing.assert_allclose(probe.residual(x), y, atol=1e-6)
    assert probe.condition_number > 1e15


def test_all_channels_constant_leaves_the_bias():
    x, y = np.ones((10, 3)), np.random.default_rng(0).normal(size=(10, 3))
    probe = probes.solve(Moments.of(x, y), 1e-6)
    assert not probe.weight.any()
    np.testing.assert_allclose(probe.bias, y.mean(0))


def test_fewer_tokens_than_channels_interpolates_with_the_smallest_weights():
    generator = np.random.default_rng(4)
    x, y = generator.normal(size=(12, 30)), generator.normal(size=(12, 30))
    probe = probes.solve(Moments.of(x, y), ridge=0)
    np.testing.assert_allclose(probe.residual(x), y, atol=1e-8)
    assert probe.condition_number == pytest.approx(1 / np.finfo(float).eps, rel=1e-6)
    z = (x - x.mean(0)) / x.std(0)
    minimum = np.linalg.pinv(z) @ (y - y.mean(0))
    np.testing.assert_allclose(probe.weight, (minimum / x.std(0)[:, None]).T, atol=1e-8)
    strong = probes.solve(Moments.of(x, y), ridge=10.0)
    assert np.linalg.norm(strong.weight) < 0.5 * np.linalg.norm(probe.weight)


def test_condition_number_is_that_of_the_raw_centred_covariance():
    generator = np.random.default_rng(5)
    x, y, _, _ = linear_block(generator, 400, 6)
    x = x * [1, 1, 1e2, 1, 1, 1] + 50
    expected = np.linalg.cond(np.cov(x.T, bias=True))
    assert probes.solve(Moments.of(x, y), 1e-3).condition_number == pytest.approx(expected, 1e-4)


def test_fit_from_moments_equals_fit_from_tokens():
    generator = np.random.default_rng(6)
    x = generator.normal(size=(150, 5)) + 2
    y = np.tanh(x @ generator.normal(size=(5, 5)))
    moments = Moments.of(x, y)
    for ridge in (0, 0.3):
        probe = probes.solve(moments, ridge)
        literal = 1 - np.square(probe.residual(x) - y).sum() / np.square(y - y.mean(0)).sum()
        assert 0.05 < literal < 0.999
        assert probes.fit_r2(probe, moments) == pytest.approx(literal, abs=1e-10)
        assert probes.residual_fit(probe, x, y).r2 == pytest.approx(literal, abs=1e-12)


def test_heldout_measures_are_literal():
    generator = np.random.default_rng(7)
    x, y = generator.normal(size=(50, 4)), generator.normal(size=(50, 4))
    probe = Probe(generator.normal(size=(4, 4)), generator.normal(size=4))
    fit = probes.residual_fit(probe, x, y)
    cosines = []
    for token, residual in zip(x, y, strict=True):
        a, b = token + probe.weight @ token + probe.bias, token + residual
        cosines.append(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))
    assert fit.cosine == pytest.approx(np.mean(cosines), abs=1e-12)
    assert fit.r2 < 0
    assert fit.residual_norm == pytest.approx(np.sqrt((y**2).mean()) / np.sqrt((x**2).mean()))


def test_an_identity_block_fits_perfectly():
    x = np.random.default_rng(8).normal(size=(40, 4))
    moments = Moments.of(x, np.zeros_like(x))
    probe = probes.solve(moments, 1e-6)
    fit = probes.residual_fit(probe, x, np.zeros_like(x))
    assert (fit.r2, fit.residual_norm, probes.fit_r2(probe, moments)) == (1, 0, 1)
    assert fit.cosine == pytest.approx(1)
    wrong = Probe(np.eye(4), np.ones(4))
    assert probes.residual_fit(wrong, x, np.zeros_like(x)).r2 < -1e6


@pytest.mark.parametrize("name", ["x_sum", "x_x", "y_sum", "x_y", "y_y"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_name_block_and_stream(name, value):
    x = np.random.default_rng(9).normal(size=(20, 3))
    moments = Moments.of(x, x)
    spoiled = np.array(getattr(moments, name), dtype=float)
    spoiled.flat[0] = value
    with pytest.raises(UserError, match=rf"block 7, stream 'text'.*{name}"):
        probes.solve(replace(moments, **{name: spoiled}), 1e-6, 7, "text")


def test_one_token_is_refused():
    with pytest.raises(UserError, match=r"block 3, stream 'image'.*1 fitting token"):
        probes.solve(Moments.of(np.ones((1, 2)), np.ones((1, 2))), 1e-6, 3, "image")


def test_cosines_have_a_meaning_where_tokens_are_zero():
    x, y = (
        np.array([[3.0, 0], [0, 0], [0, 0], [1, 1]]),
        np.array([[-2.0, 0], [0, 0], [1, 0], [3, 3]]),
    )
    np.testing.assert_allclose(probes.cosines(x, y), [-1, 1, 0, 1])
