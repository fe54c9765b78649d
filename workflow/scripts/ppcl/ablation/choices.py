"""How each method of the ablation chooses what goes: `SELECTIONS`, which `methods` names.

What the config requires and its budgets do not count here; protected blocks do. Depth-only methods
remove exactly `removed` blocks; those with width save at least as many parameters, as few more as
may be.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ppcl.ablation import rivals
from ppcl.ablation.rivals import Starts
from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.extraction import token_table
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Ends, Ffn
from ppcl.pruning.units import Matrix, Modulation
from ppcl.search import (
    candidates,
    cka_draws,
    interval_costs,
    intervals,
    measured,
    probes,
    savings,
    selection,
    similarity,
)
from ppcl.search.candidates import Limits
from ppcl.search.interval_costs import CostInputs
from ppcl.search.selection import Choices
from ppcl.settings import Settings
from ppcl.storage import tensors, texts
from ppcl.training import prices
from ppcl.transformer import blocks
from ppcl.transformer.context import Context, State
from ppcl.transformer.family import JOINT

# Of Amber-Image's scores, and of TinyFusion's masks: how many blocks choose among themselves, and
# the rank of the update that is learned beside the masks, and their learning rate.
TIMESTEP_GROUPS, LOCAL_GROUP, RANK, MASKS_LR = 4, 4, 8, 0.01


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
        steps: `trial.phases` of the method. ema: its own, if it has one.
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
        """Those that rivals judge by: of an unread one, the last blocks' output means nothing."""
        unread = blocks.family(self.transformer).unread
        return [stream for stream in self.tokens.streams if stream not in unread]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept as JSON, or what it returned in an earlier, killed run."""
        path, identity = self.state.folder / f"{name}.json", self.state.identity
        if path.exists():
            kept = texts.read_sealed(path)
            if kept["identity"] == identity:
                return kept["found"]
        found = make()
        texts.write_sealed(path, {"identity": identity, "found": found})
        return found

    @functools.cached_property
    def judged(self) -> np.ndarray:
        """Rows that selections measure on."""
        rows = self.settings.sensitivity.rows
        return self.context.reader.sample_heldout("select", rows, self.settings.seed)


def blocks_to_remove(transformer: nn.Module, fraction: float) -> int:
    """How many blocks of mean size are at least this fraction of the parameters."""
    every = [blocks.parameter_count(b.module) for b in blocks.block_sequence(transformer)]
    wanted = fraction * blocks.parameter_count(transformer)
    return math.ceil(wanted / np.mean(every) - 1e-9)


def choose(material: Material, select: Mapping) -> Chosen:
    """What a method removes. Raises UserError if so much can't go."""
    fraction = material.settings.ablation.removed_fraction
    removed = blocks_to_remove(material.transformer, fraction)
    options = {key: value for key, value in select.items() if key != "by"}
    found = SELECTIONS[select["by"]](material, removed, **options)
    return found if isinstance(found, Chosen) else Chosen(found)


# ---- PPCL


def ppcl(
    material: Material,
    removed: int,
    segmentation: str,
    cost: str,
    shortest: int = 2,
    similarity: Mapping | None = None,
) -> Starts:
    """Eq. 5's runs and their parts (`trend`) or all runs of blocks (`optimal`), the cheapest.

    Args:
        cost: of `interval_costs.COSTS`, without what training mends; not one of the probes' table.
        shortest: least blocks of an interval. The paper does not say how its ablation "longer
            intervals" was made; here it is: any runs of at least so many, wherever they begin.
        similarity: keys that differ from the config's.
    """
    cka, noise = similarities(material, similarity or {})
    runs = _seen(material.runs, cka)
    tolerance = material.settings.intervals.tolerance
    chain = intervals.trend_chain(cka, runs, noise if tolerance == "bootstrap" else tolerance)
    found = intervals.candidates(runs, segmentation, chain)
    stream = material.settings.similarity.replace(**(similarity or {})).streams
    given = CostInputs(cka, stream, material.paths["sensitivity"])
    costs = interval_costs.COSTS[cost](given)
    least = min(shortest, removed + 1)
    offered = {
        (first, last): float(costs[first, last])
        for first, last in found
        if last - first + 1 >= least and np.isfinite(costs[first, last])
    }
    return {ends: "first" for ends in exactly(offered, removed, len(cka))}


def judged(material: Material) -> prices.Judged:
    """The rows of selection."""
    size = material.settings.sensitivity.batch_size
    return prices.Judged(material.context, material.judged, size)


