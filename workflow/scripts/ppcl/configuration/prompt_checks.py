"""Checks, before anything runs, of the prompts that a configuration names, and of its judge.

Reads neither torch nor diffusers, so that Snakefiles can import it.
"""

import logging
import os
from pathlib import Path

from ppcl import judges
from ppcl.configuration import benchmark_checks
from ppcl.configuration.config import SCHEMA_PATH, schema
from ppcl.errors import UserError
from ppcl.settings import EvaluateSettings, RecordSettings, Settings, TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import hub, pictures
from ppcl.teacher.prompts import heldout_count, read, shown
from ppcl.transformer.registry import given_more

log = logging.getLogger(__name__)
STAGES = ("record", "evaluate")


def check(settings: Settings, source: str) -> None:
    """Raises UserError, naming the key, the file and the fix, if the prompts or the judge do not
    suit the teacher or each other; warns of what would make the numbers worth less."""
    _check_digits(settings, source)
    used = {}
    for stage in STAGES:
        key = f"{source}: {stage}.prompts"
        rows = read(getattr(settings, stage).prompts, key)
        used[stage] = [row["prompt"] for row in rows[: getattr(settings, stage).samples]]
        if stage == "evaluate":
            _check_judged(rows, settings.evaluate, source)
        _warn_of_repeats(used[stage], key)
    _check_data(settings, source)
    _check_split(used["record"], settings.record, source)
    # Prompts that differ in blanks at their ends alone are the same prompt to a reader.
    recorded = {prompt.strip() for prompt in used["record"]}
    if shared := sorted(recorded & {prompt.strip() for prompt in used["evaluate"]}):
        raise UserError(
            f"{source}: evaluate.prompts: {shown(shared[0])} is also a calibration prompt "
            "(record.prompts), so results on it would flatter; remove it from one of the two files"
        )
    benchmark_checks.check(settings, recorded, source)
    if len(set(used["evaluate"])) == 1:
        log.warning(
            "%s: evaluate.prompts: one prompt alone is evaluated, over which there are no "
            "confidence intervals; write more (a few dozen), and raise evaluate.samples",
            source,
        )


def _check_data(settings: Settings, source: str) -> None:
    """Raises UserError if the user's own pictures can't be trained on, as far as files tell."""
    tuned = [v for v in settings.variants if v.finetune_steps]
    every = {settings.finetune.for_variant(v).data for v in tuned} - {None}
    weights = settings.finetune.weights
    if every and not (weights.distillation or weights.pictures):
        raise UserError(
            f"{source}: finetune.weights are both 0, so nothing is trained; raise one of them"
        )
    for data in sorted(map(str, every)):
        pictures.listed(data, f"{source}: finetune.data")
    if not every or hub.is_name(settings.teacher.path):
        return
    folder = Path(settings.teacher.path, settings.teacher.subfolder or "")
    pipeline, parts = str(hub.read_index(folder)["_class_name"]), hub.parts(folder)
    why = given_more(pipeline)
    if "scheduler" in parts and not why:
        config = folder / "scheduler/scheduler_config.json"
        name = str(settings.teacher.scheduler.get("_class_name", parts["scheduler"][1]))
        known = untrusted.json_object(config) if config.is_file() else {}
        flow = {**known, **settings.teacher.scheduler}.get("use_flow_sigmas")
        if "FlowMatch" not in name and not flow:
            why = f"its {name} is not of flow matching"
    if why or "vae" not in parts:
        raise UserError(
            f"{source}: finetune.data: the transformer of a {pipeline} can't be trained on "
            f"pictures ({why or 'it has no vae'}); leave finetune.data out"
        )


def _check_digits(settings: Settings, source: str) -> None:
    """Raises UserError if prompts of the embedded teacher would go to another teacher. Only warns
    if that teacher has the same tokenizer, or if the embedded teacher's judge alone is used."""
    own = schema()["properties"]["teacher"]["properties"]["path"]["default"]
    # Relative to where Snakemake runs, or to where the workflow is.
    homes = [Path(own).resolve(), (SCHEMA_PATH.parents[2] / own).resolve()]
    teacher = Path(settings.teacher.path)
    if teacher.resolve() in homes:
        return
    named = [
        f"{stage}.prompts"
        for stage in STAGES
        # Unlike resolve(), realpath does not raise for a loop of links.
        if Path(os.path.realpath(getattr(settings, stage).prompts)).parent in homes
    ]
    judged = ["evaluate.judge"] if settings.evaluate.judge == "digits" else []
    if not named + judged:
        return
    fixes = [f"{key} to prompts for it" for key in named] + [f"{key}: none" for key in judged]
    text = (
        f"{source}: {', '.join(named + judged)}: made for the embedded teacher of handwritten "
        f"digits (and the default), but teacher.path is {teacher}; unless that makes such digits "
        f"too, set {', '.join(fixes)} (workflow/scripts/init.py writes a config for it)"
    )
    if named and not _same_vocabulary(settings.teacher, homes):
        raise UserError(text)
    log.warning("%s", text)


def _same_vocabulary(teacher: TeacherSettings, homes: list[Path]) -> bool:
    """Whether a local teacher has the tokenizer of the embedded one, as its remakes do."""
    if hub.is_name(teacher.path):
        return False
    name = Path("tokenizer/tokenizer.json")
    own = Path(teacher.path, teacher.subfolder or "") / name
    return own.is_file() and any(
        (home / name).is_file() and (home / name).read_bytes() == own.read_bytes() for home in homes
    )


def _check_judged(rows: list[dict[str, str]], options: EvaluateSettings, source: str) -> None:
    """Raises UserError if a prompt lacks a value that the judge compares with."""
    try:
        judges.refuse_without_facts(options.judge, rows, options.prompts)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _warn_of_repeats(prompts: list[str], key: str) -> None:
    if (different := len(set(prompts))) < len(prompts):
        log.warning(
            "%s: of %d prompts only %d differ; samples of one prompt are alike, and count as one "
            "in every split and interval",
            key,
            len(prompts),
            different,
        )
    if broken := [prompt for prompt in prompts if "\n" in prompt]:
        log.warning(
            "%s: %d prompts have line breaks in them, such as %s; if those should be several, a "
            "quote is not closed",
            key,
            len(broken),
            shown(broken[0]),
        )


def _check_split(prompts: list[str], options: RecordSettings, source: str) -> None:
    """Raises UserError if there is nothing to hold out; warns if it is too little."""
    different = len(set(prompts))
    if different < 2:
        raise UserError(
            f"{source}: record.prompts: {options.prompts} has only one prompt among the first "
            f"{len(prompts)}; calibration needs two or more, to fit on and to hold out"
        )
    count = heldout_count(different, options.heldout_fraction)
    if count < 4:
        selecting, reporting = (count + 1) // 2, count // 2
        log.warning(
            "%s: record.prompts: of %d different prompts %d are held out, %d to select blocks by "
            "and %s to report errors on%s; write more prompts (a few dozen), raise record.samples, "
            "or record.heldout_fraction",
            source,
            different,
            count,
            selecting,
            reporting or "the same",
            ", and over one prompt there are no confidence intervals" if reporting < 2 else "",
        )
