"""A stand-in for a pipeline's transformer, and what is seen of a pipeline that runs with it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ppcl.errors import UserError
from ppcl.teacher import steps
from ppcl.transformer import blocks


class Reached(BaseException):
    """Ends a run of the pipeline where all that was wanted is known; no Exception, so that no
    pipeline handles it."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


def refusal(pipeline: str, reason: str) -> UserError:
    """The error that a pipeline's transformer can't be trained on pictures."""
    return UserError(
        f"finetune.data: the transformer of a {pipeline} can't be trained on pictures ({reason}); "
        "leave finetune.data out"
    )


class Seen:
    """What is seen of runs of a pipeline whose transformer is replaced by a stand-in.

    Attributes:
        times: (share of noise, the transformer's timestep) of every call.
        signs: 1 where the scheduler got the transformer's answer, -1 where it got its opposite, 0
            for anything else.
        given_as_they_are: whether the transformer got the scheduler's latents in every call.
        output: shape of a sample's answer.
        dtype: of the latents.
    """

    def __init__(self, pipe: DiffusionPipeline, transformer: nn.Module):
        self._pipe, self._transformer = pipe, transformer
        self._family = blocks.family(transformer)
        self._returned: Any = None
        self._call: dict[str, Any] = {}
        self._sample: Tensor | None = None
        self.times: set[tuple[float, float]] = set()
        self._shares: set[float] = set()
        self.signs: set[int] = set()
        self.given_as_they_are = True
        self.output: tuple[int, ...] = ()
        self.dtype = torch.float32

    def latents(self) -> Tensor:
        """Those of the last run, [1, ...]."""
        if self._sample is None:
            raise refusal(type(self._pipe).__name__, "it does not show the latents of its steps")
        return self._sample

    @contextlib.contextmanager
    def watching(self, latents: Tensor) -> Iterator[None]:
        """Within this, every step leaves `latents` (a number for all, or of their shape)."""
        transformer, plain = self._transformer, self._transformer.forward

        @functools.wraps(plain)
        def forward(*args, **kwargs):
            arguments = blocks.signature_arguments(transformer, args, kwargs)
            if self._returned is None:
                self._returned = plain(*args, **kwargs)
            numbers = torch.Generator().manual_seed(1)

            def drawn(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return torch.randint(-8, 9, value.shape, generator=numbers).to(value)

            if hasattr(self._returned, "sample"):
                made = type(self._returned)(sample=tree_map(drawn, self._returned.sample))
                answer = blocks.stacked(made.sample)
            else:
                made = tuple(tree_map(drawn, self._returned[:1])) + tuple(self._returned[1:])
                answer = blocks.stacked(made[0])
            self.output = tuple(answer.shape[1:])
            times = arguments[self._family.time]
            if answer.shape[0] != 1 or self._call:
                raise refusal(type(self._pipe).__name__, "its guidance can't be switched off")
            if not isinstance(times, Tensor) or times.numel() != 1:
                raise refusal(type(self._pipe).__name__, "it gives tokens timesteps of their own")
            self._call = {"answer": answer, "state": arguments[self._family.state], "time": times}
            return made

        def step(scheduler, plain_step, given):
            returned, level = steps.taken(scheduler, plain_step, given)
            if scheduler is not self._pipe.scheduler:
                return returned
            inverted = scheduler.config.get("invert_sigmas")
            share = 1 - level.sigma if inverted else level.sigma
            self._shares.add(share)
            if self._call:
                self._note(given, share)
            self._call = {}
            left = latents.to(given["sample"]).expand_as(given["sample"])
            if isinstance(returned, tuple):
                return (left, *returned[1:])
            returned.prev_sample = left
            return returned

        self._call = {}
        with (
            in_place(transformer, "forward", forward),
            steps.around(self._pipe.scheduler, step),
        ):
            yield

    def noise(self) -> tuple[float, float]:
        """See `Layout.noise`; up to either end where this transformer is called in the last or in
        the first step."""
        called = {share for share, _ in self.times}
        low = 0.0 if min(self._shares) in called else min(called)
        return low, 1.0 if max(self._shares) in called else max(called)

    def _note(self, given: dict[str, Any], share: float) -> None:
        sample, answer = given["sample"], self._call["answer"]
        self._sample, self.dtype = sample, sample.dtype
        state = blocks.stacked(self._call["state"]).flatten()
        same = state.numel() == sample.numel()
        self.given_as_they_are &= same and torch.equal(state, sample.flatten().to(state))
        output = given["model_output"].flatten().to(answer)
        signs = [
            sign
            for sign in (1, -1)
            if output.shape == answer.flatten().shape
            and torch.allclose(output, sign * answer.flatten(), rtol=0.02)
        ]
        self.signs.add(signs[0] if signs else 0)
        self.times.add((share, float(self._call["time"].flatten()[0])))


@contextlib.contextmanager
def in_place(module: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Within this, the module's method is this function."""
    own = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        yield
    finally:
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own
