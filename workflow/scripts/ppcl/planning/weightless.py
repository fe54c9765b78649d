"""A teacher without weights: its stock class on the meta device, and what is plugged into it.

The class is built from its config alone. Variants come from the code that prunes, so their counts
are exact.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from huggingface_hub import constants, get_session, try_to_load_from_cache
from torch import nn

from ppcl.closed_forms import linear_map_candidates, linear_maps, modulation
from ppcl.errors import UserError
from ppcl.planning import footprint
from ppcl.pruning import constraints, narrow, students
from ppcl.pruning.units import Matrix, Unit, new_blocks_of, units_of
from ppcl.settings import ModulationSettings, Settings, TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import hub
from ppcl.transformer import blocks, diffusers_model, registry

# AdamW keeps two moments of each parameter: in float32, or in a byte each, with a float32 scale for
# so many of them (bitsandbytes). The step that it keeps of each tensor is not counted.
BITS_8_BLOCK = 256


class _Config(ConfigMixin):
    """Reads the config of a model of any class."""

    config_name = "config.json"  # type: ignore[assignment]  # None there, for each class to set


def _from_hub(teacher: TeacherSettings, place: str) -> dict:
    """The config of a component of a pipeline on the Hub, and nothing else of it."""
    name, file, revision = teacher.path, f"{place}/{_Config.config_name}", teacher.revision
    try:
        if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            # Asked once: a download would try for half a minute without a network.
            get_session().head(constants.ENDPOINT, timeout=hub.PATIENCE)
        config = _Config.load_config(name, subfolder=place, revision=revision)
        return config  # type: ignore[return-value]  # a dict, as unused keys are not asked for
    except Exception as error:  # offline, no such repository, no token: of many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"teacher.path: {name}: its {file} can't be had from the Hub ({reason[0]}); without a "
            "network, give a local folder, or a config.json as forecast.transformer_config"
        ) from error


def architecture(teacher: TeacherSettings, path: str | None) -> tuple[dict, str]:
    """The config of the transformer that the forecast is of, and where it is from.

    Args:
        teacher: the config's `teacher`.
        path: the config's `forecast.transformer_config`.

    Raises:
        UserError: there is no such file, it is no config, or the Hub can't be reached.
    """
    place = "/".join(filter(None, (teacher.subfolder, hub.component(teacher))))
    key, file = "forecast.transformer_config", Path(path or "")
    if path is None:
        if hub.is_name(teacher.path):
            return _from_hub(teacher, place), f"{teacher.path}/{place}"
        key, file = "teacher.path", Path(teacher.path, place, _Config.config_name)
    try:
        config = untrusted.json_object(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{key}: {file} can't be read ({error.strerror}); give the config.json of a "
            "transformer as forecast.transformer_config"
        ) from error
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if not isinstance(config.get("_class_name"), str):
        raise UserError(f"{key}: {file} is not the config of a model (it has no _class_name)")
    return config, str(file)


def on_meta(config: Mapping, dtype: torch.dtype, where: str) -> nn.Module:
    """The transformer of a config, frozen, without weights.

    What its class keeps in float32 is float32, as after `from_pretrained`.

    Raises:
        UserError: diffusers has no such class, it can't be made of this config, or it can't be
            pruned.
    """
    import diffusers

    name = registry.today(config["_class_name"], config)
    made_by: Any = getattr(diffusers, name, None)
    if not (isinstance(made_by, type) and issubclass(made_by, ModelMixin)):
        raise UserError(
            f"{where}: diffusers {diffusers.__version__} has no model {name}; only its own "
            "classes can be planned"
        )
    try:
        with footprint.META:
            made = diffusers_model.class_of(made_by).from_config(dict(config))
    except Exception as error:  # whatever a constructor makes of odd values
        raise UserError(f"{where}: {name} can't be made of this config: {error}") from error
    blocks.family(made)
    kept: Sequence[str] = () if dtype == torch.float32 else made_by._keep_in_fp32_modules or ()
    for path, parameter in made.named_parameters():
        if not any(part in path.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    for path, buffer in made.named_buffers():
        if buffer.is_floating_point() and not any(part in path.split(".") for part in kept):
            buffer.data = buffer.data.to(dtype)
    return made.requires_grad_(False).eval()


def selection(
    settings: Settings,
    transformer: nn.Module,
    intervals: Iterable[tuple[int, int]] | None = None,
    narrower: tuple[list[tuple[int, int]], list[tuple[int, str]]] | None = None,
) -> tuple[list[Unit], list[Unit]]:
    """Units of depth alone, and of depth and width: detected ones, or else those that are required.

    Args:
        intervals: detected ones, if there are.
        narrower: detected text runs and linear FFNs, if there are.

    Raises:
        UserError: requirements that this teacher can't meet, or blocks that it lacks.
    """
    sequence = blocks.block_sequence(transformer)
    required, _ = constraints.of_config(settings, len(sequence))
    ffns = {
        (new_block.first, stream)
        for unit in linear_map_candidates.ffn_candidates(transformer)
        for new_block in unit.new_blocks
        for stream in new_block.linear_ffn
    }
    constraints.check(
        required,
        constraints.Prunable(
            blocks.seams(transformer),
            blocks.untouchable(transformer),
            (),
            ffns,
            linear_map_candidates.text_sizes(transformer)["text_saved"]
            if required.runs
            else [0] * len(sequence),
            {block for block, _ in matrices(settings, transformer)},
            linear_maps.unread_after(transformer),
        ),
    )
    if not settings.intervals.enabled:
        intervals = ()
    chosen = sorted(required.intervals if intervals is None else intervals)
    runs, linear = narrower or (sorted(required.runs), sorted(required.ffns))
    ends = [*(last for _, last in (*chosen, *runs)), *(block for block, _ in linear)]
    if max(ends, default=0) >= len(sequence):
        raise UserError(
            f"the selection names block {max(ends)}, but this teacher has {len(sequence)}: it is "
            "of another teacher; delete intervals.parquet and width/candidates.parquet"
        )
    every = units_of(chosen, runs, linear, linear_maps.unread_after(transformer))
    return units_of(chosen), every


def new_blocks(
    transformer: nn.Module, units: Iterable[Unit], dtype: torch.dtype | None = None
) -> students.Students:
    """The new blocks of units, as narrow as selected, without weights.

    dtype: of their parameters; None for the teacher's.
    """
    sequence = blocks.block_sequence(transformer)
    made = {}
    for new_block in new_blocks_of(units):
        whole = copy.deepcopy(sequence[new_block.first].module)
        made[new_block] = students.shaped(
            transformer, new_block, whole.to(dtype) if dtype else whole
        )
    return made


def plugged(transformer: nn.Module, made: students.Students) -> tuple[nn.Module, list[list[int]]]:
    """The teacher with new blocks in place of its own, and its block map."""
    return blocks.assembled(
        transformer, {new_block.ends: module for new_block, module in made.items()}
    )


def ranks_on_offer(options: ModulationSettings) -> list[int]:
    """The ranks that the config's `modulation` offers to matrices; none if it is not enabled."""
    if not options.enabled:
        return []
    return sorted(options.ladder) if options.rank == "auto" else [options.rank]


