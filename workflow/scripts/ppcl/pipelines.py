"""Loading stock pipelines and transformers, and running them on prompts."""

import inspect
import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

from ppcl import blocks, devices
from ppcl.errors import UserError
from ppcl.families import family_of

log = logging.getLogger(__name__)


def load(
    teacher: dict,
    device: torch.device,
    without: tuple[str, ...] = (),
    key: str = "teacher.path",
) -> DiffusionPipeline:
    """A teacher's pipeline, on a device, in evaluation mode, with progress bars off.

    Args:
        teacher: the config's `teacher` mapping.
        without: components that are not needed and not loaded, such as `text_encoder`.
        key: what names the folder in messages, for a pipeline that is not the teacher.

    Raises:
        UserError: not a pipeline, not reachable, damaged weights, or a family we can't prune.
    """
    path = teacher["path"]
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path,
            revision=teacher["revision"],
            variant=teacher["variant"],
            dtype=devices.dtype(teacher["dtype"]),
            trust_remote_code=teacher["trust_remote_code"],
            **dict.fromkeys(without),
        )
    except Exception as error:  # diffusers raises many kinds; all mean "can't load this folder"
        raise UserError(
            f"{key}: {path} can't be loaded as a diffusers pipeline: {error}"
        ) from error
    if getattr(pipe, "transformer", None) is None:
        raise UserError(f"{key}: {path} is a {type(pipe).__name__} without a transformer")
    blocks.family(pipe.transformer)
    refuse_incomplete(pipe.transformer, f"{path}/transformer")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_transformer(
    teacher: dict, device: torch.device, key: str = "teacher.path"
) -> torch.nn.Module:
    """The teacher's transformer alone, frozen and in evaluation mode; arguments as in `load`."""
    path = teacher["path"]
    try:
        index = DiffusionPipeline.load_config(path, revision=teacher["revision"])
    except OSError as error:
        raise UserError(f"{key}: {path} is not a diffusers pipeline: {error}") from error
    library, name = index.get("transformer") or (None, None)
    if library == "diffusers":
        family_of(name)
    elif not (name and teacher["trust_remote_code"]):
        raise UserError(
            f"{key}: {path}: its transformer is not a class of diffusers; if its code is beside "
            "its weights and you trust it, set trust_remote_code: true"
        )
    options = {"subfolder": "transformer", "revision": teacher["revision"]}
    import diffusers

    try:
        made_by = getattr(diffusers, name) if library == "diffusers" else code_beside(teacher)
        transformer = made_by.from_pretrained(
            path, variant=teacher["variant"], dtype=devices.dtype(teacher["dtype"]), **options
        )
    except Exception as error:
        raise UserError(f"{key}: {path}/transformer can't be loaded: {error}") from error
    blocks.family(transformer)
    refuse_incomplete(transformer, f"{path}/transformer")
    return transformer.requires_grad_(False).eval().to(device)


def code_beside(teacher: dict) -> type:
    """The transformer's class from the code beside its weights, which the caller trusts."""
    path, revision = teacher["path"], teacher["revision"]
    library, name = DiffusionPipeline.load_config(path, revision=revision)["transformer"]
    return get_class_from_dynamic_module(
        path,
        f"{library}.py",
        class_name=name,
        trust_remote_code=True,
        subfolder="transformer",
        revision=revision,
    )


def refuse_incomplete(module: torch.nn.Module, where: str) -> None:
    """diffusers only warns about missing weights and leaves meta tensors: stop instead.

    Raises:
        UserError: a parameter is missing, or holds NaN or infinity.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"{where}: the weight '{name}' is missing; its config and files disagree"
            )
        if not torch.isfinite(parameter).all():
            raise UserError(f"{where}: the weight '{name}' holds NaN or infinity")


def call_arguments(pipe: DiffusionPipeline, settings: dict[str, Any]) -> dict[str, Any]:
    """Checks the config's `pipeline` keys against the pipeline's own signature.

    Raises:
        UserError: a key is no argument of this pipeline, or one that the workflow sets itself.
    """
    ours = {"prompt", "generator", "output_type", "callback_on_step_end", "return_dict", "latents"}
    known = set(inspect.signature(pipe.__call__).parameters) - ours
    for key in settings:
        if key not in known:
            raise UserError(
                f"config key 'pipeline.{key}' is not an argument of {type(pipe).__name__}; "
                f"known: {', '.join(sorted(known))}"
            )
    return settings


def sample_prompts(rows: list[dict], samples: int, seed: int) -> list[tuple[int, str, int]]:
    """(prompt index, prompt, noise seed) per sample: prompts in turn, a new seed each time."""
    return [(i % len(rows), rows[i % len(rows)]["prompt"], seed + i) for i in range(samples)]


def in_batches(pipe: DiffusionPipeline, items: list[dict], size: int) -> list[list[dict]]:
    """Items of like prompt length together: less padding, which costs time and needs a mask.

    Args:
        items: each with its `prompt` and its number, `sample`, which orders items of one length.
        size: most items in a batch.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        lengths = {item["prompt"]: len(item["prompt"]) for item in items}
    else:
        lengths = {item["prompt"]: len(tokenizer(item["prompt"]).input_ids) for item in items}
    groups: dict[int, list[dict]] = {}
    for item in sorted(items, key=lambda item: (lengths[item["prompt"]], item["sample"])):
        groups.setdefault(lengths[item["prompt"]], []).append(item)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def run(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    **more: Any,
):
    """Runs the stock pipeline; an image depends on its prompt and seed, not on its batch.

    Noise is drawn on the CPU, so a seed gives the same start on every device. A string
    `negative_prompt` is repeated for the batch.
    """
    arguments = dict(call_arguments(pipe, settings))
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return pipe(prompt=prompts, generator=generators, **arguments, **more)
