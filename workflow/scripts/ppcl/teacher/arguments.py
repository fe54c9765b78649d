"""Checks the config's `pipeline` mapping against the signature of the pipeline's call, before any
weight is loaded.

Imports neither torch nor diffusers, so that Snakefiles can import it.
"""

import difflib
import dis
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from ppcl.errors import UserError
from ppcl.settings import Settings, TeacherSettings
from ppcl.teacher import argument_values, hub, prompts, signatures
from ppcl.teacher.signatures import Parameter, Signature

# Arguments that the workflow gives to a call -> why, or where the user can set them.
OURS = {
    "prompt": "from the prompts files (record.prompts, evaluate.prompts)",
    "image": "name the picture of every prompt in a column 'image' of the prompts file (.csv)",
    "generator": "every sample has a seed of its own, which follows from the config's seed",
    "seed": "every sample has a seed of its own, which follows from the config's seed",
    "output_type": "recording needs latents, and evaluation pictures",
    "return_dict": "recording and evaluation read the result by name",
    "callback": "recording counts the steps with it",
    "callback_steps": "recording counts the steps with it",
    "callback_on_step_end": "recording counts the steps with it",
    "callback_on_step_end_tensor_inputs": "recording reads the latents from it",
}
_SCHEDULES = ("sigmas", "timesteps")  # of a call, in place of a number of steps
_NEEDED = ("prompt", "generator", "output_type")

# Pipeline -> exactly the pictures that it needs, for pipelines whose annotations are misleading.
PICTURES = {
    "Flux2KleinInpaintPipeline": ("image", "mask_image"),
    "Flux2KleinKVPipeline": (),
    "Flux2KleinPipeline": (),
    "Flux2Pipeline": (),
    "FluxFillPipeline": ("image", "mask_image"),
    "FluxKontextInpaintPipeline": ("image", "mask_image"),
    "FluxKontextPipeline": (),
    "HunyuanImageRefinerPipeline": ("image",),
    "CogVideoXFunControlPipeline": ("control_video",),
    "LTXConditionPipeline": (),
    "QwenImageEditInpaintPipeline": ("image", "mask_image"),
    "QwenImageEditPipeline": ("image",),
    "QwenImageEditPlusPipeline": ("image",),
    "QwenImageLayeredPipeline": ("image",),
    "ZImageOmniPipeline": (),
}
# Modules of diffusers that check the arguments of a pipeline's call.
_CHECKING = (
    "diffusers.image_processor",
    "diffusers.pipelines.",
    "diffusers.schedulers.",
    "diffusers.video_processor",
)
# If a pipeline's name has one of these words, it uses the same transformer as the pipeline whose
# name lacks the word. `Control` alone and `Fill` are not among them: the transformers of such
# pipelines take the picture as further channels.
_VARIATIONS = r"ControlNet|Inpaint(ing)?|Img2Img|VideoToVideo|PAG"


def check(settings: Settings, source: str) -> None:
    """Checks the `pipeline` mapping and the prompts files against a local teacher's pipeline.

    Raises:
        UserError: see `refuse_call`; names the config.
    """
    if hub.is_name(settings.teacher.path):
        return  # the programs check it, once they have downloaded its index
    for stage in ("record", "evaluate"):
        rows = prompts.read(getattr(settings, stage).prompts, f"{source}: {stage}.prompts")
        try:
            before_loading(settings.teacher, settings.pipeline, rows, f"{stage}.prompts")
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def before_loading(teacher: TeacherSettings, settings: Mapping, rows: list[dict], key: str) -> None:
    """Checks a call of the teacher's pipeline, for which only model_index.json must be there.

    A pipeline with code of its own is checked by `refuse_call` after loading.

    Args:
        teacher: the config's `teacher` mapping.
        settings: the config's `pipeline` mapping.
        rows: of the prompts file.
        key: the config key that names the prompts file, for messages.

    Raises:
        UserError: see `refuse_call`.
    """
    name = hub.read_index(hub.folder(teacher, only=())).get("_class_name")
    if isinstance(name, str) and (signature := signatures.of(name)) is not None:
        refuse_call(name, signature, settings)
        _refuse_lists(signature, settings)
        refuse_pictures(name, signature, bool(prompts.pictures(rows)), key)