def exactly(costs: Mapping[Ends, float], removed: int, depth: int) -> list[Ends]:
    """The cheapest disjoint intervals that remove exactly so many blocks."""
    # best[block][count]: cost and intervals with blocks before `block` decided.
    best: list[dict[int, tuple[float, tuple]]] = [{} for _ in range(depth + 1)]
    best[0][0] = (0.0, ())
    for block in range(depth):
        arcs = [(block + 1, 0, 0.0, ())]
        for (first, last), cost in costs.items():
            if first == block:
                arcs.append((last + 1, last - first, cost, ((first, last),)))
        for after, gone, cost, added in arcs:
            for count, (total, chosen) in best[block].items():
                new = total + cost, chosen + added
                if count + gone <= removed and new < best[after].get(count + gone, (math.inf, ())):
                    best[after][count + gone] = new
    if removed not in best[depth]:
        raise UserError(
            f"ablation: the offered intervals can't remove exactly {removed} blocks, at most "
            f"{max(best[depth])}; lower ablation.removed_fraction or raise sensitivity.longest"
        )
    return list(best[depth][removed][1])


def similarities(material: Material, changed: Mapping) -> tuple[np.ndarray, float]:
    """cka [first, last] of the stream that decides, and the noise of Delta's rise.

    What the similarity stage wrote, unless another estimator or reference is asked for.
    """
    options = material.settings.similarity.replace(**changed)
    stream, path = options.streams, material.paths["cka"]
    own = {key for key in changed if changed[key] != getattr(material.settings.similarity, key)}
    if own <= {"streams"}:
        noise = measured.facts(path, "delta_noise")["delta_noise"]
        return measured.cka(path, stream, material.depth), noise[stream]
    weights, _ = tensors.read(material.paths["probes"])
    tokens, draws = material.tokens, {}
    for name in (s for s in tokens.streams if stream in (s, "mean") or s == JOINT):
        read, plan = similarity.heldout(tokens, name, options, material.settings.seed)
        draws[name] = similarity.surrogate_cka(
            read,
            probes.of_stream(weights, name, material.depth),
            plan,
            stream=name,
            **{
                key: getattr(options, key) for key in ("reference", "estimator", "normalise_tokens")
            },
        )
    found = cka_draws.mean_of_streams(list(draws.values()))
    return found[0], cka_draws.rise_noise(cka_draws.differences(found))


def _seen(runs: list[range], cka: np.ndarray) -> list[range]:
    """The runs without blocks that have no CKA."""
    return [
        part
        for run in runs
        for part in intervals.spans(
            run.stop, kept={*range(run.start), *(b for b in run if np.isnan(cka[b, b]))}
        )
    ]


def depth_and_width(
    material: Material,
    removed: int,
    kinds: Collection[str] = ("text", "ffn"),
    depth_share=0.5,
    like: str = "rivals",
) -> Chosen:
    """The workflow's own selection, with segmentation `optimal`: any runs of blocks, text runs and
    FFNs, by measured costs.

    Args:
        depth_share: how many of the `removed` blocks go at least. Linear maps alone may save as
            many parameters, but not the time.
        like: what it saves: the parameters of as many blocks (`rivals`), of these and of what is
            left with every modulation at the ablation's rank (`low-rank rivals`), or the time of as
            many blocks (`rivals' time`).
    """
    settings, paths, depth = material.settings, material.paths, material.depth
    sizes = blocks.parameters_of_blocks(material.transformer)
    closed = measured.closed(paths["width"], sizes, kinds)
    low = _modulations(material) if like == "low-rank rivals" else _Modulations()
    weights = {
        "blocks": savings.by_blocks(depth),
        "parameters": replace(closed.weights, ranks=low.saved),
    }
    cka = measured.cka(paths["cka"], settings.similarity.streams, depth)
    leaves = settings.intervals.training_leaves
    costs = leaves * measured.costs(paths["sensitivity"], depth)
    every = intervals.all_within(_seen(material.runs, cka))
    protected = constraints.protected(settings, depth)
    limits = Limits(constraints.NOTHING, protected, settings.width.cka_floor)
    needs: dict[str, float] = {"blocks": math.ceil(depth_share * removed)}
    if like == "rivals' time":
        weights["latency"], _ = measured.timing(paths["latency"], depth)
        needs["latency"] = removed * float(np.mean(weights["latency"].block))
    else:
        left = low.after(removed / depth)
        needs["parameters"] = math.ceil(removed * float(np.mean(sizes)) + left)
    plan = selection.select(
        Choices(
            {ends: float(costs[ends]) for ends in every if np.isfinite(costs[ends])},
            *candidates.usable_linear_maps(closed.rows, constraints.NOTHING, limits),
            ranks={matrix: {low.rank: 0.0} for matrix in low.matrices},  # they cost all alike
            modulations=low.matrices,
            unread=closed.unread,
        ),
        weights,
        needs,
    )
    return Chosen({ends: "first" for ends in plan.intervals}, plan.runs, plan.ffns)


