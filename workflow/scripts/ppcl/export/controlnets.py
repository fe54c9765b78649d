"""ControlNets of the teacher, for pruned pipelines.

After each of its blocks, a transformer adds one of the samples that a ControlNet makes, which one
by the block's number. A block that stands for several of the teacher's gets the sum of all that the
teacher adds after these: each addition stays in the stream, and the blocks between change it
little. `control_class` has the class of such a ControlNet; its weights are those of the teacher's.
"""

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from ppcl.errors import UserError
from ppcl.export import control_class, pruned_models
from ppcl.storage import texts, whole
from ppcl.teacher import weights
from ppcl.transformer.families import FAMILIES
from ppcl.transformer.family import Control, Stride


def remap(controlnet: Path, model: pruned_models.Pruned, output: Path) -> bool:
    """Writes a ControlNet of the teacher as one for a pruned transformer.

    Returns:
        Whether the folder has code, and loads with trust_remote_code; else it is of the stock
        class.

    Raises:
        UserError: the transformer takes no ControlNet, or this is another model's, or damaged.
    """
    control = model.family.control
    if control is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.control)
        raise UserError(
            f"--model: its transformer is a {model.name}, for which diffusers has no ControlNet, "
            f"so its blocks take no samples of any; those of these classes do: {able}"
        )
    given = pruned_models.config(controlnet, "--controlnet")
    made_by = _stock_class(control, given, controlnet)
    config = _defaults(made_by) | given
    if (own := pruned_models.width(config)) != (wanted := pruned_models.width(model.config)):
        raise UserError(
            f"--controlnet: {controlnet} is {own} channels wide, but the model's stream has "
            f"{wanted}: it is of another model"
        )
    files = _weights(controlnet)
    changed, sums = planned(control, model.block_maps, config, controlnet)
    with whole.writing(output, folder=True) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        written = {k: v for k, v in given.items() if k != "_name_or_path"} | changed
        if sums is not None:
            module = control_class.module_name(made_by)
            name = f"Remapped{control.model}"
            written |= {
                "_class_name": name,
                "auto_map": {"AutoModel": f"{module}.{name}"},
                control_class.KEY: sums,
            }
            texts.write(folder / f"{module}.py", control_class.module_text(made_by))
        texts.write_json(folder / weights.CONFIG, written)
    return sums is not None


def planned(
    control: Control,
    maps: Mapping[str, list[list[int]]],
    config: Mapping[str, Any],
    where: Path,
) -> tuple[dict[str, Any], list[list[list[int]]] | None]:
    """What a ControlNet's config gets for a pruned transformer.

    Args:
        control: how the transformer takes samples.
        maps: the block map of each of its lists, counted within the list.
        config: the ControlNet's, with all defaults.
        where: the ControlNet's folder, for messages.

    Returns:
        Changed values of the stock class's keys; and the sums of `control_class`, or None if the
        stock class gives each block what it should get.
    """
    every: list[list[list[int]]] = []
    changed: dict[str, Any] = {}
    earlier = _earlier(control, config, where)
    agree = earlier is None
    for index, (attribute, (key, stride)) in enumerate(control.lists.items()):
        if earlier is not None:
            count = _total(maps[attribute])
            config = _as_given(earlier[index], key, stride, count, config, where)
        members, places = maps[attribute], config.get(key)
        samples = _samples(places, key, where)
        if not samples:
            every.append([])
            continue
        wanted = [
            _present(stride(old, _total(members), samples, config) for old in olds)
            for olds in members
        ]
        if isinstance(places, list):  # of blocks by their numbers, which can be changed
            if (most := max(places)) >= _total(members):
                raise UserError(
                    f"{where / weights.CONFIG}: {key} names block {most}, but the teacher has "
                    f"{_total(members)}: it is of another model"
                )
            moved = [next(new for new, w in enumerate(wanted) if old in w) for old in places]
            agree = agree and len(set(moved)) == len(moved)
            changed[key] = moved
        else:
            count = len(members)
            stock = [_present([stride(new, count, samples, config)]) for new in range(count)]
            agree = agree and wanted == stock
        sums = _sums(stride, wanted, key, config)
        if earlier is not None:
            sums = [[n for place in each for n in earlier[index][place]] for each in sums]
        every.append(sums)
    return (changed, None) if agree else ({}, every)


