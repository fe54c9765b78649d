"""The class of a transformer that has narrow blocks, and its code, which travels beside weights.

An exported folder has one module: the text of narrow_layers.py, narrow.py and this file, and lines
that `module_text` adds, which define the class to load.
"""

import copy
import functools
import hashlib
import inspect
import os
import pprint
import re
import sys  # noqa: F401  the added lines use it
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.pruning.narrow import narrow, specs
from ppcl.pruning.narrow_layers import drop, nothing, zero_linear

MODULE = "ppcl_narrow"  # how the file's name beside exported weights begins (`module_name`)
_END = "# ---- Added by the export"
_FILES = ("narrow_layers.py", "narrow.py", "pruned_class.py")


def _text(here: Path) -> str:
    """The text of the three files as one, without their imports of each other; of an exported
    module, which is one, what stands before the added lines."""
    if here.name != _FILES[-1]:
        return here.read_text(encoding="utf-8").split("\n" + _END)[0]
    each = [here.with_name(name).read_text(encoding="utf-8") for name in _FILES]
    within = re.compile(r"^from ppcl\.\S+ import (\([^)]*\)|[^(\n]*)\n", re.MULTILINE)
    return "\n\n".join(within.sub("", text) for text in each)


_TEXT = _text(Path(__file__))


def pruned(base: type[nn.Module], layouts: dict[str, dict]) -> type[nn.Module]:
    """The class of a transformer with narrow blocks; its config has one key more than `base`.

    `narrow_blocks` maps the path of a block, or of what holds the Linear of the last AdaLN, to its
    spec (see `narrow`). A saved folder gets the
    module that loads it, also from `save_pretrained` of a pipeline.

    Args:
        base: a class of diffusers.
        layouts: name of each list of blocks -> the layout of its blocks.
    """

    as_saved: Any = base  # Module does not say what else diffusers' classes have

    @functools.wraps(base.__init__)
    def init(self, *args, narrow_blocks: dict[str, dict] | None = None, **kwargs):
        base.__init__(self, *args, **kwargs)
        narrow_blocks = {} if narrow_blocks is None else narrow_blocks
        if not isinstance(narrow_blocks, dict) or not all(
            isinstance(spec, dict) for spec in narrow_blocks.values()
        ):
            raise ValueError(
                "config.json: narrow_blocks should map the path of each narrow block to its spec"
            )
        self.register_to_config(narrow_blocks=narrow_blocks)
        for path, spec in self.config.narrow_blocks.items():
            narrow(self.get_submodule(path), layouts.get(path.rpartition(".")[0], {}), spec)

    # diffusers takes from this signature which keys of a config are the class's own.
    stock = inspect.signature(base.__init__)
    key = inspect.Parameter("narrow_blocks", inspect.Parameter.KEYWORD_ONLY, default=None)
    every = stock.replace(parameters=[*stock.parameters.values(), key])
    init.__signature__ = every  # type: ignore[attr-defined]  # what inspect.signature looks at

    name, module = f"Pruned{base.__name__}", module_name(base, layouts)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        os.makedirs(save_directory, exist_ok=True)
        file = Path(save_directory, f"{module}.py")
        file.write_text(module_text(base, layouts), encoding="utf-8")
        as_saved.save_config(self, save_directory, *args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        # The stock class reads the weights of text queries, also of blocks that have none.
        every: list[Any] = list(self.modules())
        without = [m for m in every if getattr(m, "add_q_proj", None) is nothing]
        for attention in without:
            key = attention.add_k_proj
            shape = key.in_features, key.out_features
            attention.add_q_proj = zero_linear(*shape, key.weight, key.bias is not None)
        try:
            as_saved.fuse_qkv_projections(self)
        finally:
            for attention in without:
                drop(attention, "add_q_proj", nothing)

    body = {
        "__doc__": f"A {base.__name__} with narrow blocks.",
        "__init__": init,
        "__module__": module,  # pipelines write it to model_index.json, as the name of the file
        "_tp_plan": None,  # the stock plan of tensor parallelism names layers that may be gone
        "fuse_qkv_projections": fuse_qkv_projections,
        "save_config": save_config,
        "stock": base,
    }
    return type(name, (base,), body)


def from_stock(transformer: nn.Module, layouts: dict[str, dict]) -> nn.Module:
    """A transformer that holds narrow blocks, as one of the class `pruned`; shares all modules."""
    made: Any = copy.copy(transformer)  # Module does not say that it has a config
    made.__dict__.pop("forward", None)  # an offloading hook's, which runs the original
    made._modules = dict(transformer._modules)  # a shallow copy would share this mapping
    made.__class__ = pruned(getattr(type(transformer), "stock", type(transformer)), layouts)
    made.register_to_config(narrow_blocks=specs(transformer))
    return made


def module_name(base: type[nn.Module], layouts: dict[str, dict]) -> str:
    """Name of the module beside exported weights, which model_index.json gives: another one for
    every content, since diffusers keeps code of all folders in one place by its name."""
    content = hashlib.sha256(module_text(base, layouts).encode())
    return f"{MODULE}_{content.hexdigest()[:16]}"


def module_text(base: type[nn.Module], layouts: dict[str, dict]) -> str:
    """The module beside exported weights: these files, and the class that its index names."""
    name, where = base.__name__, pprint.pformat(layouts, width=96, sort_dicts=False)
    return f"""{_TEXT}
{_END}, for the weights beside this file.
from diffusers import ModelMixin, {name}  # noqa: E402, F401

Pruned{name} = pruned(
    {name},
    {where.replace(chr(10), chr(10) + "    ")},
)
# Here pipelines look the class and ModelMixin up when they are given the transformer.
sys.modules[Pruned{name}.__module__] = sys.modules[__name__]
"""
