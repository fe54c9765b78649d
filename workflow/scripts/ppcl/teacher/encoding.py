"""A user's own pictures as the transformer would meet them in the stock pipeline, at no noise.

Nothing here knows a pipeline by name. The stock pipeline runs with its transformer replaced by a
stand-in, and the latents that leave its last step are replaced by numbers that say where each of
them ends up in the autoencoder's input (`Layout`). Run backwards, that turns what the autoencoder
makes of a picture into the pipeline's own latents, packed and scaled as it does both. The
transformer's arguments for a caption are those of the stock pipeline's first call with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.teacher import pipelines, signatures
from ppcl.teacher.stand_in import Reached, Seen, in_place, refusal
from ppcl.transformer import blocks, call_tables

# Scales of guidance by a second call, and values that switch it off: training sees the call with
# the caption alone. guidance_scale is compared with 1 by most pipelines, with 0 by Z-Image.
_GUIDANCE = {"true_cfg_scale": 1.0, "guidance_scale": 0.0, "guidance_scale_2": 0.0}


@dataclass(frozen=True)
class Layout:
    """How a pipeline's latents, its transformer's calls and its pictures hang together, per sample.

    Attributes:
        latents: shape of what the scheduler steps.
        place: of every value of the autoencoder's input, in its order, its number in the latents,
            int64.
        scale, shift: float64, as long: the autoencoder's input is scale * latent + shift.
        encoded: shape of the autoencoder's input.
        output: shape of the transformer's answer.
        sign: 1 if it answers with noise - latents, as flow matching has it; -1: the opposite.
        times: the transformer's timestep without noise, and of noise alone.
        noise: least and largest share of noise that this transformer is called with: a pipeline may
            have a second one for the other steps.
        size: frames, height and width of a picture (1 frame) or a video, in pixels.
    """

    latents: tuple[int, ...]
    place: Tensor
    scale: Tensor
    shift: Tensor
    encoded: tuple[int, ...]
    output: tuple[int, ...]
    sign: int
    times: tuple[float, float]
    noise: tuple[float, float]
    size: tuple[int, int, int]

    def latents_of(self, encoded: Tensor) -> Tensor:
        """The pipeline's latents [batch, *latents] whose decoding begins with this input of the
        autoencoder [batch, *encoded]; float32."""
        flat = encoded.flatten(1).double().cpu()
        made = torch.empty_like(flat)
        made[:, self.place] = (flat - self.shift) / self.scale
        return made.float().unflatten(1, self.latents)

    def decoded_from(self, latents: Tensor) -> Tensor:
        """The inverse of `latents_of`."""
        flat = latents.flatten(1).double().cpu()[:, self.place] * self.scale + self.shift
        return flat.float().unflatten(1, self.encoded)


class Encoder:
    """Makes rows of encoded.parquet of pictures and captions, by a teacher's stock pipeline.

    Args:
        pipe: the pipeline; its autoencoder is put into float32.
        transformer: the component whose calls are wanted.
        settings: the config's `pipeline` mapping.
        caption: any caption, to look at the pipeline with.

    Attributes:
        layout: see `Layout`.

    Raises:
        UserError: the pipeline can't be trained on pictures; says why.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        transformer: nn.Module,
        settings: Mapping[str, Any],
        caption: str,
    ):
        self._pipe, self._transformer = pipe, transformer
        self._family = blocks.family(transformer)
        self._settings = unguided(pipe, transformer, settings)
        vae: Any = getattr(pipe, "vae", None)
        if not isinstance(vae, nn.Module) or not hasattr(vae, "encode"):
            raise self._refusal("it has no autoencoder (vae) that encodes pictures")
        if not is_flow(pipe.scheduler):
            raise self._refusal(f"its {type(pipe.scheduler).__name__} is not of flow matching")
        self._vae: Any = vae.float()
        with torch.no_grad():
            self.layout = self._look(caption)

    def rows(self, pictures: np.ndarray, columns: dict[str, list]) -> list[pa.Table]:
        """Rows of encoded.parquet (schemas.ENCODED), with the transformer's arguments as columns.

        `hidden_states`, or whatever takes the latents, holds those of the picture, without noise;
        `output` those as the transformer would answer them.

        Args:
            pictures: uint8 [batch, frames, height, width, 3], of `layout.size`.
            columns: column -> a value per sample, with `prompt`; its captions are of one length.

        Raises:
            UserError: the autoencoder makes NaN or infinity of a picture.
        """
        prompts, family, layout = columns["prompt"], self._family, self.layout
        with torch.no_grad():
            arguments = self._arguments(prompts)
            latents = layout.latents_of(self._encoded(pictures))
        if not torch.isfinite(latents).all():
            raise UserError(
                f"the autoencoder makes NaN or infinity of the pictures {columns['file']}; remove "
                "those that are not plain pictures"
            )
        count = len(prompts)
        place = iter(latents)
        state = arguments[family.state]
        if isinstance(state, Tensor):
            state = latents.reshape(state.shape)
        else:
            state = [next(place).reshape(each.shape) for each in state]
        given = arguments | {family.state: state}
        times = given[family.time]
        given[family.time] = torch.full_like(times, layout.times[0])
        answer = (layout.sign * latents).reshape(count, *layout.output)
        more = {
            "sign": [float(layout.sign)] * count,
            "time_at_data": [layout.times[0]] * count,
            "time_at_noise": [layout.times[1]] * count,
            "noise_low": [layout.noise[0]] * count,
            "noise_high": [layout.noise[1]] * count,
        }
        return call_tables.to_tables(
            given, answer, columns | more, family.shared, family.batch_dims
        )

    # ---- runs of the stock pipeline

    def _run(self, prompts: list[str], output_type: str = "pt") -> None:
        pipelines.run(
            self._pipe, prompts, [0] * len(prompts), self._settings, output_type=output_type
        )

    def _arguments(self, prompts: list[str]) -> dict[str, Any]:
        """The arguments of the pipeline's first call of the transformer with these captions."""

        def first(*args, **kwargs):
            raise Reached(blocks.signature_arguments(self._transformer, args, kwargs))

        with in_place(self._transformer, "forward", first):
            arguments = self._reached(lambda: self._run(prompts))
        self._refuse_joined(arguments, len(prompts))
        return arguments

    def _encoded(self, pictures: np.ndarray) -> Tensor:
        """What the autoencoder makes of pictures: the mean of its distribution."""
        x = torch.from_numpy(pictures).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        if len(self.layout.encoded) == 3:
            x = x[:, :, 0]
        made = self._vae.encode(x.to(self._pipe._execution_device))
        made = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
        if tuple(made.shape[1:]) != self.layout.encoded:
            raise self._refusal(
                f"its autoencoder encodes to {tuple(made.shape[1:])} and decodes "
                f"{self.layout.encoded}"
            )
        return made

    def _reached(self, run: Callable[[], None]) -> Any:
        try:
            run()
        except Reached as reached:
            return reached.value
        raise self._refusal("it never calls its transformer, or never decodes a picture")

    def _decoded(self, caption: str, latents: Tensor, seen: Seen, whole: bool = False) -> Any:
        """The autoencoder's input [values], float64, where the last step leaves these latents; if
        `whole`, the shapes of that and of the picture, too."""
        plain = self._vae.decode

        def decode(z, *args, **kwargs):
            shapes = (
                (tuple(z.shape[1:]), tuple(plain(z, return_dict=False)[0].shape)) if whole else ()
            )
            raise Reached((z.detach().double().cpu().flatten(), shapes))

        with seen.watching(latents), in_place(self._vae, "decode", decode):
            values, shapes = self._reached(lambda: self._run([caption]))
        return (values, *shapes) if whole else values

    # ---- what a layout is found by

    def _look(self, caption: str) -> Layout:
        seen = Seen(self._pipe, self._transformer)
        first, encoded, picture = self._decoded(caption, torch.zeros(()), seen, whole=True)
        latents, count = seen.latents(), len(first)
        if latents.numel() != count:
            raise self._refusal("it decodes other values than those that it denoises")
        probe = torch.randint(-8, 9, latents.shape, generator=torch.Generator().manual_seed(0))
        drawn = self._decoded(caption, probe.float(), seen)
        times, sign = self._times(seen), self._sign(seen)
        zero = self._decoded(caption, torch.zeros(latents.shape), seen)
        scale = self._decoded(caption, torch.ones(latents.shape), seen) - zero
        # Numbers that say which latent a value is, a digit at a time: 16-bit floats hold few.
        base = 1024 if seen.dtype == torch.float32 else 16
        place, unit = torch.zeros(count, dtype=torch.int64), 1
        while unit < count:
            digits = torch.arange(count) // unit % base
            values = self._decoded(caption, digits.reshape(latents.shape).float(), seen)
            place += unit * ((values - zero) / scale).round().nan_to_num().long()
            unit *= base
        near = 1e-3 if base == 1024 else 0.05
        again = probe.flatten().double()[place.clamp(0, count - 1)] * scale + zero
        if not torch.equal(place.sort().values, torch.arange(count)) or not torch.allclose(
            drawn, again, rtol=near, atol=near * float(scale.abs().max())
        ):
            raise self._refusal("its pictures are no plain function of its latents")
        size = (1, *picture[-2:]) if len(picture) == 4 else picture[-3:]
        return Layout(
            latents=tuple(latents.shape[1:]),
            place=place,
            scale=scale,
            shift=zero,
            encoded=encoded,
            output=seen.output,
            sign=sign,
            times=times,
            noise=seen.noise(),
            size=size,
        )

    def _times(self, seen: Seen) -> tuple[float, float]:
        config = self._pipe.scheduler.config
        last = float(config["num_train_timesteps"])
        for low, high in ((0.0, last), (0.0, 1.0), (1.0, 0.0), (last, 0.0)):
            # In bfloat16 a timestep is off by up to 0.4 %.
            if all(
                abs(time - (low + share * (high - low))) <= 0.01 * max(low, high)
                for share, time in seen.times
            ):
                return low, high
        raise self._refusal("how it counts time for its transformer is unknown")

    def _sign(self, seen: Seen) -> int:
        if not seen.given_as_they_are:
            raise self._refusal("its transformer does not get the latents as they are")
        if seen.signs not in ({1}, {-1}):
            raise self._refusal("its scheduler does not get the transformer's answer as it is")
        sign = next(iter(seen.signs))
        # Noise levels that grow while it denoises: the scheduler's velocity is the opposite.
        return -sign if self._pipe.scheduler.config.get("invert_sigmas") else sign

    def _refuse_joined(self, arguments: dict[str, Any], prompts: int) -> None:
        state = arguments[self._family.state]
        if len(state) != prompts:
            raise self._refusal("its guidance can't be switched off")

    def _refusal(self, reason: str) -> UserError:
        return refusal(type(self._pipe).__name__, reason)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler steps along straight lines from noise to data (flow matching)."""
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    return "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))


def unguided(
    pipe: DiffusionPipeline, transformer: nn.Module, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The pipeline's settings without guidance by a second call of the transformer. Guidance that
    the transformer gets as an argument stays as it is."""
    known = signatures.of_class(type(pipe)).parameters
    config: Any = transformer.config
    own = bool(config.get("guidance_embeds"))
    off = {
        name: value
        for name, value in _GUIDANCE.items()
        if name in known and not (own and name.startswith("guidance_scale"))
    }
    if "true_cfg_scale" in off:  # guidance_scale is what the transformer gets, if it takes any
        off = {"true_cfg_scale": 1.0}
    if "guidance_scale_2" not in settings:  # Wan's pipelines of one transformer refuse it
        off.pop("guidance_scale_2", None)
    if (guider := getattr(pipe, "guider", None)) is not None:
        guider.disable()
    return {**settings, **off}