def _earlier(
    control: Control, config: Mapping[str, Any], where: Path
) -> list[list[list[int]]] | None:
    """The sums of a ControlNet that is remapped already, for the pruned model that is the teacher
    here; None of a stock one. Raises UserError if they are no sums of its samples."""
    if control_class.KEY not in config:
        return None
    sums = config[control_class.KEY]
    keys = []
    for key, _ in control.lists.values():
        places, count = config.get(key), _samples(config.get(key), key, where)
        keys.append({*places} if isinstance(places, list) else {*range(count)})
    whole = control_class.is_sums(sums) and len(sums) == len(keys)
    if not whole or any(n not in k for s, k in zip(sums, keys, strict=True) for e in s for n in e):
        raise UserError(
            f"{where / weights.CONFIG}: {control_class.KEY} are no sums of its samples; remap the "
            "ControlNet again"
        )
    return sums


def _as_given(
    sums: list[list[int]],
    key: str,
    stride: Stride,
    count: int,
    config: Mapping[str, Any],
    where: Path,
) -> dict[str, Any]:
    """The config of a stock ControlNet that gives as many samples as a remapped one, for a list of
    `count` blocks. Raises UserError if it was remapped for another number of blocks."""
    listed, n = isinstance(config[key], list), len(sums)
    every = {**config, key: [*range(count)] if listed else count}
    given = every if listed else {**config, key: n}
    fits = n == count
    if n and not listed:  # of the last blocks there may be no samples
        after = [stride(block, count, count, every) for block in range(count)]
        wanted = [place if place is not None and place < n else None for place in after]
        fits = wanted == [stride(block, count, n, given) for block in range(count)]
    if not fits and (n or listed):
        raise UserError(
            f"--controlnet: {where} is remapped already, for a pruned model with {n} blocks or "
            f"more, but the model's teacher has {count}; name the teacher's ControlNet"
        )
    return given


def _sums(
    stride: Stride, wanted: list[list[int]], key: str, config: Mapping[str, Any]
) -> list[list[int]]:
    """Of each sample that a remapped ControlNet gives, the keys of those that it is the sum of.

    wanted: of each block, the keys of all samples that it should get. What a block should get that
    the transformer gives none (the first of a class) goes to the next.
    """
    count, listed = len(wanted), isinstance(config[key], list)
    again = {**config, key: [*range(count)] if listed else count}
    made: dict[int, list[int]] = {}
    late: list[int] = []
    for new, keys in enumerate(wanted):
        late = late + keys
        place = stride(new, count, count, again)
        if place is not None:
            made[place], late = late, []
    sums = [made[place] for place in sorted(made)]
    while sums and not sums[-1] and not listed:
        sums.pop()
    return sums


def _present(keys) -> list[int]:
    return [key for key in keys if key is not None]


def _total(members: list[list[int]]) -> int:
    return sum(map(len, members))


def _samples(value: Any, key: str, where: Path) -> int:
    """How many samples a ControlNet gives for a list of blocks."""
    if isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value):
        return len(value)
    if type(value) is int and value >= 0:
        return value
    raise UserError(
        f"{where / weights.CONFIG}: {key} is {str(value)[:100]}, which tells no number of samples; "
        "restore the file"
    )


def _stock_class(control: Control, config: Mapping[str, Any], folder: Path) -> Any:
    """The ControlNet's class. Raises UserError if its config names another one."""
    name = config.get("_class_name")
    if name != (f"Remapped{control.model}" if control_class.KEY in config else control.model):
        raise UserError(
            f"--controlnet: {folder} is a {str(name)[:100]}, but the model takes samples of a "
            f"{control.model}; name one of these"
        )
    return getattr(diffusers, control.model)


def _defaults(made_by: type) -> dict[str, Any]:
    """Values that a config of a class of diffusers may leave out."""
    parameters = inspect.signature(made_by.__init__).parameters  # type: ignore[misc]
    return {
        name: [*value.default] if isinstance(value.default, tuple) else value.default
        for name, value in parameters.items()
        if value.default is not inspect.Parameter.empty
    }


def _weights(folder: Path) -> list[Path]:
    """The files of a ControlNet's weights. Raises UserError if they are missing or damaged."""
    files = [*weights.headers(folder, "diffusers", None)]
    if not files:
        raise UserError(
            f"--controlnet: {folder} has no weights as safetensors; load it, and save it again "
            "with save_pretrained"
        )
    first = weights.first(weights.names_in(folder), weights.STEMS["diffusers"], None)
    return files if first is None or folder / first in files else [folder / first, *files]
