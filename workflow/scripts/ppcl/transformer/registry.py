"""Looks transformer and pipeline classes up in the family registry, by their names."""

import re
from collections.abc import Mapping
from typing import Any

from ppcl.errors import UserError
from ppcl.transformer.families import FAMILIES, REFUSED
from ppcl.transformer.family import Family
from ppcl.transformer.original_files import OriginalFiles

# Words in the names of pipelines that give the transformer pictures or frames beside the latents
# that it denoises.
_MORE_THAN_LATENTS = (
    r"Edit|Kontext|Fill|Control(?!Net)|ImageToVideo|I2V|Condition|Layered|Refiner|VisualCloze"
    r"|Framepack"
)
_GIVEN_MORE = "its transformer gets pictures, or frames that are there already, beside the latents"

# Old class names that published model_index.json files still hold -> the key of the component's
# config whose value tells the present class, and value -> present class.
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
    """Whether diffusers has split this class into several (`today` says which one is meant)."""
    return class_name in _SPLIT


def today(class_name: str, config: Mapping[str, Any]) -> str:
    """The present diffusers name of a class that a model_index.json names.

    Args:
        class_name: as the index has it.
        config: of the component.
    """
    key, classes = _SPLIT.get(class_name, ("", {}))
    value = config.get(key)
    return classes.get(value, class_name) if isinstance(value, str) else class_name


def family_of(class_name: str) -> Family | None:
    """The registry entry of a transformer class; None if it has none and must be inspected.

    Raises:
        UserError: the class is known not to work (`REFUSED`); says why.
    """
    if class_name in REFUSED:
        raise UserError(
            f"teacher: its transformer is a {class_name}, which can't be pruned: "
            f"{REFUSED[class_name]}. Supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES.get(class_name)


def original_files(class_name: str) -> OriginalFiles | None:
    """What is known of a class's files outside of diffusers; None if nothing is."""
    family = FAMILIES.get(class_name)
    return family.original if family else None


def with_original_files() -> list[str]:
    """The classes of which something is known."""
    return [name for name, family in FAMILIES.items() if family.original]


def depth_keys(class_name: str) -> list[tuple[str, str]]:
    """A class's lists of blocks, and the keys of its config that hold their lengths; none of a
    class without an entry."""
    family = FAMILIES.get(class_name)
    return [(blocks.attribute, blocks.depth_key) for blocks in family.lists] if family else []


def given_more(pipeline: str) -> str:
    """Whether the transformer of a pipeline's class gets more than latents and text: why its
    pictures can't be noised again; empty if it does not."""
    return _GIVEN_MORE if re.search(_MORE_THAN_LATENTS, pipeline) else ""


def fixed_states(transformer: str, pipeline: str) -> str:
    """Why finished pictures of a pipeline can't be noised again for its transformer, so that the
    config's record.renoised_per_sample must be 0; empty if the class names tell no reason.

    Args:
        transformer, pipeline: names of their classes.
    """
    if why := given_more(pipeline):
        return why
    family = FAMILIES.get(transformer)
    return family.fixed if family else ""
