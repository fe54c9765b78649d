"""The class of a transformer that has narrow blocks, and its code, which travels beside weights.

An exported folder has one module: the text of narrow_layers.py, block_class.py, narrow.py and this
file, and lines that `module_text` adds, which define the class to load.
"""

import copy
import functools
import hashlib
import inspect
import json
import os
import pprint
import re
import shutil
import sys  # noqa: F401  the added lines use it
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.pruning.block_class import match_ends, reduced
from ppcl.pruning.narrow import narrow, specs, stock_shapes
from ppcl.pruning.narrow_layers import drop, nothing, zero_linear

MODULE = "ppcl_narrow"  # how the file's name beside exported weights begins (`module_name`)
_END = "# ---- Added by the export"
_FILES = ("narrow_layers.py", "block_class.py", "narrow.py", "pruned_class.py")
# Keys of a transformer's config. diffusers' classes load and save keys that begin so, whether they
# know them or not; files beside weights are lost when a pipeline is downloaded, or saved anew.
BLOCK_MAP, CARD = "_block_map", "_pruning"


def _text(here: Path) -> str:
    """The text of these files as one, without their imports of each other; of an exported
    module, which is one, what stands before the added lines."""
    if here.name != _FILES[-1]:
        return here.read_text(encoding="utf-8").split("\n" + _END)[0]
    each = [here.with_name(name).read_text(encoding="utf-8") for name in _FILES]
    within = re.compile(r"^from ppcl\.\S+ import (\([^)]*\)|[^(\n]*)\n", re.MULTILINE)
    return "\n\n".join(within.sub("", text) for text in each)


_TEXT = _text(Path(__file__))


class _LikeStock(type):
    """Of classes that `==` says are the stock class: `from_pipe` asks so for the type of each part
    of a pipeline, and leaves out what is of another."""

    stock: type

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.stock

    def __hash__(cls) -> int:
        return hash(cls.stock)


def pruned(base: type[nn.Module], layouts: dict[str, dict]) -> type[nn.Module]:
    """The class of a transformer with narrow blocks; its config has one key more than `base`.

    `narrow_blocks` maps the path of a block, or of what holds the Linear of the last AdaLN, to its
    spec (see `narrow`). A saved folder gets the module that loads it, also from `save_pretrained`
    of a pipeline, the block map, pruning.json and the card.

    Args:
        base: a class of diffusers.
        layouts: name of each list of blocks -> the layout of its blocks.
    """
    stock: type = base  # as its cache would not take it
    return pruned_as(stock, json.dumps(layouts))


@functools.cache
def pruned_as(stock: type, written: str) -> type[nn.Module]:
    """`pruned`, of layouts as JSON."""
    base: type[nn.Module] = stock
    layouts: dict[str, dict] = json.loads(written)
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
        _settle(self, layouts)

    # diffusers takes from this signature which keys of a config are the class's own.
    own = inspect.signature(base.__init__)
    key = inspect.Parameter("narrow_blocks", inspect.Parameter.KEYWORD_ONLY, default=None)
    every = own.replace(parameters=[*own.parameters.values(), key])
    init.__signature__ = every  # type: ignore[attr-defined]  # what inspect.signature looks at

    name, module = f"Pruned{base.__name__}", module_name(base, layouts)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        os.makedirs(save_directory, exist_ok=True)
        file = Path(save_directory, f"{module}.py")
        file.write_text(module_text(base, layouts), encoding="utf-8")
        as_saved.save_config(self, save_directory, *args, **kwargs)
        _save_beside(self.config, module, Path(save_directory))

    def extract_init_dict(cls, config_dict: dict, **kwargs):
        # The key by which AutoModel finds the class; stock code warns of keys that it doesn't know.
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super(made, cls).extract_init_dict(known, **kwargs)

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
        "__reduce_ex__": lambda self, _protocol: reduced(self, pruned_as, base, written),
        "_auto_class": "AutoModel",
        "_tp_plan": None,  # the stock plan of tensor parallelism names layers that may be gone
        "extract_init_dict": classmethod(extract_init_dict),
        "fuse_qkv_projections": fuse_qkv_projections,
        "save_config": save_config,
        "stock": base,
    }
    made: Any = _LikeStock(name, (base,), body)
    return made


