"""Tiny pipelines of every supported family, made of stock parts with random weights: wiring only.

`zoo_images` and `zoo_videos` list them, `zoo_others` further pipelines of the same classes; all
build their text encoders with `zoo_parts`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Specimen:
    """One pipeline that the tests can make.

    Attributes:
        family: class name of the transformer that is pruned.
        make: number of blocks per block list -> the pipeline, float32, on the CPU, seeded.
        settings: keyword arguments of a call, besides prompt, generator and output_type.
        component: the pipeline's component that is pruned.
        image: the pipeline needs a picture besides its prompt.
    """

    family: str
    make: Callable[[int], DiffusionPipeline]
    settings: dict[str, Any] = field(default_factory=dict)
    component: str = "transformer"
    image: bool = False
