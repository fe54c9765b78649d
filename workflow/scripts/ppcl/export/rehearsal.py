"""A dress rehearsal of exports: what can't be saved and loaded again is known before training."""

import copy
import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl.errors import UserError
from ppcl.export import assembly
from ppcl.settings import TeacherSettings
from ppcl.storage import whole
from ppcl.teacher import hub, loras
from ppcl.transformer import blocks, diffusers_model


def rehearse(
    pipe: DiffusionPipeline,
    transformer: nn.Module,
    teacher: TeacherSettings,
    call: dict,
    done: Path,
) -> None:
    """Exports the untouched teacher, cut to the first and last block of each list, and reloads it,
    so that what can't be exported is known before anything is trained. Nothing of it is kept.

    Components that exports copy are linked, and reloaded without their weights.

    Args:
        pipe, transformer: as loaded to run, wherever they are; they stay as they are.
        teacher: the config's `teacher` mapping.
        call: keyword arguments of one transformer call, on the CPU.
        done: an empty folder that is made when all is well; if it is there, nothing is done.

    Raises:
        UserError: an export would fail, or its answer would differ.
    """
    if done.exists():
        return
    source, component = hub.folder(teacher), hub.component(teacher)
    left_out = (
        () if teacher.variant else assembly.copied(source, loras.text_encoders(teacher, source))
    )
    try:
        model, block_map = _shortest(transformer, call)
        twins = {  # such as the other expert of Wan 2.2
            name: _cut(part)[0]
            for name, part in pipe.components.items()
            if part is not transformer and type(part) is type(transformer)
        }
        stand_in = copy.copy(pipe)
        stand_in.register_modules(**dict.fromkeys(left_out), **twins)
        with whole.writing(done, folder=True) as temporary:
            folder = temporary / "teacher"
            trusted = assembly.save(
                assembly.TeacherPipeline(stand_in, component, source),
                model,
                block_map,
                folder,
                os.symlink,
            )
            assembly.prove(folder, model, call, component, trusted, left_out)
            shutil.rmtree(folder)
    except Exception as error:  # whatever a class makes of being saved
        raise UserError(
            f"teacher.path: {teacher.path} can't be exported: its first and last blocks were "
            "saved and loaded again, as variants will be, before anything is trained, and that "
            f"failed: {error}"
        ) from error


def _cut(transformer: nn.Module) -> tuple[nn.Module, list[list[int]]]:
    """A copy, on the CPU, of its first and last block of each list; and its block map."""
    first, instead = 0, {}
    for listed in blocks.family(transformer).lists:
        modules = getattr(transformer, listed.attribute)
        if len(modules) > 2:
            instead[first, first + len(modules) - 2] = modules[0]
        first += len(modules)
    return _on_cpu(*blocks.assembled(transformer, instead))


def _on_cpu(model: nn.Module, block_map: list[list[int]]) -> tuple[nn.Module, list[list[int]]]:
    # Of offloading: a deep copy would follow them to other models.
    for hook in ("_hf_hook", "_old_forward"):
        model.__dict__.pop(hook, None)
    places: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().cpu()
        is_weight = isinstance(tensor, nn.Parameter)
        places[id(tensor)] = nn.Parameter(there, requires_grad=False) if is_weight else there
    return assembly.with_code(copy.deepcopy(model, places)), block_map


def _shortest(transformer: nn.Module, call: dict) -> tuple[nn.Module, list[list[int]]]:
    """The transformer's shortest copy that answers, and that its config alone rebuilds: not every
    class works with two blocks."""
    shortest = _cut(transformer)
    try:
        with torch.no_grad():
            blocks.answer(shortest[0], call)
        with torch.device("meta"):
            model = diffusers_model.of(shortest[0])
            again = type(model).from_config(dict(model.config))
        if _shapes(again) == _shapes(shortest[0]):
            return shortest
    except Exception:  # whatever a class makes of fewer blocks than it expects
        pass
    return _on_cpu(*blocks.assembled(transformer, {}))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
