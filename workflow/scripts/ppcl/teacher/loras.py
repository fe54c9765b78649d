"""LoRAs fused into a teacher's transformers and text encoders when these are loaded, by stock
diffusers."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn

from ppcl.errors import UserError
from ppcl.settings import LoraSettings, TeacherSettings
from ppcl.teacher import complete, hub, lora_files
from ppcl.teacher.lora_files import KEY

_NAME = "fused"  # of the adapter, while it is there
_TRANSFORMER = "transformer"  # as LoRAs name it
_SHOWN = 3  # tensors that a message names
# Said of every component that a LoRA could have layers for, and has none.
_NO_NEWS = "No LoRA keys associated to"


def fuse(teacher: TeacherSettings, folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Fuses the teacher's LoRAs into its weights, one after the other, in place: into transformers,
    and into those text encoders of which the pipeline's class loads LoRAs (FLUX, SD3).

    All that loads a teacher's weights does it by this function, on the CPU, so all get the same.
    It is what `load_lora_weights`, `fuse_lora` and `unload_lora_weights` of the pipeline's class
    do, but what they only warn of is an error.

    Args:
        teacher: the config's `teacher` mapping.
        folder: of its pipeline.
        modules: component -> module, on the CPU, of the components that are loaded; LoRAs of
            others are left out.

    Raises:
        UserError: a file is missing, damaged or of another model; a part of it would not be used,
            or it changes nothing; the pipeline takes no LoRAs; or a fused weight is not finite.
    """
    for lora in teacher.loras:
        parts, name = hub.parts(folder), lora_files.component(lora, teacher)
        made_by = _pipeline(folder)
        lora_files.refuse_component(lora, teacher, parts, folder)
        into = {_TRANSFORMER: modules[name]} if name in modules else {}
        into |= {text: modules[text] for text in _text_encoders(made_by) if text in modules}
        if name in modules:
            _fuse_one(made_by, into, lora)
            for module in into.values():
                complete.as_loaded(module)


def text_encoders(teacher: TeacherSettings, folder: Path) -> set[str]:
    """Names of the text encoders that the teacher's LoRAs change. Raises UserError as `fuse`."""
    changed: set[str] = set()
    for lora in teacher.loras:
        made_by, path = _pipeline(folder), lora_files.file(lora)
        state = _converted(made_by, path)
        changed |= {name.split(".")[0] for name in state} & set(_text_encoders(made_by))
    return changed


def _pipeline(folder: Path) -> Any:
    """The class of a pipeline's folder. Raises UserError if it has no LoRAs."""
    name = str(hub.read_index(folder).get("_class_name"))
    lora_files.refuse_pipeline(name)
    return getattr(diffusers, name)


def _text_encoders(made_by: Any) -> list[str]:
    """The text encoders into which a pipeline's class loads LoRAs."""
    return [name for name in made_by._lora_loadable_modules if name.startswith("text_encoder")]