def _settle(transformer: nn.Module, layouts: dict[str, dict]) -> None:
    """What is done to a whole transformer whose blocks are narrow."""
    lists = [getattr(transformer, name) for name in layouts if len(getattr(transformer, name, ()))]
    if lists:
        match_ends(lists[0][0], lists[-1][-1], layouts[list(layouts)[-1]])
    for blocks in lists:
        if stock_shapes not in blocks._state_dict_hooks.values():
            blocks.register_state_dict_post_hook(stock_shapes)


def _save_beside(config: Any, module: str, folder: Path) -> None:
    """Saves the block map beside weights, and what is told of them: pruning.json, and the card of
    the pipeline that they were loaded from."""
    if (block_map := config.get(BLOCK_MAP)) is not None:
        (folder / "block_map.json").write_text(_json(block_map), encoding="utf-8")
    if (card := config.get(CARD)) is not None:
        # As the package seals its texts: the digest of the text with zeros in the digest's place.
        text = _json(card | {"seal": "sha256:" + 64 * "0"})
        digest = hashlib.sha256(text.encode()).hexdigest()
        sealed = text.replace(64 * "0", digest)
        (folder / "pruning.json").write_text(sealed, encoding="utf-8")
    loaded_from = Path(config.get("_name_or_path") or folder)
    if loaded_from.resolve() == folder.resolve() or not (loaded_from / f"{module}.py").is_file():
        return  # from the teacher, whose card is not that of this model
    # In the folder above, only a pipeline's page is a card of this model.
    above = [loaded_from.parent] if (loaded_from.parent / "model_index.json").is_file() else []
    for page in (place / "README.md" for place in (loaded_from, *above)):
        if page.is_file():
            shutil.copyfile(page, folder / page.name)
            return


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def from_stock(transformer: nn.Module, layouts: dict[str, dict]) -> nn.Module:
    """A transformer that holds narrow blocks, as one of the class `pruned`; shares all modules."""
    made: Any = copy.copy(transformer)  # Module does not say that it has a config
    made.__dict__.pop("forward", None)  # an offloading hook's, which runs the original
    made._modules = dict(transformer._modules)  # a shallow copy would share this mapping
    made.__class__ = pruned(getattr(type(transformer), "stock", type(transformer)), layouts)
    made.register_to_config(narrow_blocks=specs(transformer))
    _settle(made, layouts)
    return made


def module_name(base: type[nn.Module], layouts: dict[str, dict]) -> str:
    """Name of the module beside exported weights, which model_index.json gives: another one for
    every content, since diffusers keeps code of all folders in one place by its name."""
    content = hashlib.sha256(module_text(base, layouts).encode())
    return f"{MODULE}_{content.hexdigest()[:16]}"


def module_text(base: type[nn.Module], layouts: dict[str, dict]) -> str:
    """The module beside exported weights: these files, and the class that its index names."""
    plain = json.loads(json.dumps(layouts))  # as a class made in another process gets them
    name, where = base.__name__, pprint.pformat(plain, width=96, sort_dicts=False)
    return f"""{_TEXT}
{_END}, for the weights beside this file.
from diffusers import ModelMixin, {name}  # noqa: E402, F401

Pruned{name} = pruned(
    {name},
    {where.replace(chr(10), chr(10) + "    ")},
)
# diffusers runs this module anew at every load, but models that were loaded before have what the
# first run made, and so should all others.
_FIRST = globals().get("_FIRST") or dict(globals())
globals().update(_FIRST)
# Here pipelines look the class and ModelMixin up when they are given the transformer.
sys.modules[Pruned{name}.__module__] = sys.modules[__name__]
"""
