"""A LoRA file of the teacher as one for a pruned model: places, projections and a fit, together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.export import lora, lora_fit
from ppcl.export.lora_fit import FitOptions
from ppcl.export.lora_layers import Layer, LoraFile
from ppcl.pruning import narrow
from ppcl.pruning.narrow_layers import is_low_rank
from ppcl.transformer import blocks
from ppcl.transformer.context import Context


@dataclass(frozen=True)
class Given:
    """What is known beside the LoRA and the pruned model; all of it may be missing.

    Attributes:
        conditioning: moments of the modulations' inputs, for those of low rank.
        teacher: it and its recorded calls, to fit the LoRA on.
        options: of the fit.
    """

    conditioning: modulation.Conditioning | None = None
    teacher: Context | None = None
    options: FitOptions = FitOptions()


@dataclass(frozen=True)
class Remapped:
    """A LoRA for a pruned model.

    Attributes:
        file: it, with the reasons for what can't be used.
        lost: path in the teacher -> share that a modulation's projection loses.
        errors: of each step of the fit, none without one.
    """

    file: LoraFile
    lost: Mapping[str, float] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)


def placed(
    model: nn.Module, block_map: list[list[int]], file: LoraFile
) -> tuple[dict[str, lora.Place], dict[str, str]]:
    """As `lora.places`, with the file's own reasons. Raises UserError if nothing has a place."""
    places, gone = lora.places(model, block_map, file.layers)
    if not places:
        path, why = next(iter(gone.items()))
        raise UserError(
            f"--lora: none of its {len(gone)} layers has a place in this model: {path} {why}"
        )
    return places, file.unusable | gone


def remap(
    model: nn.Module, block_map: list[list[int]], file: LoraFile, given: Given | None = None
) -> Remapped:
    """A LoRA file for the model as it is.

    Args:
        model: the pruned one; for a fit in float32, on the device.
        block_map: new block -> the teacher's that it stands for.

    Raises:
        UserError: as `lora.places`, `lora.projected` and `lora_fit.fit`.
    """
    given = given or Given()
    places, unusable = placed(model, block_map, file)
    layers, lost = lora.projected(model, places, given.conditioning)
    errors: list[float] = []
    if given.teacher is not None:
        refuse_others(given.teacher.transformer, file)
        teacher, options = given.teacher, given.options
        layers, errors = lora_fit.fit(teacher, model, block_map, file.layers, layers, options)
    return Remapped(replace(file, layers=layers, unusable=unusable), lost, errors)


def merge(
    model: nn.Module, block_map: list[list[int]], file: LoraFile, given: Given | None = None
) -> Remapped:
    """Adds a LoRA to the model's weights, in place, modulations exactly; arguments as of `remap`.

    Raises:
        UserError: as `remap`; or a fit is wanted of layers that it can't reach.
    """
    places, unusable = placed(model, block_map, file)
    low = [path for path, place in places.items() if is_low_rank(narrow.matrix(model, place.path))]
    if given is not None and given.teacher is not None:
        if low:
            raise UserError(
                f"--merge: {low[0]} is of a modulation of low rank, which --merge makes wider and "
                "no fit can reach; leave --config or --calls out, or write a LoRA file (--output)"
            )
        made = remap(model, block_map, file, given)
    else:
        layers: dict[str, Layer] = {place.path: place.layer for place in places.values()}
        made = Remapped(replace(file, layers=layers, unusable=unusable))
    lora.merge(model, made.file.layers)
    apart = {key: "is of another component: load it beside" for key in file.others}
    return replace(made, file=replace(made.file, unusable=made.file.unusable | apart))


def refuse_others(teacher: nn.Module, file: LoraFile) -> None:
    """Raises UserError unless all layers fit the teacher."""
    identity = [[block.index] for block in blocks.block_sequence(teacher)]
    _, gone = lora.places(teacher, identity, file.layers)
    if gone:
        path, why = next(iter(gone.items()))
        raise UserError(f"--lora: {path} {why}: it is not of the teacher")
