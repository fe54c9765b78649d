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
    """Positions of random real tokens of every sample: `count`, or all where there are fewer.

    The choice depends on the sample and its row number, not on how rows were batched.
    """
    batch, length = shape
    mask = masks[stream].cpu().numpy() if stream in masks else np.ones((batch, length), bool)
    # In random order, so that a part of them is random too.
    return [
        np.random.default_rng((seed, int(row))).permutation(np.flatnonzero(m))[:count]
        for row, m in zip(rows, mask, strict=True)
    ]


class Places:
    """Some tokens of every sample of a batch, in the samples' order.

    Args:
        chosen: positions of each sample's.
    """

    def __init__(self, chosen: list[np.ndarray], device: torch.device):
        self.samples = np.repeat(np.arange(len(chosen)), [len(places) for places in chosen])
        self.tokens = np.concatenate(chosen)
        self._where = tuple(torch.from_numpy(w).to(device) for w in (self.samples, self.tokens))

    def of(self, x: Tensor) -> Tensor:
        """These tokens of a stream [batch, tokens, d]: [n, d]."""
        return x[self._where]


class CallTokens:
    """Some tokens of a call, before and after every block that it goes through.

    `before_block` and `after_block` are for `blocks.watch`.

    Args:
        settings: moment_tokens and sample_tokens per row and stream.
        recorded: the call as it was read: the device need not be asked for its masks.
        add_moments: takes stream, block, and tokens [n, d] of rows to fit on before and after the
            block (`Moments.add`); None: nobody wants them.
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
        # By stream: places of tokens for moments, of rows to fit on, and for the sample; padding
        # [batch, tokens]; how many tokens there are; the first block that gets it.
        self._moment_places: dict[str, Places] = {}
        self._sample_places: dict[str, Places] = {}
        self._padding: blocks.Streams = {}
        self._lengths: dict[str, int] = {}
        self._first: dict[str, int] = {}
        # Tokens for moments before the present block, and for the sample at each boundary so far.
        self._before: blocks.Streams = {}
        self._sampled: dict[str, list[Tensor]] = {}
        self._finite: dict[tuple[int, str], Tensor] = {}

    def before_block(self, block: blocks.Block, bound: dict[str, Any]) -> None:
        """Keeps what a block gets.

        Raises:
            UserError: a stream has another number of tokens than before.
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
        """Chooses tokens of a stream [batch, tokens, d], when its first block gets it."""
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
        """Keeps what a block returns."""
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
        """Reads the call's flags, by block and stream in data-flow order.

        Raises:
            UserError: a real token was NaN or infinite.
        """
        broken = ~_on_host(torch.stack(list(self._finite.values())))
        if broken.any():
            block, stream = list(self._finite)[int(broken.argmax())]
            raise UserError(
                f"extract: the {stream} stream after block {block} holds NaN or infinity; set "
                "teacher.dtype: float32 (or bfloat16 in place of float16)"
            )

    def put_into(self, sample: token_store.Kept, most: int) -> None:
        """Adds the sampled tokens; most: that there can be of a stream in all calls."""
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
    """A copy from the device, for which all that it was asked for must be done: one a call."""
    return x.cpu().numpy()
