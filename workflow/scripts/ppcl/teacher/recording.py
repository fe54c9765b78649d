"""Runs the stock pipeline and records its calls of the transformer."""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ppcl.errors import UserError
from ppcl.teacher import pipelines, replays, steps
from ppcl.transformer import blocks, call_tables
from ppcl.transformer.family import Family


class _Recorder:
    """Hooks a transformer and a scheduler for one run of a pipeline, and collects the calls.

    Attributes:
        calls: of every call, a mapping: arguments (by name), output [batch, ...], step, branch (how
            many calls came before in this step) and level (`steps.Level`).
        latents: number of a step -> the latents after it.
        step: number of steps taken so far.
    """

    def __init__(self, pipe: DiffusionPipeline, transformer: nn.Module):
        self.pipe, self.transformer, self.step = pipe, transformer, 0
        self.calls: list[dict[str, Any]] = []
        self.latents: dict[int, Tensor] = {}
        self._counted = False

    def __enter__(self) -> "_Recorder":
        family = blocks.family(self.transformer)
        changing = family.state, family.time

        def hook(module, args, kwargs, returned):
            output = blocks.stacked(returned[0] if isinstance(returned, tuple) else returned.sample)
            branch = sum(call["step"] == self.step for call in self.calls)
            here = {"step": self.step, "branch": branch, "level": None}
            given = blocks.signature_arguments(module, args, kwargs)
            # Clones, since the pipeline may change these tensors in place later.
            here["arguments"] = given | {k: _copied(given[k]) for k in changing if k in given}
            here["output"] = output.clone()
            self.calls.append(here)

        self._undo = contextlib.ExitStack()
        handle = self.transformer.register_forward_hook(hook, with_kwargs=True)
        self._undo.callback(handle.remove)
        self._undo.enter_context(steps.around(self._scheduler, self._take))
        return self

    def __exit__(self, *_exception) -> None:
        self._undo.close()

    @property
    def _scheduler(self) -> Any:
        return getattr(self.pipe, "scheduler", None)

    def _take(self, scheduler: Any, step: steps.Step, given: dict[str, Any]) -> Any:
        returned, level = steps.taken(scheduler, step, given)
        if scheduler is self._scheduler:  # steps of the pipeline's copies of it do not count
            self._end(level)
            self._counted = True
        return returned

    def _end(self, level: steps.Level) -> None:
        for call in self.calls:
            if call["step"] == self.step:
                call["level"] = level
        self.step += 1

    def end_of_step(self, _pipe, _step, timestep, values: dict) -> dict:
        """The pipeline's callback after each denoising step."""
        if not self._counted:
            self._end(steps.told(self._scheduler, timestep))
        self._counted = False
        self.latents[self.step - 1] = _copied(values["latents"])
        return {}

    def callback(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of a pipeline's call that have it call `end_of_step`.

        Raises:
            UserError: it takes no callback.
        """
        call: Any = pipe  # each class has a __call__ of its own, their base has none
        known = inspect.signature(call.__call__).parameters
        if "callback_on_step_end" in known:
            return {"callback_on_step_end": self.end_of_step}
        if {"callback", "callback_steps"} <= set(known):  # as older pipelines have it

            def old(step: int, timestep: Tensor, latents: Tensor) -> None:
                self.end_of_step(pipe, step, timestep, {"latents": latents})

            return {"callback": old, "callback_steps": 1}
        raise UserError(
            f"{type(pipe).__name__} can't be recorded: its call takes no callback for the end of a "
            "step (callback_on_step_end)"
        )


def _copied(value: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


def record_batch(
    pipe: DiffusionPipeline,
    transformer: nn.Module,
    samples: list[dict],
    settings: Mapping[str, Any],
    renoised: int,
    seed: int,
    replayed: bool = True,
) -> list[pa.Table]:
    """Runs the pipeline for one batch of samples, and returns all calls of the transformer as
    tables (`call_tables.to_tables`).

    Args:
        transformer: the component of the pipeline whose calls are recorded.
        samples: per sample, a mapping: sample, prompt_index, prompt, seed, heldout; and image, the
            path of its picture, if prompts have one.
        settings: the config's `pipeline` mapping.
        renoised: number of fresh states to add, per sample and branch, with the teacher's answers.
            A fresh state is the pipeline's final latents, noised again at a sigma drawn uniformly
            between the lowest and the highest of the pipeline's calls.
        seed: of the fresh noise.
        replayed: replay all calls on the transformer alone, and compare (`replays.compare`). This
            takes as long as the calls did; once per pipeline is enough.

    Raises:
        UserError: the pipeline has no step callback, denoises in several rounds, or never calls
            this transformer; its states can't be renoised; something in it changes the
            transformer's answers; or an answer is all zero.
    """
    prompts, seeds = [s["prompt"] for s in samples], [s["seed"] for s in samples]
    images = [s["image"] for s in samples] if "image" in samples[0] else None
    samples = [{key: value for key, value in s.items() if key != "image"} for s in samples]
    with _Recorder(pipe, transformer) as recorder:
        more = recorder.callback(pipe)
        pipelines.run(pipe, prompts, seeds, settings, images, output_type="latent", **more)
    family = blocks.family(transformer)
    tables = []
    most = len(getattr(getattr(pipe, "scheduler", None), "timesteps", recorder.calls))
    for call in recorder.calls:
        if call["step"] >= most or call["level"] is None:
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
        place = {key: call[key] for key in ("step", "branch")} | call["level"]._asdict()
        tables += _tables(
            call["arguments"], call["output"], samples, place | {"kind": "pipeline"}, family
        )
    if not tables:
        raise UserError(
            f"{type(pipe).__name__} never called the transformer that teacher.component names; "
            "with these pipeline settings there is nothing to record"
        )
    if replayed:
        replays.compare(pipe, transformer, recorder.calls)
    if renoised:
        tables += _renoise(pipe, recorder, samples, renoised, seed, family)
    return tables


def _tables(arguments, output, samples, place, family: Family) -> list[pa.Table]:
    # A pipeline that joins both guidance branches in one batch repeats the samples.
    repeats, rest = divmod(len(output), len(samples))
    if rest or not repeats:
        raise UserError(
            f"the pipeline calls its transformer with {len(output)} samples for {len(samples)} "
            "prompts, so whose they are is unclear; set record.batch_size to 1, and leave out "
            "settings of the config's pipeline that multiply pictures"
        )
    every = samples * repeats
    if zero := [every[i]["prompt"] for i in (~output.flatten(1).any(1)).nonzero().flatten()]:
        raise UserError(
            f"the transformer answers a call with zeros alone (step {place['step']}, branch "
            f"{place['branch']}, prompt '{zero[0]}'), so no error relative to its answer is "
            "defined; its last layer looks untrained: give a trained teacher (teacher.path, "
            "teacher.component)"
        )
    rows = {key: [s[key] for s in every] for key in samples[0]}
    rows |= {k: v if isinstance(v, list) else [v] * len(every) for k, v in place.items()}
    return call_tables.to_tables(arguments, output, rows, family.shared, family.batch_dims)


@torch.no_grad()
def _renoise(pipe, recorder, samples, renoised, seed, family: Family) -> list[pa.Table]:
    """Calls at fresh states x = (1 - sigma) x_0 + sigma noise, the interpolation of flow matching,
    with x_0 the final latents. All other arguments are those of the first step after step 0."""
    schedule = getattr(pipe, "scheduler", None)
    config: Mapping[str, Any] = getattr(schedule, "config", {})
    flow = "FlowMatch" in type(schedule).__name__ or config.get("use_flow_sigmas")
    if not flow:
        name = type(schedule).__name__ if schedule is not None else "a pipeline without scheduler"
        raise UserError(
            f"record.renoised_per_sample: states of {name} can't be renoised (only flow-matching "
            "schedulers yet); set it to 0"
        )
    if recorder.step < 2:
        raise UserError(
            "record.renoised_per_sample: one denoising step does not show how this pipeline hands "
            "its latents to the transformer; set it to 0, or pipeline.num_inference_steps to 2 (if "
            "it starts from a picture, raise pipeline.strength)"
        )
    later = [call["step"] for call in recorder.calls if call["step"] > 0]
    second = [call for call in recorder.calls if later and call["step"] == min(later)]
    if not second:
        raise UserError(
            "record.renoised_per_sample: the pipeline calls this transformer in its first step "
            "only, which does not show how it hands over its latents; set it to 0"
        )
    before, clean = (recorder.latents.get(n) for n in (min(later) - 1, recorder.step - 1))
    # Only levels of this transformer's own calls: a pipeline may have a second transformer for the
    # others, or, if it starts from a picture, skip the first ones.
    called = [call["level"].sigma for call in recorder.calls]
    if before is None or clean is None or not np.isfinite(called).all():
        raise UserError(
            "record.renoised_per_sample: this pipeline does not show its latents and noise level "
            "at every step, so its states can't be renoised; set it to 0"
        )
    low, high = min(called), max(called)
    scale = _timestep_scale(recorder.calls, family, schedule)
    tables = []
    for round_ in range(renoised):
        generator = torch.Generator().manual_seed(
            seed * 1_000_003 + samples[0]["sample"] * 1009 + round_
        )
        sigma = low + (high - low) * torch.rand(
            len(samples), generator=generator, dtype=torch.float64
        )
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        # Mochi counts its noise levels the other way round.
        share = 1 - sigma if config.get("invert_sigmas") else sigma
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
            timestep = sigma * config["num_train_timesteps"]
            times = arguments[family.time]
            if times.ndim > 1:
                raise UserError(
                    "record.renoised_per_sample: this pipeline gives every token a timestep of its "
                    "own, so its states can't be renoised; set it to 0"
                )
            arguments[family.state] = torch.cat([state] * repeats).to(hidden)
            arguments[family.time] = (timestep * scale).repeat(repeats).to(times)
            output = blocks.answer(recorder.transformer, arguments | {"return_dict": False})
            place = {
                "kind": "renoised",
                "step": -1,
                "branch": call["branch"],
                "timestep": timestep.tolist() * repeats,
                "sigma": sigma.tolist() * repeats,
            }
            tables += _tables(arguments, output, samples, place, family)
    return tables


def _timestep_scale(recorded: list[dict[str, Any]], family: Family, schedule) -> float:
    """The factor by which a pipeline multiplies the scheduler's timestep for the transformer: 1, or
    1 / num_train_timesteps for pipelines that pass sigma.

    In bfloat16 the quotient of both is off by up to 1 %, so it only tells which of the two it is.

    Raises:
        UserError: it is neither.
    """
    call = max(recorded, key=lambda call: abs(call["level"].timestep))
    given, timestep = call["arguments"][family.time].flatten()[0].item(), call["level"].timestep
    quotient = given / timestep if timestep else float("nan")  # all calls are at timestep 0
    for scale in (1.0, 1 / schedule.config.num_train_timesteps):
        if abs(quotient / scale - 1) < 0.01:
            return scale
    raise UserError(
        f"record.renoised_per_sample: this pipeline gives the transformer {given:g} at the "
        f"scheduler's timestep {timestep:g}, so its states can't be renoised; set it to 0"
    )
