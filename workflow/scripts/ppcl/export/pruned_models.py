"""What the folder of a pruned pipeline says of its transformer; the weights stay unread."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.export import assembly, block_maps
from ppcl.storage import untrusted
from ppcl.teacher import hub, weights
from ppcl.transformer.families import FAMILIES
from ppcl.transformer.family import Family


@dataclass(frozen=True)
class Pruned:
    """A pruned transformer.

    Attributes:
        name: of its class in diffusers.
        family: the entry of this class.
        config: its config.
        block_maps: of each of its lists of blocks, counted within the list.
    """

    name: str
    family: Family
    config: Mapping[str, Any]
    block_maps: dict[str, list[list[int]]]


def read(folder: Path, component: str) -> Pruned:
    """The transformer of a pruned pipeline's folder.

    Raises:
        UserError: a file is missing or damaged, or the class is in no registry.
    """
    assembly.verify(folder)
    made_as = hub.parts(folder, "--model").get(component)
    if made_as is None:
        raise UserError(f"--component: {folder} has no {component}")
    name = made_as[1].removeprefix("Pruned")
    if name not in FAMILIES:
        raise UserError(
            f"--model: its transformer is a {name}, which is not in the registry of families, so "
            "it is not known what its blocks take"
        )
    family, known = FAMILIES[name], config(folder / component, "--model")
    lists = block_maps.by_list(folder / component, family, known)
    return Pruned(name, family, known, lists)


def config(folder: Path, option: str) -> dict[str, Any]:
    """The config of a model in its folder; UserError, with the option, if there is none."""
    try:
        return untrusted.json_object(folder / weights.CONFIG)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{option}: {folder} has no {weights.CONFIG}; name a folder that save_pretrained wrote"
        ) from error


def width(config: Mapping[str, Any]) -> Any:
    """Channels of the image stream; None if the config does not tell."""
    if "dim" in config:
        return config["dim"]
    try:
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    except (KeyError, TypeError, ValueError):
        return None
