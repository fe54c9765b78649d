"""Which price, known before training, foretells what a trained student costs: a sample of units.

Intervals of each length, single FFNs and text runs are trained alone by Eq. 6, side by side, since
none sees another's output. Their prices: 1 - CKA, the velocity error with composed probes in place
of an interval, and the velocity error with the untrained student or the least-squares maps.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ppcl.ablation import phases
from ppcl.ablation.material import Material
from ppcl.closed_forms import linear_map_fits, linear_maps
from ppcl.pruning import students
from ppcl.pruning.constraints import Ends
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock, Unit, units_of
from ppcl.search import probes
from ppcl.search.measured import ClosedForm
from ppcl.settings import Settings
from ppcl.training import distillation, prices
from ppcl.transformer import blocks
from ppcl.transformer.family import TEXT

LENGTHS, PER_LENGTH = range(2, 7), 4
FFNS, TEXT_RUNS = 4, 3  # of each stream; of each length


def sample(
    runs: Sequence[range], widths: Sequence[ClosedForm], unread_after: int | None, seed: int
) -> list[tuple[str, Unit]]:
    """Kind (as in schemas.CALIBRATION) and unit, drawn from what may be pruned.

    A text run that shares a new block with a run drawn before is passed over: each new block is
    trained once.
    """
    rng = np.random.default_rng(seed)

    def drawn(candidates: list, count: int) -> list:
        return [candidates[i] for i in sorted(rng.permutation(len(candidates))[:count])]

    chosen: list[tuple[str, Unit]] = []
    for length in LENGTHS:
        every = [(first, first + length - 1) for run in runs for first in run]
        inside = [ends for ends in every if any(ends[0] in r and ends[1] in r for r in runs)]
        chosen += [("depth", units_of([ends])[0]) for ends in drawn(inside, PER_LENGTH)]
    touched = {block for run in runs for block in run}
    ffns = [width for width in widths if width.kind == "ffn" and width.first in touched]
    for stream in sorted({width.stream for width in ffns}):
        for width in drawn([width for width in ffns if width.stream == stream], FFNS):
            chosen.append((f"ffn_{stream}", units_of([], [], [width.ffn])[0]))
    taken: set[NewBlock] = set()
    texts = [width.ends for width in widths if width.kind == "text" and width.first in touched]
    for length in sorted({last - first + 1 for first, last in texts}):
        alike = [ends for ends in texts if ends[1] - ends[0] + 1 == length]
        for ends in drawn(alike, TEXT_RUNS):
            (unit,) = units_of([], [ends], [], unread_after)
            if not taken & set(unit.new_blocks):
                taken |= set(unit.new_blocks)
                chosen.append(("text", unit))
    return chosen


class ProbeBlock(nn.Module):
    """Composed probes of blocks first..last, called and answering as a block does."""

    def __init__(self, block: blocks.Block, maps: Mapping[str, probes.Probe]):
        super().__init__()
        self._block = [block]  # in a list, so that its weights are not this module's
        self._maps = {stream: _tensors(probe) for stream, probe in maps.items()}
        # With the stock block's signature, by which whoever calls it finds the streams.
        answer = functools.wraps(block.module.forward)(lambda *a, **k: self._answer(*a, **k))
        self.forward = answer

    def _answer(self, *args, **kwargs):
        (block,) = self._block
        streams = block.inputs(block.bind(args, kwargs))
        for stream, (weight, bias) in self._maps.items():
            x = streams[stream]
            streams[stream] = x + x @ weight.to(x).T + bias.to(x)
        outputs = tuple(streams[stream] for stream in block.list.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def _tensors(probe: probes.Probe) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(probe.weight), torch.from_numpy(probe.bias)


def composed(every: Sequence[probes.Probe]) -> probes.Probe:
    """One probe that maps as several do one after the other: I + W = (I + W_n) ... (I + W_1)."""
    eye = np.eye(len(every[0].bias))
    product, bias = eye, np.zeros(len(eye))
    for probe in every:
        product, bias = product + probe.weight @ product, bias + probe.residual(bias)
    return probes.Probe(product - eye, bias)


def probe_block(transformer: nn.Module, weights: Mapping, ends: Ends) -> ProbeBlock:
    """What stands for an interval without any training; weights: of probes.safetensors.

    A stream that has no probe in one of the blocks is left as it is.
    """
    sequence = blocks.block_sequence(transformer)
    block, (first, last) = sequence[ends[0]], ends
    maps = {}
    for stream in block.list.outputs:
        inside = probes.of_stream(weights, stream, len(sequence))[first : last + 1]
        passed = [probe for probe in inside if probe is not None]
        if len(passed) == len(inside):
            maps[stream] = composed(passed)
    return ProbeBlock(block, maps)


def cka_price(kind: str, unit: Unit, cka: np.ndarray, widths: Sequence[ClosedForm]) -> float:
    """1 - CKA of an interval or a text run; NaN for an FFN."""
    if kind == "depth":
        return 1 - float(cka[unit.first, unit.last])
    ends = unit.first, unit.last
    text_cka = [w.cka for w in widths if kind == "text" and w.kind == TEXT and w.ends == ends]
    return 1 - text_cka[0] if text_cka else float("nan")


def steps(settings: Settings) -> int:
    """For how many steps the sample is trained: as many as a method of the ablation."""
    return sum(phases.steps_of({"by": "ppcl"}, {}, settings.ablation).values())


def reported(material: Material) -> np.ndarray:
    """Rows on which trained students are judged."""
    settings = material.settings
    count, key = settings.distill.heldout_rows, "distill.heldout_rows"
    return material.context.reader.sample_heldout("report", count, settings.seed, key)


def table(
    material: Material, cka: np.ndarray, weights: Mapping, closed_forms: Sequence[ClosedForm]
) -> pd.DataFrame:
    """Rows of ablation/calibration.parquet.

    Args:
        cka: [first, last] of intervals, float64.
        weights: of probes.safetensors.
        closed_forms: candidates for linear maps, as they were measured.
    """
    context, wide = material.context, material.settings.width
    transformer = material.transformer
    unread_after = linear_maps.unread_after(transformer)
    drawn = sample(material.runs, closed_forms, unread_after, material.settings.seed)
    # One unit at a time: two may replace the same blocks, which one fit could not tell apart.
    taught = [
        linear_map_fits.start(context, students.start(transformer, unit.new_blocks, "first"), wide)
        for _, unit in tqdm(drawn, desc="starting", unit="unit")
    ]
    judged, size = reported(material), material.settings.ablation.batch_size

    def cost(plugged: Students, rows: np.ndarray) -> float:
        for student in plugged.values():
            student.to(context.device).eval()
        return prices.error(context, plugged, rows, size)

    def probe_cost(unit: Unit) -> float:
        block = probe_block(transformer, weights, unit.new_blocks[0].ends)
        return cost({NewBlock(unit.first, unit.last): block}, material.judged)

    columns: dict[str, list] = {"kind": [kind for kind, _ in drawn]}
    columns |= {"first": [u.first for _, u in drawn], "last": [u.last for _, u in drawn]}
    columns["cost_cka"] = [cka_price(*one, cka, closed_forms) for one in drawn]
    columns["cost_probe"] = [probe_cost(u) if kind == "depth" else np.nan for kind, u in drawn]
    columns["cost_untrained"] = [cost(each, material.judged) for each in taught]
    _train(material, taught)
    columns["trained"] = [cost(each, judged) for each in taught]
    return pd.DataFrame(columns)


def _train(material: Material, taught: Sequence[Students]) -> None:
    """Trains the sample's students side by side, each alone; in place."""
    every = {new_block: student for each in taught for new_block, student in each.items()}
    names = {new_block: f"{n} {new_block.name}" for n, new_block in enumerate(every)}
    options = phases.stage_options(
        material, "distill", steps(material.settings), mode="independent"
    )
    phases.train(
        material,
        "calibration",
        {names[new_block]: student for new_block, student in every.items()},
        distillation.independent(material.context, every, options, names),
        options,
        {f"{names[b]}/": material.settings.width.lr_scale for b in every if b.first == b.last},
    )
