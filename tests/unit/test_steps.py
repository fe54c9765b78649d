"""Denoising steps: the noise level of each, wherever they start, and noise of seeds alone."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from ppcl.errors import UserError
from ppcl.runtime import devices
from ppcl.teacher import pipelines, steps
from support import tiny

CPU = torch.device("cpu")


def levels(scheduler, begin, told=True):
    """Of all steps from number `begin` on; told: the pipeline tells the scheduler that number."""
    scheduler.set_timesteps(4)
    if told:
        scheduler.set_begin_index(begin)
    state, noise_levels = torch.ones(1, 1, 2, 2), []

    def take(own, step, given):
        returned, level = steps.taken(own, step, given)
        noise_levels.append(level)
        return returned

    with steps.around(scheduler, take):
        for timestep in scheduler.timesteps[begin:]:
            state = scheduler.step(torch.zeros_like(state), timestep, state).prev_sample
    return noise_levels


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_a_flow_matching_step_has_its_own_sigma(name, told, begin):
    made = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")(shift=3.0)
    if name == "Heun" and not told:
        begin = 0  # of two equal timesteps a scheduler takes the second, so pairs would be torn
    noise_levels = levels(made, begin, told)
    assert len(noise_levels) == len(made.timesteps) - begin
    np.testing.assert_allclose(
        [f.sigma for f in noise_levels], [f.timestep / 1000 for f in noise_levels], 1e-6
    )
    assert noise_levels[0].sigma == made.sigmas[begin]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy, by the thousand
@pytest.mark.parametrize("name", ["KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_a_step_between_two_levels_has_the_level_between(name):
    made = getattr(diffusers, f"{name}Scheduler")()
    sigmas = [level.sigma for level in levels(made, 0)]
    assert len(sigmas) == 7 and sigmas[::2] == made.sigmas[:7:2].tolist()
    # At the geometric mean of two sigmas; an ancestral one steps down below the next.
    wanted = {float(sigma) for sigma in made.sigmas_interpol}
    for one, between, other in zip(sigmas[::2], sigmas[1::2], sigmas[2::2], strict=False):
        assert min(abs(between / sigma - 1) for sigma in wanted if sigma) < 1e-4
        assert between < one and (between > other or "Ancestral" in name)


def test_a_scheduler_without_sigmas_has_none():
    noise_levels = levels(diffusers.DDPMScheduler(), 1, told=False)
    assert [f.timestep for f in noise_levels] == [500, 250, 0] and np.isnan(
        [f.sigma for f in noise_levels]
    ).all()


def test_a_timestep_by_another_name_is_the_schedules():
    class Own(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, t, sample):
            return super().step(model_output, t, sample)

    noise_levels = levels(Own(), 1)
    np.testing.assert_allclose(
        [f.timestep for f in noise_levels], [1000 * f.sigma for f in noise_levels], 1e-6
    )


def test_a_step_that_the_pipeline_takes_itself_is_found_by_its_timestep():
    made = diffusers.FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(4)
    assert steps.told(made, made.timesteps[2]) == (made.timesteps[2], made.sigmas[2])
    assert np.isnan(steps.told(made, torch.tensor(3.0)).sigma)
    assert np.isnan(steps.told(made, made.timesteps)).all()


def test_the_scheduler_is_left_as_it_was():
    made = diffusers.FlowMatchEulerDiscreteScheduler
    plain = made.step
    with steps.around(made(), lambda _own, step, given: step(**given)):
        assert made.step is not plain
    assert made.step is plain


# ---- noise


def drawn(seeds, scheduler=None, more=lambda: None):
    """The state after one noisy step of pictures that begin with zeros, and the noise of `more`."""
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(4)
    pipe = SimpleNamespace(_execution_device=CPU, scheduler=scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    state = torch.zeros(len(seeds), 3, 5)
    with steps.seeded(pipe, generators, seeds):
        made = scheduler.step(state, scheduler.timesteps[0], state, return_dict=False)[0]
        return made, more()


def test_a_schedulers_noise_is_of_each_pictures_seed():
    torch.manual_seed(8)
    together, _ = drawn([3, 4])
    torch.manual_seed(9)
    alone = [drawn([seed])[0] for seed in (3, 4)]
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(*alone)


def test_global_noise_is_of_the_one_pictures_seed_or_refused():
    torch.manual_seed(8)
    before = torch.get_rng_state()
    one, same, other = (drawn([s], more=lambda: torch.randn(9))[1] for s in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    # Not the noise that the picture starts from once more.
    assert not torch.equal(one, torch.randn(9, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(UserError, match="SimpleNamespace .* set record.batch_size and evaluate"):
        drawn([3, 4], more=lambda: torch.randn(9))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(devices.random_states(CPU)[0], before)


def test_noisy_pictures_do_not_depend_on_their_batch(tiny_teacher):
    pipe = tiny.load(tiny_teacher)
    pipe.scheduler.register_to_config(stochastic_sampling=True)
    given = tiny.SETTINGS | {"num_inference_steps": 2}
    prompts = ["a red 1", "a red 2"]

    def made(pick):
        picked = [prompts[i] for i in pick], list(pick)
        return pipelines.run(pipe, *picked, given, output_type="latent").images

    together = made([0, 1])
    for number in range(2):
        torch.testing.assert_close(together[number], made([number])[0], rtol=1e-4, atol=1e-5)
