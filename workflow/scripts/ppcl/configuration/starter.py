"""A first config for a model of one's own, from the configs of its pipeline. No torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ppcl.configuration import config, default_sizes, preflight, starter_text
from ppcl.errors import UserError
from ppcl.settings import Settings, TeacherSettings
from ppcl.teacher import arguments, hub, signatures
from ppcl.transformer.family import Family
from ppcl.transformer.registry import family_of

# Budgets of the two variants; the key says whether nothing is trained.
BUDGETS = {False: (0.7, 0.55), True: (0.75, 0.65)}


def write(
    teacher: dict,
    output: Path,
    run: str | None = None,
    calibration: str | None = None,
    evaluation: str | None = None,
    free: bool = False,
) -> None:
    """Writes a config for a teacher; the config passes the checks that are made before a run.

    Args:
        teacher: as the config's `teacher`, without dtype and offload.
        output: the config file, .yaml or .yml.
        run: name of the run; None takes the file's, without its ending.
        calibration, evaluation: prompts files; None takes those of the repository.
        free: nothing is trained: closed forms alone.

    Raises:
        UserError: `output` exists or has another ending; the teacher is no pipeline, or can't be
            pruned; its pipeline needs pictures, and not both prompts files are given.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output: {output} is to be a config file; let it end in .yaml")
    if output.exists():
        raise UserError(f"--output: {output} is there already; name another file, or remove it")
    path = os.path.expanduser(teacher["path"])
    teacher = teacher | {"path": path.rstrip("/") if hub.is_name(path.rstrip("/")) else path}
    given = teacher, run or output.stem, calibration, evaluation, free
    config.complete({"run": given[1], "teacher": teacher}, str(output))  # bad names
    text = made(*given)
    settings = Settings.of(config.complete(yaml.safe_load(text), str(output)))
    least = preflight.least_fraction(settings, str(output))
    if least > BUDGETS[free][-1] - 0.05:  # BUDGETS are out of reach, or nearly
        text = made(*given, budgets=[round(least + (1 - least) * part, 3) for part in (0.6, 0.3)])
        settings = Settings.of(config.complete(yaml.safe_load(text), str(output)))
    preflight.check(settings, str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"--output: {output} was written just now by another") from error


def made(
    teacher: dict,
    run: str,
    calibration: str | None = None,
    evaluation: str | None = None,
    free: bool = False,
    budgets: Sequence[float] | None = None,
) -> str:
    """The text of a config for a teacher. Raises UserError as `write` does.

    Args:
        budgets: of the variants `plugged` and `tuned`, or of `large` and `small` if `free`; None
            takes BUDGETS.
    """
    budgets = budgets or BUDGETS[free]
    source = TeacherSettings.of(teacher)
    folder, part = _folder(source), hub.component(source)
    index = hub.read_index(folder)
    pipeline = str(index.get("_class_name"))
    transformer = str((index.get(part) or [None])[-1])
    if "Transformer" not in transformer:
        known = [name for name, kind in index.items() if "Transformer" in str(kind)]
        raise UserError(
            f"--component: {teacher['path']}, a {pipeline}, has no {part} that is a transformer; "
            f"transformers in it: {', '.join(known) or 'none, so that it cannot be pruned'}"
        )
    family, shape = (
        family_of(transformer),
        default_sizes.component_config(folder / part / "config.json"),
    )
    signature = signatures.of(pipeline)
    if signature is None:
        raise UserError(
            f"--teacher: {teacher['path']} is a {pipeline}, which is no pipeline of diffusers' "
            "own: write its config by hand, as config/README.md tells"
        )
    if not (calibration and evaluation):
        arguments.refuse_pictures(pipeline, signature, False, "--calibration and --evaluation")
    model = starter_text.Model(
        pipeline,
        transformer,
        family,
        signature,
        folder,
        part,
        width=channels(shape),
        depth=sum(_depths(family, shape)),
    )
    if free and not any(model.closed_forms):
        raise UserError(
            f"--free: of a {transformer} nothing has a closed form (docs/families.md); leave "
            "--free out, so that blocks go and students are trained"
        )
    return starter_text.text(model, teacher, run, (calibration, evaluation), free, budgets)


def channels(shape: Mapping) -> int:
    """Channels of a token, from the config of a transformer of any class."""

    def held(*names: str) -> int | None:
        counts = (shape[name] for name in names if type(shape.get(name)) is int)
        return next((count for count in counts if 0 < count <= default_sizes.LARGEST), None)

    heads, size = held("num_attention_heads", "num_heads"), held("attention_head_dim")
    width = held("hidden_size", "inner_dim", "dim") or (heads or 1) * (size or 64)
    return min(width, default_sizes.LARGEST)


def _depths(family: Family | None, shape: Mapping) -> list[int]:
    keys = [listed.depth_key for listed in family.lists] if family else ["num_layers"]
    return [shape[key] for key in keys if isinstance(shape.get(key), int)]


def _folder(teacher: TeacherSettings) -> Path:
    """The pipeline's folder; for a teacher on the Hub, one with its configs, which are fetched."""
    path, subfolder = teacher.path, teacher.subfolder or ""
    if not hub.is_name(path):
        return hub.folder(teacher, "--teacher")
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{name}".lstrip("/") for name in (hub.INDEX, "*/config.json")]
    try:
        root = snapshot_download(path, revision=teacher.revision, allow_patterns=wanted)
    except Exception as error:  # of many kinds: no network, no such repository, no token
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--teacher: {path} is no folder here, and the Hub does not give its configs "
            f"({reason}); check the name, accept its terms and set HF_TOKEN, or give a folder"
        ) from error
    return Path(root) / subfolder