def refuse_call(name: str, signature: Signature, settings: Mapping[str, Any]) -> None:
    """Checks that a pipeline can be called with a prompt, a seed and the config's settings.

    Args:
        name: of the pipeline's class, for messages and for PICTURES.
        settings: the config's `pipeline` mapping.

    Raises:
        UserError: a key is no argument of the call, or not for the config to set; the argument does
            not take the value; or the call needs an argument that nothing here can give.
    """
    given = {k for k in signature.parameters if argument_values.given_by_config(signature, k)}
    known = given - OURS.keys()
    absent = [key for key in _NEEDED if key not in signature.parameters]
    if absent and not signature.open:
        raise UserError(
            f"teacher.path: a {name} can't be recorded: its call takes no {absent[0]}; choose a "
            "pipeline that makes pictures or videos of prompts"
        )
    for key in _needed(name, signature):
        if key not in known and key not in OURS:
            raise UserError(
                f"teacher.path: a {name} can't be recorded: its call needs {key}, which neither "
                f"the config nor the prompts files can give; {_instead(name)}"
            )
        if key in known and key not in settings:
            raise UserError(f"pipeline.{key}: {name} can't do without it; set it")
    _refuse_steps(settings)
    for key, value in settings.items():
        _refuse_key(name, signature, key, known)
        if (parameter := signature.parameters.get(key)) is not None:
            argument_values.refuse_value(parameter, value)


def steps_asked(settings: Mapping[str, Any], default: int) -> int:
    """Denoising steps that a call takes: as many as it is given sigmas or timesteps.

    Args:
        settings: the config's `pipeline` mapping.
        default: the pipeline's own number of steps.
    """
    for key in _SCHEDULES:
        if isinstance(given := settings.get(key), list):
            return len(given)
    return int(settings.get("num_inference_steps", default))


def _refuse_steps(settings: Mapping[str, Any]) -> None:
    """Raises UserError if a call is given two schedules, or two numbers of steps: pipelines would
    silently take one."""
    given = [key for key in _SCHEDULES if settings.get(key) is not None]
    if len(given) > 1:
        raise UserError(
            f"pipeline.{given[0]} and pipeline.{given[1]} both give a schedule; leave one out"
        )
    count = settings.get("num_inference_steps")
    for key in given:
        if isinstance(settings[key], list) and count is not None and count != len(settings[key]):
            raise UserError(
                f"pipeline.num_inference_steps is {count}, but pipeline.{key} has "
                f"{len(settings[key])} values, a step for each; set it to that, or leave it out"
            )


def refuse_pictures(name: str, signature: Signature, pictures: bool, key: str) -> None:
    """Checks that there are pictures if a pipeline needs them, and none if it takes none.

    Args:
        name: of the pipeline's class.
        pictures: whether the prompts name pictures.
        key: the config key that names the prompts file, for messages.

    Raises:
        UserError: a picture is missing, or the pipeline takes none.
    """
    if pictures and "image" not in signature.parameters:
        raise UserError(
            f"{key}: the prompts file has a column 'image', but {name} takes no picture; remove "
            "the column, or choose a pipeline that edits pictures (teacher.path)"
        )
    if not pictures and "image" in _needed(name, signature):
        raise UserError(
            f"{key}: {name} takes a picture besides the prompt, and the prompts name none; name "
            "the picture of every prompt in a column 'image' of the prompts file (.csv)"
        )


