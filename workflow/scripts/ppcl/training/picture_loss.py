"""The flow-matching loss of the user's own pictures, on what `encode` made of them.

x = (1 - s) x_0 + s noise, with x_0 the picture's latents and s the share of noise; the model is to
answer noise - x_0, or the opposite where its pipeline has it so. Shares and weights are those of
diffusers' training scripts (`weighting_scheme`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor, nn

from ppcl.settings import FinetuneSettings
from ppcl.storage import schemas
from ppcl.training import distillation
from ppcl.transformer import blocks, calls

# As train_dreambooth_lora_sd3.py and its like have them.
_DENSITY: dict[str, Any] = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
HELDOUT = 64  # most pictures to measure on


class Pictures:
    """Encoded pictures and the loss on them.

    Args:
        path: encoded.parquet.
        options: batch_size and weighting.
        seed: decides which pictures, noise and noise levels a step gets.
        accelerator: the processes that share the batches.
    """

    def __init__(self, path: Path, options: FinetuneSettings, seed: int, accelerator: Accelerator):
        self.reader = calls.Reader(path, schema=schemas.ENCODED)
        self._options, self._seed, self._accelerator = options, seed, accelerator
        self._rows = self.reader.rows(heldout=False)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of a step's batch, a float32 scalar: weighted squared error, averaged over
        values, of this process's part. The mean over processes is that of the batch."""
        size, accelerator = self._options.batch_size, self._accelerator
        drawn = self.reader.draw(self._rows, size, (self._seed, step, 2))
        places = distillation.share(np.arange(size), accelerator)
        seeds: list[tuple[int, ...]] = [(self._seed, step, 2, int(place)) for place in places]
        batch = self.reader.batch(drawn[places])
        shares = [self._share(seed) for seed in seeds]
        errors = self._errors(model, batch, torch.tensor(shares), seeds)
        return errors.sum() * accelerator.num_processes / size

    @torch.no_grad()
    def heldout(self, model: nn.Module) -> float:
        """The loss on pictures that are held out, at noise levels spread evenly; every process
        computes all of it. Always the same noise, and all levels of one weight."""
        rows, total = self.reader.rows(heldout=True), 0.0
        rng = np.random.default_rng(self._seed)
        rows = np.sort(rng.permutation(rows)[:HELDOUT])
        # Few pictures are measured at several levels each.
        rows = np.repeat(rows, max(1, HELDOUT // (2 * len(rows))))
        shares = rng.permutation((np.arange(len(rows)) + 0.5) / len(rows))
        for batch_rows in self.reader.in_batches(np.unique(rows), self._options.batch_size):
            places = np.flatnonzero(np.isin(rows, batch_rows))
            for start in range(0, len(places), self._options.batch_size):
                some = places[start : start + self._options.batch_size]
                batch = self.reader.batch(rows[some])
                seeds: list[tuple[int, ...]] = [(self._seed, 3, int(place)) for place in some]
                values = torch.from_numpy(shares[some])
                total += float(self._errors(model, batch, values, seeds, weighted=False).sum())
        return total / len(rows)

    def _share(self, seed: tuple[int, ...]) -> float:
        """A share of noise, between 0 and 1."""
        # The scripts' u counts from noise to data, as the timesteps of a schedule do.
        u = compute_density_for_timestep_sampling(
            self._options.weighting, 1, generator=_generator((*seed, 4)), **_DENSITY
        )
        return float(1 - u)

    def _errors(
        self,
        model: nn.Module,
        batch: calls.Batch,
        shares: Tensor,
        seeds: list[tuple[int, ...]],
        weighted: bool = True,
    ) -> Tensor:
        """The loss of each sample, [batch] in float32.

        Args:
            shares: of noise, between the least and the largest that the transformer is for,
                [batch].
            seeds: each sample's, of its noise.
        """
        family, rows = blocks.family(model), batch.rows
        low, high = (torch.from_numpy(rows[key]) for key in ("noise_low", "noise_high"))
        shares = (low + (high - low) * shares.double()).float()
        arguments, target = noised(batch, family, shares, seeds)
        ready = calls.Batch(arguments, target, rows, batch.numbers).to_float32()
        ready = ready.to(self._accelerator.device)
        with self._accelerator.autocast():
            answer = blocks.answer(model, ready.arguments)
        errors = (answer.float() - ready.output).square().flatten(1).mean(1)
        if weighted:
            weights = compute_loss_weighting_for_sd3(self._options.weighting, shares)
            errors = errors * weights.to(errors)
        return errors


def noised(
    batch: calls.Batch, family: Any, shares: Tensor, seeds: list[tuple[int, ...]]
) -> tuple[dict[str, Any], Tensor]:
    """The transformer's arguments for pictures with noise, and what it is to answer.

    Args:
        batch: of encoded.parquet.
        family: the transformer's.
        shares: of noise, float32 [batch].
        seeds: of each sample's noise.
    """
    state, times = batch.arguments[family.state], batch.arguments[family.time]
    clean = blocks.stacked(state).float()
    noise = torch.stack(
        [torch.randn(x.shape, generator=_generator(s)) for x, s in zip(clean, seeds, strict=True)]
    )
    noisy = torch.lerp(clean, noise, shares.view(-1, *[1] * (clean.ndim - 1)))
    data, last = (torch.from_numpy(batch.rows[k]) for k in ("time_at_data", "time_at_noise"))
    moved = (data + (last - data) * shares.double()).to(times.dtype)
    sign = torch.from_numpy(batch.rows["sign"]).float()
    signed = sign.view(-1, *[1] * (batch.output.ndim - 1))
    target = signed * noise.reshape(batch.output.shape) - batch.output
    given = noisy if isinstance(state, Tensor) else list(noisy)
    return {**batch.arguments, family.state: given, family.time: moved}, target


def _generator(seed: tuple[int, ...]) -> torch.Generator:
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
