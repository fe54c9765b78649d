"""The config's `pipeline` mapping against the signature of the pipeline's call.

Reads neither torch nor diffusers, so that Snakefiles can import it: what can't work is refused
before any weight is loaded.
"""

import difflib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ppcl.errors import UserError
from ppcl.settings import Settings, TeacherSettings
from ppcl.teacher import hub, prompts, signatures
from ppcl.teacher.signatures import Parameter, Signature

# What a call gets from the workflow, and where a person sets it.
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
_NEEDED = ("prompt", "generator", "output_type")
_NUMBERED = "skip_guidance_layers"  # numbers of blocks

# Pictures that a pipeline can't do without, and neither more nor fewer, where annotations that say
# the same elsewhere say otherwise.
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
# Words in the name of a pipeline that uses the transformer of the pipeline without them as it is.
# Not `Control` alone and `Fill`: their transformers take the picture as further channels.
_VARIATIONS = r"ControlNet|Inpaint(ing)?|Img2Img|VideoToVideo|PAG"

_COUNT = re.compile(r"(num_\w+|(\w+_)?(height|width|length)|layers|resolution|max_area|frame_rate)")
_OPTIONAL = re.compile(r"\bNone\b|\bOptional\b")


def check(settings: Settings, source: str) -> None:
    """Checks the `pipeline` mapping and the prompts files against a local teacher's pipeline.

    Raises:
        UserError: see `refuse_call`; names the config.
    """
    if hub.is_name(settings.teacher.path):
        return  # the programs do it once its index is there
    for stage in ("record", "evaluate"):
        rows = prompts.read(getattr(settings, stage).prompts, f"{source}: {stage}.prompts")
        try:
            before_loading(settings.teacher, settings.pipeline, rows, f"{stage}.prompts")
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def before_loading(teacher: TeacherSettings, settings: Mapping, rows: list[dict], key: str) -> None:
    """What can be refused once a teacher's index is there, of all its files.

    A pipeline with code of its own is left to `refuse_call` after loading.

    Args:
        teacher: the config's `teacher` mapping.
        settings: the config's `pipeline` mapping.
        rows: of the prompts file that the config's `key` names.

    Raises:
        UserError: see `refuse_call`.
    """
    name = hub.read_index(hub.folder(teacher, only=())).get("_class_name")
    signature = signatures.of(name) if isinstance(name, str) else None
    if signature is not None:
        refuse_call(name, signature, settings)
        _refuse_lists(signature, settings)
        refuse_pictures(name, signature, bool(prompts.pictures(rows)), key)


def refuse_call(name: str, signature: Signature, settings: Mapping[str, Any]) -> None:
    """Checks that a pipeline can be called with a prompt, a seed and the config's settings.

    Args:
        name: of the pipeline's class, for messages and for what its annotations don't say.

    Raises:
        UserError: a key that the call does not have, or that isn't the config's to set; a value
            that can't be; something that the call needs and that nothing here can give it.
    """
    known = {k for k in signature.parameters if k not in OURS and _given_by_config(signature, k)}
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
    for key, value in settings.items():
        _refuse_key(name, signature, key, known)
        if (parameter := signature.parameters.get(key)) is not None:
            _refuse_value(parameter, value)


def refuse_pictures(name: str, signature: Signature, pictures: bool, key: str) -> None:
    """Checks that there are pictures if a pipeline needs them, and none if it takes none.

    Args:
        pictures: the prompts have some.
        key: of the config, that names the prompts file.

    Raises:
        UserError: otherwise.
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
    """The settings for a call with `count` prompts: what goes with each prompt is there as often,
    and YAML's 4.0 is a whole number where one is needed.

    Raises:
        UserError: a list has a value per prompt, but for another number of prompts.
    """
    return {
        key: _for_each(key, value, count)
        if value is not None and _goes_with_prompt(signature.parameters.get(key))
        else _whole(signature.parameters.get(key), value)
        for key, value in settings.items()
    }


def _whole(parameter: Parameter | None, value: Any) -> Any:
    needed = parameter is not None and _kinds(parameter) == ["int"]
    return int(value) if needed and isinstance(value, float) and value.is_integer() else value


def _refuse_lists(signature: Signature, settings: Mapping[str, Any]) -> None:
    """Which prompts come together follows from their lengths and the batch size of a stage: a list
    can't follow them."""
    for key, value in settings.items():
        several = isinstance(value, list) and any(other != value[0] for other in value[1:])
        if several and _goes_with_prompt(signature.parameters[key]):
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


def _goes_with_prompt(parameter: Parameter | None) -> bool:
    """Whether an argument may have a value per prompt."""
    if parameter is None:
        return False
    if re.fullmatch(r"(negative_)?prompt(_\d+)?", parameter.name):
        return True
    kinds = _kinds(parameter)
    return "list" in kinds and f"list[{kinds[0]}]" in _plain(parameter)


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
        what = "a picture" if _is_picture(signature.parameters[key]) else "a tensor"
        raise UserError(
            f"config key 'pipeline.{key}' of {name} is {what}, which a config can't hold; remove "
            "the key"
        )


