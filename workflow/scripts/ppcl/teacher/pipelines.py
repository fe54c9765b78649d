"""Loading stock pipelines and transformers, and running them on prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from PIL import Image

from ppcl.errors import UserError
from ppcl.runtime import devices
from ppcl.settings import TeacherSettings
from ppcl.teacher import (
    arguments,
    complete,
    hub,
    loras,
    prompt_tokens,
    schedulers,
    signatures,
    steps,
    teacher_identity,
    trust,
    weights,
)
from ppcl.teacher.needed import refuse_incomplete, refuse_missing
from ppcl.transformer import blocks
from ppcl.transformer.registry import family_of


def denoiser(pipe: DiffusionPipeline, teacher: TeacherSettings) -> torch.nn.Module:
    """The transformer that is pruned: the pipeline's component that `teacher.component` names.

    Raises:
        UserError: the pipeline has no such component.
    """
    name = hub.component(teacher)
    component = getattr(pipe, name, None)
    if not isinstance(component, torch.nn.Module):
        raise UserError(
            f"teacher.component: {teacher.path} is a {type(pipe).__name__} without a {name}; "
            f"it has {', '.join(sorted(pipe.components))}"
        )
    return component


def load(
    teacher: TeacherSettings,
    device: torch.device,
    without: tuple[str, ...] = (),
    key: str = "teacher.path",
) -> DiffusionPipeline:
    """A teacher's pipeline, in evaluation mode, with progress bars off.

    It is on the device, or brought there in parts as `teacher.offload` says.

    Args:
        teacher: the config's `teacher` mapping.
        without: components that are not needed and not loaded, such as `text_encoder`.
        key: the config key that names the folder, for messages.

    Raises:
        UserError: it is no pipeline, can't be reached, has damaged weights or can't be pruned.
    """
    path, folder = teacher.path, hub.folder(teacher, key, without=without)
    if teacher.trust_remote_code:
        trust.own_modules()
    parts = hub.parts(folder, key)
    weights.check_variant(folder, parts, teacher.variant, key)
    needed = {name: made_as for name, made_as in parts.items() if name not in without}
    files = weights.check(folder, needed, teacher.variant, key, hub.component(teacher))
    refuse_incomplete(folder, {*parts, *without}, key)
    refuse_missing(folder, needed, key)
    try:
        with complete.accounts() as told:
            pipe = DiffusionPipeline.from_pretrained(
                folder,
                variant=teacher.variant,
                dtype=devices.dtype(teacher.dtype),
                trust_remote_code=teacher.trust_remote_code,
                use_safetensors=True,
                **dict.fromkeys(without) | schedulers.changed(teacher, folder),
            )
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds; all mean "can't load this folder"
        raise UserError(
            f"{key}: {path} can't be loaded as a diffusers pipeline: {error}"
        ) from error
    transformer = denoiser(pipe, teacher)
    blocks.family(transformer)
    teacher_identity.refuse_changed(teacher)
    prompt_tokens.as_published(pipe, folder)
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    devices.use_threads((w for module in modules.values() for w in module.parameters()), device)
    for name, module in modules.items():
        account = next((account for model, account in told if model is module), None)
        if account is None:  # its class has a loader of its own
            complete.refuse_incomplete(module, str(folder / name))
        else:
            complete.check(module, account, folder / name, files.get(name, {}))
    loras.fuse(teacher, folder, modules)
    pipe.set_progress_bar_config(disable=True)
    sizes = {name: devices.size(module) for name, module in modules.items()}
    how = devices.offload(teacher.offload, sizes, device)
    if how == "none":
        return pipe.to(device)
    if how == "model":
        try:
            pipe.enable_model_cpu_offload(device=device)
        except ValueError as error:  # the pipeline does not say in which order it uses them
            raise UserError(
                f"teacher.offload: model does not work with {type(pipe).__name__} ({error}); set "
                "it to none or stream"
            ) from error
        return pipe
    for module in modules.values():
        if isinstance(module, type(transformer)):
            devices.stream(module, [b.module for b in blocks.block_sequence(module)], device)
        else:
            stream_leaves(module, device)
    return pipe


def stream_leaves(module: torch.nn.Module, device: torch.device) -> None:
    """Streams any module to the device layer by layer (stock group offloading). In place."""
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def load_transformer(
    teacher: TeacherSettings,
    device: torch.device,
    key: str = "teacher.path",
    gradients: bool = False,
    compiled: bool = False,
) -> torch.nn.Module:
    """The teacher's transformer alone, frozen and in evaluation mode; arguments as in `load`.

    Its LoRAs are fused. Nothing else of the pipeline is read, or downloaded.

    Args:
        gradients: whether it will be trained, or gradients will pass through it. Then it can't be
            streamed, since autograd needs its weights to stay where they are.
        compiled: compile its blocks if the config's `teacher.compile` says so; False where it is
            timed, or compared with models that aren't compiled.

    Raises:
        UserError: as `load`; or it has to be streamed and gradients are wanted.
    """
    path, name = teacher.path, hub.component(teacher)
    where = f"{path}/{name}"
    folder = hub.folder(teacher, key, only=(name,))
    parts = hub.parts(folder, key)
    if name not in parts:
        raise UserError(f"{key}: {path} has no {name}; set teacher.component to one that it has")
    library, made_as = parts[name]
    if not hub.is_name(path):  # of one on the Hub, other components may not be downloaded
        weights.check_variant(folder, parts, teacher.variant, key)
    files = weights.check(folder, {name: parts[name]}, teacher.variant, key, name)[name]
    if library == "diffusers":
        family_of(made_as)
    elif not teacher.trust_remote_code:
        raise UserError(
            f"{key}: {path}: its {name} is not a class of diffusers; if its code is beside "
            "its weights and you trust it, set trust_remote_code: true"
        )
    variant = weights.variant_of(weights.names_in(folder / name), teacher.variant)
    try:
        stock = library == "diffusers"
        made_by: Any = getattr(diffusers, made_as) if stock else code_beside(teacher)
        transformer, account = made_by.from_pretrained(
            folder,
            subfolder=name,
            variant=variant,
            dtype=devices.dtype(teacher.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(f"{key}: {where} can't be loaded: {error}") from error
    blocks.family(transformer)
    devices.use_threads(transformer.parameters(), device)
    complete.check(transformer, account, folder / name, files)
    loras.fuse(teacher, folder, {name: transformer})
    teacher_identity.refuse_changed(teacher)
    transformer.requires_grad_(False).eval()
    if compiled and teacher.compile:
        devices.compile_blocks([b.module for b in blocks.block_sequence(transformer)])
    how = devices.offload(teacher.offload, {name: devices.size(transformer)}, device)
    if how != "stream":
        return transformer.to(device)
    if gradients:
        raise UserError(
            f"teacher.offload: {where} would be streamed, but this stage sends gradients through "
            "it, which needs all its weights on the device; set teacher.offload to none, or leave "
            "the stage out (subsets.steps: 0, finetune_steps: 0)"
        )
    devices.stream(transformer, [b.module for b in blocks.block_sequence(transformer)], device)
    return transformer


def transformer_size(teacher: TeacherSettings) -> int:
    """Bytes of the transformer's weights in the dtype in which it runs, from the files' headers."""
    name = hub.component(teacher)
    folder = hub.folder(teacher, only=(name,))
    library, _ = hub.parts(folder)[name]
    headers = weights.headers(folder / name, library, teacher.variant).values()
    count = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    return count * devices.dtype(teacher.dtype).itemsize


def code_beside(teacher: TeacherSettings) -> type:
    """The transformer's class from the code beside its weights, which the caller trusts."""
    part = hub.component(teacher)
    return trust.class_beside(hub.folder(teacher, only=(part,)), part)


