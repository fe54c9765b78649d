"""What the names in a LoRA file tell of files that are no LoRA of this model."""

import re
from collections.abc import Iterable

from torch import nn

from ppcl.transformer.families import FAMILIES
from ppcl.transformer.family import Family

# Parts of keys of methods that are no product of two matrices -> the method.
_METHODS = {"hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT", "glora_": "GLoRA", "on_input": "IA3"}
_BEFORE = r"(?:(?:base_model\.model|model|diffusion_model|transformer|unet)\.|lora_unet_|lycoris_)*"
_LIST = re.compile(_BEFORE + r"([a-z_]+?)[._]\d+[._]")  # of blocks, with the number of one


def other_family(keys: Iterable[str], model: nn.Module) -> str | None:
    """Why a file with these keys is of another family than a model's; None if it is not.

    Two families may be of one width, so that some of a LoRA of the one would fit the other. Of a
    class that is not in the registry, the names in its authors' code are not known.
    """
    kind = type(model).__name__.removeprefix("Pruned")
    if kind not in FAMILIES:
        return None
    named = {hit[1] for hit in map(_LIST.match, keys) if hit} - _lists(FAMILIES[kind])
    for name in sorted(named):
        holders = [each for each, family in FAMILIES.items() if name in _lists(family)]
        if holders:
            return (
                f"has layers of {name}, which LoRAs of {', '.join(holders)} have and those of a "
                f"{kind} do not: it is of another family of models"
            )
    return None


def other_method(keys: Iterable[str]) -> str | None:
    """Why keys are of no LoRA but of another method; None if they are of none that is known."""
    for key in keys:
        for part, method in _METHODS.items():
            if f".{part}" in key:
                return f"is a {method} ('{key[:200]}'), which is no LoRA; train or get a LoRA"
    return None


def _lists(family: Family) -> set[str]:
    """Names of a family's lists of blocks, in diffusers and in its authors' code."""
    templates = [*family.lora_names, *(family.original.names if family.original else ())]
    firsts = (re.match(r"(\w+)\.[<{]", template) for template in templates)
    return {each.attribute for each in family.lists} | {hit[1] for hit in firsts if hit}
