"""LoRAs fused into a teacher's transformers when these are loaded, by stock diffusers."""

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
_SHOWN = 3  # tensors that a message names
# Said of every component that a LoRA could have layers for, and has none.
_NO_NEWS = "No LoRA keys associated to"


def fuse(teacher: TeacherSettings, folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Fuses the teacher's LoRAs into its weights, one after the other, in place.

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
        made_as = hub.read_index(folder).get("_class_name")
        lora_files.refuse_pipeline(str(made_as))
        lora_files.refuse_component(lora, teacher, parts, folder)
        if name in modules:
            _fuse_one(getattr(diffusers, str(made_as)), modules[name], lora)
            complete.as_loaded(modules[name])


def _fuse_one(made_by: type, module: nn.Module, lora: LoraSettings) -> None:
    path = lora_files.file(lora)
    shapes = _shapes(module)
    pipe = _stand_in(made_by, module)
    given = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
    try:
        # Layers are made before they get their weights; the numbers drawn then are not used.
        with _warnings() as said, torch.random.fork_rng(devices=()):
            pipe.load_lora_weights(str(path.parent), adapter_name=_NAME, **given)
            state = pipe.lora_state_dict(str(path.parent), **given)
    except Exception as error:  # diffusers and peft raise many kinds
        raise UserError(
            f"{KEY}: {path} can't be put into a {type(module).__name__}; is it a LoRA of another "
            f"model? {_first(error)}"
        ) from error
    _refuse_unused(path, module, state[0] if isinstance(state, tuple) else state)
    if said:
        raise UserError(f"{KEY}: {path} would not be used as it is: {said[0]}; convert it")
    pipe.fuse_lora(components=["transformer"], lora_scale=lora.scale, adapter_names=[_NAME])
    pipe.unload_lora_weights()
    if _shapes(module) != shapes:
        raise UserError(
            f"{KEY}: {path} changes the shapes of weights, as control LoRAs do, which is another "
            "model; leave it out"
        )
    module.requires_grad_(False).eval()
    complete.refuse_incomplete(module, f"{KEY}: {path}, fused with scale {lora.scale:g}")


def _stand_in(made_by: type, module: nn.Module) -> Any:
    """A pipeline of a class that has the transformer alone, whatever its component's name is."""
    own = {
        "__init__": lambda self: None,
        "components": property(lambda self: {"transformer": module}),
        "hf_device_map": None,
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")),
    }
    pipe = type(made_by.__name__, (made_by,), own)()
    vars(pipe)["transformer"] = module
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


def _refuse_unused(path: Path, module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError unless the module holds each of a LoRA's tensors, and they do something."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import get_peft_model_state_dict

    prefix = "transformer."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if own and not any("lora_A" in name or "lokr_" in name for name in own):
        own = convert_unet_state_dict_to_peft(own)
    held = get_peft_model_state_dict(module, adapter_name=_NAME) if own else {}
    left = [name for name in state if not name.startswith(prefix)]
    left += [prefix + name for name in own.keys() - held.keys() if not name.endswith(".alpha")]
    if left:
        shown = ", ".join(repr(name)[:200] for name in sorted(left)[:_SHOWN])
        others = sorted({name.split(".")[0] for name in left} - {"transformer"})
        raise UserError(
            f"{KEY}: {path} holds {len(left)} tensors ({shown}{', ...' * (len(left) > _SHOWN)}) "
            f"for which the {type(module).__name__} has no place"
            + (f"; only transformers are fused, not {', '.join(others)}" if others else "")
            + "; leave them out of the file, or fuse it yourself, save the pipeline with "
            "save_pretrained, and give that folder (teacher.path)"
        )
    if not any(tensor.any() for name, tensor in held.items() if "lora_A" not in name):
        raise UserError(f"{KEY}: {path} changes nothing: it is zero; give one that was trained")


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _first(error: Exception) -> str:
    """The beginning of an error's text."""
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__
