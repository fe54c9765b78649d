"""A pipeline's transformer as a GGUF file, as ComfyUI-GGUF and diffusers read it.

Metadata and types follow ComfyUI-GGUF, the field's own converter: general.architecture, file_type
and quantization_version; float32 for vectors, for tensors of at most 1,024 numbers or of five
dimensions, and for some by name (tools/convert.py); quantised are matrices alone, not those that
embed, modulate for all blocks, or end (tools/lcpp.patch); what is left is float16.
"""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ppcl.errors import UserError
from ppcl.export.single_file import Transformer
from ppcl.storage import tensors, whole
from ppcl.transformer.original_files import OriginalFiles

TYPES = ("F16", "Q8_0", "Q4_0")
_SMALL = 1024  # numbers; so large a tensor, or smaller, stays in float32
_DIMENSIONS = 4  # of tensors that quantisers know
_NAME = 127  # characters, the longest name that readers take
_BLOCK = 32  # numbers of a row that share a scale


def write(path: Path, transformer: Transformer, kind: str) -> None:
    """Writes the file, one tensor in memory at a time.

    Args:
        kind: one of TYPES, of matrices.

    Raises:
        UserError: the package gguf is missing; nobody reads such a file of the class; a weight is
            no number of float16; the disk is full or fails.
    """
    gguf = _package()
    files = transformer.files
    if not files.gguf:
        raise UserError(
            f"--output: no program reads a GGUF file of a {transformer.made_as}; name a "
            ".safetensors file"
        )
    every = transformer.tensors
    kinds = {name: kind_of(name, stored.shape, kind, files) for name, stored in every.items()}
    if long := [name for name in kinds if len(name) > _NAME]:
        raise UserError(f"--output: a name in a GGUF file has at most {_NAME} letters: {long[0]}")
    raw = {name: gguf.GGMLQuantizationType[each] for name, each in kinds.items()}
    with whole.writing(path) as temporary:
        writer = gguf.GGUFWriter(None, arch=files.gguf)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for name, stored in every.items():
            block, size = gguf.GGML_QUANT_SIZES[raw[name]]
            count = math.prod(stored.shape) // block * size
            writer.add_tensor_info(name, stored.shape, np.dtype(np.float32), count, raw[name])
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, stored in every.items():
            numbers = _checked(name, tensors.load(name, stored), kinds[name])
            try:
                writer.write_tensor_data(gguf.quants.quantize(numbers.numpy(), raw[name]))
            except OSError as error:
                if error.errno is not None:
                    raise
                raise UserError(  # numpy does not say which error ended its writing
                    f"{path} could not be written ({error}): the disk is full, or limits the size "
                    "of files; make room and rerun"
                ) from error
        writer.close()


def kind_of(name: str, shape: tuple[int, ...], kind: str, files: OriginalFiles) -> str:
    """The type that a tensor is stored in, where matrices are `kind`."""
    if any(part in name for part in files.precise) or len(shape) > _DIMENSIONS:
        return "F32"
    if len(shape) < 2 or math.prod(shape) <= _SMALL:
        return "F32"
    kept = any(part in name for part in files.kept) or not name.endswith("weight")
    return "F16" if kept or len(shape) > 2 or shape[1] % _BLOCK else kind


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError("--output: GGUF files need a package: pip install gguf==0.19.0") from error
    return gguf


def _checked(name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Numbers in float32; UserError if a type can't store them."""
    numbers = tensor.to(torch.float32)
    limit = torch.finfo(torch.float32 if kind == "F32" else torch.float16).max
    if numbers.numel():
        low, high = map(float, numbers.aminmax())
        if not (-limit <= low and high <= limit):  # which NaN isn't either
            raise UserError(
                f"--model: {name!r} holds numbers that {kind} can't (NaN, infinity, or beyond "
                f"{limit:g}); a .safetensors file holds them as they are"
            )
    return numbers
