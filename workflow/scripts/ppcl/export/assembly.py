"""Variants as pipeline folders that diffusers alone loads."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map

from ppcl.errors import UserError
from ppcl.export import quantising, reload_gate
from ppcl.pruning import narrow, pruned_class
from ppcl.settings import Settings, Variant
from ppcl.storage import seals, tensors, texts, untrusted, whole
from ppcl.teacher import hub, trust
from ppcl.teacher.weights import STEMS
from ppcl.transformer import blocks, call_arguments
from ppcl.transformer.registry import family_of

CARD = "pruning.json"
# Keys of it that hold for a folder alone and for no copy: its seal, and what `describe` adds.
NOT_ITS = ("card", "next_card", "metrics", "seal")


def variant(settings: Settings, name: str) -> Variant:
    """The config's variant of that name. Raises UserError if there is none."""
    for variant in settings.variants:
        if variant.name == name:
            return variant
    known = ", ".join(v.name for v in settings.variants)
    raise UserError(f"--variant: the config has no variant '{name}'; it has {known}")


@dataclass(frozen=True)
class TeacherPipeline:
    """What a variant's pipeline is made from.

    Attributes:
        pipe: the teacher's pipeline; everything but the transformer is saved as it is.
        component: the pipeline's component that the transformer is.
        source: folder of the teacher's pipeline; components that `pipe` was loaded without are
            copied from there.
    """

    pipe: DiffusionPipeline
    component: str = "transformer"
    source: Path | None = None


def export(
    teacher: TeacherPipeline,
    transformer: nn.Module,
    block_map: list[list[int]],
    folder: Path,
    card: dict,
    call: dict,
    quantise: str | None = None,
) -> None:
    """Writes a pipeline folder and proves, in a fresh process, that diffusers alone loads it.

    The folder holds code, and loads with trust_remote_code, if the transformer has narrow blocks or
    the pipeline was loaded with code of its own. Any other folder is stock.

    Args:
        block_map: new block -> the old blocks that it stands for; saved beside the weights, since
            LoRA and ControlNet files carry the old numbers.
        card: provenance and choices, saved as pruning.json with the digests of all files.
        call: keyword arguments of one transformer call, for the comparison.
        quantise: how its weights are quantised (quantisation.METHODS), if they are.

    Raises:
        UserError: the reloaded model misses weights or answers differently. Nothing is left behind.
    """
    transformer = with_code(transformer)
    _remember(transformer, pruned_class.CARD, card)
    with whole.writing(folder, folder=True) as temporary:
        trusted = save(teacher, transformer, block_map, temporary)
        if quantise:
            part = temporary / teacher.component
            transformer = quantising.quantised(
                transformer, part, part, quantise, main_dtype(transformer)
            )
            forget_paths(temporary)
        prove(temporary, transformer, call, teacher.component, trusted)
        seal(temporary, teacher.component, card | quantising.told(transformer, quantise))


def requantise(
    transformer: nn.Module, source: Path, folder: Path, component: str, call: dict, quantise: str
) -> None:
    """Writes an exported folder once more with its transformer's weights quantised, and proves it.

    Args:
        transformer: of the folder `source`, as `export` or `requantise` takes it.
        component, call, quantise: as for `export`.

    Raises:
        UserError: as `export`, or `quantising.quantised`. Nothing is left behind.
    """
    card = texts.read_sealed(source / CARD) if (source / CARD).exists() else {}
    card = {key: value for key, value in card.items() if key not in NOT_ITS}
    with whole.writing(folder, folder=True) as temporary:
        for name in card.get("files", _files(source)):
            if name != CARD and not name.startswith(f"{component}/{STEMS['diffusers']}"):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, temporary / name)
        made = quantising.quantised(
            transformer,
            source / component,
            temporary / component,
            quantise,
            main_dtype(transformer),
        )
        forget_paths(temporary)
        prove(temporary, made, call, component, bool(trust.code_in(temporary)))
        card |= quantising.told(made, quantise) | {"of": source.name}
        seal(temporary, component, card)


