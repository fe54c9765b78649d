"""The denoising steps of a pipeline: at which noise level each is, and whose noise it draws."""

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
    """Where a denoising step is: its timestep, and its sigma; NaN where there is none."""

    timestep: float
    sigma: float


@contextmanager
def around(scheduler: Any, wrap: Callable[[Any, Step, dict[str, Any]], Any]) -> Iterator[None]:
    """Within, `scheduler.step(...)` is `wrap(scheduler, step, arguments by name)`.

    So it is for all schedulers of this class: pipelines copy theirs, for the sound of a video or
    for its frames.
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
    """Takes a step, and says at which noise level it was.

    The scheduler's own count says so: a pipeline that starts from a picture starts in the middle,
    and one whose scheduler is of second order comes to a level twice, or to one in between.
    """
    timestep, place = given.get("timestep", float("nan")), getattr(scheduler, "step_index", None)
    sigmas, between = getattr(scheduler, "sigmas", None), None
    second = getattr(scheduler, "state_in_first_order", True) is False
    if second and any(hasattr(scheduler, name) for name in ("sigmas_interpol", "mid_point_sigma")):
        # Between two levels; each class counts in its own way, but shows it as it scales a state.
        one = torch.ones((), dtype=torch.float64)
        between = (scheduler.scale_model_input(one, timestep) ** -2 - 1) ** 0.5
    returned = step(**given)
    counted = getattr(scheduler, "step_index", None)
    if place is None:
        place = _found(scheduler, timestep) if counted is None else counted - 1
    sigma: Any = float("nan")
    if sigmas is not None and place is not None and place < len(sigmas):
        sigma = sigmas[place]
    several = isinstance(timestep, Tensor) and timestep.numel() != 1  # of every token, or frame
    if several or "timestep" not in given:  # or by another name, in a scheduler of one's own
        inside = place is not None and place < len(scheduler.timesteps)
        timestep = scheduler.timesteps[place] if inside else float("nan")
    return returned, Level(float(timestep), float(sigma if between is None else between))


def told(scheduler: Any, timestep: Any) -> Level:
    """The noise level of a step that a pipeline tells of, but takes without its scheduler."""
    place, sigmas = _found(scheduler, timestep), getattr(scheduler, "sigmas", None)
    sigma = float("nan")
    if sigmas is not None and place is not None and place < len(sigmas):
        sigma = float(sigmas[place])
    single = not isinstance(timestep, Tensor) or timestep.numel() == 1
    return Level(float(timestep) if single else float("nan"), sigma)


def _found(scheduler: Any, timestep: Any) -> int | None:
    """The place of a timestep in the schedule, if it is there once."""
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
    """Within, all noise is that of the pictures' seeds, also what is drawn while denoising.

    A scheduler that draws noise gets the pictures' generators, whether or not the pipeline passes
    them on. Whatever draws from torch's global state instead gets a state that the seed decides, if
    there is one picture only.

    Args:
        generators, seeds: one per picture; a generator is of its seed.

    Raises:
        UserError: numbers were drawn that no one picture's seed decides.
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
    # Not the seed itself, whose stream is the noise that the picture starts from.
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