def matrices(settings: Settings, transformer: nn.Module) -> dict[Matrix, list[int]]:
    """Every modulation matrix that may become low rank, and the ranks on offer that it can have."""
    offered, forbidden = ranks_on_offer(settings.modulation), settings.modulation.forbid
    ranks_of = {
        matrix.key: [rank for rank in offered if rank <= min(matrix.inputs, matrix.outputs)]
        for matrix in modulation.matrices(transformer)
        if matrix.block not in forbidden
    }
    return {key: ranks for key, ranks in ranks_of.items() if ranks}


def low_rank(
    model: nn.Module, block_map: list[list[int]], ranks: Mapping[Matrix, int]
) -> nn.Module:
    """A model without weights, with matrices of low rank: those in `ranks` that it still has."""
    depth, every = block_map[-1][-1] + 1, blocks.block_sequence(model)
    kept = {old[0]: block.module for old, block in zip(block_map, every, strict=True)}

    def has(matrix: Matrix) -> bool:
        block, path = matrix
        return block == depth or (block in kept and bool(narrow.held(kept[block], path)))

    return modulation.shaped(model, block_map, {m: rank for m, rank in ranks.items() if has(m)})


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def optimizer_bytes(parameters: int, kind: str, ema: float = 0.0) -> int:
    """Bytes that `adamw` or `adamw8bit` keeps of so many parameters, and an average of them if its
    decay is not 0."""
    average = 4 * parameters if ema else 0
    if kind == "adamw":
        return 2 * 4 * parameters + average
    return 2 * (parameters + 4 * math.ceil(parameters / BITS_8_BLOCK)) + average
