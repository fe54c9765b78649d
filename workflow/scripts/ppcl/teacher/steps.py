"""The denoising steps of a pipeline: the noise level of each, and the seeds of its random noise."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ppcl.errors import UserError
from ppcl.runtime import devices

Step = Callable[..., Any]


class Level(NamedTuple):
    """The noise level of a denoising step: timestep and sigma, as its scheduler counts them; NaN if
    unknown."""

    timestep: float
    sigma: float


@contextmanager
def around(scheduler: Any, wrap: Callable[[Any, Step, dict[str, Any]], Any]) -> Iterator[None]:
    """Within this context, `scheduler.step(...)` calls `wrap(scheduler, step, arguments by name)`,
    with `step` the scheduler's own method.

    This holds for all schedulers of the same class, since pipelines may copy theirs, for the sound
    of a video or for its frames.
    """
    kind = type(scheduler)
    own, plain = vars(kind).get("step"), getattr(kind, "step", None)
    if plain is None:
        yield
        return

    @functools.wraps(plain)  # pipelines look at its signature
    def step(self, *args, **kwargs):
        bound = inspect.signature(plain).bind(self, *args, **kwargs).arguments
        rest = dict(list(bound.items())[1:])
        rest |= rest.pop("kwargs", {})
        return wrap(self, functools.partial(plain, self), rest)

    kind.step = step
    try:
        yield
    finally:
        if own is None:
            del kind.step
        else:
            kind.step = own


def taken(scheduler: Any, step: Step, given: dict[str, Any]) -> tuple[Any, Level]:
    """Takes a step; returns what the scheduler returned, and the step's noise level.

    The level follows from the scheduler's own `step_index`. Counting calls would be wrong: a
    pipeline that starts from a picture starts in the middle of the schedule, and a second-order
    scheduler takes two steps at one level, or one between two levels.
    """
    timestep, place = given.get("timestep", float("nan")), getattr(scheduler, "step_index", None)
    sigmas, between = getattr(scheduler, "sigmas", None), None
    second = getattr(scheduler, "state_in_first_order", True) is False
    if second and any(hasattr(scheduler, name) for name in ("sigmas_interpol", "mid_point_sigma")):
        # Between two levels. Classes count these in their own ways, but all scale the model's input
        # by 1 / sqrt(sigma^2 + 1), which gives sigma.
        one = torch.ones((), dtype=torch.float64)
        between = (scheduler.scale_model_input(one, timestep) ** -2 - 1) ** 0.5
    returned = step(**given)
    counted = getattr(scheduler, "step_index", None)
    if place is None:
        place = _found(scheduler, timestep) if counted is None else counted - 1
    sigma: Any = float("nan")
    if sigmas is not None and place is not None and place < len(sigmas):
        sigma = sigmas[place]
    several = isinstance(timestep, Tensor) and timestep.numel() != 1  # one per token or frame
    if several or "timestep" not in given:  # a custom scheduler may have another name for it
        inside = place is not None and place < len(scheduler.timesteps)
        timestep = scheduler.timesteps[place] if inside else float("nan")
    return returned, Level(float(timestep), float(sigma if between is None else between))


def told(scheduler: Any, timestep: Any) -> Level:
    """The noise level of a step that the pipeline reports by its callback, but takes without its
    scheduler."""
    place, sigmas = _found(scheduler, timestep), getattr(scheduler, "sigmas", None)
    sigma = float("nan")
    if sigmas is not None and place is not None and place < len(sigmas):
        sigma = float(sigmas[place])
    single = not isinstance(timestep, Tensor) or timestep.numel() == 1
    return Level(float(timestep) if single else float("nan"), sigma)


def _found(scheduler: Any, timestep: Any) -> int | None:
    """The index of a timestep in the schedule; None unless it is there exactly once."""
    every = getattr(scheduler, "timesteps", None)  # a pipeline may have no scheduler
    if every is None or (isinstance(timestep, Tensor) and timestep.numel() != 1):
        return None
    every = torch.as_tensor(every).cpu().double()
    places = (every == float(timestep)).nonzero().flatten().tolist()
    return places[0] if len(places) == 1 else None


@contextmanager
def seeded(
    pipe: DiffusionPipeline, generators: list[torch.Generator], seeds: Sequence[int]
) -> Iterator[None]:
    """Within this context the pictures' seeds decide all random numbers, also those drawn while
    denoising.

    A scheduler that draws noise gets the pictures' generators, even if the pipeline does not pass
    them on. torch's global random state, for everything else that draws, follows from the seeds;
    with several pictures in the batch, drawing from it is an error.

    Args:
        generators, seeds: one per picture; each generator was seeded with its seed.

    Raises:
        UserError: numbers were drawn from the global state for a batch of several pictures.
    """

    def step(scheduler: Any, plain: Step, given: dict[str, Any]) -> Any:
        takes = "generator" in inspect.signature(plain).parameters
        sample = given.get("sample")
        alike = isinstance(sample, Tensor) and sample.ndim and len(sample) == len(generators)
        if takes and given.get("generator") is None and alike:
            given = given | {"generator": generators}
        return plain(**given)

    device = pipe._execution_device
    states = devices.random_states(device)
    # Not the seed itself: it would repeat the noise from which the picture starts.
    torch.manual_seed(int(np.random.SeedSequence([1, *seeds]).generate_state(1)[0]))
    fresh = devices.random_states(device)
    try:
        with around(getattr(pipe, "scheduler", None), step):
            yield
        drawn = not all(map(torch.equal, fresh, devices.random_states(device)))
    finally:
        devices.set_random_states(device, states)
    if drawn and len(seeds) > 1:
        raise UserError(
            f"{type(pipe).__name__} with a {type(getattr(pipe, 'scheduler', None)).__name__} draws "
            "random numbers from torch's global state, so a picture of a batch depends on more "
            "than its own seed; set record.batch_size and evaluate.batch_size to 1, or give the "
            "teacher a scheduler that draws none"
        )