def call_arguments(pipe: DiffusionPipeline, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Checks the config's `pipeline` keys against the pipeline's own signature.

    Raises:
        UserError: see `arguments.refuse_call`.
    """
    arguments.refuse_call(type(pipe).__name__, signatures.of_class(type(pipe)), settings)
    return settings


def sample_prompts(rows: list[dict], samples: int, seed: int) -> list[tuple[int, str, int]]:
    """(prompt index, prompt, noise seed) per sample: prompts in turn, a new seed each time."""
    return [(i % len(rows), rows[i % len(rows)]["prompt"], seed + i) for i in range(samples)]


def samples(rows: list[dict], count: int, seed: int) -> list[dict]:
    """`sample_prompts` as mappings: sample, prompt_index, prompt, seed; image, if rows have it."""
    return [
        {"sample": number, "prompt_index": index, "prompt": prompt, "seed": noise}
        | {key: rows[index][key] for key in ("image",) if key in rows[index]}
        for number, (index, prompt, noise) in enumerate(sample_prompts(rows, count, seed))
    ]


def in_batches(pipe: DiffusionPipeline, items: list[dict], size: int) -> list[list[dict]]:
    """Items in batches of equal prompt length, so that no prompt is padded: padding costs time and
    needs a mask. An item with a picture is a batch of its own, since pipelines differ in whether
    and how they take one picture for several prompts.

    Args:
        items: each with its `prompt` and its number, `sample`, which orders items of one length.
        size: most items in a batch.
    """
    if any("image" in item for item in items):
        return [[item] for item in sorted(items, key=lambda item: item["sample"])]
    lengths = prompt_tokens.lengths(pipe, [item["prompt"] for item in items])
    groups: dict[tuple[int, ...], list[dict]] = {}
    for item in sorted(items, key=lambda item: (lengths[item["prompt"]], item["sample"])):
        groups.setdefault(lengths[item["prompt"]], []).append(item)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def run(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: Mapping[str, Any],
    images: Sequence[str | None] | None = None,
    **more: Any,
):
    """Runs the stock pipeline; an image depends on its prompt and seed, not on its batch.

    Noise is drawn on the CPU, so a seed gives the same start on every device; what schedulers draw
    while denoising is the seed's too (`steps.seeded`). A text that goes with the prompt, such as
    `negative_prompt`, is repeated for the batch.

    Args:
        settings: the config's `pipeline` mapping.
        images: path of each prompt's picture (all the same), or None if prompts have none.

    Raises:
        UserError: a setting is no argument of this pipeline, or the pipeline refuses its value; a
            picture can't be read, the pipeline takes none, or it needs one.
    """
    signature, name = signatures.of_class(type(pipe)), type(pipe).__name__
    given = arguments.for_batch(signature, call_arguments(pipe, settings), len(prompts))
    pictures = {image for image in images or () if image is not None}
    arguments.refuse_pictures(name, signature, bool(pictures), "prompts")
    if images and pictures:
        given["image"] = _picture(images)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompt_tokens.hush(pipe)
    try:
        with torch.no_grad(), steps.seeded(pipe, generators, seeds):
            # A copy, since Z-Image's pipeline writes into the list.
            call: Any = pipe  # each class has a __call__ of its own, their base has none
            return call(prompt=list(prompts), generator=generators, **given, **more)
    except Exception as error:
        # Some pipelines do not tell whether they can do without a picture: this may be why.
        missed = isinstance(error, (TypeError, ValueError, AttributeError, UnboundLocalError))
        missed = missed and not pictures and "image" in signature.parameters
        missed = missed and name not in arguments.PICTURES
        if not missed and not arguments.refused_by(type(pipe), error):
            raise
        hint = (
            " It takes a picture besides the prompt, and got none: name the picture of every "
            "prompt in a column 'image' of the prompts file (.csv), if that is why"
        )
        raise UserError(
            f"config section 'pipeline': {name} can't work with {json.dumps(settings)}: "
            f"{error}.{hint if missed else ''}"
        ) from error


def _picture(images: Sequence[str | None]) -> Image.Image:
    """The one picture of a call."""
    image = images[0]
    if len(set(images)) > 1 or image is None:
        raise ValueError("a call of a pipeline takes one picture for all of its prompts")
    try:
        return Image.open(image).convert("RGB")
    except OSError as error:
        raise UserError(
            f"the prompts file names the image {image}, which can't be read ({error}); replace it"
        ) from error
