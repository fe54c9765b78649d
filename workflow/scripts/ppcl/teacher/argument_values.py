"""Which values an argument of a pipeline's call takes, as far as its annotation and name tell.

Imports neither torch nor diffusers, so that Snakefiles can import it.
"""

import json
import math
import re
from dataclasses import replace
from typing import Any

from ppcl.errors import UserError
from ppcl.teacher.signatures import Parameter, Signature

_NUMBERED = "skip_guidance_layers"  # numbers of blocks
_COUNT = re.compile(r"(num_\w+|(\w+_)?(height|width|length)|layers|resolution|max_area|frame_rate)")
_OPTIONAL = re.compile(r"\bNone\b|\bOptional\b")


def goes_with_prompt(parameter: Parameter | None) -> bool:
    """Whether an argument may have a value per prompt."""
    if parameter is None:
        return False
    if re.fullmatch(r"(negative_)?prompt(_\d+)?", parameter.name):
        return True
    kinds = kinds_of(parameter)
    return "list" in kinds and f"list[{kinds[0]}]" in _plain(parameter)


def refuse_value(parameter: Parameter, value: Any, section: str = "pipeline") -> None:
    """Raises UserError if the argument does not take the config's value.

    section: of the config, which has the argument's name as a key; for messages.
    """
    key, kinds = f"{section}.{parameter.name}", kinds_of(parameter)
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
        if number and parameter.default is not None and not optional(parameter):
            raise UserError(
                f"{key} is null; leave it out for the pipeline's own default, {parameter.default}"
            )
        return
    if value == [] and (goes_with_prompt(parameter) or parameter.name in ("sigmas", "timesteps")):
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
    """Whether a value is given alone where the argument takes only a list of such values."""
    if isinstance(value, list) or not _fits(value, kinds_of(parameter)):
        return False
    outer, count = _plain(parameter), 1
    while count:
        outer, count = re.subn(r"\b(list|[Tt]uple)\[[^\[\]]*\]", r"\1", outer)
    kinds = kinds_of(replace(parameter, annotation=outer))
    listed = isinstance(parameter.default, (list, tuple, type(None)))
    return listed and bool({"list", "tuple"} & set(kinds)) and not _fits(value, kinds)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(parameter: Parameter) -> str:
    """The annotation in present syntax: `list[str]` for `typing.List[str]`."""
    return re.sub(r"typing\.", "", parameter.annotation).replace("List[", "list[")


def kinds_of(parameter: Parameter) -> list[str]:
    """The types in an annotation, in order, if a config can hold all of them but tensors; else an
    empty list. With a dict, whose entries may be anything, only `list` and `dict` are named."""
    named = re.findall(r"[A-Za-z_][\w.]*", _plain(parameter).replace("Dict[", "dict["))
    if "dict" in named:
        return ["list", "dict"] if "list" in named else ["dict"]  # of whatever
    plain = [word for word in named if word not in ("None", "Optional", "Union", "Tuple")]
    plain += ["tuple"] if "Tuple" in named else []
    tensors = [word for word in plain if re.fullmatch(r"torch\.(\w*Tensor)", word)]
    rest = [word for word in plain if word not in tensors]
    return list(dict.fromkeys(rest)) if rest and set(rest) <= set(_WORDS) else []


def optional(parameter: Parameter) -> bool:
    """Whether the argument's type allows None."""
    return bool(_OPTIONAL.search(parameter.annotation))


def is_picture(parameter: Parameter) -> bool:
    """Whether an argument is a picture, a mask or a video."""
    named = re.fullmatch(
        r"((\w+_)?(image|images|video|videos|mask)|mask_(image|video)|conditions|controls)",
        parameter.name,
    )
    held = named and "attention" not in parameter.name and "embeds" not in parameter.name
    return bool(held or re.search(r"Image|Video", parameter.annotation)) and not kinds_of(parameter)


def given_by_config(signature: Signature, key: str) -> bool:
    """Whether an argument is of a kind that a config can hold."""
    parameter = signature.parameters[key]
    # FLUX.2 annotates an embedding as text.
    if re.search(r"(^|_)(latents|embeds)(_|$)", key) or is_picture(parameter):
        return False
    foreign = re.search(r"Tensor|Callable|ndarray", parameter.annotation)
    return not foreign or bool(kinds_of(parameter))
