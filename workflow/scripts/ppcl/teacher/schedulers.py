"""A teacher's scheduler with some keys of its config changed (`teacher.scheduler`).

Imports nothing heavy at its top, so that Snakefiles can import it.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.settings import TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import argument_values, hub, signatures

NAME = "scheduler"  # the pipeline's component
KEY = "teacher.scheduler"
CONFIG = "scheduler_config.json"
_CLASS = "_class_name"


def changed(teacher: TeacherSettings, folder: Path) -> dict[str, Any]:
    """For `from_pretrained` of a pipeline: its scheduler, if the teacher's is another than that in
    its folder; else nothing.

    Raises:
        UserError: as `check`, or the scheduler can't be made with these values.
    """
    if not teacher.scheduler:
        return {}
    import diffusers

    name, config = check(teacher, folder)
    try:
        made = getattr(diffusers, name).from_config(config)
    except Exception as error:  # classes check their arguments in their own ways
        shown = json.dumps(dict(teacher.scheduler))
        raise UserError(f"{KEY}: a {name} can't be made with {shown}: {error}") from error
    return {NAME: made}


def check(teacher: TeacherSettings, folder: Path, source: str = "") -> tuple[str, dict[str, Any]]:
    """The class of a teacher's scheduler, and its config with the teacher's changes.

    Args:
        folder: the pipeline's.
        source: begins messages.

    Raises:
        UserError: the pipeline has no scheduler; the class is none of diffusers; a key is no
            argument of it, or does not take the value.
    """
    key, parts = f"{source}{KEY}", hub.parts(folder)
    if NAME not in parts:
        raise UserError(f"{key}: {folder} has no {NAME}; leave that out")
    if not (folder / NAME / CONFIG).is_file():
        raise UserError(f"{key}: {folder / NAME} has no {CONFIG}; restore it, or leave {KEY} out")
    config = untrusted.json_object(folder / NAME / CONFIG)
    name = teacher.scheduler.get(_CLASS, parts[NAME][1])
    known = (
        signatures.of_init(name) if isinstance(name, str) and name.endswith("Scheduler") else None
    )
    if known is None:
        raise UserError(
            f"{key}.{_CLASS}: {name!r} is no scheduler of diffusers; give one, such as "
            "FlowMatchEulerDiscreteScheduler"
        )
    asked = {k: v for k, v in teacher.scheduler.items() if k != _CLASS}
    _refuse(key, name, asked, known.parameters)
    return name, {**config, **asked, _CLASS: name}


def _refuse(key: str, name: str, asked: Mapping, known: Mapping) -> None:
    """Raises UserError if a scheduler does not take a key, or its value."""
    for argument, value in asked.items():
        if argument not in known:
            close = difflib.get_close_matches(argument, sorted(known), n=1)
            hint = f"did you mean '{close[0]}'? Known" if close else "known"
            raise UserError(
                f"{key}.{argument} is not an argument of {name}; {hint}: {', '.join(sorted(known))}"
            )
        argument_values.refuse_value(known[argument], value, key)
