"""Runs the stock pipeline and records what it asks of the transformer."""

from typing import Any

import pyarrow as pa
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ppcl import blocks, calls, pipelines
from ppcl.errors import UserError


class _Recorder:
    """Hooks a transformer for one run of a pipeline and collects its calls."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.step, self.branch = pipe, 0, 0
        self.calls: list[dict[str, Any]] = []
        self.latents: list[Tensor] = []

    def __enter__(self) -> "_Recorder":
        def hook(module, args, kwargs, returned):
            output = returned[0] if isinstance(returned, tuple) else returned.sample
            bound = blocks.signature_arguments(module, args, kwargs)
            here = {"arguments": bound, "output": output, "step": self.step, "branch": self.branch}
            self.calls.append(here)
            self.branch += 1

        self._handle = self.pipe.transformer.register_forward_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *_exception) -> None:
        self._handle.remove()

    def end_of_step(self, _pipe, _step, _timestep, values: dict) -> dict:
        """The pipeline's callback after each denoising step."""
        self.latents.append(values["latents"])
        self.step, self.branch = self.step + 1, 0
        return {}


def record_batch(
    pipe: DiffusionPipeline,
    samples: list[dict],
    settings: dict[str, Any],
    renoised: int,
    seed: int,
) -> list[pa.Table]:
    """Every transformer call of one batch of samples, one table per call.

    Args:
        samples: per sample: sample, prompt_index, prompt, seed, heldout.
        settings: the config's `pipeline` mapping.
        renoised: fresh states per sample and branch: the pipeline's final latent, noised again at a
            sigma drawn uniformly between the schedule's ends, and the teacher's answer to it.
        seed: of the fresh noise.

    Raises:
        UserError: the pipeline has no step callback, or its states can't be renoised.
    """
    prompts, seeds = [s["prompt"] for s in samples], [s["seed"] for s in samples]
    with _Recorder(pipe) as recorder:
        try:
            pipelines.run(
                pipe,
                prompts,
                seeds,
                settings,
                output_type="latent",
                callback_on_step_end=recorder.end_of_step,
            )
        except TypeError as error:
            raise UserError(
                f"{type(pipe).__name__} can't be recorded: {error}. A pipeline needs the standard "
                "arguments prompt, generator, output_type and callback_on_step_end."
            ) from error
    schedule = pipe.scheduler
    sigmas = getattr(schedule, "sigmas", None)
    shared = blocks.family(pipe.transformer).shared
    found = []
    for call in recorder.calls:
        step = call["step"]
        sigma = float(sigmas[step]) if sigmas is not None else float("nan")
        place = {
            "kind": "pipeline",
            "step": step,
            "branch": call["branch"],
            "timestep": float(schedule.timesteps[step]),
            "sigma": sigma,
        }
        found.append(_table(call["arguments"], call["output"], samples, place, shared))
    if renoised:
        found += _renoise(pipe, recorder, samples, renoised, seed, shared)
    return found


def _table(arguments, output, samples, place, shared) -> pa.Table:
    # A pipeline that joins both guidance branches in one batch repeats the samples.
    repeats = len(output) // len(samples)
    every = samples * repeats
    rows = {key: [s[key] for s in every] for key in samples[0]}
    rows |= {k: v if isinstance(v, list) else [v] * len(every) for k, v in place.items()}
    return calls.to_table(arguments, output, rows, shared)


@torch.no_grad()
def _renoise(pipe, recorder, samples, renoised, seed, shared) -> list[pa.Table]:
    """x = (1 - sigma) x_0 + sigma noise, the interpolation that flow matching trains on."""
    schedule = pipe.scheduler
    if "FlowMatch" not in type(schedule).__name__:
        raise UserError(
            f"record.renoised_per_sample: states of {type(schedule).__name__} can't be renoised "
            "(only flow-matching schedulers yet); set it to 0"
        )
    if recorder.step < 2:
        raise UserError(
            "record.renoised_per_sample: one denoising step does not show how this pipeline hands "
            "its latents to the transformer; set it to 0, or pipeline.num_inference_steps to 2"
        )
    second = [c for c in recorder.calls if c["step"] == 1]
    before, clean = recorder.latents[0], recorder.latents[-1]
    low, high = float(schedule.sigmas[schedule.sigmas > 0].min()), float(schedule.sigmas.max())
    found = []
    for round_ in range(renoised):
        generator = torch.Generator().manual_seed(
            seed * 1_000_003 + samples[0]["sample"] * 1009 + round_
        )
        sigma = low + (high - low) * torch.rand(
            len(samples), generator=generator, dtype=torch.float64
        )
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        weight = sigma.to(clean).view(-1, *[1] * (clean.ndim - 1))
        state = torch.lerp(clean, noise, weight)
        for call in second:
            arguments = dict(call["arguments"])
            repeats = len(call["output"]) // len(samples)
            hidden = arguments["hidden_states"]
            if not torch.equal(hidden, torch.cat([before] * repeats).to(hidden)):
                raise UserError(
                    "record.renoised_per_sample: the transformer of this pipeline does not get the "
                    "latents as they are, so its states can't be renoised; set it to 0"
                )
            timestep = sigma * schedule.config.num_train_timesteps
            given = float(arguments["timestep"].flatten()[0])
            scaled = timestep * _timestep_scale(given, schedule, call["step"])
            arguments["hidden_states"] = torch.cat([state] * repeats).to(hidden)
            arguments["timestep"] = scaled.repeat(repeats).to(arguments["timestep"])
            output = pipe.transformer(**arguments)[0]
            place = {
                "kind": "renoised",
                "step": -1,
                "branch": call["branch"],
                "timestep": timestep.tolist() * repeats,
                "sigma": sigma.tolist() * repeats,
            }
            found.append(_table(arguments, output, samples, place, shared))
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
