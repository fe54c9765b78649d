"""Facts of a teacher and its selection that tell what a run needs: sizes, FLOPs, shapes.

They are worked out on the meta device: the teacher and its variants have no weights
(weightless.py).
The text encoder and the autoencoder are not counted.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ppcl.closed_forms import linear_map_candidates
from ppcl.planning import footprint, weightless
from ppcl.pruning.units import Matrix, Unit, new_blocks_of, units_of
from ppcl.runtime import devices
from ppcl.settings import Settings
from ppcl.teacher import arguments
from ppcl.training import shards
from ppcl.transformer import blocks, calls, example_calls
from ppcl.transformer.family import Pipeline

log = logging.getLogger(__name__)


@dataclass
class Planner:
    """Facts of one teacher and its selection.

    Attributes:
        settings: the config.
        transformer: the teacher, on the meta device.
        depth, every: units of depth alone, and of the whole selection.
        ranks: of modulation matrices, as selected; None before there is a selection.
        example: (batch, dtype) -> arguments of a call; None if nothing tells its shapes.
        pipeline: how its stock pipeline calls it, if known.
    """

    settings: Settings
    transformer: nn.Module
    depth: list[Unit]
    every: list[Unit]
    example: Callable[[int, torch.dtype], dict[str, Any]] | None
    pipeline: Pipeline | None
    ranks: Mapping[Matrix, int] | None = None
    _kept: dict = field(default_factory=dict)

    @cached_property
    def variants(self) -> dict[str, tuple[nn.Module, list[list[int]]]]:
        """Name -> model in the teacher's dtype, and its block map; the last one is the smallest.

        `modulation`: with the ranks that are selected, else every matrix at the highest on offer.
        """
        chosen: dict[str, Sequence[Unit]] = {"teacher": []}
        if self.depth:
            chosen["depth"] = self.depth
        if any(new_block.narrow for new_block in new_blocks_of(self.every)):
            chosen["depth+width" if self.depth else "width"] = self.every
        ranks = self.ranks
        if ranks is None:
            ranks = {m: max(offered) for m, offered in self.matrices.items()}
        models = {}
        for name, taken in chosen.items():
            made = weightless.new_blocks(self.transformer, taken)
            model, block_map = models[name] = weightless.plugged(self.transformer, made)
            if ranks:
                low = "modulation" if name == "teacher" else f"{name}+modulation"
                models[low] = weightless.low_rank(model, block_map, ranks), block_map
        return models

    @cached_property
    def matrices(self) -> dict[Matrix, list[int]]:
        """Modulation matrices that may become low rank, and the ranks on offer."""
        return weightless.matrices(self.settings, self.transformer)

    @cached_property
    def least(self) -> int:
        """Parameters of the smallest model that a variant can be; 0 if intervals are still to be
        found. If variants choose among all closed forms, a model with every FFN linear and all
        modulations at their lowest rank is one of these."""
        if self.settings.intervals.enabled and not self.depth:
            return 0
        smallest = [blocks.parameter_count(model) for model, _ in self.variants.values()]
        if self.settings.choose.closed_forms:
            wanted = linear_map_candidates.ffn_candidates(self.transformer) if self.widens else []
            linear = [(unit.first, s) for unit in wanted for s in unit.new_blocks[0].linear_ffn]
            made = weightless.new_blocks(self.transformer, units_of([], linear=linear))
            model, block_map = weightless.plugged(self.transformer, made)
            ranks = {matrix: min(offered) for matrix, offered in self.matrices.items()}
            smallest.append(blocks.parameter_count(weightless.low_rank(model, block_map, ranks)))
        return min(smallest)

    @property
    def widens(self) -> bool:
        """Whether FFNs and text streams may become linear."""
        return self.settings.width.enabled

    @property
    def trains(self) -> bool:
        """Whether students are trained."""
        return bool(self.every) and self.settings.trains

    @cached_property
    def dtype(self) -> torch.dtype:
        return devices.dtype(self.settings.teacher.dtype)

    @cached_property
    def weights(self) -> int:
        """Bytes of the whole teacher."""
        return weightless.weight_bytes(self.transformer)

    @cached_property
    def offloaded(self) -> int:
        """Bytes of the teacher on the device with one block at a time: that block and the rest."""
        sizes = [weightless.weight_bytes(b.module) for b in blocks.block_sequence(self.transformer)]
        return self.weights - sum(sizes) + max(sizes)

    def flops(self, model: nn.Module) -> tuple[list[int], int] | None:
        """FLOPs of one call of a variant with a batch of one: of each block, and of all; None
        without an example call."""
        if self.example and ("flops", model) not in self._kept:
            self._kept["flops", model] = footprint.flops(model, self.example(1, self.dtype))
        return self._kept.get(("flops", model))

    def inference(self, batch: int, dtype: torch.dtype | None = None) -> int | None:
        """Peak bytes of the teacher's activations, without gradients, and its arguments; None
        without an example call.

        dtype: what it computes in, if not its own.
        """
        if self.example is None:
            return None
        dtype = dtype or self.dtype
        if (batch, dtype) not in self._kept:
            arguments, model = self.example(batch, dtype), self.transformer
            if dtype != self.dtype:  # diffusers' own `to` would warn
                model = nn.Module.to(copy.deepcopy(model), dtype)

            @torch.no_grad()
            def run():
                return model(**arguments)

            self._kept[batch, dtype] = footprint.measured(run).peak + bytes_of(arguments)
        return self._kept[batch, dtype]

    def forget_unusable(self) -> None:
        """Drops the example call, with a warning, if the transformer can't run on tensors without
        content."""
        if self.example is None:
            return
        try:
            self._look()
        except Exception as error:  # of many kinds: a value is asked for that is not there
            log.warning(
                "%s can't run without content (%s): no FLOPs and no memory of activations",
                type(self.transformer).__name__,
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            self.example = None

    @torch.no_grad()
    def _look(self) -> None:
        """Runs one call and keeps what its shapes tell: channels, answer, bytes of streams."""
        assert self.example is not None, "`_looked` asks"
        sequence = blocks.block_sequence(self.transformer)
        channels: list[dict[str, int]] = [{} for _ in sequence]
        sizes: dict[int, int] = {}

        def before(block, bound):
            sizes[block.index] = bytes_of(block.inputs(bound))

        def after(block, streams):
            channels[block.index] = {s: x.shape[-1] for s, x in streams.items()}

        with footprint.without_content(), blocks.watch(sequence, before, after) as run:
            output = run(self.transformer, self.example(1, self.dtype))[0]
        self._kept["channels"], self._kept["answer"] = channels, blocks.stacked(output)
        self._kept["streams"] = sizes

    def _looked(self) -> bool:
        """Whether a call's shapes are known; makes the example call if it was not made yet."""
        if "answer" not in self._kept and self.example is not None:
            self._look()
        return "answer" in self._kept

    def answer(self) -> int | None:
        """Bytes of a call's answer with a batch of one."""
        return self._kept["answer"].nbytes if self._looked() else None

    def batch(self, size: int, dtype: torch.dtype) -> calls.Batch | None:
        """A batch of `size` recorded calls, without content; None if nothing tells their shapes."""
        if self.example is None or not self._looked():
            return None
        answer = torch.empty(size, *self._kept["answer"].shape[1:], dtype=dtype, device="meta")
        return calls.Batch(self.example(size, dtype), answer, {}, np.arange(size))

    def streams(self, block: int) -> int | None:
        """Bytes of what a block gets as streams, with a batch of one."""
        return self._kept["streams"][block] if self._looked() else None

    def moments(self) -> list[int]:
        """Bytes of the sums that `extract` keeps for probes, float64, of every block and stream."""
        if not self.settings.compares:
            return []
        return [
            8 * (2 * channels**2 + 2 * channels + 2)
            for block in blocks.block_sequence(self.transformer)
            for channels in self.channels(block).values()
        ]

    def channels(self, block: blocks.Block) -> dict[str, int]:
        """Stream -> channels of a block; without an example call, the transformer's least width."""
        if not self._looked() and "channels" not in self._kept:
            sequence = blocks.block_sequence(self.transformer)
            shapes = [p.shape for b in sequence for p in b.module.parameters() if p.ndim == 2]
            least = min(min(shape) for shape in shapes if min(shape) > 1)
            self._kept["channels"] = [dict.fromkeys(b.list.inputs, least) for b in sequence]
        return self._kept["channels"][block.index]

    def recorded(self) -> int | None:
        """Rows of calls.parquet: of every step and branch, then the renoised ones."""
        if self.pipeline is None:
            return None
        asked, options = self.settings.pipeline, self.settings.record
        steps = arguments.steps_asked(asked, self.pipeline.steps)
        branches = 2 if example_calls.guided(self.pipeline, asked) else 1
        return options.samples * branches * (steps + options.renoised_per_sample)

    def caching(self) -> shards.Caching:
        """What keeping streams at a job's first block costs, from the rows that are recorded."""
        options, rows = self.settings.distill, self.recorded()
        if rows is None or options.mode != "independent":
            return shards.NEVER
        taught = rows * (1 - self.settings.record.heldout_fraction)
        visits = options.steps * options.batch_size
        # The expected number of distinct rows among so many draws.
        drawn = taught * (1 - (1 - 1 / max(2, taught)) ** visits)
        return shards.Caching(options.cache_inputs, min(1, drawn / visits))

    def jobs(self, units: list[Unit]) -> list[list[Unit]]:
        """The units of every job of distill."""
        return shards.assign(units, self.settings.distill.shards, self.caching())


def bytes_of(arguments: Mapping[str, Any]) -> int:
    """Bytes of all tensors among a call's arguments."""
    return sum(v.nbytes for v in tree_leaves(dict(arguments)) if isinstance(v, Tensor))
