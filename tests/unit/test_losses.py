"""Eq. 6 and its companions against literal float64 loops."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.configuration import config
from ppcl.training import losses

SHAPE = (2, 3, 4)


def tensors(seed, scale=1.0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, *shape, generator=generator)).unbind()


def loop(output, target, mask, of_token):
    """Mean of `of_token` over real tokens, in Python floats."""
    terms = []
    for b in range(output.shape[0]):
        for t in range(output.shape[1]):
            if mask is None or mask[b, t]:
                terms.append(of_token(output[b, t].tolist(), target[b, t].tolist()))
    return math.fsum(terms) / len(terms)


def eq_6(a, b):
    length_a, length_b = math.hypot(*a), math.hypot(*b)
    return math.fsum((x / length_a - y / length_b) ** 2 for x, y in zip(a, b, strict=True))


def relative(a, b):
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / math.hypot(*b) ** 2


masks = st.none() | st.lists(st.booleans(), min_size=6, max_size=6).filter(any)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e4]), masks)
def test_losses_are_the_literal_sums(seed, scale, mask):
    output, target = tensors(seed, scale)
    mask = None if mask is None else torch.tensor(mask).reshape(2, 3)
    for error, literal in (
        (losses.normalised_error(output, target, mask), eq_6),
        (losses.relative_error(output, target, mask), relative),
    ):
        expected = loop(output.double(), target.double(), mask, literal)
        assert error.dtype == torch.float32 and error.shape == ()
        assert float(error) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_normalised_sees_direction_only(seed, factor):
    output, target = tensors(seed)
    cosine = torch.cosine_similarity(output.double(), target.double(), dim=-1).mean()
    assert float(losses.normalised_error(output, target)) == pytest.approx(
        float(2 - 2 * cosine), rel=1e-5, abs=1e-6
    )
    assert float(losses.normalised_error(factor * target, target)) == pytest.approx(0, abs=1e-10)
    # The closed form of the magnitude's error: |f t - t|^2 / |t|^2 = (f - 1)^2 for every token.
    assert float(losses.relative_error(factor * target, target)) == pytest.approx(
        (factor - 1) ** 2, rel=1e-3, abs=1e-10
    )


def test_equal_is_zero_and_opposite_is_four():
    _, target = tensors(0)
    for error in (losses.normalised_error, losses.relative_error):
        assert float(error(target, target.clone())) == 0
        assert float(error(-target, target)) == pytest.approx(4)
    assert float(losses.velocity_error(target, target.clone())) == 0


def test_padding_has_no_say():
    output, target = tensors(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for error in (losses.normalised_error, losses.relative_error):
        leaf = output.clone().requires_grad_()
        value = error(leaf, target, mask)
        value.backward()
        assert leaf.grad[~mask].abs().max() == 0 < leaf.grad[mask].abs().min()
        changed = torch.where(mask[..., None], output, 1e6)
        assert error(changed, target, mask).item() == value.item()


ERRORS = [losses.normalised_error, losses.relative_error, losses.squared_error]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 3e38])
def test_padding_may_hold_anything(error, spoilt):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    by_padding = []
    for padding in (0.0, spoilt):
        output, target = (torch.where(mask[..., None], t, padding) for t in tensors(5))
        leaf = output.requires_grad_()
        value = error(leaf, target, mask)
        value.backward()
        by_padding.append((value.item(), leaf.grad))
    assert by_padding[0][0] == by_padding[1][0] > 0
    assert torch.equal(by_padding[0][1], by_padding[1][1]) and not by_padding[1][1][~mask].any()


@pytest.mark.parametrize("error", ERRORS)
def test_without_a_real_token_there_is_no_loss(error):
    output, target = tensors(6)
    leaf = torch.full_like(output, math.nan).requires_grad_()
    value = error(leaf, target, torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and not leaf.grad.any()


def test_velocity_error_is_one_ratio_for_the_batch():
    output, target = tensors(3)
    above = math.fsum(((output - target).double() ** 2).flatten().tolist())
    below = math.fsum((target.double() ** 2).flatten().tolist())
    assert float(losses.velocity_error(output, target)) == pytest.approx(above / below, rel=1e-6)


@pytest.mark.parametrize("error", [losses.normalised_error, losses.relative_error])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(error, dtype):
    output, target = (t.to(dtype) for t in tensors(1, scale=300.0))
    assert float(error(output, target)) == float(error(output.float(), target.float()))


@pytest.mark.parametrize(
    "error", [losses.normalised_error, losses.relative_error, losses.velocity_error]
)
def test_gradient_is_that_of_finite_differences(error):
    output, target = tensors(2)
    leaf = output.clone().requires_grad_()
    error(leaf, target).backward()
    step = 1e-2
    for index in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        sides = []
        for sign in (1, -1):
            moved = output.clone()
            moved[index] += sign * step
            sides.append(float(error(moved, target)))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert float(leaf.grad[index]) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_tokens_of_zero_length_keep_everything_finite():
    output, target = tensors(4)
    output[0, 0], target[1, 1] = 0, 0
    leaf = output.requires_grad_()
    value = losses.normalised_error(leaf, target)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(leaf.grad).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 3), masks.filter(lambda m: m is None or all_rows(m)))
def test_outliers_are_by_each_samples_own_deviation(seed, deviations, mask):
    x, _ = tensors(seed)
    mask = None if mask is None else torch.tensor(mask).reshape(2, 3)
    kept = losses.without_outliers(x, deviations, mask)
    for b in range(len(x)):
        real = [t for t in range(3) if mask is None or mask[b, t]]
        values = [v for t in real for v in x[b, t].tolist()]
        mean = statistics.fmean(values)
        limit = deviations * statistics.stdev(values)
        for t in real:
            for c, value in enumerate(x[b, t].tolist()):
                assert kept[b, t, c] == (value if abs(value - mean) < limit else 0)


def all_rows(mask):
    return any(mask[:3]) and any(mask[3:])


def test_outliers_have_no_gradient_and_padding_no_say():
    x = torch.tensor([[[1.0, -1.0, 1.0, 50.0], [1.0, -1.0, 1.0, -1.0], [math.nan] * 4]])
    leaf = x.requires_grad_()
    kept = losses.without_outliers(leaf, 2, torch.tensor([[True, True, False]]))
    kept[:, :2].sum().backward()
    assert leaf.grad[0, :2].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_config_may_name_each_loss_of_the_catalogue():
    node = config.schema()["properties"]["distill"]["properties"]["loss"]
    assert set(node["enum"]) == {*losses.STREAM_LOSSES, "mixed"}
    assert set(losses.LOGGED) <= losses.STREAM_LOSSES.keys()