def seal(folder: Path, component: str, card: dict) -> None:
    """Writes the card of an export, with digests of all of its files."""
    # Saved beside narrow weights: a card without digests, and the page of the model before.
    for name in (CARD, hub.CARD):
        (folder / component / name).unlink(missing_ok=True)
    files = {name: seals.file_digest(folder / name) for name in _files(folder)}
    texts.write_sealed(folder / CARD, card | {"files": files})


def with_code(transformer: nn.Module) -> nn.Module:
    """The transformer as the class that it is saved as, a generated one if it has narrow blocks."""
    if not narrow.specs(transformer):
        return transformer
    return pruned_class.from_stock(transformer, blocks.family(transformer).layouts())


def save(
    teacher: TeacherPipeline,
    transformer: nn.Module,
    block_map: list[list[int]],
    folder: Path,
    copy_file: Callable = shutil.copyfile,
) -> bool:
    """Writes all files of an export but its card; returns whether it has code (`trust.bring`).

    copy_file: as for `copy_missing`.
    """
    pipe, component = teacher.pipe, teacher.component
    _remember(transformer, pruned_class.BLOCK_MAP, block_map)
    pipe.register_modules(**{component: transformer})
    pipe.save_pretrained(folder)
    if teacher.source is not None:
        copy_missing(teacher.source, folder, pipe, copy_file)
    trusted = trust.bring(pipe, folder)
    forget_paths(folder)
    texts.write_json(folder / component / "block_map.json", block_map)
    return trusted


def _remember(transformer: Any, key: str, value: Any) -> None:
    """Puts a private key into a transformer's config, which stock classes load and save silently:
    files beside weights are lost by downloads and by `save_pretrained`."""
    transformer.register_to_config(**{key: value})


def verify(folder: Path) -> None:
    """Raises UserError unless every file of an exported folder is what `export` wrote.

    A folder without a card was not written by `export`, and passes unchecked.
    """
    if not (folder / CARD).exists():
        return
    for name, digest in texts.read_sealed(folder / CARD)["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is gone; delete {folder} and rerun")
        if seals.file_digest(folder / name) != digest:
            raise UserError(f"{folder / name} {seals.DAMAGED}; delete {folder} and rerun")


def _files(folder: Path) -> list[str]:
    """Relative paths of all files of a folder, without hidden ones, which Snakemake may add."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(p[0] == "." for p in path.parts))


def copied(source: Path, changed: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the text encoders in a pipeline's folder that an export copies without loading them.

    They are large, and the pipeline's class can be made without them. Left out are text encoders
    with code of their own, those with files that are links out of the folder, and those of which
    other weights are saved than are in the folder (`changed`).
    """
    return tuple(
        name
        for name, (library, _) in hub.parts(source).items()
        if name.startswith("text_encoder")
        and name not in changed
        and not (source / name / f"{library}.py").exists()
        and not any(hub.leaves(source, source / file) for file in hub.files(source, name))
    )


def copy_missing(
    source: Path, folder: Path, pipe: DiffusionPipeline, copy_file: Callable = shutil.copyfile
) -> None:
    """Copies components from one pipeline's folder to another: those whose class the latter lacks.

    Only files that a download would take are copied: no code, no hidden files.

    Args:
        source: the folder with the components.
        folder: the folder whose index (model_index.json) lacks classes; it is completed.
        pipe: a pipeline of the class of both folders. Only parameters of that class are components.
        copy_file: called with (from, to); os.symlink, for example, where links will do.

    Raises:
        UserError: a file is a link out of `source`.
    """
    index, known = hub.read_index(folder), inspect.signature(type(pipe).__init__).parameters
    for name, made_as in hub.parts(source).items():
        if name not in known or (index.get(name) or [None])[0]:
            continue
        for file in hub.files(source, name):
            if hub.leaves(source, source / file):
                raise UserError(
                    f"teacher.path: {source / file} leads to {(source / file).resolve()}, out of "
                    f"this folder, so it is not copied; put {name} itself there"
                )
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            copy_file((source / file).resolve(), folder / file)
        index[name] = list(made_as)
    texts.write_json(folder / hub.INDEX, index)


