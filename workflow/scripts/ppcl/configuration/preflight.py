"""Cheap checks, before anything runs, of what a configuration points at.

Reads neither torch nor diffusers, so that Snakefiles can import it.
"""

import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ppcl.configuration import prompt_checks, variant_checks
from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.quantisation import DTYPES, GIB, METHODS
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import schemas, untrusted
from ppcl.teacher import arguments, hub, lora_files, needed, schedulers, weights
from ppcl.transformer.registry import family_of, fixed_states


def check(settings: Settings, source: str = "config") -> None:
    """Cheap checks of what the configuration points at: teacher, prompts, possible budgets.

    Raises UserError naming the key, the file and the fix.
    """
    _check_teacher(settings.teacher, source)
    prompt_checks.check(settings, source)
    arguments.check(settings, source)
    _check_renoising(settings, source)
    _check_start(settings, source)
    for stage in _trainings(settings):
        size = getattr(settings, stage).batch_size
        if settings.processes != "auto" and settings.processes > size:
            raise UserError(
                f"{source}: processes is {settings.processes}, but {stage}.batch_size only "
                f"{size}, and every process needs a sample; raise one or lower the other"
            )
    if settings.teacher.dtype == "float16" and settings.trains and settings.subsets.steps:
        raise UserError(
            f"{source}: teacher.dtype is float16, in which the gradients of subsets vanish on "
            f"their way through the teacher; set it to bfloat16 or float32, or subsets.steps to 0"
        )
    _check_optimizers(settings, source)
    sequential = settings.trains and settings.distill.mode == "sequential"
    if sequential and settings.distill.shards != 1:
        raise UserError(
            f"{source}: distill.mode is sequential, in which students learn from those before "
            "them, so they can't be shared out; set distill.shards to 1, or mode to independent"
        )
    searched = settings.intervals.enabled and settings.intervals.tolerance == "bootstrap"
    if searched and not settings.similarity.bootstrap:
        raise UserError(
            f"{source}: intervals.tolerance is bootstrap, the noise that resamples show, but "
            "similarity.bootstrap is 0; set tolerance to a number, or bootstrap to 2 or more"
        )
    if sequential and settings.distill.cache_inputs == "always":
        raise UserError(
            f"{source}: distill.mode is sequential, which runs all of the teacher anyway; set "
            "distill.cache_inputs to auto or never, or mode to independent"
        )
    if settings.finetune.cpu_offload and settings.finetune.sharding == "none":
        raise UserError(
            f"{source}: finetune.cpu_offload is of use with finetune.sharding: fsdp alone; set "
            "that too (one process is enough), or leave cpu_offload out"
        )
    _check_offload(settings, source)
    variant_checks.check_quantised(settings, source)
    kinds = [
        name for name in ("intervals", "width", "modulation") if getattr(settings, name).enabled
    ]
    if not kinds:
        raise UserError(
            f"{source}: intervals, width and modulation all have enabled: false, so nothing can be "
            "pruned; set one of them to true"
        )
    if kinds[0] == "width" and not settings.choose.closed_forms:
        raise UserError(
            f"{source}: choose.closed_forms is false, so variants take the linear maps that the "
            "search for intervals took, but intervals.enabled is false: there is none; set one of "
            "them to true"
        )
    blocks, total = _parameters(settings.teacher)
    try:
        constraints.of_config(settings, len(blocks) or None)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    _check_budgets(settings, blocks, total, source)


def least_fraction(settings: Settings, source: str) -> float:
    """The least share of a local teacher's parameters that pruning can leave; 0 on the Hub."""
    blocks, total = _parameters(settings.teacher)
    return _least(settings, blocks, total, source)[1] / total if blocks else 0.0


def _check_renoising(settings: Settings, source: str) -> None:
    """Raises UserError if pictures of a local teacher are to be noised again and can't be."""
    teacher, count = settings.teacher, settings.record.renoised_per_sample
    if not count or hub.is_name(teacher.path):
        return
    index = hub.read_index(_folder(teacher))
    pipeline, transformer = str(index["_class_name"]), str(index[hub.component(teacher)][1])
    if why := fixed_states(transformer, pipeline):
        raise UserError(
            f"{source}: record.renoised_per_sample is {count}, but pictures of a {pipeline} can't "
            f"be noised again ({why}); set it to 0"
        )


def _check_start(settings: Settings, source: str) -> None:
    """Raises UserError if prune.start is solved, but a local teacher's blocks can't be refitted."""
    teacher = settings.teacher
    if settings.prune.start != "solved" or hub.is_name(teacher.path):
        return
    name = str(hub.read_index(_folder(teacher))[hub.component(teacher)][1])
    family = family_of(name)
    if family is None or not family.gated:
        raise UserError(
            f"{source}: prune.start is solved, but the family registry names no linears of a "
            f"{name} that could be refitted (workflow/scripts/ppcl/transformer/families.py); set "
            "it to first"
        )


