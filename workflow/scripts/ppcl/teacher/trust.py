"""Code in a pipeline's folder. It runs only if the user trusts it, from a copy of this process's
own, and an export that needs it gets it too."""

import functools
import inspect
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import transformers.dynamic_module_utils
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from torch import nn

from ppcl.errors import UserError
from ppcl.pruning import pruned_class
from ppcl.storage import texts
from ppcl.teacher import hub
from ppcl.transformer.registry import family_of

transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it would ask at the terminal
_COPIES = "diffusers_modules."  # diffusers' copies of such code are modules with this prefix
_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}


def own_modules() -> None:
    """Has this process copy the code that it loads to a folder of its own, which is deleted when
    the process ends.

    By default all processes of a machine share a folder under HF_HOME. There, one may read a file
    that another is writing, and the folder may not be writable.
    """
    place = _place(os.getpid())  # a fork starts anew
    dynamic_modules_utils.HF_MODULES_CACHE = place
    transformers.dynamic_module_utils.HF_MODULES_CACHE = place


@functools.cache
def _place(_process: int) -> str:
    place = tempfile.mkdtemp(prefix="ppcl-modules-")
    # Unlike atexit, this also runs when a process of multiprocessing ends.
    multiprocessing.util.Finalize(None, shutil.rmtree, (place, True), exitpriority=0)
    return place


def class_beside(folder: Path, part: str) -> type:
    """A component's class from the code beside its weights, which the caller trusts.

    Raises:
        UserError: the index names no file there.
    """
    library, name = hub.read_index(folder)[part]
    if not library.isidentifier():
        raise UserError(f"{folder / hub.INDEX}: {part}: '{library}' is no name of a module")
    own_modules()
    return dynamic_modules_utils.get_class_from_dynamic_module(
        folder, f"{library}.py", class_name=name, trust_remote_code=True, subfolder=part
    )


def bring(pipe: DiffusionPipeline, folder: Path) -> bool:
    """Puts the code with which a pipeline was loaded into its saved folder, and names it in the
    folder's index.

    Returns:
        Whether the folder then holds code. All of it is, byte for byte, code that ran in this
        process since the user trusts it, or the text of `pruned_class`.

    Raises:
        UserError: the folder holds other code.
    """
    index = hub.read_index(folder)
    named = {"": type(pipe)} | {k: type(v) for k, v in pipe.components.items() if v is not None}
    known: dict[str, bytes] = {}
    for place, made_by in named.items():
        if made_by.__module__.startswith(_COPIES):
            origin = Path(inspect.getfile(made_by))
            for file in (origin, *_needed(origin)):
                known[(Path(place) / file.relative_to(origin.parent)).as_posix()] = (
                    file.read_bytes()
                )
            index[place or "_class_name"] = [origin.stem, made_by.__name__]
        elif hasattr(made_by, "stock"):
            known[f"{place}/{made_by.__module__}.py"] = _narrow_text(made_by, made_by.stock)
    for name, content in known.items():
        texts.write(folder / name, content)
    texts.write_json(folder / hub.INDEX, index)
    if other := sorted(set(code_in(folder)) - known.keys()):
        raise UserError(f"{folder / other[0]}: code that the pipeline was not loaded with")
    return bool(known)


def refuse_narrowing(transformer: nn.Module) -> None:
    """Raises UserError if the transformer's class is not one of diffusers: the code of narrow
    blocks that comes with an export derives from diffusers' classes alone."""
    made_by = getattr(type(transformer), "stock", type(transformer))
    if getattr(diffusers, made_by.__name__, None) is not made_by:
        raise UserError(
            f"width.enabled: {made_by.__name__} comes with the teacher, and blocks can be made "
            "narrow only in diffusers' own classes; set width.enabled: false"
        )


def _needed(origin: Path) -> Iterator[Path]:
    """Files that a module imports by relative imports, directly or indirectly."""
    return map(Path, dynamic_modules_utils.get_relative_import_files(str(origin)))


def _narrow_text(made_by: type, stock: type[nn.Module]) -> bytes:
    """The code of a class that `pruned_class` made: the file from which it was loaded, or, if it
    was made in this process, the text that `pruned_class` writes."""
    loaded = getattr(sys.modules.get(made_by.__module__), "__file__", None)
    if loaded:
        return Path(loaded).read_bytes()
    family = family_of(stock.__name__)
    if family is None:
        raise ValueError(f"{stock.__name__} was narrowed, yet the registry does not have it")
    return pruned_class.module_text(stock, family.layouts()).encode()


def code_in(folder: Path) -> list[str]:
    """All files of a folder that could be run, by their paths in it."""
    paths = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in paths)