@dataclass(frozen=True)
class _Modulations:
    """Every modulation at one rank, as a selection counts them; none by default.

    saved: as `Weights.ranks`.
    """

    rank: int = 0
    matrices: Mapping[Matrix, Modulation] = field(default_factory=dict)
    saved: Mapping[tuple[Matrix, int, int], float] = field(default_factory=dict)

    def after(self, share: float) -> float:
        """Parameters that they save where such a share of the blocks is gone."""
        last = max((block for block, _ in self.matrices), default=0)
        return sum(
            self.saved[key, self.rank, 6] * (1 if key[0] == last else 1 - share)
            for key in self.matrices
        )


def _modulations(material: Material) -> _Modulations:
    rank = material.settings.ablation.rank
    matrices = {one.key: one for one in modulation.matrices(material.transformer)}
    saved = {
        (key, rank, sixths): one.parameters(sixths=sixths) - one.parameters(rank, sixths)
        for key, one in matrices.items()
        for sixths in one.shares
    }
    return _Modulations(rank, matrices, saved)


# ---- rivals: those that delete blocks, and those that replace runs


def _deleting(gone: Callable[[Material, int], Collection[int]]) -> Callable:
    return lambda material, removed: rivals.merged(gone(material, removed), material.runs)


def _by_score(score: Callable[[Material], np.ndarray]) -> Callable:
    return _deleting(lambda m, removed: rivals.lowest(score(m), removed, m.runs))


def _skipped(m: Material, groups: list[np.ndarray]) -> np.ndarray:
    """rivals.skip_errors on groups of rows."""
    size, state = m.settings.sensitivity.batch_size, m.state.within("skipped")
    return rivals.skip_errors(m.context, m.runs, groups, size, state)


def _over_timesteps(m: Material, removed: int) -> Starts:
    """The score, and Amber-Image's local averaging of an interval's weights."""
    reader = m.context.reader
    levels = len(np.unique(reader.index["timestep"][m.judged]))
    groups = rivals.timestep_groups(reader, m.judged, min(TIMESTEP_GROUPS, levels))
    scores = rivals.over_timesteps(_skipped(m, groups))
    gone = rivals.lowest(scores, removed, m.runs)
    return dict.fromkeys(rivals.merged(gone, m.runs), "average")


def _learned_masks(m: Material, removed: int) -> list[int]:
    options = m.settings.subsets.replace(
        batch_size=m.settings.ablation.batch_size,
        steps=m.steps["masks"],
        warmup_steps=0,
        lr=MASKS_LR,
    )
    groups = rivals.local_groups(removed, m.runs, LOCAL_GROUP)
    return m.once("masks", lambda: rivals.learned_masks(m.context, groups, RANK, options, m.state))


SELECTIONS: dict[str, Callable[..., Chosen | Starts]] = {
    "nothing": lambda m, removed: {},
    "ppcl": ppcl,
    "depth_and_width": depth_and_width,
    "every_nth": _deleting(lambda m, removed: rivals.every_nth(removed, m.runs)),
    "random_blocks": _deleting(
        lambda m, removed: rivals.random_blocks(removed, m.runs, m.context.seed)
    ),
    "random_run": lambda m, removed: rivals.random_run(removed, m.runs, m.context.seed),
    "block_influence": _by_score(lambda m: rivals.block_influence(m.tokens, m.streams)),
    "cka_change": _by_score(
        lambda m: rivals.cka_change(m.tokens, m.streams, m.settings.similarity.estimator)
    ),
    "one_out": _by_score(lambda m: _skipped(m, [m.judged])[0]),
    "over_timesteps": _over_timesteps,
    "learned_masks": _deleting(_learned_masks),
    "streamline": lambda m, removed: rivals.streamline(m.tokens, m.streams, removed, m.runs),
    "cka_threshold": lambda m, removed: rivals.cka_threshold(
        similarities(m, {})[0], removed, m.runs
    ),
}