def for_batch(signature: Signature, settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The settings for a call with `count` prompts: values that go with each prompt are repeated as
    often, and a float such as YAML's 4.0 becomes an integer if the argument needs one.

    Raises:
        UserError: a list has a value per prompt, but for another number of prompts.
    """
    return {
        key: _for_each(key, value, count)
        if value is not None and argument_values.goes_with_prompt(signature.parameters.get(key))
        else _whole(signature.parameters.get(key), value)
        for key, value in settings.items()
    }


def refused_by(pipeline: type, error: BaseException) -> bool:
    """Whether a `raise` statement in the code of a pipeline, its scheduler or its processors made
    this error, as their checks of arguments do, and not one of its models."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    stock = place.tb_frame.f_globals.get("__name__", "").startswith(_CHECKING)
    its_own = code.co_filename == getattr(sys.modules[pipeline.__module__], "__file__", None)
    return (stock or its_own) and code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _whole(parameter: Parameter | None, value: Any) -> Any:
    needed = parameter is not None and argument_values.kinds_of(parameter) == ["int"]
    return int(value) if needed and isinstance(value, float) and value.is_integer() else value


def _refuse_lists(signature: Signature, settings: Mapping[str, Any]) -> None:
    """Raises UserError for lists with a value per prompt: batches follow from the prompts' lengths
    and a stage's batch size, so values would go to other prompts than meant."""
    for key, value in settings.items():
        several = isinstance(value, list) and any(other != value[0] for other in value[1:])
        if several and argument_values.goes_with_prompt(signature.parameters[key]):
            raise UserError(
                f"pipeline.{key}: a list of {len(value)}, but batches are made of prompts of like "
                "length, in other numbers and another order; give one value, which every prompt "
                "gets"
            )


def _for_each(key: str, value: Any, count: int) -> Any:
    if isinstance(value, str):
        return [value] * count
    if not isinstance(value, list):
        return value
    if value and all(other == value[0] for other in value[1:]):
        return value[:1] * count
    if len(value) != count:
        raise UserError(
            f"pipeline.{key}: a list of {len(value)} for a batch of {count} prompts; give one "
            "value, which every prompt gets"
        )
    return value


def _refuse_key(name: str, signature: Signature, key: str, known: Collection[str]) -> None:
    if key in OURS:
        raise UserError(
            f"config key 'pipeline.{key}' is set by the workflow: {OURS[key]}; remove the key"
        )
    if key not in signature.parameters:
        if signature.open and signatures.of(name) is None:
            return
        close = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f"did you mean '{close[0]}'? Known" if close else "known"
        raise UserError(
            f"config key 'pipeline.{key}' is not an argument of {name}; {hint}: "
            f"{', '.join(sorted(known))}"
        )
    if key not in known:
        what = "a picture" if argument_values.is_picture(signature.parameters[key]) else "a tensor"
        raise UserError(
            f"config key 'pipeline.{key}' of {name} is {what}, which a config can't hold; remove "
            "the key"
        )


def _needed(name: str, signature: Signature) -> list[str]:
    """Names of the arguments that a pipeline's call needs: those without a default, and pictures
    whose annotation does not allow None."""

    def needed(parameter: Parameter) -> bool:
        if parameter.required:
            return True
        if name in PICTURES:
            return parameter.name in PICTURES[name]
        picture = argument_values.is_picture(parameter) and "latents" not in parameter.name
        return picture and bool(parameter.annotation) and not argument_values.optional(parameter)

    return [key for key, parameter in signature.parameters.items() if needed(parameter)]


def _instead(name: str) -> str:
    """For messages: the advice to use another pipeline, of the same transformer if there is one."""
    plain = re.sub(_VARIATIONS, "", name)
    signature = signatures.of(plain)
    if plain == name or signature is None or set(_needed(plain, signature)) - {"image", "prompt"}:
        return "choose a pipeline that makes pictures or videos of prompts alone"
    return (
        f"its transformer is that of {plain}: save it as one "
        f"({plain}.from_pretrained(...).save_pretrained(...)) and set teacher.path to that"
    )
