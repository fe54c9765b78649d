"""What extraction keeps of the teacher's activations: moments for probes, tokens for CKA.

Of M blocks, boundary b is the input of block b, and boundary M the output of the last block. So the
output of block i is boundary i + 1.
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
    """Sums over tokens that determine every probe (Eq. 1).

    With X [n, d] a block's input and Y = T_i(X) - X its residual: `x_x`, X^T X [d, d]; `x_y`, X^T Y
    [d, d]; `x_sum` and `y_sum` [d]; `y_y`, the squared norm of Y [1]; `count`, n [1]. All float64.
    Memory does not depend on the number of tokens added.

    Args:
        device: where the products are made. The sums are there too, unless `apart`.
        apart: keeps the sums in main memory, since they may be half as large as the teacher. Every
            product [d, d] is then copied from the device. Tokens therefore wait in main memory
            until there are at least d, so that there is one product for all of them.

    Attributes:
        sums: `<stream>.<block>.<name>` -> a sum, with names as above.
    """

    def __init__(self, device: torch.device, apart: bool = False):
        self._device, self._apart = devices.statistics_device(device), apart
        self._waiting: dict[tuple[str, int | str], list[tuple[Tensor, Tensor]]] = {}
        self.sums: dict[str, Tensor] = {}

    def put(self, sums: Mapping[str, Tensor]) -> None:
        """Replaces the sums by copies of these, to go on from a checkpoint."""
        rest = torch.device("cpu") if self._apart else self._device
        # Copies, since tensors from a file may be unaligned, and sums then round in another way.
        self.sums = {name: value.to(rest, copy=True) for name, value in sums.items()}

    def add(self, stream: str, block: int | str, x: Tensor, after: Tensor) -> None:
        """Adds tokens of a stream. If `apart`, they are copied to main memory and wait (`settle`).

        Args:
            x, after: [tokens, d], before and after the block; of any float dtype.
        """
        if self._apart:
            x, after = (devices.to_main_memory(t) for t in (x, after))
            self._waiting.setdefault((stream, block), []).append((x, after))
        else:
            self._sum(stream, block, x, after)

    def settle(self, everything: bool = False) -> None:
        """Adds waiting tokens to the sums: those of each block and stream that has at least d, or
        `everything`.

        Synchronise the device before: copies of tokens to main memory may still be under way.
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
        for name, other in (("x_x", x), ("x_y", y)):  # in place, without a second [d, d] sum
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
        settings: uses batch_size; moment_tokens and sample_tokens, per row and stream;
            checkpoint_every, rows between checkpoints.
        state: where the token sample and a checkpoint are kept. A killed run goes on from there.
        progress: a tqdm bar that counts rows.
        modulations: gets the inputs of modulation matrices, of rows to fit on.
        sums: whether to sum up moments.

    Returns:
        The moments (of rows to fit on), and stream -> its sample: `value`, a `token_store.Store`
        [boundaries, n, d] float32; `first`, the number of its first boundary; and [n] each,
        `prompt`, `step`, `timestep`, `token` (position in the sequence) and `heldout`.

    Raises:
        UserError: an activation is NaN or infinite (says the block and the stream), no token is
            left to fit on, the disk has no room, or the files of a killed run are damaged.
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
        tokens.refuse_nonfinite()  # reads flags from the device, and so synchronises it
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
    if sample.batches > resumed:  # a run killed before it writes its results goes on from here
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
    """Runs one call. It ends after the last block, unless the last AdaLN is watched too."""
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
    """Raises UserError if a stream had no real token, or, if `to_fit`, none in rows to fit on."""
    fitted = {name.split(".")[0] for name in moments.sums}
    for stream, store in sample.stores.items():
        boundaries, tokens, _ = store.shape
        if not tokens or (to_fit and boundaries > 1 and stream not in fitted):
            raise UserError(
                f"extract: the {stream} stream of every call {'to fit on ' * bool(tokens)}is "
                "padding alone, by the mask that the pipeline gives; record prompts that are not "
                "empty (record.prompts)"
            )
