"""The class of a ControlNet for a transformer of fewer blocks than it was trained with, and its
code, which travels beside its weights.

This file needs nothing but torch and diffusers, for an exported folder has its text as a module,
with lines that `module_text` adds, which define the class to load.
"""

import dataclasses
import functools
import hashlib
import inspect
import os
import sys  # noqa: F401  the added lines use it
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MODULE = "ppcl_control"  # how the file's name beside exported weights begins (`module_name`)
KEY = "block_samples"  # of the config
_END = "# ---- Added by the export"
_TEXT = Path(__file__).read_text(encoding="utf-8").split("\n" + _END)[0]


def summed(samples: Any, sums: list[list[int]]) -> Any:
    """What a transformer gets in place of the samples of one of its block lists.

    Args:
        samples: tensors [batch, tokens, channels], in a list or by the number of their block; or
            None.
        sums: of each sample to return, the keys of those that it is the sum of. By the number of
            their block, a block without any gets none; in a list, zeros.
    """
    if samples is None:
        return None
    made: dict[tuple[int, ...], Tensor] = {}
    for wanted in map(tuple, sums):
        if wanted and wanted not in made:
            terms = [samples[key] * n if n > 1 else samples[key] for key, n in counted(wanted)]
            made[wanted] = sum(terms[1:], terms[0])
    if isinstance(samples, dict):
        return {block: made[tuple(wanted)] for block, wanted in enumerate(sums) if wanted}
    first = samples[0]  # of a block that gets none, there is zero
    return [made[tuple(wanted)] if wanted else first.new_zeros(first.shape) for wanted in sums]


def counted(wanted: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each number and how often it is there."""
    return list(Counter(wanted).items())


def replaced(returned: Any, sums: list[list[list[int]]]) -> Any:
    """What a ControlNet returned, with `summed` samples: as an output of diffusers, a tuple of the
    samples of each block list, or the samples of the only one."""
    if dataclasses.is_dataclass(returned):
        kind: Any = type(returned)
        names = [field.name for field in dataclasses.fields(returned)]
        made = [summed(getattr(returned, name), s) for name, s in zip(names, sums, strict=True)]
        return kind(**dict(zip(names, made, strict=True)))
    if isinstance(returned, tuple):
        return tuple(map(summed, returned, sums))
    return summed(returned, sums[0])


def remapped(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a ControlNet whose samples are summed anew; its config has one key more.

    `block_samples` has, for each list of blocks of the transformer and for each sample that it is
    to get, the numbers of the samples of `base` that this one is the sum of. A saved folder gets
    the module that loads it. Without the key, it is as `base`.

    Args:
        base: a class of diffusers.
    """
    as_saved: Any = base  # Module does not say what else diffusers' classes have

    @functools.wraps(base.__init__)
    def init(self, *args, block_samples: list[list[list[int]]] | None = None, **kwargs):
        base.__init__(self, *args, **kwargs)
        if block_samples is not None and not is_sums(block_samples):
            raise ValueError(
                "config.json: block_samples should list, for each list of blocks and each sample "
                "that it gets, numbers of samples"
            )
        self.register_to_config(block_samples=block_samples)

    # diffusers takes from this signature which keys of a config are the class's own.
    stock = inspect.signature(base.__init__)
    key = inspect.Parameter(KEY, inspect.Parameter.KEYWORD_ONLY, default=None)
    every = stock.replace(parameters=[*stock.parameters.values(), key])
    init.__signature__ = every  # type: ignore[attr-defined]  # what inspect.signature looks at

    name, module = f"Remapped{base.__name__}", module_name(base)

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        returned = as_saved.forward(self, *args, **kwargs)
        sums = self.config.block_samples
        return returned if sums is None else replaced(returned, sums)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        os.makedirs(save_directory, exist_ok=True)
        file = Path(save_directory, f"{module}.py")
        file.write_text(module_text(base), encoding="utf-8")
        as_saved.save_config(self, save_directory, *args, **kwargs)

    def extract_init_dict(cls, config_dict: dict, **kwargs):
        # The key by which AutoModel finds the class; stock code warns of keys that it doesn't know.
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super(made, cls).extract_init_dict(known, **kwargs)

    body = {
        "__doc__": f"A {base.__name__} for a transformer of another number of blocks.",
        "__init__": init,
        "__module__": module,  # pipelines write it to model_index.json, as the name of the file
        "_auto_class": "AutoModel",
        "extract_init_dict": classmethod(extract_init_dict),
        "forward": forward,
        "save_config": save_config,
    }
    made: Any = type(name, (base,), body)
    return made


def is_sums(value: Any) -> bool:
    """Whether a value is a list of lists of lists of natural numbers."""
    lists = isinstance(value, list) and all(isinstance(each, list) for each in value)
    inner = [numbers for each in value for numbers in each] if lists else [None]
    return all(
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        for numbers in inner
    )


def module_name(base: type[nn.Module]) -> str:
    """Name of the module beside exported weights: another one for every content, since diffusers
    keeps code of all folders in one place by its name."""
    content = hashlib.sha256(module_text(base).encode())
    return f"{MODULE}_{content.hexdigest()[:16]}"


def module_text(base: type[nn.Module]) -> str:
    """The module beside exported weights: this file, and the class that its config names."""
    name = base.__name__
    return f"""{_TEXT}
{_END}, for the weights beside this file.
from diffusers import ModelMixin, {name}  # noqa: E402, F401

Remapped{name} = remapped({name})
# Here pipelines look the class and ModelMixin up when they are given the ControlNet.
sys.modules[Remapped{name}.__module__] = sys.modules[__name__]
"""
