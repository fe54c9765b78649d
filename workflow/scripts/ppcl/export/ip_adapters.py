"""IP-adapters of the teacher, for pruned pipelines.

An IP-adapter has weights for each block: with the block's own queries, an attention reads keys and
values of a picture, and what it reads is added to the image stream. In its file they are numbered.
A block that stands for several of the teacher's gets the weights of the first, whose queries are
the likest. FLUX adds what a block reads as it is, so the values are the sum of all; in SD3 it
passes the block's output projection first, and others' values would pass the wrong one.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.export import pruned_models
from ppcl.storage import untrusted
from ppcl.transformer.families import FAMILIES
from ppcl.transformer.family import Adapter

# Name after the number -> whole name and weight.
Named = dict[str, tuple[str, Tensor]]
# How the names of numbered weights begin, of diffusers and of XLabs.
NUMBERED = ("ip_adapter", "double_blocks")


def remap(file: Path, model: pruned_models.Pruned) -> dict[str, Tensor]:
    """The weights of an IP-adapter of the teacher, renumbered for a pruned transformer.

    Raises:
        UserError: the transformer takes no IP-adapter, or the file is none, or another model's.
    """
    adapter = model.family.adapter
    if adapter is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.adapter)
        raise UserError(
            f"--model: its transformer is a {model.name}, for which diffusers loads no "
            f"IP-adapters; it does for {able}"
        )
    weights, others = _read(file)
    places = numbers(adapter, model)
    teacher = sum(map(len, places))
    if sorted(weights) != [*range(teacher)]:
        raise UserError(
            f"--adapter: {file} has weights for {len(weights)} attentions, but the teacher has "
            f"{teacher}: it is of another model"
        )
    _check_width(file, weights, pruned_models.width(model.config))
    made = dict(others)
    for new, olds in enumerate(places):
        try:
            made |= _merged([weights[old] for old in olds], adapter, new)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"--adapter: {file} has other weights for attention {olds[0]} than for "
                f"{olds[-1]} ({error}); restore the file"
            ) from error
    return made


def numbers(adapter: Adapter, model: pruned_models.Pruned) -> list[list[int]]:
    """Of each attention of the pruned transformer that is counted, the teacher's numbers of those
    that it stands for. An interval's blocks all have the same attentions."""
    members, count = model.block_maps[adapter.attribute], 0
    made: dict[tuple[int, int], list[int]] = {}
    for new, olds in enumerate(members):
        for _old in olds:
            for place, key in enumerate(adapter.attentions):
                if not key or new in (model.config.get(key) or ()):
                    made.setdefault((new, place), []).append(count)
                    count += 1
    return [made[which] for which in sorted(made)]


def _check_width(file: Path, weights: Mapping[int, Named], width: int | None) -> None:
    """Raises UserError unless keys are of the width of the stream that reads them."""
    for name, weight in (each for named in weights.values() for each in named.values()):
        is_key = name.endswith(("to_k_ip.weight", "k_proj.weight"))
        if is_key and width is not None and weight.shape[:1] != (width,):
            raise UserError(
                f"--adapter: {file}: {name!r} is of the shape {tuple(weight.shape)}, but the "
                f"model's stream has {width} channels: it is of another model"
            )


def _merged(each: list[Named], adapter: Adapter, number: int) -> dict[str, Tensor]:
    """The weights for one attention under its new number, from those for the ones that it stands
    for: the first's, but for those that are summed."""
    made = {}
    for inside, (name, first) in each[0].items():
        weight = first
        if len(each) > 1 and any(part in adapter.summed for part in inside.split(".")):
            stacked = torch.stack([of[inside][1] for of in each])
            # In a type of one byte, a sum would keep one or two digits.
            dtype = first.dtype if first.dtype.itemsize > 1 else torch.bfloat16
            weight = stacked.double().sum(0).to(dtype)
        prefix, _, rest = name.split(".", 2)
        made[f"{prefix}.{number}.{rest}"] = weight
    return made


def _read(file: Path) -> tuple[dict[int, Named], Mapping[str, Tensor]]:
    """Number -> the weights under it; and all weights without a number."""
    if file.suffix != ".safetensors":  # diffusers would unpickle it
        raise UserError(f"--adapter: {file} is no .safetensors file; convert it")
    try:
        untrusted.safetensors_header(file)
    except FileNotFoundError as error:
        raise UserError(f"--adapter: {file} does not exist; name a file on this disk") from error
    numbered: dict[int, Named] = {}
    others = {}
    for name, weight in safetensors.torch.load_file(file).items():
        prefix, _, rest = name.partition(".")
        number, _, inside = rest.partition(".")
        if prefix in NUMBERED and number.isdecimal() and inside:
            numbered.setdefault(int(number), {})[inside] = (name, weight)
        else:
            others[name] = weight
    if not numbered:
        raise UserError(
            f"--adapter: {file} has no weights such as ip_adapter.0.to_k_ip.weight; name the file "
            "of an IP-adapter for FLUX or SD3"
        )
    return numbered, others
