"""A pipeline's transformer as one file under the names of the model's authors, which ComfyUI and
diffusers' `from_single_file` read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from ppcl.errors import UserError
from ppcl.export import original_format
from ppcl.export.original_format import Original, Rows
from ppcl.storage import tensors, untrusted
from ppcl.storage.tensors import Region, Stored
from ppcl.teacher import hub, weights
from ppcl.transformer import registry
from ppcl.transformer.original_files import OriginalFiles


@dataclass(frozen=True)
class Transformer:
    """A transformer in its folder, none of whose weights is read yet.

    Attributes:
        made_as: name of its class.
        files: what the registry knows of the class's files.
        tensors: those of the authors' file, as they lie in the folder.
    """

    made_as: str
    files: OriginalFiles
    tensors: Mapping[str, Stored]


def opened(folder: Path, component: str) -> Transformer:
    """A pipeline's transformer, whose way back to the authors' file is known.

    Raises:
        UserError: there is no such component, or no way back; says why.
    """
    hub.refuse_strange(folder, "--model")
    parts = hub.parts(folder, "--model")
    if component not in parts or not (folder / component / weights.CONFIG).is_file():
        raise UserError(f"--component: {folder} has no model '{component}'; it has {sorted(parts)}")
    library, made_as = parts[component]
    if library != "diffusers":
        raise UserError(
            f"--model: the {component} of {folder} has code of its own ({made_as}), of narrow "
            "blocks, which no other program has; give a variant that is pruned in depth alone"
        )
    files = registry.original_files(made_as)
    readers: Mapping[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
    if files is None or made_as not in readers:
        known = ", ".join(sorted(registry.with_original_files()))
        raise UserError(
            f"--model: the {component} of {folder} is of the class {made_as}, of whose files "
            f"outside of diffusers nothing is known here; something is of those of {known}"
        )
    config = untrusted.json_object(folder / component / weights.CONFIG)
    if config.get("quantization_config") is not None:
        raise UserError(
            f"--model: the {component} of {folder} is quantised; give the variant that it is of, "
            "and quantise here, with a .gguf file and --type"
        )
    headers = weights.headers(folder / component, library, None)
    if not headers:
        raise UserError(f"--model: {folder / component} holds no .safetensors file of weights")
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    _check_depth(folder / component, made_as, config, entries)

    def convert(named: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return readers[made_as]["checkpoint_mapping_fn"](checkpoint=named, config=dict(config))

    try:
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        originals = original_format.backwards(files, convert, shapes)
    except UserError as error:
        raise UserError(f"--model: {folder / component} can't be one file: {error}") from error
    return Transformer(made_as, files, _stored(originals, headers))


def _check_depth(
    folder: Path, made_as: str, config: Mapping[str, Any], entries: Mapping[str, Any]
) -> None:
    """Raises UserError unless blocks are numbered from 0 on, as many as the config says: others
    count them by their numbers."""
    for attribute, key in registry.depth_keys(made_as):
        numbers = {
            int(name.split(".")[1])
            for name in entries
            if name.startswith(f"{attribute}.") and name.split(".")[1].isdecimal()
        }
        told = config.get(key, len(numbers))
        if numbers != {*range(len(numbers))} or told != len(numbers):
            raise UserError(
                f"--model: {folder} has blocks of {attribute} numbered {sorted(numbers)[:100]}, "
                f"but its config says {key} {str(told)[:20]}; export the model again"
            )


def write(path: Path, transformer: Transformer) -> None:
    """Writes the file, as safetensors, every number as it is, by copying bytes alone.

    Raises:
        UserError: the disk is full, fails, or may not be written to.
    """
    tensors.gather(path, transformer.tensors, {"format": "pt"})


def _stored(
    originals: Mapping[str, Original], headers: Mapping[Path, weights.Header]
) -> dict[str, Stored]:
    """Where the tensors of the authors' file lie; UserError if parts of one differ in dtype."""
    places, stored = _places(headers), {}
    for name, original in originals.items():
        dtypes = {places[rows.name].dtype for rows in original.parts}
        if len(dtypes) > 1:
            raise UserError(
                f"--model: {name!r} would be of several dtypes, {sorted(dtypes)}; load the "
                "pipeline with one torch_dtype, and save it again with save_pretrained"
            )
        regions = tuple(_region(places[rows.name], rows) for rows in original.parts)
        stored[name] = Stored(dtypes.pop(), original.shape, regions)
    return stored


def _places(headers: Mapping[Path, weights.Header]) -> dict[str, Stored]:
    """Where each tensor of a model lies."""
    places = {}
    for path, header in headers.items():
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in header.items():
            start, stop = (begin + offset for offset in entry["data_offsets"])
            region = Region(path, start, stop)
            places[name] = Stored(entry["dtype"], tuple(entry["shape"]), (region,))
    return places


def _region(place: Stored, rows: Rows) -> Region:
    (whole,) = place.regions
    width = math.prod(place.shape[1:]) * untrusted.BITS[place.dtype] // 8
    return Region(whole.path, whole.start + rows.start * width, whole.start + rows.stop * width)