def check_results(run: str, source: str = "config") -> None:
    """Raises UserError if a file is where a folder of the run's results has to be."""
    folders = {path.split("/")[0] for path in schemas.ARTIFACTS}
    run_folder = Path("results", run)
    for folder in (run_folder.parent, run_folder, *map(run_folder.joinpath, sorted(folders))):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(
                f"{source}: run: {folder} has to be a folder, and is none; choose another name for "
                "the run, or move that away"
            )


def _check_budgets(settings: Settings, blocks: list[int], total: int, source: str) -> None:
    """Raises UserError if no budget prunes anything, or if one can't be met.

    Args:
        blocks: parameters of every block of a local teacher, in ascending order; empty if unknown.
        total: parameters of its transformer.
    """
    given_budgets = [each["budget"] for each in settings.given["variants"] if "of" not in each]
    size = DTYPES[settings.teacher.dtype]
    whole = {"parameters": total, "blocks": len(blocks), "gib": size * total / GIB}
    if not any(_prunes(variant.budget, whole) for variant in settings.pruned):
        raise UserError(
            f"{source}: variants: a budget of {given_budgets[0]} prunes nothing; lower one of them"
        )
    if not blocks:
        return
    fewest, least = _least(settings, blocks, total, source)
    for variant, given in zip(settings.pruned, given_budgets, strict=True):
        for kind, value in variant.budget.items():
            left = {"fraction": least / total, "parameters": least, "blocks": fewest}.get(kind, 0)
            if kind == "gib":  # no less than this, whatever else is stored with the weights
                method = METHODS.get(variant.quantise or "")
                left = least * min(method.per_value if method else size, size) / GIB
            if value >= left:
                continue
            shown = f"{left:.3f} of this teacher's parameters"
            if kind == "gib":
                shown = f"{left:.4g} GiB"
            elif kind != "fraction":
                shown = f"{left:,} of this teacher's {kind}"
            why = "even the fewest students in place of all unprotected blocks leave"
            longer = "raise sensitivity.longest or " * (settings.intervals.cost == "velocity")
            fix = f"{longer}lower intervals.protect_first and protect_last"
            if not settings.intervals.enabled:
                why = "without depth pruning, the least that closed forms leave is"
                fix = "set intervals.enabled: true"
            raise UserError(
                f"{source}: variants: budget {given} of '{variant.name}' is "
                f"impossible: {why} {shown}; choose a larger budget, or {fix}"
            )


def _prunes(budget: Mapping[str, float], whole: Mapping[str, float]) -> bool:
    """Whether a budget asks for less than the whole teacher; it may, if that is unknown (0)."""
    return any(
        value < whole.get(kind, 1) or not whole.get(kind, 1) for kind, value in budget.items()
    )


def _trainings(settings: Settings) -> list[str]:
    """The stages that train, by their keys."""
    stages = ["distill", "subsets"] if settings.trains else []
    return stages + (["finetune"] if any(v.finetune_steps for v in settings.variants) else [])


def _check_optimizers(settings: Settings, source: str) -> None:
    """Raises UserError if 8-bit moments are asked for where there can be none."""
    for stage in _trainings(settings):
        if getattr(settings, stage).optimizer != "adamw8bit":
            continue
        if find_spec("bitsandbytes") is None:
            raise UserError(
                f"{source}: {stage}.optimizer is adamw8bit, which needs the package bitsandbytes; "
                f"install it (pip install bitsandbytes), or set {stage}.optimizer to adamw"
            )
        if stage == "finetune" and getattr(settings, stage).sharding == "fsdp":
            raise UserError(
                f"{source}: finetune.optimizer is adamw8bit, which can't take weights that are "
                "shared out; set finetune.optimizer to adamw, or finetune.sharding to none"
            )


def _check_offload(settings: Settings, source: str) -> None:
    """Raises UserError if gradients would have to pass through a streamed teacher."""
    trained = settings.trains and settings.subsets.steps
    if settings.teacher.offload == "stream" and trained:
        raise UserError(
            f"{source}: teacher.offload is stream, but gradients of subsets pass through the "
            "teacher, which needs all its weights on the device; set subsets.steps to 0, or "
            "teacher.offload to none, model or auto"
        )


def _folder(teacher: TeacherSettings) -> Path:
    return Path(teacher.path) / (teacher.subfolder or "")


