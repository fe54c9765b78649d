"""What a run of the ablation works with, and what a method chose."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ppcl.ablation.rivals import Starts
from ppcl.extraction import token_table
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Ends, Ffn
from ppcl.search import (
    intervals,
)
from ppcl.settings import Settings
from ppcl.storage import texts
from ppcl.training import prices
from ppcl.transformer import blocks
from ppcl.transformer.context import Context, State


@dataclass(frozen=True)
class Chosen:
    """What goes: intervals with what their students start from, text runs and linear FFNs."""

    starts: Starts
    runs: tuple[Ends, ...] = ()
    ffns: tuple[Ffn, ...] = ()


@dataclass(frozen=True)
class Material:
    """What a run of the ablation works with.

    Attributes:
        context: with the seed of this run.
        paths: of the shared artifacts: tokens, conditioning, probes, cka, sensitivity, width,
            latency.
        steps: of each phase of the method (`phases.steps_of`).
        ema: decay of the moving average of weights, if the method sets its own.
    """

    context: Context
    settings: Settings
    paths: Mapping[str, Path]
    state: State
    steps: Mapping[str, int] = field(default_factory=dict)
    ema: float | None = None

    @functools.cached_property
    def tokens(self) -> token_table.TokenReader:
        return token_table.TokenReader(self.paths["tokens"])

    @property
    def transformer(self) -> nn.Module:
        """The teacher's."""
        return self.context.transformer

    @property
    def depth(self) -> int:
        return len(blocks.block_sequence(self.transformer))

    @property
    def runs(self) -> list[range]:
        """Where intervals may lie."""
        kept = set(blocks.untouchable(self.transformer))
        kept |= constraints.protected(self.settings, self.depth)
        return intervals.spans(self.depth, blocks.seams(self.transformer), kept)

    @property
    def streams(self) -> list[str]:
        """Streams that rivals judge blocks by: without those that nothing reads after the last
        block, since the last blocks' output in them means nothing."""
        unread = blocks.family(self.transformer).unread
        return [stream for stream in self.tokens.streams if stream not in unread]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept as JSON, or what it returned in an earlier, killed run."""
        path, identity = self.state.folder / f"{name}.json", self.state.identity
        if path.exists():
            kept = texts.read_sealed(path)
            if kept["identity"] == identity:
                return kept["found"]
        returned = make()
        texts.write_sealed(path, {"identity": identity, "found": returned})
        return returned

    @functools.cached_property
    def judged(self) -> np.ndarray:
        """Rows that selections measure on."""
        rows = self.settings.sensitivity.rows
        return self.context.reader.sample_heldout("select", rows, self.settings.seed)


def judged(material: Material) -> prices.Judged:
    """The teacher's answers to the calls that selections measure on."""
    size = material.settings.sensitivity.batch_size
    return prices.Judged(material.context, material.judged, size)


def blocks_to_remove(transformer: nn.Module, fraction: float) -> int:
    """How many blocks of mean size are at least this fraction of the parameters."""
    every = [blocks.parameter_count(b.module) for b in blocks.block_sequence(transformer)]
    wanted = fraction * blocks.parameter_count(transformer)
    return math.ceil(wanted / np.mean(every) - 1e-9)
