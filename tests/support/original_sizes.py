"""diffusers' converters of single files, told the sizes of tiny models where they know but one."""

from collections.abc import Mapping
from types import CodeType, FunctionType

import pytest
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

# Class -> a size that its converter has as a constant, and that of the tiny model of the zoo.
SIZES: dict[str, dict[int, int]] = {
    "FluxTransformer2DModel": {3072: 32},
    "HunyuanVideoTransformer3DModel": {3072: 32},
    "Lumina2Transformer2DModel": {2304: 32, 768: 16},
}


def tell(monkeypatch: pytest.MonkeyPatch, made_as: str) -> None:
    """Replaces these sizes in a class's converter, and nothing else of it."""
    entry = SINGLE_FILE_LOADABLE_CLASSES[made_as]
    convert = entry["checkpoint_mapping_fn"]
    if made_as in SIZES:
        code, counted = _with(convert.__code__, SIZES[made_as])
        assert counted == len(SIZES[made_as]), "diffusers has changed it"
        told = FunctionType(code, convert.__globals__, convert.__name__)
        told.__kwdefaults__ = convert.__kwdefaults__
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", told)


def _with(code: CodeType, sizes: Mapping[int, int]) -> tuple[CodeType, int]:
    """Code with other constants, and how many were replaced in it and in functions inside."""
    constants, counted = [], 0
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constant, inside = _with(constant, sizes)
            counted += inside
        elif type(constant) is int and constant in sizes:
            constant, counted = sizes[constant], counted + 1
        constants.append(constant)
    return code.replace(co_consts=tuple(constants)), counted
