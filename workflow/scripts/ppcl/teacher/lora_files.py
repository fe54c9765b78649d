"""Which files the LoRAs are that are fused into a teacher, checked before anything is loaded.

Imports nothing heavy, so that Snakefiles can import it.
"""

import hashlib
import re
from pathlib import Path

from ppcl.errors import UserError
from ppcl.settings import LoraSettings, TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import hub, signatures
from ppcl.teacher.weights import PICKLED

KEY = "teacher.loras"
NAME = "pytorch_lora_weights.safetensors"  # as diffusers saves them
_LORA = re.compile(r"lora|lokr", re.IGNORECASE)
_DORA = "dora_scale"


def on_hub(lora: LoraSettings) -> bool:
    """Whether a LoRA's path is the name of a repository on the Hub."""
    is_file = lora.path.endswith((".safetensors", *PICKLED))
    return not is_file and hub.is_name(lora.path)


def file(lora: LoraSettings) -> Path:
    """A LoRA's file on this machine; it is downloaded, if need be.

    Raises:
        UserError: there is none, or it can't be read as `refuse` says.
    """
    if on_hub(lora):
        path = hub.file(lora.path, lora.weight_name or NAME, lora.revision, KEY)
    else:
        path = _local(lora)
    refuse(path)
    return path


def digest(lora: LoraSettings) -> str:
    """SHA-256 (hex) of a LoRA's file, as the Hub shows it. Raises UserError as `file` does."""
    with open(file(lora), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _local(lora: LoraSettings) -> Path:
    path = Path(lora.path)
    if path.is_dir():
        path = path / (lora.weight_name or NAME)
        if not path.exists():
            raise UserError(
                f"{KEY}: {path} does not exist; set weight_name to the file's name in that folder"
            )
    elif not path.exists():
        raise UserError(
            f"{KEY}: {path} does not exist; give a .safetensors file, a folder with one, or the "
            "name of a repository on the Hub (owner/name)"
        )
    elif lora.weight_name is not None:
        raise UserError(
            f"{KEY}: {path} is a file, so weight_name ({lora.weight_name}) names nothing in it; "
            "leave weight_name out, or give the folder"
        )
    return path


def local(teacher: TeacherSettings) -> list[Path]:
    """The files of all local LoRAs that are there."""
    files = []
    for lora in teacher.loras:
        path = Path(lora.path)
        path = path / (lora.weight_name or NAME) if path.is_dir() else path
        if not on_hub(lora) and path.is_file():
            files.append(path)
    return files


def refuse(path: Path) -> None:
    """Raises UserError if a file is no LoRA that can be fused: pickled, damaged, without tensors
    of a LoRA, or in a format of which diffusers drops a part."""
    if path.suffix != ".safetensors":
        why = "could run code when it is read" if path.suffix in PICKLED else "is no such file"
        raise UserError(
            f"{KEY}: {path}: only .safetensors files are read, and this one {why}; convert it"
        )
    names = untrusted.safetensors_header(path)
    if odd := next((name for name in names if _DORA in name), None):
        raise UserError(
            f"{KEY}: {path}: '{odd[:200]}' is of a DoRA as kohya writes it, which diffusers leaves "
            "out; convert it to peft's format (lora_magnitude_vector)"
        )
    if not any(_LORA.search(name) for name in names):
        raise UserError(
            f"{KEY}: {path} holds no LoRA ({len(names)} tensors, none with lora in its name); give "
            "a LoRA's file"
        )


def check_local(teacher: TeacherSettings, source: str) -> None:
    """Raises UserError if a LoRA on this machine is missing or not to be read; `source` names the
    config in messages."""
    for lora in teacher.loras:
        try:
            if not on_hub(lora):
                refuse(_local(lora))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def check(teacher: TeacherSettings, folder: Path, source: str) -> None:
    """Checks the LoRAs of a local teacher as far as their files, and its index, tell.

    Args:
        folder: the pipeline's.
        source: names the config in messages.

    Raises:
        UserError: a file is missing or not to be read; the pipeline takes no LoRAs, or has no such
            component.
    """
    check_local(teacher, source)
    index = hub.read_index(folder)
    for lora in teacher.loras:
        try:
            refuse_pipeline(str(index.get("_class_name")))
            refuse_component(lora, teacher, hub.parts(folder), folder)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def refuse_pipeline(name: str) -> None:
    """Raises UserError if a pipeline's class is none of diffusers, or one without LoRAs."""
    made = signatures.source(name)
    bases = [base.id for base in made.bases if hasattr(base, "id")] if made else []
    if made is not None and any(base.endswith("LoraLoaderMixin") for base in bases):
        return
    raise UserError(
        f"{KEY}: diffusers has no LoRAs for a {name}; fuse them yourself, save the pipeline with "
        "save_pretrained, and give that folder (teacher.path)"
    )


def refuse_component(lora: LoraSettings, teacher: TeacherSettings, parts, folder: Path) -> None:
    """Raises UserError if a LoRA's component is not one of the pipeline's transformers.

    parts: component -> (library, class), as `hub.parts` gives them.
    """
    name = component(lora, teacher)
    transformers = [part for part, (_, made_as) in parts.items() if "Transformer" in made_as]
    if name not in transformers:
        raise UserError(
            f"{KEY}: component {name}: {folder} has no transformer of that name, and LoRAs are "
            f"fused into transformers alone; it has {', '.join(transformers)}"
        )


def component(lora: LoraSettings, teacher: TeacherSettings) -> str:
    """The pipeline's component that a LoRA is fused into."""
    return lora.component or teacher.component