def forget_paths(folder: Path) -> None:
    """Removes `_name_or_path`, where components were loaded from, from all configs: it is private,
    and another machine has no such path."""
    for path in (folder / hub.INDEX, *folder.glob("*/*config.json")):
        config = untrusted.json_object(path)
        if config.pop("_name_or_path", None) is not None:
            texts.write_json(path, config)


def own_code(folder: Path, component: str = "transformer") -> bool:
    """Whether a pipeline's transformer has the code that `export` writes, to the letter, and
    nothing else in its folder could be run."""
    module, name = hub.read_index(folder)[component]
    base = getattr(diffusers, name.removeprefix("Pruned"), None)
    of = family_of(base.__name__) if isinstance(base, type) else None
    if base is None or of is None or trust.code_in(folder) != [f"{component}/{module}.py"]:
        return False
    if module != pruned_class.module_name(base, of.layouts()):
        return False
    path = folder / component / f"{module}.py"
    return path.read_text(encoding="utf-8") == pruned_class.module_text(base, of.layouts())


def may_run(folder: Path, component: str, trusted: bool = False) -> bool:
    """Whether code in an exported folder may run: what `export` writes, or all if it is `trusted`.

    Raises:
        UserError: another version of `export` wrote it, so that nothing says what it does.
    """
    if trusted or own_code(folder, component):
        return True
    module = str(hub.read_index(folder)[component][0])
    alone = trust.code_in(folder) == [f"{component}/{module}.py"]
    if alone and module.startswith(pruned_class.MODULE):
        raise UserError(
            f"{folder}: the code of its {component} was made by another version of this program "
            "(or changed since); run assemble again, or use the version that made it"
        )
    return False


@torch.no_grad()
def prove(
    folder: Path,
    transformer: nn.Module,
    call: dict,
    component: str = "transformer",
    trusted: bool | None = None,
    light: Collection[str] = (),
) -> None:
    """The reload gate: a fresh process that knows only diffusers must get the same answer.

    Args:
        trusted: whether the code in the folder may run; by default only what `export` writes.
        light: components to load without their weights.

    Raises:
        UserError: the answers differ, or weights differ or are missing.
    """
    device = next(transformer.parameters()).device
    there = tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, call)
    held = {"expected": blocks.answer(transformer, there).cpu()}
    about = {
        "arguments": json.dumps(call_arguments.encode(call, "call", held.__setitem__)),
        "component": component,
        "dtype": str(main_dtype(transformer)).removeprefix("torch."),
        "light": json.dumps(list(light)),
        "trusted": json.dumps(own_code(folder, component) if trusted is None else trusted),
        "weights": json.dumps(reload_gate.digests(transformer)),
    }
    probe = folder / ".call.safetensors"
    tensors.write(probe, held, about)
    gate, packages = Path(__file__).with_name("reload_gate.py"), quantising.places(transformer)
    with tempfile.TemporaryDirectory() as modules:  # where diffusers copies and compiles code to
        done = subprocess.run(
            [sys.executable, "-I", str(gate), str(folder), str(probe), *packages],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | {"HF_MODULES_CACHE": modules},
        )
    probe.unlink()
    if done.returncode:
        raise UserError(
            f"{folder.name.strip('.')}: the exported pipeline does not reload as it was written, "
            f"so it was not kept:\n{done.stdout.strip()}\n{done.stderr.strip()[-2000:]}"
        )


def main_dtype(module: nn.Module) -> torch.dtype:
    """The type of most of a module's weights, but integers; a class may keep some in float32."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=counts.__getitem__)
