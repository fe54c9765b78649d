"""Checks that a model got all of its weights, and that its files hold no others.

Loaders only warn: they draw missing weights at random, and drop weights for which the config has no
place. The check reads the loader's own account (`output_loading_info`), which knows tied weights,
renamed keys and weights that may be absent.
"""

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ppcl.errors import UserError
from ppcl.runtime import devices
from ppcl.storage import untrusted
from ppcl.teacher import weights
from ppcl.teacher.weights import Header

SHOWN = 3  # weights that a message names
SAMPLED = 64  # values of each weight that are compared to see if it changed after loading
_loaded: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, torch.Tensor]]
_loaded = weakref.WeakKeyDictionary()


@contextmanager
def accounts() -> Iterator[list[tuple[torch.nn.Module, Mapping[str, Any]]]]:
    """Yields a list, to which every model that is loaded within the context is added, with its
    loader's account (`output_loading_info`).

    `DiffusionPipeline.from_pretrained` calls `from_pretrained` of its components without asking for
    their accounts.
    """
    told: list[tuple[torch.nn.Module, Mapping[str, Any]]] = []
    bases = {
        b: vars(b)["from_pretrained"] for b in (diffusers.ModelMixin, transformers.PreTrainedModel)
    }
    for base, stock in bases.items():
        telling = _telling(base, stock, told)
        base.from_pretrained = telling  # type: ignore[method-assign,assignment]  # until the end
    try:
        yield told
    finally:
        for base, stock in bases.items():
            base.from_pretrained = stock  # type: ignore[method-assign]  # as it was


def _telling(base: type, stock: classmethod, told: list) -> classmethod:
    """A `from_pretrained` for `base` that also adds the model and its account to `told`."""
    # transformers' own refusal of a wrong shape names no weight; diffusers' does.
    more = {"ignore_mismatched_sizes": True} if base is transformers.PreTrainedModel else {}

    def from_pretrained(cls: type, folder: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
        try:
            model, account = stock.__func__(
                cls, folder, *arguments, **options | more | {"output_loading_info": True}
            )
        except Exception as error:
            raise RuntimeError(f"{Path(folder).name}: {error}") from error
        told.append((model, account))
        if base is diffusers.ModelMixin:
            _loaded[model] = _samples(model)
        return model

    return classmethod(from_pretrained)


def _samples(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> some values of that weight, evenly spaced, on the CPU."""
    every = {
        f"{name}/{number}" if number else name: part.detach().flatten()
        for name, parameter in model.named_parameters()
        for number, part in enumerate(devices.plain(parameter))
        if not part.is_meta
    }
    return {n: p[:: max(1, len(p) // SAMPLED)].to("cpu", copy=True) for n, p in every.items()}


def as_loaded(model: torch.nn.Module) -> None:
    """Takes a model's present weights as those that were loaded: what else every stage does to
    them after loading is done."""
    _loaded[model] = _samples(model)


def changed(model: torch.nn.Module) -> list[str]:
    """Names of a model's weights that have changed since `accounts` saw it load. A pipeline with
    code of its own may have fused an adapter with them."""
    now = _samples(model)
    return [
        name
        for name, before in _loaded.get(model, {}).items()
        if name in now and not torch.equal(before.to(now[name].dtype), now[name])
    ]


def check(
    model: torch.nn.Module,
    account: Mapping[str, Any],
    folder: Path,
    files: Mapping[Path, Header],
) -> None:
    """Refuses a model whose files are not exactly its weights.

    Args:
        account: of its loader (`output_loading_info`).
        folder: of the component.
        files: the component's files and headers, from `weights.check`.

    Raises:
        UserError: weights are missing, left over, of another shape, not stored as real numbers, or
            NaN or infinite.
    """
    where = next(iter(files)) if len(files) == 1 else folder
    config = folder / weights.CONFIG
    if missing := account["missing_keys"]:
        raise UserError(
            f"{where}: lacks {_some(missing)}, which the {folder.name} has by its config.json; "
            "restore the weights, or the config that they were saved with"
        )
    if wrong := sorted(account["mismatched_keys"]):
        name, stored, asked = wrong[0]
        raise UserError(
            f"{where}: the weight '{name}' of the {folder.name} is {list(stored)}, but "
            f"{list(asked)} by its config.json ({len(wrong)} of other shapes); restore the "
            "weights, or the config that they were saved with"
        )
    # Quantised weights are stored as integers, beside scales, which no place in the model has.
    if getattr(model, "hf_quantizer", None) is None:
        left = account["unexpected_keys"]
        if odd := _of_no_other(model, left, config):
            place = next((file for file in files if set(odd) & files[file].keys()), where)
            raise UserError(
                f"{place}: holds {_some(odd)}, for which the {folder.name} has no place by its "
                "config.json, so they would be ignored; restore the config that they were saved "
                "with, or load the right model and save it again with save_pretrained"
            )
        _refuse_integers(model, files, left)
    refuse_incomplete(model, str(folder))


def _of_no_other(model: torch.nn.Module, names: Collection[str], config: Path) -> list[str]:
    """Unexpected weights that the other parts of a larger model do not explain, sorted.

    A text encoder is often one part of the model that its config names, and the file also holds the
    head, the decoder or the vision tower. Weights of these are explained; those under the name of a
    part that the encoder has itself are not.

    Args:
        names: of all unexpected weights.
        config: the component's config.json.
    """
    made_of = untrusted.json_object(config).get("architectures")
    larger = isinstance(made_of, list) and type(model).__name__ not in made_of
    if not larger or not isinstance(model, transformers.PreTrainedModel):
        return sorted(names)
    own = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    prefix = f"{model.base_model_prefix}."
    firsts = lambda n: {n.split(".")[0], n.removeprefix(prefix).split(".")[0]}  # noqa: E731
    return sorted(name for name in names if firsts(name) & own)


def _refuse_integers(
    model: torch.nn.Module, files: Mapping[Path, Header], left: Collection[str]
) -> None:
    """Raises UserError if a weight is stored as anything but real numbers, such as integers of a
    quantisation that loaders do not know: they would convert it as if it held the values."""
    buffers = {name.split(".")[-1] for name, _ in model.named_buffers()}
    for file, header in files.items():
        for name, entry in header.items():
            real = entry["dtype"].startswith(("F", "BF"))
            if not real and name not in left and name.split(".")[-1] not in buffers:
                raise UserError(
                    f"{file}: the weight '{name}' is stored as {entry['dtype']}, not as real "
                    "numbers; give the model as it was before it was quantised or packed"
                )


def _some(names: Collection[str]) -> str:
    """For messages: how many weights these are, and the names of the first."""
    shown = ", ".join(repr(str(name))[:200] for name in sorted(names)[:SHOWN])
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({shown}{more})"


def refuse_incomplete(module: torch.nn.Module, where: str) -> None:
    """Refuses a model with a missing weight, or with a weight that is not finite.

    Raises:
        UserError: a parameter or buffer is missing; a parameter holds NaN or infinity.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise UserError(
                f"{where}: the weight '{name}' is missing; its config and files disagree"
            )
    parts = ((n, part) for n, p in module.named_parameters() for part in devices.plain(p))
    for name, part in parts:
        # The extremes cost a sixtieth of isfinite's time, and no copy; float8 has neither.
        if part.is_floating_point() and part.itemsize > 1 and part.numel():
            extremes = torch.stack(torch.aminmax(part.detach()))
            if not torch.isfinite(extremes).all():
                raise UserError(f"{where}: the weight '{name}' holds NaN or infinity")
