"""Which ranks each modulation matrix may have, and the models that tell what they cost."""

import functools
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.closed_forms import modulation
from ppcl.closed_forms.modulation import Factors, Spread
from ppcl.extraction.conditioning import Conditioning
from ppcl.pruning import narrow, narrow_layers
from ppcl.pruning.units import Matrix, Modulation
from ppcl.runtime import devices
from ppcl.settings import ModulationSettings
from ppcl.training.prices import Change
from ppcl.transformer import blocks
from ppcl.transformer.context import Context

log = logging.getLogger(__name__)


class Offers:
    """Ranks on offer, and the products that they make; one matrix's products are held at a time.

    Args:
        conditioning: what matrices got in recorded calls.
        options: config's `modulation`.
        device: where products are made.

    Attributes:
        ranks: of every matrix, none above its inputs' numerical rank, and none that saves nothing.
    """

    def __init__(
        self,
        transformer: nn.Module,
        conditioning: Conditioning,
        options: ModulationSettings,
        device: torch.device,
    ):
        self._transformer, self._conditioning = transformer, conditioning
        self._device = devices.statistics_device(device)
        self._sequence = blocks.block_sequence(transformer)
        # Most matrices get the same as the one before.
        self._spread = functools.lru_cache(maxsize=1)(self._spread_at)
        self._products = functools.lru_cache(maxsize=1)(self._products_of)
        ladder = options.ladder if options.rank == "auto" else [options.rank]
        self.ranks: dict[Modulation, list[int]] = {}
        for matrix in modulation.matrices(transformer):
            most = self._of(matrix).rank
            self.ranks[matrix] = [
                rank
                for rank in sorted(set(ladder))
                if rank <= most and matrix.parameters(rank) < matrix.parameters()
            ]
        if self.ranks and not any(self.ranks.values()):
            log.warning(
                "modulation.ladder or modulation.rank: no matrix can have rank %s: what matrices "
                "get has fewer directions, or it would save nothing",
                ", ".join(map(str, ladder)),
            )

    def _of(self, matrix: Modulation) -> Spread:
        self._conditioning.of(matrix.key)  # says what to do if nothing is known of it
        return self._spread(self._conditioning.places[matrix.key])

    def _spread_at(self, place: int) -> Spread:
        return Spread.of(self._conditioning.entries[place], self._device)

    def _linear(self, matrix: Matrix) -> nn.Linear:
        block, path = matrix
        last = block == len(self._sequence)
        return narrow.linear_at(self._transformer if last else self._sequence[block].module, path)

    def _products_of(self, matrix: Modulation) -> dict[int, Factors]:
        """Rank -> product, for every rank on offer."""
        linear = self._linear(matrix.key)
        spread = self._of(matrix)
        weight = linear.weight.detach().to(spread.mean.device)
        bias = None if linear.bias is None else linear.bias.detach().to(spread.mean.device)
        return modulation.reductions(weight, bias, spread, self.ranks[matrix])

    @torch.no_grad()
    def model(self, matrix: Modulation, rank: int) -> nn.Module:
        """The teacher with that product in the matrix's place; shares all else with it."""
        block_map = [[number] for number in range(len(self._sequence))]
        made = modulation.shaped(self._transformer, block_map, {matrix.key: rank})
        product = modulation.matrix_in(made, block_map, matrix.key)
        assert narrow_layers.is_low_rank(product), "as it was shaped"
        modulation.put(product, self._products(matrix)[rank])
        return made

    def changes(self) -> dict[str, Change]:
        """Name of a product (`name`) -> the teacher with it, for all products on offer."""
        return {
            name(matrix, rank): Change(
                matrix.block,
                functools.partial(self.model, matrix, rank),
                matrix.block if matrix.block < len(self._sequence) else None,
            )
            for matrix, ranks in self.ranks.items()
            for rank in ranks
        }

    def errors(self, inputs: Mapping[Matrix, Tensor]) -> dict[str, float]:
        """Name of a product -> 1 - R^2 of its outputs, on inputs [n, d] of its matrix."""
        errors = {}
        for matrix, ranks in self.ranks.items():
            linear = self._linear(matrix.key)
            x = inputs[matrix.key].double()
            weight = linear.weight.detach().cpu().double()
            bias = 0 if linear.bias is None else linear.bias.detach().cpu().double()
            wanted = x @ weight.T + bias
            total = float((wanted - wanted.mean(0)).square().sum())
            for rank in ranks:
                made = self._products(matrix)[rank]
                down, up, offset = (part.cpu() for part in (made.down, made.up, made.bias))
                wrong = float((x @ down.T @ up.T + offset - wanted).square().sum())
                errors[name(matrix, rank)] = wrong / total if total > 0 else 0.0
        return errors

    def rows(self, fit_errors: Mapping[str, float]) -> dict[str, dict]:
        """Name of a product -> its row of width/measured.parquet, without the velocity error.

        fit_errors: from `errors`.
        """
        return {
            name(matrix, rank): {
                "kind": "modulation",
                "first": matrix.block,
                "last": matrix.block,
                "stream": "",
                "path": matrix.path,
                "rank": rank,
                "fit_error_heldout": fit_errors[name(matrix, rank)],
                "cka": np.nan,
                "parameters_saved": matrix.parameters() - matrix.parameters(rank),
            }
            for matrix, ranks in self.ranks.items()
            for rank in ranks
        }


def name(matrix: Modulation, rank: int) -> str:
    """Names a product among prices."""
    return f"modulation {matrix.block:02d} {matrix.path} {rank}"


@torch.no_grad()
def inputs_of(
    context: Context, matrices: Iterable[Modulation], rows: np.ndarray, batch_size: int
) -> dict[Matrix, Tensor]:
    """What matrices get in some recorded calls, [n, d] each, on the CPU."""
    transformer, device = context.transformer, context.device
    sequence = blocks.block_sequence(transformer)
    inputs: dict[Matrix, list[Tensor]] = {matrix.key: [] for matrix in matrices}
    with ExitStack() as stack:
        for (block, path), seen in inputs.items():
            owner = transformer if block == len(sequence) else sequence[block].module
            handle = owner.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, seen=seen: seen.append(args[0].flatten(0, -2).cpu())
            )
            stack.callback(handle.remove)
        for batch in context.reader.batches(rows, batch_size, device):
            transformer(**batch.to(device).arguments)
    return {matrix: torch.cat(seen) for matrix, seen in inputs.items()}
