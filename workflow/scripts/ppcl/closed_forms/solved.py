"""`prune.start: solved`: an interval's first block, refitted to what the whole interval does.

Linears whose outputs are added to a stream, each channel times a gate (`Family.gated`), are
refitted by least squares; all other weights of the block stay the teacher's. First those of the
attention, while the FFN returns zeros; then the FFN's last linear, on the stream that the refitted
attention leaves. With f a token's inputs of the linear and a 1 for its bias, gate g, and y the
block's output, for channel c

    minimise over the change d_c of its row    sum | t_c - y_c - g_c d_c . f |^2
    (sum over samples of g_c^2 sum over tokens f f^T) d_c = sum over samples and tokens of g_c r_c f

with t the teacher's stream after the interval and r = t - y. g and g r come from backward passes
through the block: of the linear's output, an element of the block's output depends on the same
element alone, so the Jacobian J between the two is diagonal, J^T 1 is g and J^T r is g r, however a
family makes its gates.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.closed_forms import linear_map_fits
from ppcl.errors import UserError
from ppcl.pruning import narrow, students
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import devices
from ppcl.settings import WidthSettings
from ppcl.training import teaching
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context

# Samples are put in so many groups of neighbouring timesteps. The samples of a group all count with
# the group's mean squared gate, so a group needs one matrix of moments for all channels. On the
# embedded teacher, errors with 64 groups are within 4 % of these.
GROUPS = 16
# Most bytes of the sums of the new blocks that are fitted in one pass over the calls.
SUMS_BYTES = 4 << 30
# Share of the largest gate by which others may differ from it by rounding.
ALIKE = 1e-3
# Ridge on the change of each channel, in units of a feature's mean square. On the embedded teacher
# with 256 calls, a hundredth of it left errors 1 to 18 % higher; with 1024 it hardly matters.
RIDGE = 1e-2


def stages(transformer: nn.Module, new_block: NewBlock) -> tuple[tuple[str, ...], ...]:
    """Paths of the linears in a new block that are refitted, stage by stage; those of one together.

    Raises:
        UserError: the family registry names none (`Family.gated`).
    """
    attribute = blocks.block_sequence(transformer)[new_block.first].list.attribute
    paths = blocks.family(transformer).gated.get(attribute)
    if paths is None:
        raise UserError(
            f"prune.start: solved is not for {type(transformer).__name__}: of its {attribute} the "
            "family registry names no linear that a gate alone follows "
            "(workflow/scripts/ppcl/transformer/families.py); set prune.start to first"
        )
    return paths


def start(
    context: Context, new_blocks: Iterable[NewBlock], how: str, options: WidthSettings
) -> Students:
    """Whole blocks with their start weights as `students.start` makes them, refitted if `how` is
    `solved`; on the device.

    Args:
        options: the config's `width`: fit_rows, batch_size.
    """
    made = students.start(context.transformer, new_blocks, how)
    for student in made.values():
        student.to(context.device)
    if how == "solved":
        rows, _ = linear_map_fits.fit_rows(context.reader, options, context.seed)
        refit(context, made, rows, options.batch_size)
    return made


def refit(context: Context, wholes: Students, rows: np.ndarray, batch_size: int) -> Students:
    """Refits whole blocks that are copies of their interval's first; in place.

    Args:
        wholes: on the device; those of one block are left as they are.
        rows: numbers of the calls to fit on.
        batch_size: of calls.

    Raises:
        UserError: the registry does not say where these linears are, or is wrong about a block.
    """
    transformer = context.transformer
    longer = {
        new_block: module
        for new_block, module in wholes.items()
        if new_block.last > new_block.first
    }
    for number in range(
        max((len(stages(transformer, new_block)) for new_block in longer), default=0)
    ):
        wanted = {
            new_block: every[number:]
            for new_block in longer
            if len(every := stages(transformer, new_block)) > number
        }
        for group in _groups(longer, wanted):
            now = {new_block: wanted[new_block] for new_block in group}
            _refit(context, longer, now, rows, batch_size)
    return wholes


def _groups(wholes: Students, wanted: Mapping[NewBlock, tuple]) -> Iterator[list[NewBlock]]:
    """Groups of new blocks whose sums fit in SUMS_BYTES together."""
    group: list[NewBlock] = []
    held = 0
    for new_block, paths in wanted.items():
        linears = [narrow.linear_at(wholes[new_block], path) for path in paths[0]]
        size = sum(8 * GROUPS * (linear.in_features + 1) ** 2 for linear in linears)
        if group and held + size > SUMS_BYTES:
            yield group
            group, held = [], 0
        group, held = [*group, new_block], held + size
    if group:
        yield group


def _refit(
    context: Context,
    wholes: Students,
    wanted: Mapping[NewBlock, tuple[tuple[str, ...], ...]],
    rows: np.ndarray,
    batch_size: int,
) -> None:
    """One stage: refits the first paths of each new block, while linears of later stages return
    zeros."""
    transformer, reader, device = context.transformer, context.reader, context.device
    order = np.argsort(reader.index["timestep"][rows], kind="stable")
    group_of = dict(
        zip(rows[order].tolist(), np.arange(len(rows)) * GROUPS // len(rows), strict=True)
    )
    sums = {
        (new_block, path): _Sums(narrow.linear_at(wholes[new_block], path), device)
        for new_block, paths in wanted.items()
        for path in paths[0]
    }
    for batch in reader.batches(rows, batch_size, device):
        batch = batch.to(device)
        groups = torch.tensor([group_of[number] for number in batch.numbers.tolist()])
        lessons = teaching.teacher_states(transformer, list(wanted), batch.arguments)
        for new_block, (paths, *later) in wanted.items():
            block = blocks.block_sequence(transformer)[new_block.first]
            block = blocks.Block(new_block.first, wholes[new_block], block.list)
            masks = _real(transformer, new_block, batch, lessons[new_block].target)
            seen = _answers(block, paths, sum(later, ()), lessons[new_block], masks)
            for path, (features, gate, target) in seen.items():
                sums[new_block, path].add(
                    features, gate, target, groups, f"block {new_block.first}, {path}"
                )
    for one in sums.values():
        one.solve()


def _real(
    transformer: nn.Module, new_block: NewBlock, batch: calls.Batch, target: blocks.Streams
) -> blocks.Streams:
    """Stream -> float32 tensor of its shape, 1 at real tokens and 0 at padding; without streams
    that nothing reads."""
    family = blocks.family(transformer)
    last = new_block.last == blocks.block_sequence(transformer)[-1].index
    read = {s: v for s, v in target.items() if not (last and s in family.unread)}
    masks = blocks.token_masks(family, batch.arguments, read)
    real = {stream: torch.ones_like(value, dtype=torch.float32) for stream, value in read.items()}
    for stream, mask in masks.items():
        real[stream] *= mask[..., None]
    return real


def _answers(
    block: blocks.Block,
    paths: Sequence[str],
    later: Sequence[str],
    lesson: teaching.Lesson,
    real: blocks.Streams,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Path -> its linear's features [batch, tokens, in], J^T 1 and J^T r [batch, tokens, out];
    without linears whose outputs reach only streams that nothing reads."""
    features: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    handles = []

    def watch(path: str):
        def instead(_module, args, out):
            features[path] = args[0].detach()
            leaves[path] = out.detach().requires_grad_()
            return leaves[path]

        return instead

    def nothing(_module, _args, out):
        return torch.zeros_like(out)

    for path in paths:
        handles.append(block.module.get_submodule(path).register_forward_hook(watch(path)))
    for path in later:
        handles.append(block.module.get_submodule(path).register_forward_hook(nothing))
    try:
        with torch.enable_grad():
            bound = teaching.fitting(lesson.bound, block.module)
            output = block.outputs(block.module(**bound))
    finally:
        for handle in handles:
            handle.remove()
    streams = list(real)
    made = [output[stream] for stream in streams]
    names = list(leaves)

    def back(cotangents: list[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            made, [leaves[n] for n in names], cotangents, retain_graph=True, allow_unused=True
        )

    with torch.no_grad():
        short = [
            torch.where(real[s] > 0, lesson.target[s].to(y) - y, 0.0)
            for s, y in zip(streams, made, strict=True)
        ]
        ones = [real[s].to(y) for s, y in zip(streams, made, strict=True)]
        generator = torch.Generator().manual_seed(0)
        flips = [torch.rand(y.shape, generator=generator).to(y) < 0.5 for y in made]
        signs = [torch.where(flip, -one, one) for flip, one in zip(flips, ones, strict=True)]
    gates, targets, turned = back(ones), back(short), back(signs)
    answers = {}
    for name, gate, target, other in zip(names, gates, targets, turned, strict=True):
        if gate is None or target is None or other is None:  # if one is, all are
            continue
        if (other.abs() - gate.abs()).abs().max() > ALIKE * gate.abs().max():
            raise UserError(
                f"{type(block.module).__name__}: more than a gate follows {name}, which the family "
                "registry lists as gated (workflow/scripts/ppcl/transformer/families.py)"
            )
        answers[name] = features[name], gate, target
    return answers


class _Sums:
    """Both sides of the normal equations of one linear's channels, float64.

    moments [groups, in + 1, in + 1], sums of f f^T; gates [groups, out], sums of squared gates;
    counts [groups], numbers of samples; right [out, in + 1], sums of g r f.
    """

    def __init__(self, linear: nn.Linear, device: torch.device):
        self.linear = linear
        where = devices.statistics_device(device)
        size, out = linear.in_features + 1, linear.out_features
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=where)
        self.moments = zeros(GROUPS, size, size)
        self.gates = zeros(GROUPS, out)
        self.counts = zeros(GROUPS)
        self.right = zeros(out, size)

    def add(
        self, features: Tensor, gate: Tensor, target: Tensor, groups: Tensor, name: str
    ) -> None:
        """Adds samples; a gate of 0 marks padding. Raises UserError if gates differ between tokens
        of a sample.

        groups: [batch], each sample's group. name: of the linear, for errors.
        """
        features, gate, target = (x.to(self.right) for x in (features, gate, target))
        real = gate.abs().amax(-1) > 0  # [batch, tokens]
        largest = gate.abs().amax(1, keepdim=True)
        if ((gate.abs() - largest).abs() * real[..., None]).max() > ALIKE * largest.max():
            raise UserError(
                f"prune.start: solved: at {name}, gates differ between tokens of a sample; set "
                "prune.start to first"
            )
        features = torch.where(real[..., None], features, 0.0)
        features = torch.cat([features, real[..., None].to(features)], -1)
        self.right += torch.einsum("nto,nti->oi", target, features)
        moments = features.mT @ features
        groups = groups.to(self.moments.device)
        self.moments.index_add_(0, groups, moments)
        self.gates.index_add_(0, groups, largest[:, 0].square())
        self.counts.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))

    @torch.no_grad()
    def solve(self) -> None:
        """Adds each channel's least-squares change to the linear."""
        weights = self.gates / self.counts.clamp_min(1)[:, None]
        scale = self.moments.sum(0).diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        weight, bias = self.linear.weight, self.linear.bias
        used = slice(None) if bias is not None else slice(-1)
        for channel in range(len(self.right)):
            left = torch.einsum("k,kij->ij", weights[:, channel], self.moments)
            left = (left / torch.outer(scale, scale))[used, used]
            mean = left.diagonal()[: weight.shape[1]].mean()
            if not mean > 0:
                continue  # its gate is shut throughout
            left.diagonal()[: weight.shape[1]] += RIDGE * mean
            change = torch.linalg.solve(left, (self.right[channel] / scale)[used]) / scale[used]
            weight[channel] += change[: weight.shape[1]].to(weight)
            if bias is not None:
                bias[channel] += change[-1].to(bias)
