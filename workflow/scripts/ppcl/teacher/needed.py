"""Checks for packages and components that only some teachers need. diffusers and transformers
report a missing one late, or not by its name.

Imports nothing heavy, so that Snakefiles can import it.
"""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from ppcl.errors import UserError
from ppcl.teacher import hub, signatures

# Classes that can't do without a package, whatever they read.
_BY_CLASS = {
    "PixtralProcessor": "torchvision",
    "Qwen2VLProcessor": "torchvision",
    "Qwen2_5_VLProcessor": "torchvision",
    "Qwen3VLProcessor": "torchvision",
    "WanImageToVideoPipeline": "ftfy",
}


def refuse_missing(folder: Path, parts: dict[str, tuple[str, str]], key: str) -> None:
    """Checks that the packages are installed that a pipeline and its components need.

    Nothing is checked if transformers isn't installed: then Snakemake runs the programs in an
    environment of their own.

    Args:
        parts: components that are loaded -> (library, class).
        key: the config key that names the folder, for messages.

    Raises:
        UserError: a package is missing; names it, and the component that needs it.
    """
    if find_spec("transformers") is None:
        return
    classes = {folder / name: made_as for name, (_, made_as) in parts.items()}
    pipeline = hub.read_index(folder, key).get("_class_name")
    if isinstance(pipeline, str):
        classes[folder] = pipeline
    for where, made_as in classes.items():
        missing = [package for package in _of(where, made_as) if not _installed(package)]
        if missing:
            raise UserError(
                f"{key}: {where} is a {made_as}, which can't work without "
                f"{' and '.join(missing)}; install {'it' if len(missing) == 1 else 'them'} beside "
                f"torch, for its version (pip install {' '.join(missing)})"
            )


def refuse_incomplete(folder: Path, names: Collection[str], key: str) -> None:
    """Checks that a pipeline of diffusers has all components that its class can't do without.

    Args:
        names: of its components, including those that are not loaded now.
        key: the config key that names the folder, for messages.

    Raises:
        UserError: a component is missing, as Llama is in HiDream's published folders.
    """
    pipeline = hub.read_index(folder, key).get("_class_name")
    wanted = signatures.components(pipeline) if isinstance(pipeline, str) else ()
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(
            f"{key}: {folder / hub.INDEX} names no {' and no '.join(missing)}, without which a "
            f"{pipeline} can't be made; load it once with what is missing "
            f"({pipeline}.from_pretrained(..., {missing[0]}=...)), save it with save_pretrained, "
            "and give that folder"
        )


def _of(part: Path, made_as: str) -> list[str]:
    if made_as in _BY_CLASS:
        return [_BY_CLASS[made_as]]
    # Several families publish their T5 tokenizer as a sentencepiece model alone.
    alone = (part / "spiece.model").is_file() and not (part / "tokenizer.json").is_file()
    return ["sentencepiece", "protobuf"] if alone else []


def _installed(package: str) -> bool:
    module = {"protobuf": "google.protobuf"}.get(package, package)
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
