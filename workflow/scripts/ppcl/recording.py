"""Runs the stock pipeline and records what it asks of the transformer."""

import inspect
from typing import Any

import pyarrow as pa
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ppcl import blocks, calls, pipelines
from ppcl.errors import UserError
from ppcl.families import Family


class _Recorder:
    """Hooks a transformer for one run of a pipeline and collects its calls."""

    def __init__(self, transformer: nn.Module):
        self.transformer, self.step, self.branch = transformer, 0, 0
        self.calls: list[dict[str, Any]] = []
        self.latents: list[Tensor] = []

    def __enter__(self) -> "_Recorder":
        def hook(module, args, kwargs, returned):
            output = blocks.stacked(returned[0] if isinstance(returned, tuple) else returned.sample)
            bound = blocks.signature_arguments(module, args, kwargs)
            here = {"arguments": bound, "output": output, "step": self.step, "branch": self.branch}
            self.calls.append(here)
            self.branch += 1

        self._handle = self.transformer.register_forward_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *_exception) -> None:
        self._handle.remove()

    def end_of_step(self, _pipe, _step, _timestep, values: dict) -> dict:
        """The pipeline's callback after each denoising step."""
        self.latents.append(values["latents"])
        self.step, self.branch = self.step + 1, 0
        return {}

    def callback(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of a pipeline's call that let it tell the end of each step.

        Raises:
            UserError: it can't.
        """
        known = inspect.signature(pipe.__call__).parameters
        if "callback_on_step_end" in known:
            return {"callback_on_step_end": self.end_of_step}
        if {"callback", "callback_steps"} <= set(known):  # as older pipelines have it

            def old(step: int, timestep: Tensor, latents: Tensor) -> None:
                self.end_of_step(pipe, step, timestep, {"latents": latents})

            return {"callback": old, "callback_steps": 1}
        raise UserError(
            f"{type(pipe).__name__} can't be recorded: it tells nobody when a step ends "
            "(callback_on_step_end)"
        )


def record_batch(
    pipe: DiffusionPipeline,
    transformer: nn.Module,
    samples: list[dict],
    settings: dict[str, Any],
    renoised: int,
    seed: int,
) -> list[pa.Table]:
    """Every transformer call of one batch of samples, one table per call.

    Args:
        transformer: the component of the pipeline whose calls are recorded.
        samples: per sample: sample, prompt_index, prompt, seed, heldout; and image, a picture's
            path, if the prompts have one.
        settings: the config's `pipeline` mapping.
        renoised: fresh states per sample and branch: the pipeline's final latent, noised again at a
            sigma drawn uniformly between the schedule's ends, and the teacher's answer to it.
        seed: of the fresh noise.

    Raises:
        UserError: the pipeline has no step callback, or its states can't be renoised.
    """
    prompts, seeds = [s["prompt"] for s in samples], [s["seed"] for s in samples]
    images = [s["image"] for s in samples] if "image" in samples[0] else None
    samples = [{key: value for key, value in s.items() if key != "image"} for s in samples]
    with _Recorder(transformer) as recorder:
        more = recorder.callback(pipe)
        pipelines.run(pipe, prompts, seeds, settings, images, output_type="latent", **more)
    schedule = pipe.scheduler
    sigmas = getattr(schedule, "sigmas", None)
    family = blocks.family(transformer)
    found = []
    for call in recorder.calls:
        step = call["step"]
        if step >= len(schedule.timesteps):
            raise UserError(
                f"{type(pipe).__name__} denoises in several rounds, which can't be recorded yet; "
                "make a shorter video, or a smaller picture, that takes one"
            )
        if listed := [name for name in family.numbered if call["arguments"].get(name)]:
            raise UserError(
                f"these pipeline settings give the transformer '{listed[0]}', numbers of blocks, "
                "which would be other blocks after pruning; leave that guidance out of the "
                "config's pipeline"
            )
        sigma = float(sigmas[step]) if sigmas is not None else float("nan")
        place = {
            "kind": "pipeline",
            "step": step,
            "branch": call["branch"],
            "timestep": float(schedule.timesteps[step]),
            "sigma": sigma,
        }
        found += _tables(call["arguments"], call["output"], samples, place, family)
    if not found:
        raise UserError(
            f"{type(pipe).__name__} never called its transformer teacher.component; with these "
            "pipeline settings there is nothing to record"
        )
    if renoised:
        found += _renoise(pipe, recorder, samples, renoised, seed, family)
    return found


def _tables(arguments, output, samples, place, family: Family) -> list[pa.Table]:
    # A pipeline that joins both guidance branches in one batch repeats the samples.
    repeats = len(output) // len(samples)
    every = samples * repeats
    rows = {key: [s[key] for s in every] for key in samples[0]}
    rows |= {k: v if isinstance(v, list) else [v] * len(every) for k, v in place.items()}
    return calls.to_tables(arguments, output, rows, family.shared, family.batch_dims)


@torch.no_grad()
def _renoise(pipe, recorder, samples, renoised, seed, family: Family) -> list[pa.Table]:
    """x = (1 - sigma) x_0 + sigma noise, the interpolation that flow matching trains on."""
    schedule = pipe.scheduler
    flow = "FlowMatch" in type(schedule).__name__ or schedule.config.get("use_flow_sigmas")
    if not flow:
        raise UserError(
            f"record.renoised_per_sample: states of {type(schedule).__name__} can't be renoised "
            "(only flow-matching schedulers yet); set it to 0"
        )
    if recorder.step < 2:
        raise UserError(
            "record.renoised_per_sample: one denoising step does not show how this pipeline hands "
            "its latents to the transformer; set it to 0, or pipeline.num_inference_steps to 2"
        )
    later = [call["step"] for call in recorder.calls if call["step"] > 0]
    second = [call for call in recorder.calls if later and call["step"] == min(later)]
    if not second:
        raise UserError(
            "record.renoised_per_sample: the pipeline calls this transformer in its first step "
            "only, which does not show how it hands over its latents; set it to 0"
        )
    before, clean = recorder.latents[min(later) - 1], recorder.latents[-1]
    # Of two transformers, each knows its own noise levels.
    called = [float(schedule.sigmas[call["step"]]) for call in recorder.calls]
    low, high = min(called), max(called)
    found = []
    for round_ in range(renoised):
        generator = torch.Generator().manual_seed(
            seed * 1_000_003 + samples[0]["sample"] * 1009 + round_
        )
        sigma = low + (high - low) * torch.rand(
            len(samples), generator=generator, dtype=torch.float64
        )
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        # Mochi counts its noise levels the other way round.
        share = 1 - sigma if schedule.config.get("invert_sigmas") else sigma
        weight = share.to(clean).view(-1, *[1] * (clean.ndim - 1))
        state = torch.lerp(clean, noise, weight)
        for call in second:
            arguments = dict(call["arguments"])
            repeats = len(call["output"]) // len(samples)
            hidden = arguments[family.state]
            given = torch.cat([before] * repeats)
            as_it_is = isinstance(hidden, Tensor) and hidden.shape == given.shape
            if not as_it_is or not torch.equal(hidden, given.to(hidden)):
                raise UserError(
                    "record.renoised_per_sample: the transformer of this pipeline does not get the "
                    "latents as they are, so its states can't be renoised; set it to 0"
                )
            timestep = sigma * schedule.config.num_train_timesteps
            given = float(arguments[family.time].flatten()[0])
            scaled = timestep * _timestep_scale(given, schedule, call["step"])
            times = arguments[family.time]
            if times.ndim > 1:
                raise UserError(
                    "record.renoised_per_sample: this pipeline gives every token a timestep of its "
                    "own, so its states can't be renoised; set it to 0"
                )
            arguments[family.state] = torch.cat([state] * repeats).to(hidden)
            arguments[family.time] = scaled.repeat(repeats).to(times)
            output = blocks.answer(recorder.transformer, arguments | {"return_dict": False})
            place = {
                "kind": "renoised",
                "step": -1,
                "branch": call["branch"],
                "timestep": timestep.tolist() * repeats,
                "sigma": sigma.tolist() * repeats,
            }
            found += _tables(arguments, output, samples, place, family)
    return found


def _timestep_scale(given: float, schedule, step: int) -> float:
    """What a pipeline multiplies the scheduler's timestep by: some pass it as it is, others sigma.

    In bfloat16 the quotient is off by up to 1 %, so it says only which of the two.
    """
    found = given / float(schedule.timesteps[step])
    for scale in (1.0, 1 / schedule.config.num_train_timesteps):
        if abs(found / scale - 1) < 0.01:
            return scale
    raise UserError(
        f"record.renoised_per_sample: this pipeline gives the transformer {found:g} times the "
        "scheduler's timestep, so its states can't be renoised; set it to 0"
    )