def _check_teacher(teacher: TeacherSettings, source: str) -> None:
    path = teacher.path
    if hub.is_name(path):
        lora_files.check_local(teacher, source)
        return  # only the download can check the rest
    folder, component = _folder(teacher), hub.component(teacher)
    if not folder.exists():
        raise UserError(
            f"{source}: teacher.path: {folder} does not exist; give the folder of a diffusers "
            f"pipeline or the name of a repository on the Hub (owner/name)"
        )
    index, index_path = hub.read_index(folder, f"{source}: teacher.path"), folder / hub.INDEX
    hub.refuse_strange(folder, f"{source}: teacher.path")
    parts = hub.parts(folder)
    transformers = [name for name, (_, made_as) in parts.items() if "Transformer" in made_as]
    if "_class_name" not in index or not (component in parts or transformers):
        raise UserError(
            f"{source}: teacher.path: {index_path} names no {component}; only pipelines whose "
            f"denoiser is a transformer can be pruned"
        )
    if component not in parts:
        raise UserError(
            f"{source}: teacher.component: {index_path} names no {component}; set it to one of "
            f"{', '.join(transformers)}"
        )
    family = family_of(parts[component][1])
    for name, made_as in index.items():
        place = folder if name == "_class_name" else folder / name
        beside = isinstance(made_as, list) and (place / f"{made_as[0]}.py").is_file()
        if beside and not teacher.trust_remote_code:
            raise UserError(
                f"{source}: teacher.path: {place} brings code of its own ({made_as[0]}.py), as a "
                "pruned transformer with narrow blocks does; if you trust it, set "
                "teacher.trust_remote_code: true"
            )
    weights.check_variant(folder, parts, teacher.variant, source)
    lora_files.check(teacher, folder, source)
    if teacher.scheduler:
        schedulers.check(teacher, folder, f"{source}: ")
    key = f"{source}: teacher.path"
    held = weights.check(folder, parts, teacher.variant, key, component)[component]
    needed.refuse_missing(folder, parts, key)
    known = untrusted.json_object(folder / component / weights.CONFIG)
    for listed in family.lists if family else ():
        names = [name for header in held.values() for name in header]
        stored = len({_block(name, listed.attribute) for name in names} - {None})
        if listed.depth_key in known and known[listed.depth_key] != stored:
            raise UserError(
                f"{key}: {folder / component / weights.CONFIG}: {listed.depth_key} is "
                f"{str(known[listed.depth_key])[:100]}, but the weights are of {stored} blocks "
                f"({listed.attribute}); restore the config that they were saved with"
            )


def _block(weight: str, lists: str) -> tuple[str, int] | None:
    """List and number of the block that a weight is of; None if it is of no block.

    lists: regular expression of the names of the block lists.
    """
    match = re.match(rf"({lists})\.([0-9]{{1,6}})\.", weight)
    return (match[1], int(match[2])) if match else None


def _parameters(teacher: TeacherSettings) -> tuple[list[int], int]:
    """Parameters of every block of a local teacher, ascending, and of its whole transformer, from
    the safetensors headers alone."""
    blocks: dict[tuple[str, int], int] = {}
    total = 0
    part = hub.component(teacher)
    folder = _folder(teacher) / part
    if not folder.is_dir():
        return [], 0  # on the Hub
    library, made_as = hub.parts(_folder(teacher))[part]
    family = family_of(made_as)
    names = "|".join(listed.attribute for listed in family.lists) if family else r"\w*blocks"
    for header in weights.headers(folder, library, teacher.variant).values():
        for name, entry in header.items():
            count = math.prod(entry["shape"])
            total += count
            if key := _block(name, names):
                blocks[key] = blocks.get(key, 0) + count
    return sorted(blocks.values()), total


def _least(settings: Settings, blocks: list[int], total: int, source: str) -> tuple[int, int]:
    """The fewest blocks and parameters that pruning can leave: a lower bound.

    All unprotected blocks become as few students as possible: one, or with measured costs one for
    every sensitivity.longest blocks (or for the longest required interval, if that is longer).
    Without intervals.enabled they all stay. How much of a narrow block stays is not known here, so
    it counts as 0 parameters: with width.enabled, each unprotected block; with modulation.enabled,
    every block.

    Raises UserError if fewer than two blocks are unprotected.
    """
    intervals = settings.intervals
    protected = intervals.protect_first + intervals.protect_last
    if protected > len(blocks) - 2:
        raise UserError(
            f"{source}: intervals: protect_first and protect_last keep {protected} of this "
            f"teacher's {len(blocks)} blocks, which leaves nothing to prune; lower them"
        )
    measured = intervals.cost == "velocity"
    longest = settings.sensitivity.longest if measured else len(blocks)
    longest = max([longest, *(last - first + 1 for first, last in intervals.require)])
    students = math.ceil((len(blocks) - protected) / longest)
    if not intervals.enabled:
        students = len(blocks) - protected
    whole = protected if settings.width.enabled else protected + students
    whole = 0 if settings.modulation.enabled else whole
    return protected + students, total - sum(blocks[whole:])