def _converted(made_by: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """A LoRA's tensors under the names that diffusers gives them. Raises UserError."""
    try:
        with _warnings():
            state = made_by.lora_state_dict(str(path.parent), **_given(path))
    except Exception as error:  # diffusers raises many kinds
        raise UserError(
            f"{KEY}: {path} can't be read as a LoRA of a {made_by.__name__}; is it one of another "
            f"model? {_first(error)}"
        ) from error
    return state[0] if isinstance(state, tuple) else state


def _given(path: Path) -> dict[str, Any]:
    return {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}


def _fuse_one(made_by: Any, modules: Mapping[str, nn.Module], lora: LoraSettings) -> None:
    """modules: `transformer`, whatever the pipeline calls it, and text encoders."""
    path, transformer = lora_files.file(lora), modules[_TRANSFORMER]
    shapes = {name: _shapes(module) for name, module in modules.items()}
    pipe = _stand_in(made_by, modules)
    try:
        # Layers are made before they get their weights; the numbers drawn then are not used.
        with _warnings() as said, torch.random.fork_rng(devices=()):
            pipe.load_lora_weights(str(path.parent), adapter_name=_NAME, **_given(path))
    except Exception as error:  # diffusers and peft raise many kinds
        raise UserError(
            f"{KEY}: {path} can't be put into a {type(transformer).__name__}; is it a LoRA of "
            f"another model? {_first(error)}"
        ) from error
    used = _refuse_unused(path, made_by, modules)
    if said:
        raise UserError(f"{KEY}: {path} would not be used as it is: {said[0]}; convert it")
    if used:
        pipe.fuse_lora(components=used, lora_scale=lora.scale, adapter_names=[_NAME])
    pipe.unload_lora_weights()
    for name, module in modules.items():
        if _shapes(module) != shapes[name]:
            raise UserError(
                f"{KEY}: {path} changes the shapes of weights, as control LoRAs do, which is "
                "another model; leave it out"
            )
        module.requires_grad_(False).eval()
        complete.refuse_incomplete(module, f"{KEY}: {path}, fused with scale {lora.scale:g}")


def _stand_in(made_by: Any, modules: Mapping[str, nn.Module]) -> Any:
    """A pipeline of a class that has these modules alone, whatever its transformer is called."""
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))

    def into_text_encoder(cls: Any, *arguments: Any, text_encoder: Any, **options: Any) -> None:
        if text_encoder is not None:  # else it is not loaded in this stage
            given = {"text_encoder": text_encoder, **options}
            made_by.load_lora_into_text_encoder(*arguments, **given)

    own = {
        "__init__": lambda self: None,
        "components": property(lambda self: dict(modules)),
        "hf_device_map": None,
        "load_lora_into_text_encoder": classmethod(into_text_encoder),
        **texts,
    }
    pipe = type(made_by.__name__, (made_by,), own)()
    vars(pipe).update(modules)
    return pipe


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Yields a list, to which whatever diffusers warns of within the context is added."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.getMessage().startswith(_NO_NEWS):
                said.append(record.getMessage()[:500])

    ear, logger = Ear(logging.WARNING), logging.getLogger("diffusers")
    verbosity = diffusers_logging.get_verbosity()
    logger.addHandler(ear)
    diffusers_logging.set_verbosity_warning()
    try:
        yield said
    finally:
        diffusers_logging.set_verbosity(verbosity)
        logger.removeHandler(ear)


def _refuse_unused(path: Path, made_by: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Raises UserError unless the modules hold each of a LoRA's tensors, and they do something.

    Returns:
        The names of the modules that it has tensors of. Those of text encoders that the pipeline's
        class loads, but that are not loaded now, are passed over.
    """
    from peft.utils import get_peft_model_state_dict

    state, used, left = _converted(made_by, path), [], []
    every: list[torch.Tensor] = []
    places = {_TRANSFORMER, *_text_encoders(made_by)}
    for name in sorted(places):
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        own = _as_peft(own, modules.get(name), name)
        every += [v for k, v in own.items() if "lora_A" not in k and not k.endswith(".alpha")]
        if not own or name not in modules:
            continue
        used.append(name)
        held = get_peft_model_state_dict(modules[name], adapter_name=_NAME)
        lost = [k for k in own.keys() - held.keys() if not k.endswith(".alpha")]
        left += [f"{name}.{k}" for k in lost]
    left += [name for name in state if name.split(".")[0] not in places]
    if left:
        shown = ", ".join(repr(name)[:200] for name in sorted(left)[:_SHOWN])
        others = sorted({name.split(".")[0] for name in left} - places)
        also = f" and {', '.join(texts)}" if (texts := sorted(places - {_TRANSFORMER})) else ""
        raise UserError(
            f"{KEY}: {path} holds {len(left)} tensors ({shown}{', ...' * (len(left) > _SHOWN)}) "
            f"for which the {type(modules[_TRANSFORMER]).__name__}{also} has no place"
            + (
                f"; into a {made_by.__name__} diffusers loads LoRAs of its transformer{also} alone,"
                f" not of {', '.join(others)}"
                if others
                else ""
            )
            + "; leave them out of the file, or fuse it yourself, save the pipeline with "
            "save_pretrained, and give that folder (teacher.path)"
        )
    if not any(tensor.any() for tensor in every):
        raise UserError(f"{KEY}: {path} changes nothing: it is zero; give one that was trained")
    return used


def _as_peft(own: dict, module: nn.Module | None, name: str) -> dict[str, torch.Tensor]:
    """A module's tensors under peft's names, as diffusers makes these when it loads them."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if not own:
        return own
    if name != _TRANSFORMER:
        own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        if not hasattr(module, "text_model"):  # as older versions of transformers nest it
            own = {k.removeprefix("text_model."): v for k, v in own.items()}
        return own
    if not any("lora_A" in key or "lokr_" in key for key in own):
        own = convert_unet_state_dict_to_peft(own)
    return own


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _first(error: Exception) -> str:
    """The beginning of an error's text."""
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__
