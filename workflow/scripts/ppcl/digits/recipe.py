"""How the embedded teacher is made: config/teacher-digits.yaml as typed sections."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ppcl.settings import Section, TrainingSettings


@dataclass(frozen=True)
class PartRecipe(TrainingSettings):
    """One part of the pipeline and its training; batch_size is that of each process."""

    seed: int


@dataclass(frozen=True)
class TextEncoderRecipe(PartRecipe):
    width: int
    layers: int


@dataclass(frozen=True)
class AutoencoderRecipe(PartRecipe):
    """latent_noise: standard deviation of the noise that the decoder learns to forgive."""

    base_dim: int
    z_dim: int
    kl_weight: float
    latent_noise: float


@dataclass(frozen=True)
class TransformerRecipe(PartRecipe):
    """caption_dropout: share of the batches trained on the negative prompt. pictures: drawn and
    encoded once, by all processes together."""

    blocks: int
    heads: int
    head_dim: int
    axes_dims_rope: tuple[int, ...]
    scheduler_shift: float
    pictures: int
    caption_dropout: float


@dataclass(frozen=True)
class ScoreRecipe(Section):
    """How the finished teacher is scored, on held-out prompts and seeds.

    pipeline: keyword arguments of the pipeline's call.
    """

    seed: int
    samples: int
    pipeline: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe(Section):
    """The whole file. given: its mapping, for digests."""

    seed: int
    calibration_prompts: int
    text_encoder: TextEncoderRecipe
    vae: AutoencoderRecipe
    transformer: TransformerRecipe
    score: ScoreRecipe
    given: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The recipe of the file's mapping. Raises TypeError for an unknown key."""
        return super().of({**values, "given": values})
