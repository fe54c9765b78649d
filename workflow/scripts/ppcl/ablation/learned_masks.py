"""TinyFusion's depth masks, a rival way to choose blocks: learned together with a light update."""

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.ablation.rivals import every_nth
from ppcl.errors import UserError
from ppcl.settings import TrainingSettings
from ppcl.training import distillation, loop
from ppcl.transformer import blocks
from ppcl.transformer.context import Context, State

MOST_SCHEMES = 10_000
# Of the Gumbel-softmax, at the first step and after the last; and a factor on the logits, so that a
# learning rate that suits weights moves them far enough.
TEMPERATURES, SHARPNESS = (4.0, 0.1), 50.0


def local_groups(removed: int, runs: Sequence[range], size: int) -> list[tuple[range, int]]:
    """Groups of at most `size` neighbours, and how many go of each: `removed`, evenly spread."""
    spread = set(every_nth(removed, runs))
    groups = [run[at : at + size] for run in runs for at in range(0, len(run), size)]
    return [(group, len(spread.intersection(group))) for group in groups]


def schemes(size: int, gone: int) -> Tensor:
    """Every mask of `size` blocks that removes `gone`: [schemes, size], 1 for a kept block.

    Raises UserError if there are more than MOST_SCHEMES.
    """
    if (count := math.comb(size, gone)) > MOST_SCHEMES:
        raise UserError(f"ablation: {count} masks of {size} blocks are too many; group fewer")
    kept = torch.tensor(list(itertools.combinations(range(size), size - gone)), dtype=torch.long)
    return torch.zeros(count, size).scatter_(1, kept, 1)


class DepthMasks(nn.Module):
    """Masks of a transformer's groups of blocks, and a low-rank update of their linear layers.

    groups: as of `local_groups`. rank: of the update.
    """

    def __init__(self, transformer: nn.Module, groups, rank: int, seed: int):
        super().__init__()
        sequence = blocks.block_sequence(transformer)
        generator = torch.Generator().manual_seed(seed)
        self.groups = [[sequence[block] for block in group] for group, _ in groups]
        self.schemes = [schemes(len(group), gone) for group, gone in groups]
        self.logits = nn.ParameterList(torch.zeros(len(masks)) for masks in self.schemes)
        modules = [m for group in self.groups for block in group for m in block.module.modules()]
        # In a plain list, so that they are no part of what is trained and saved.
        self.linears = [m for m in modules if isinstance(m, nn.Linear)]
        shapes = [(m.out_features, m.in_features) for m in self.linears]
        draws = [torch.randn(rank, n, generator=generator) / n**0.5 for _, n in shapes]
        self.down = nn.ParameterList(draws)
        self.up = nn.ParameterList(torch.zeros(n, rank) for n, _ in shapes)
        self.gates: dict[int, Tensor] = {}

    def sample(self, seed: tuple[int, ...], temperature: float) -> None:
        """Draws a mask of every group by Gumbel-softmax, hard forward and soft backward."""
        rng = np.random.default_rng(seed)
        for group, masks, logits in zip(self.groups, self.schemes, self.logits, strict=True):
            noise = torch.from_numpy(rng.gumbel(size=len(masks))).to(logits)
            soft = torch.softmax((SHARPNESS * logits + noise) / temperature, 0)
            hard = nn.functional.one_hot(soft.argmax(), len(masks))
            gates = (hard + (soft - soft.detach())) @ masks.to(soft)
            self.gates |= {block.index: gate for block, gate in zip(group, gates, strict=True)}

    @contextmanager
    def attached(self):
        """Blocks compute x + m (T(x) - x) on every stream, T with updated layers."""
        with ExitStack() as stack:
            for linear, down, up in zip(self.linears, self.down, self.up, strict=True):

                def update(_module, args, out, down=down, up=up):
                    return out + (args[0].to(down) @ down.T @ up.T).to(out)

                stack.callback(linear.register_forward_hook(update).remove)
            for block in itertools.chain(*self.groups):

                def gate(_module, args, kwargs, returned, block=block):
                    x, y = block.inputs(block.bind(args, kwargs)), block.outputs(returned)
                    m = self.gates[block.index]
                    mixed = tuple(x[s] + m.to(x[s]) * (out - x[s]) for s, out in y.items())
                    return mixed if isinstance(returned, tuple) else mixed[0]

                stack.callback(block.module.register_forward_hook(gate, with_kwargs=True).remove)
            yield

    def gone(self) -> list[int]:
        """The blocks that the most probable mask of every group removes."""
        best = [m[x.argmax().item()] for m, x in zip(self.schemes, self.logits, strict=True)]
        every = zip(itertools.chain(*self.groups), torch.cat(best), strict=True)
        return [block.index for block, mask in every if mask == 0]


def learned_masks(
    context: Context,
    groups: Sequence[tuple[range, int]],
    rank: int,
    options: TrainingSettings,
    state: State,
) -> list[int]:
    """TinyFusion (arXiv 2412.01199): depth masks learned together with a light weight update.

    Taken: local N:M schemes (`local_groups`), a distribution over all masks of each group,
    Gumbel-softmax with a straight-through gradient and a falling temperature; a low-rank update,
    learned beside the masks and then dropped, so that masks are judged by what training can mend;
    the most probable mask wins. Ours: the loss is the velocity error on recorded calls, and one
    AdamW trains masks and update.

    Args:
        context: its transformer is frozen; gradient checkpointing may be on.
        groups: as of `local_groups`.
        rank: of the update.

    Returns:
        Numbers of the blocks that go.
    """
    transformer, seed = context.transformer, context.seed
    masks = DepthMasks(transformer, groups, rank, seed).to(context.device)

    def model_at(step: int) -> nn.Module:
        # Batches are drawn from (seed, step): the third number keeps the draws apart.
        masks.sample((seed, step, 2), np.interp(step / options.steps, (0, 1), TEMPERATURES))
        return transformer

    losses = distillation.output_distillation(context, model_at, "masks", options, in_float32=False)
    optimisation = loop.Optimisation.from_settings(options)
    path = state.folder / "masks-checkpoint.safetensors"
    with masks.attached():  # throughout: checkpointing runs the blocks again during backward
        loop.train(
            {"masks": masks}, losses, optimisation, context.accelerator, path, state.identity
        )
    return masks.gone()
