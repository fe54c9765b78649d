"""Reading and writing safetensors: whole or not at all, with provenance, and with clear errors."""

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ppcl.errors import UserError

_UMASK = os.umask(0)
os.umask(_UMASK)


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors atomically; aliases and views are stored as contiguous copies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(
            {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()},
            temporary,
            metadata=dict(metadata),
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors makes files that only we can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file that is known to be whole."""
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and the metadata.

    Raises:
        UserError: the file is missing, truncated, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Run the stage that writes it.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}). Delete it and rerun; "
            "the stage that writes it will make it again."
        ) from error