def _refuse_value(parameter: Parameter, value: Any) -> None:
    key, kinds = f"pipeline.{parameter.name}", _kinds(parameter)
    shown = json.dumps(value, default=str)
    if parameter.name == _NUMBERED and value:
        raise UserError(
            f"{key} is {shown}, numbers of blocks, which would be other blocks after pruning; "
            "remove the key"
        )
    if re.fullmatch(r"num_\w+_per_prompt", parameter.name):
        if value != 1 or isinstance(value, bool):
            raise UserError(
                f"{key} is {shown}, but every sample is one prompt with one seed; leave it out, "
                "and for more samples of a prompt raise record.samples and evaluate.samples"
            )
        return
    if value is None:
        number = bool(kinds) and set(kinds) <= {"int", "float"}
        if number and parameter.default is not None and not _optional(parameter):
            raise UserError(
                f"{key} is null; leave it out for the pipeline's own default, {parameter.default}"
            )
        return
    if value == [] and (_goes_with_prompt(parameter) or parameter.name in ("sigmas", "timesteps")):
        raise UserError(f"{key} is an empty list; leave it out for the pipeline's own default")
    numbers = value if isinstance(value, list) else [value]
    listed = _lists_alone(parameter, value)
    if listed or not _fits(value, kinds):
        hint = ""
        if isinstance(value, str) and _number(value) is not None:
            hint = (
                "; it is text: write it without quotes, with a point before an e (1.0e-3), in a "
                "config file (--config makes all nested values text)"
            )
        words = dict.fromkeys(_WORDS[kind] for kind in kinds)
        allowed = "a list" if listed else ", ".join(words)
        raise UserError(f"{key} is {shown}; allowed: {allowed}{hint}")
    if "int" in kinds and "float" not in kinds and _COUNT.fullmatch(parameter.name):
        if any(isinstance(number, (int, float)) and number < 1 for number in numbers):
            raise UserError(f"{key} is {shown}; it must be 1 or more")
        if any(isinstance(number, float) and not number.is_integer() for number in numbers):
            raise UserError(f"{key} is {shown}; it must be a whole number")
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UserError(f"{key} is {shown}; it must be finite")


_WORDS = {
    "int": "a number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


def _fits(value: Any, kinds: list[str]) -> bool:
    """Whether a value of the config is of one of the types that an annotation names."""
    if not kinds:
        return True
    if isinstance(value, list):
        # An annotation of text alone does not say that a list of texts works as well.
        many = "list" in kinds or "tuple" in kinds or "str" in kinds
        inner = [kind for kind in kinds if kind not in ("list", "tuple")]
        return many and all(_fits(entry, inner) for entry in value)
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, (int, float)):
        return "int" in kinds or "float" in kinds
    return ("dict" if isinstance(value, dict) else "str") in kinds


def _lists_alone(parameter: Parameter, value: Any) -> bool:
    """Whether a value is no list, and its type is only that of a list's entries."""
    if isinstance(value, list) or not _fits(value, _kinds(parameter)):
        return False
    outer, count = _plain(parameter), 1
    while count:
        outer, count = re.subn(r"\b(list|[Tt]uple)\[[^\[\]]*\]", r"\1", outer)
    kinds = _kinds(replace(parameter, annotation=outer))
    listed = isinstance(parameter.default, (list, tuple, type(None)))
    return listed and bool({"list", "tuple"} & set(kinds)) and not _fits(value, kinds)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(parameter: Parameter) -> str:
    """An annotation with today's names: `list[str]` for `typing.List[str]`."""
    return re.sub(r"typing\.", "", parameter.annotation).replace("List[", "list[")


def _kinds(parameter: Parameter) -> list[str]:
    """The types of an annotation that a config can hold, in order; none if it names others too."""
    named = re.findall(r"[A-Za-z_][\w.]*", _plain(parameter).replace("Dict[", "dict["))
    if "dict" in named:
        return ["list", "dict"] if "list" in named else ["dict"]  # of whatever
    plain = [word for word in named if word not in ("None", "Optional", "Union", "Tuple")]
    plain += ["tuple"] if "Tuple" in named else []
    tensors = [word for word in plain if re.fullmatch(r"torch\.(\w*Tensor)", word)]
    rest = [word for word in plain if word not in tensors]
    return list(dict.fromkeys(rest)) if rest and set(rest) <= set(_WORDS) else []


def _optional(parameter: Parameter) -> bool:
    return bool(_OPTIONAL.search(parameter.annotation))


def _is_picture(parameter: Parameter) -> bool:
    """Whether an argument is a picture, a mask or a video."""
    named = re.fullmatch(
        r"((\w+_)?(image|images|video|videos|mask)|mask_(image|video)|conditions|controls)",
        parameter.name,
    )
    held = named and "attention" not in parameter.name and "embeds" not in parameter.name
    return bool(held or re.search(r"Image|Video", parameter.annotation)) and not _kinds(parameter)


def _given_by_config(signature: Signature, key: str) -> bool:
    """Whether an argument is of a kind that a config can hold."""
    parameter = signature.parameters[key]
    # FLUX.2 annotates an embedding as text.
    if re.search(r"(^|_)(latents|embeds)(_|$)", key) or _is_picture(parameter):
        return False
    foreign = re.search(r"Tensor|Callable|ndarray", parameter.annotation)
    return not foreign or bool(_kinds(parameter))


def _needed(name: str, signature: Signature) -> list[str]:
    """What a pipeline can't do without: a picture's annotation without None means that too."""

    def needed(parameter: Parameter) -> bool:
        if parameter.required:
            return True
        if name in PICTURES:
            return parameter.name in PICTURES[name]
        picture = _is_picture(parameter) and "latents" not in parameter.name
        return picture and bool(parameter.annotation) and not _optional(parameter)

    return [key for key, parameter in signature.parameters.items() if needed(parameter)]


def _instead(name: str) -> str:
    """Which pipeline of the same transformer can be recorded, if there is one."""
    plain = re.sub(_VARIATIONS, "", name)
    signature = signatures.of(plain)
    if plain == name or signature is None or set(_needed(plain, signature)) - {"image", "prompt"}:
        return "choose a pipeline that makes pictures or videos of prompts alone"
    return (
        f"its transformer is that of {plain}: save it as one "
        f"({plain}.from_pretrained(...).save_pretrained(...)) and set teacher.path to that"
    )
