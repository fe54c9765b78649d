"""How the family registry is asked, by the names of classes."""

import re
from collections.abc import Mapping
from typing import Any

from ppcl.errors import UserError
from ppcl.transformer.families import FAMILIES, REFUSED
from ppcl.transformer.family import Family

# Words in the names of pipelines that give a transformer more than the latents that it denoises.
_MORE_THAN_LATENTS = (
    r"Edit|Kontext|Fill|Control(?!Net)|ImageToVideo|I2V|Condition|Layered|Refiner|VisualCloze"
    r"|Framepack"
)
_GIVEN_MORE = "its transformer gets pictures, or frames that are there already, beside the latents"

# Names that published indexes still have -> the key of the component's config that tells the
# class, and the classes.
_SPLIT = {
    "Transformer2DModel": (
        "norm_type",
        {
            "ada_norm_single": "PixArtTransformer2DModel",
            "ada_norm_zero": "DiTTransformer2DModel",
        },
    )
}


def was_split(class_name: str) -> bool:
    """Whether diffusers has made several classes of this one, which `today` tells apart."""
    return class_name in _SPLIT


def today(class_name: str, config: Mapping[str, Any]) -> str:
    """The name that diffusers has now for a class of an index, from its component's config."""
    key, classes = _SPLIT.get(class_name, ("", {}))
    value = config.get(key)
    return classes.get(value, class_name) if isinstance(value, str) else class_name


def family_of(class_name: str) -> Family | None:
    """The registry entry of a transformer class; None if it has none and must be inspected.

    Raises:
        UserError: the class is known not to work; says why.
    """
    if class_name in REFUSED:
        raise UserError(
            f"teacher: its transformer is a {class_name}, which can't be pruned: "
            f"{REFUSED[class_name]}. Supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES.get(class_name)


def fixed_states(transformer: str, pipeline: str) -> str:
    """Why finished pictures of a pipeline can't be noised again for its transformer, so that the
    config's record.renoised_per_sample must be 0; empty if they can, as far as the names tell.

    Args:
        transformer, pipeline: names of their classes.
    """
    if re.search(_MORE_THAN_LATENTS, pipeline):
        return _GIVEN_MORE
    family = FAMILIES.get(transformer)
    return family.fixed if family else ""
