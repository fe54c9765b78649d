"""Checks of a config's variants that a schema can't make.

Needs no torch.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from ppcl.errors import UserError
from ppcl.pruning.quantisation import METHODS
from ppcl.settings import Settings

# Keys of pruning and training, of which a quantised copy of another variant has none, and what
# they are where they say nothing.
OWN = {"budget": None, "train": True, "finetune_steps": 0, "finetune_data": None}


def check(variants: Sequence[Mapping], given: Sequence[Mapping], source: str) -> None:
    """Checks the variants of a config that fits the schema.

    Args:
        variants: with their defaults.
        given: as they were written.
        source: names the config in messages.

    Raises:
        UserError: names a variant, its key and the fix.
    """
    names = [variant["name"] for variant in variants]
    by_name = dict(zip(names, variants, strict=True))
    for variant, written in zip(variants, given or variants, strict=True):
        name, where = variant["name"], f"{source}: variants: '{variant['name']}'"
        if names.count(name) > 1:
            raise UserError(f"{source}: variants: the name '{name}' is used twice; rename one")
        if "of" in variant:
            _check_copy(variant, written, by_name, where)
        elif "budget" not in variant:
            raise UserError(
                f"{where} has no budget; give it one, or, to quantise another variant, its name "
                "(of) and quantise"
            )
        elif variant["finetune_steps"] and not variant["train"]:
            raise UserError(
                f"{where} has train: false, so nothing of it is trained, but finetune_steps is "
                f"{variant['finetune_steps']}; set that to 0, or leave train out"
            )
        elif "finetune_data" in variant and not variant["finetune_steps"]:
            raise UserError(
                f"{where} has finetune_data, but finetune_steps is 0, so nothing is trained on "
                "it; raise finetune_steps, or leave finetune_data out"
            )


def _check_copy(
    variant: Mapping, written: Mapping, by_name: Mapping[str, Mapping], where: str
) -> None:
    """Of a variant that is another one, quantised."""
    of = variant["of"]
    if own := [key for key, plain in OWN.items() if written.get(key, plain) != plain]:
        raise UserError(
            f"{where} is a quantised copy of '{of}', but has {own[0]}; leave that out (it is as "
            f"for '{of}'), or leave out of: a variant with a budget may be quantised, too"
        )
    if "quantise" not in variant:
        raise UserError(
            f"{where} is of '{of}', but has no quantise, so it would be the same; add quantise: "
            "int8, or leave it out"
        )
    if of == variant["name"]:
        raise UserError(f"{where} is of itself; name the variant that is to be quantised")
    if of not in by_name:
        known = ", ".join(name for name, one in by_name.items() if "of" not in one)
        raise UserError(
            f"{where} is of '{of}', of which there is no variant; name one of {known or 'none'}"
        )
    parent = by_name[of]
    if {"of", "quantise"} & parent.keys():
        raise UserError(
            f"{where} is of '{of}', which is quantised itself; name the variant that it is made "
            "of as it was before"
        )


def check_quantised(settings: Settings, source: str) -> None:
    """Raises UserError if a variant is quantised by what is not here, or can't run as asked for."""
    for variant in settings.variants:
        if variant.quantise is None:
            continue
        method, which = METHODS[variant.quantise], f"{source}: variants: '{variant.name}'"
        if find_spec(method.package) is None:
            raise UserError(
                f"{which} has quantise: {variant.quantise}, which needs the package "
                f"{method.package}; install it (pip install {method.package}=={method.version}), "
                "or leave quantise out"
            )
        if method.cuda and settings.device in ("cpu", "mps"):
            raise UserError(
                f"{which} has quantise: {variant.quantise}, which diffusers runs on CUDA alone, "
                f"but device is {settings.device}; set quantise to int8, or device to cuda"
            )
        if settings.teacher.offload != "none":
            raise UserError(
                f"{which} has quantise: {variant.quantise}, but teacher.offload is "
                f"{settings.teacher.offload}, and quantised weights have to stay on the device; "
                "set teacher.offload to none, or leave quantise out"
            )
