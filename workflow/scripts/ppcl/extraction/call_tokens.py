"""The tokens of one replayed call that extraction keeps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.extraction import token_store
from ppcl.settings import ExtractSettings
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context


def pick_tokens(
    masks: blocks.Streams,
    stream: str,
    shape: Sequence[int],
    count: int,
    rows: np.ndarray,
    seed: int,
) -> list[np.ndarray]:
    """Positions of random real tokens, an array per sample: `count`, or all if there are fewer.

    The choice depends on the seed and the row number, not on how rows were batched.

    Args:
        masks: stream -> mask [batch, tokens] of real tokens (`blocks.token_masks`).
        shape: batch, tokens of the stream.
        rows: row numbers of the samples, [batch].
    """
    batch, length = shape
    mask = masks[stream].cpu().numpy() if stream in masks else np.ones((batch, length), bool)
    # In random order, so that the first of them are a random choice too.
    return [
        np.random.default_rng((seed, int(row))).permutation(np.flatnonzero(m))[:count]
        for row, m in zip(rows, mask, strict=True)
    ]


class Places:
    """The places of n chosen tokens in a batch, sample by sample.

    Args:
        chosen: positions of the chosen tokens, an array per sample.
        device: of the streams from which the tokens are taken.

    Attributes:
        samples, tokens: [n], of each token, its sample and its position there.
    """

    def __init__(self, chosen: list[np.ndarray], device: torch.device):
        self.samples = np.repeat(np.arange(len(chosen)), [len(places) for places in chosen])
        self.tokens = np.concatenate(chosen)
        self._where = tuple(torch.from_numpy(w).to(device) for w in (self.samples, self.tokens))

    def of(self, x: Tensor) -> Tensor:
        """The tokens [n, d] at these places in a stream [batch, tokens, d]."""
        return x[self._where]


class CallTokens:
    """Collects some tokens of one call, before and after every block.

    `before_block` and `after_block` are for `blocks.watch`.

    Args:
        settings: moment_tokens and sample_tokens per row and stream.
        recorded: the call, on the CPU: masks are read without waiting for the device.
        add_moments: is called with stream, block number, and the tokens [n, d] of rows to fit on,
            before and after the block (`Moments.add`); None if moments are not wanted.
    """

    def __init__(
        self,
        context: Context,
        settings: ExtractSettings,
        recorded: calls.Batch,
        add_moments: Callable[[str, int, Tensor, Tensor], None] | None,
    ):
        self._family, self._device = blocks.family(context.transformer), context.device
        self._seed, self._settings = context.seed, settings
        self._recorded, self._add_moments = recorded, add_moments
        # By stream: places of the tokens for moments (of rows to fit on), and of those for the
        # sample; padding [batch, tokens]; number of tokens; number of the first block that gets it.
        self._moment_places: dict[str, Places] = {}
        self._sample_places: dict[str, Places] = {}
        self._padding: blocks.Streams = {}
        self._lengths: dict[str, int] = {}
        self._first: dict[str, int] = {}
        # By stream: tokens for moments before the present block; tokens for the sample at each
        # boundary so far. By block and stream: whether all real tokens are finite.
        self._before: blocks.Streams = {}
        self._sampled: dict[str, list[Tensor]] = {}
        self._finite: dict[tuple[int, str], Tensor] = {}

    def before_block(self, block: blocks.Block, bound: dict[str, Any]) -> None:
        """Keeps tokens of a block's input.

        Raises:
            UserError: a stream has another number of tokens than in earlier blocks.
        """
        self._before.clear()
        for stream, x in block.inputs(bound).items():
            if stream not in self._sample_places:
                self._choose(block, stream, x)
            elif x.shape[1] != self._lengths[stream]:
                raise UserError(
                    f"extract: block {block.index} gets another number of {stream} tokens than "
                    "the blocks before; give its list a stream of its own in "
                    "workflow/scripts/ppcl/transformer/families.py"
                )
            self._before[stream] = self._moment_places[stream].of(x)

    def _choose(self, block: blocks.Block, stream: str, x: Tensor) -> None:
        """Chooses tokens of a stream x [batch, tokens, d], at the first block that gets it."""
        recorded, settings = self._recorded, self._settings
        masks = blocks.token_masks(self._family, recorded.arguments, {stream: x})
        chosen = pick_tokens(
            masks, stream, x.shape[:2], settings.moment_tokens, recorded.numbers, self._seed
        )
        held = zip(chosen, recorded.rows["heldout"], strict=True)
        to_fit = [places[:0] if out else places for places, out in held]
        self._moment_places[stream] = Places(to_fit, self._device)
        few = [places[: settings.sample_tokens] for places in chosen]
        self._sample_places[stream] = Places(few, self._device)
        self._sampled[stream] = [self._sample_places[stream].of(x)]
        if stream in masks:
            self._padding[stream] = ~masks[stream].to(self._device)
        self._first[stream], self._lengths[stream] = block.index, x.shape[1]

    def after_block(self, block: blocks.Block, returned: blocks.Streams) -> None:
        """Keeps tokens of a block's output, and whether it is finite."""
        for stream, out in returned.items():
            sound = torch.isfinite(out).all(-1)
            if stream in self._padding:
                sound |= self._padding[stream]
            self._finite[block.index, stream] = sound.all()
            self._sampled[stream].append(self._sample_places[stream].of(out))
            if self._add_moments and len(before := self._before[stream]):
                after = self._moment_places[stream].of(out)
                self._add_moments(stream, block.index, before, after)

    def refuse_nonfinite(self) -> None:
        """Reads the flags of the call from the device, and so waits for it.

        Raises:
            UserError: a real token is NaN or infinite; names the first block and stream.
        """
        broken = ~_on_host(torch.stack(list(self._finite.values())))
        if broken.any():
            block, stream = list(self._finite)[int(broken.argmax())]
            raise UserError(
                f"extract: the {stream} stream after block {block} holds NaN or infinity; set "
                "teacher.dtype: float32 (or bfloat16 in place of float16)"
            )

    def put_into(self, sample: token_store.Kept, most: int) -> None:
        """Adds this call's tokens to the sample.

        Args:
            most: upper bound of a stream's sampled tokens in all calls together.
        """
        rows = self._recorded.rows
        per_row = {
            "prompt": rows["prompt_index"],
            "step": rows["step"],
            "timestep": rows["timestep"],
            "heldout": rows["heldout"],
        }
        for stream, boundaries in self._sampled.items():
            values = _on_host(torch.stack(boundaries).float())
            places = self._sample_places[stream]
            about = {name: value[places.samples] for name, value in per_row.items()}
            about["token"] = places.tokens
            sample.add(stream, values, about, self._first[stream], most)


def _on_host(x: Tensor) -> np.ndarray:
    """A copy on the CPU, made after waiting for the device; so there should be few of them."""
    return x.cpu().numpy()
