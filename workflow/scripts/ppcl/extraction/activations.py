"""What extraction keeps of the teacher's activations: moments for probes, tokens for CKA.

Boundary b is the input of block b, boundary M the output of the last block, so the output of block
i is boundary i + 1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.extraction import modulation_inputs, token_store
from ppcl.extraction.call_tokens import CallTokens
from ppcl.runtime import devices
from ppcl.settings import ExtractSettings
from ppcl.transformer import blocks
from ppcl.transformer.context import Context, State


class Moments:
    """Sums over tokens that determine every probe (Eq. 1): X^T X, X^T Y and their companions.

    X is a block's input and Y = T_i(X) - X its residual; float64 [d, d] per block and stream.
    Memory does not depend on the number of tokens added.

    Args:
        device: where the products are made and, unless they are apart, the sums are.
        apart: the sums are in main memory, as a GPU has better use for what may be half as much as
            the teacher. Tokens wait there too until they are as many as channels: a product
            [d, d] has a long way, and comes once for d tokens.
    """

    def __init__(self, device: torch.device, apart: bool = False):
        self._device, self._apart = devices.statistics_device(device), apart
        self._waiting: dict[tuple[str, int | str], list[tuple[Tensor, Tensor]]] = {}
        self.sums: dict[str, Tensor] = {}

    def put(self, sums: Mapping[str, Tensor]) -> None:
        """Starts from these sums."""
        rest = torch.device("cpu") if self._apart else self._device
        # Copies: what was read from a file may lie at any address, and then rounds in another way.
        self.sums = {name: value.to(rest, copy=True) for name, value in sums.items()}

    def add(self, stream: str, block: int | str, x: Tensor, after: Tensor) -> None:
        """Adds tokens, on the device or on their way (see `settle`).

        x, after [tokens, d]: before and after the block, of any float dtype.
        """
        if self._apart:
            x, after = (devices.to_main_memory(t) for t in (x, after))
            self._waiting.setdefault((stream, block), []).append((x, after))
        else:
            self._sum(stream, block, x, after)

    def settle(self, everything: bool = False) -> None:
        """Sums up what waits: where that is enough, or `everything`.

        The device must have done what it was asked for: until then tokens are not all there.
        """
        for key, parts in self._waiting.items():
            if parts and (everything or sum(len(x) for x, _ in parts) >= parts[0][0].shape[1]):
                x, after = (torch.cat(side) for side in zip(*parts, strict=True))
                parts.clear()
                self._sum(*key, x, after)

    def _sum(self, stream: str, block: int | str, x: Tensor, after: Tensor) -> None:
        x, after = (t.to(self._device).double() for t in (x, after))  # MPS casts to no float64
        y = after - x
        parts = {
            "count": torch.full((1,), len(x), dtype=torch.float64, device=x.device),
            "x_sum": x.sum(0),
            "y_sum": y.sum(0),
            "y_y": y.square().sum()[None],
        }
        rest = torch.device("cpu") if self._apart else x.device
        for name, value in parts.items():
            key, value = f"{stream}.{block}.{name}", value.to(rest)
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        for name, other in (("x_x", x), ("x_y", y)):  # in place: a batch has few tokens for d x d
            key = f"{stream}.{block}.{name}"
            if key not in self.sums:
                self.sums[key] = (x.T @ other).to(rest)
            elif rest == x.device:
                self.sums[key].addmm_(x.T, other)
            else:
                self.sums[key] += (x.T @ other).to(rest)


@torch.no_grad()
def collect(
    context: Context,
    rows: np.ndarray,
    settings: ExtractSettings,
    state: State,
    progress,
    modulations: modulation_inputs.Sums | None = None,
    sums: bool = True,
) -> tuple[Moments, dict[str, dict]]:
    """Replays recorded calls and returns the probes' moments and the token sample.

    Args:
        rows: row numbers of the calls to replay, of both splits.
        settings: batch_size; moment_tokens and sample_tokens per row and stream;
            checkpoint_every so many rows.
        state: where the token sample is kept, and a checkpoint, from which a killed run goes on.
        progress: a bar, which is told how many rows are done.
        modulations: sums up what modulation matrices get, of rows of the fit split.
        sums: whether there shall be moments.

    Returns:
        The moments (rows of the fit split only), and per stream the sample: `value`, a
        `token_store.Store` [boundaries, n, d], the number of its `first` boundary, and n-vectors
        `prompt`, `step`, `timestep`, `token`, `heldout`.

    Raises:
        UserError: an activation is NaN or infinite; says the block and the stream. Or there is no
            token to fit on, no room for the sample, or what a killed run left is damaged.
    """
    device, size = context.device, settings.batch_size
    sample = token_store.resume(state.folder, state.identity)
    moments = Moments(device, apart=devices.free_memory(device) is not None)
    moments.put(sample.sums)
    if modulations is None:
        modulations = modulation_inputs.Sums(context.transformer, [], device)
    modulations.put(sample.conditioning)

    def save() -> None:
        sample.sums, sample.conditioning = moments.sums, modulations.sums
        sample.save(state.identity)

    regular = max(1, settings.checkpoint_every // size)
    every = context.reader.in_batches(rows, size)
    progress.update(sum(map(len, every[: sample.batches])))
    resumed = sample.batches
    for recorded in context.reader.batches(rows, size, device, start=sample.batches):
        tokens = CallTokens(context, settings, recorded, moments.add if sums else None)
        _replay(context.transformer, recorded.to(device).arguments, tokens, modulations)
        modulations.take(~recorded.rows["heldout"])
        tokens.refuse_nonfinite()  # reads flags, so the device has done all that it was asked for
        moments.settle()
        modulations.settle()
        tokens.put_into(sample, len(rows) * settings.sample_tokens)
        sample.batches += 1
        if sample.batches % regular == 0 and sample.batches < len(every):
            moments.settle(everything=True)
            modulations.sum_up(everything=True)
            save()
        progress.update(len(recorded))
    moments.settle(everything=True)
    modulations.sum_up(everything=True)
    to_fit = sums and not context.reader.index["heldout"][rows].all()
    _refuse_padding_alone(sample, moments, to_fit)
    if sample.batches > resumed:  # what is made of it may be lost
        save()
    return moments, {
        stream: sample.joined(stream) | {"first": sample.first[stream], "value": store}
        for stream, store in sample.stores.items()
    }


def _replay(
    transformer: nn.Module,
    arguments: Mapping[str, Any],
    tokens: CallTokens,
    modulations: modulation_inputs.Sums,
) -> None:
    """Runs one call, no further than to what is wanted of it."""
    sequence = blocks.block_sequence(transformer)
    watched = blocks.watch(
        sequence,
        tokens.before_block,
        tokens.after_block,
        stop_after=None if modulations.last else sequence[-1].index,
    )
    with modulations.watching(), watched as run:
        run(transformer, arguments)


def _refuse_padding_alone(sample: token_store.Kept, moments: Moments, to_fit: bool) -> None:
    """Raises UserError if a stream had no real token, or none `to_fit` probes on."""
    fitted = {name.split(".")[0] for name in moments.sums}
    for stream, store in sample.stores.items():
        boundaries, tokens, _ = store.shape
        if not tokens or (to_fit and boundaries > 1 and stream not in fitted):
            raise UserError(
                f"extract: the {stream} stream of every call {'to fit on ' * bool(tokens)}is "
                "padding alone, by the mask that the pipeline gives; record prompts that are not "
                "empty (record.prompts)"
            )
