"""Distances between a student's output and the teacher's, per stream: the catalogue of losses."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Real(NamedTuple):
    """The tokens of a stream that count, in a process's share of a batch.

    mask: [batch, tokens], true for real tokens; None if all are.
    weight: factor on this share's mean loss: the share's number of real tokens over the mean number
        of all shares. So the mean over processes is the mean over the batch's tokens.
    """

    mask: Tensor | None = None
    weight: Tensor | float = 1.0


def normalised_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 6: || Norm(output) - Norm(target) ||^2 with Norm the L2 norm along channels, per token.

    Summed over channels, averaged over tokens; equals 2 - 2 cos, so it sees direction only.

    Args:
        output, target: [batch, tokens, channels], any float dtype; computed in float32.
        mask: [batch, tokens], true for real tokens; padding is left out of the average, whatever
            it holds, and has no gradient.

    Returns:
        A float32 scalar; 0 if no token is real.
    """
    output, target = without_padding(output, mask), without_padding(target, mask)
    # A token of zero length has no direction; the floor keeps its gradient finite.
    unit_output = output / output.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit_target = target / target.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return _mean_over_tokens((unit_output - unit_target).square().sum(-1), mask)


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """|| output - target ||^2 / || target ||^2 per token, averaged; sees magnitude as well.

    Arguments and result as in `normalised_error`.
    """
    output, target = without_padding(output, mask), without_padding(target, mask)
    error = (output - target).square().sum(-1)
    return _mean_over_tokens(error / target.square().sum(-1).clamp_min(1e-24), mask)


# The losses that the config's distill.loss may name, beside `mixed`: the first plus relative_weight
# times the second. Each takes a stream's output, target and mask, as `normalised_error` does.
STREAM_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "normalised": normalised_error,
    "relative": relative_error,
}
# Computed and logged whichever loss is trained.
LOGGED = ("normalised", "relative")


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_linear: || output - target ||^2 per token, averaged over tokens and over channels.

    Arguments and result as in `normalised_error`.
    """
    output, target = without_padding(output, mask), without_padding(target, mask)
    return _mean_over_tokens((output - target).square().mean(-1), mask)


def velocity_error(output: Tensor, target: Tensor, power: Tensor | None = None) -> Tensor:
    """|| output - target ||^2 / || target ||^2 over the whole batch: float32 scalar.

    Args:
        output, target: [batch, ...], any float dtype; computed in float32.
        power: the denominator, if not this target's own || target ||^2. A process that holds part
            of a batch passes the mean of || target ||^2 over processes; then the mean of the
            processes' errors is the error of the batch.
    """
    output, target = output.float(), target.float()
    power = target.square().sum() if power is None else power
    return (output - target).square().sum() / power


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [batch, tokens, channels] in float32, with padding set to zero.

    A product with the mask would not do: padding may be NaN, and 0 * NaN is NaN, in gradients too.
    """
    return x.float() if mask is None else torch.where(mask[..., None], x.float(), 0.0)


def without_outliers(x: Tensor, deviations: float, mask: Tensor | None = None) -> Tensor:
    """x in float32, with values set to zero that are more than `deviations` standard deviations
    from the mean of their sample. Both are taken over the sample's real tokens and all channels.

    As TinyFusion (arXiv 2412.01199, train_masked_kd.py) masks features before it compares them:
    output and target each by its own mean and deviation, which have no gradient. Its code takes 2
    deviations.

    Args:
        x: [batch, tokens, channels]. mask: as in `normalised_error`; padding is left as it is.
    """
    x = x.float()
    known = without_padding(x.detach(), mask)
    if mask is None:
        spread, mean = torch.var_mean(known, dim=(1, 2), keepdim=True)
    else:
        count = (mask.sum(1) * x.shape[-1])[:, None, None].clamp_min(2)
        mean = known.sum((1, 2), keepdim=True) / count
        spread = without_padding(known - mean, mask).square().sum((1, 2), keepdim=True)
        spread = spread / (count - 1)
    return torch.where((x.detach() - mean).abs() < deviations * spread.sqrt(), x, 0.0)


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens of values [batch, tokens] that are zero at padding; 0 if none is."""
    return values.mean() if mask is None else values.sum() / mask.sum().clamp_min(1)
