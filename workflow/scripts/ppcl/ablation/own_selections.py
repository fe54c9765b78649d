"""How this workflow's own methods choose what goes: the ladder of PPCL, and depth with width.

The config's required choices and its budgets are ignored here; its protected blocks are kept.
Depth-only methods remove exactly `removed` blocks; those with width save at least as many
parameters as so many blocks have, or as much time (`like`).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ppcl.ablation.material import Chosen, Material
from ppcl.ablation.rivals import Starts
from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.pruning import constraints
from ppcl.pruning.constraints import Ends
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
from ppcl.storage import tensors
from ppcl.transformer import blocks
from ppcl.transformer.family import JOINT


def ppcl(
    material: Material,
    removed: int,
    segmentation: str,
    cost: str,
    shortest: int = 2,
    similarity: Mapping | None = None,
) -> Starts:
    """The cheapest intervals, of Eq. 5's runs and their parts (`trend`) or of all runs (`optimal`).

    Args:
        cost: a key of `interval_costs.COSTS`, but not `influence`, which needs the probes' table.
            Measured costs count in full, whatever intervals.training_leaves says.
        shortest: least blocks of an interval. The paper does not say how its ablation "longer
            intervals" was made; here it is: any runs of at least so many, wherever they begin.
        similarity: keys of the config's section with values that differ.

    Raises:
        UserError: as `exactly`.
    """
    cka, noise = similarities(material, similarity or {})
    runs = _seen(material.runs, cka)
    tolerance = material.settings.intervals.tolerance
    chain = intervals.trend_chain(cka, runs, noise if tolerance == "bootstrap" else tolerance)
    choices = intervals.candidates(runs, segmentation, chain)
    stream = material.settings.similarity.replace(**(similarity or {})).streams
    given = CostInputs(cka, stream, material.paths["sensitivity"])
    costs = interval_costs.COSTS[cost](given)
    least = min(shortest, removed + 1)
    offered = {
        (first, last): float(costs[first, last])
        for first, last in choices
        if last - first + 1 >= least and np.isfinite(costs[first, last])
    }
    return {ends: "first" for ends in exactly(offered, removed, len(cka))}


def exactly(costs: Mapping[Ends, float], removed: int, depth: int) -> list[Ends]:
    """The cheapest disjoint intervals that remove exactly `removed` blocks.

    Raises UserError if no set of them does.
    """
    # best[block][count]: cost and intervals with blocks before `block` decided.
    best: list[dict[int, tuple[float, tuple]]] = [{} for _ in range(depth + 1)]
    best[0][0] = (0.0, ())
    for block in range(depth):
        arcs: list[tuple[int, int, float, tuple]] = [(block + 1, 0, 0.0, ())]
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
    cka = cka_draws.mean_of_streams(list(draws.values()))
    return cka[0], cka_draws.rise_noise(cka_draws.differences(cka))


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
        like: what has to be saved. `rivals`: the parameters of `removed` blocks of mean size.
            `low-rank rivals`: these, and what the modulations of the other blocks save at the
            ablation's rank. `rivals' time`: the mean time of `removed` blocks.
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
        """Parameters that low rank saves once such a share of the blocks is gone; the last AdaLN
        counts in full."""
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
