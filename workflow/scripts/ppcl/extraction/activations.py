"""What extraction keeps of the teacher's activations: moments for probes, tokens for CKA.

Boundary b is the input of block b, boundary M the output of the last block, so the output of block
i is boundary i + 1.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.extraction import modulation_inputs, token_store
from ppcl.runtime import devices
from ppcl.settings import ExtractSettings
from ppcl.transformer import blocks, calls


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


def pick_tokens(
    masks: blocks.Streams,
    stream: str,
    shape: tuple[int, int],
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


@torch.no_grad()
def collect(
    transformer: nn.Module,
    reader: calls.Reader,
    rows: np.ndarray,
    settings: ExtractSettings,
    seed: int,
    device: torch.device,
    folder: Path,
    progress,
    identity: str = "",
    modulations: modulation_inputs.Sums | None = None,
    sums: bool = True,
) -> tuple[Moments, dict[str, dict]]:
    """Replays recorded calls and returns the probes' moments and the token sample.

    Args:
        rows: row numbers of the calls to replay, of both splits.
        settings: batch_size; moment_tokens and sample_tokens per row and stream;
            checkpoint_every so many rows.
        folder: where the token sample is kept, and a checkpoint, from which a killed run goes on.
        identity: digest of what decides the result, for checkpoints; others are not used.
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
    sequence = blocks.block_sequence(transformer)
    sample = token_store.resume(folder, identity)
    moments = Moments(device, apart=devices.free_memory(device) is not None)
    moments.put(sample.sums)
    if modulations is None:
        modulations = modulation_inputs.Sums(transformer, [], device)
    modulations.put(sample.conditioning)
    last = None if modulations.last else sequence[-1].index
    size, most = settings.batch_size, len(rows) * settings.sample_tokens
    regular = max(1, settings.checkpoint_every // size)
    every = reader.in_batches(rows, size)
    progress.update(sum(map(len, every[: sample.batches])))
    resumed = sample.batches
    for recorded in reader.batches(rows, size, device, start=sample.batches):
        batch = recorded.to(device)
        family = blocks.family(transformer)
        before: blocks.Streams = {}
        padding: blocks.Streams = {}
        many: dict[str, Places] = {}  # of rows to fit on
        few: dict[str, Places] = {}
        lengths: dict[str, int] = {}
        first: dict[str, int] = {}
        kept: dict[str, list[Tensor]] = {}
        finite: dict[tuple[int, str], Tensor] = {}

        def look(block, bound):
            before.clear()
            for stream, x in block.inputs(bound).items():
                if stream not in few:
                    # Of the call as it was read: the device need not be asked for its masks.
                    masks = blocks.token_masks(family, recorded.arguments, {stream: x})
                    chosen = pick_tokens(
                        masks,
                        stream,
                        x.shape[:2],
                        settings.moment_tokens,
                        recorded.numbers,
                        seed,
                    )
                    held = zip(chosen, batch.rows["heldout"], strict=True)
                    many[stream] = Places([c[:0] if out else c for c, out in held], device)
                    few[stream] = Places([c[: settings.sample_tokens] for c in chosen], device)
                    kept[stream] = [few[stream].of(x)]
                    if stream in masks:
                        padding[stream] = ~masks[stream].to(device)
                    first[stream], lengths[stream] = block.index, x.shape[1]
                elif x.shape[1] != lengths[stream]:
                    raise UserError(
                        f"extract: block {block.index} gets another number of {stream} tokens than "
                        "the blocks before; give its list a stream of its own in "
                        "workflow/scripts/ppcl/transformer/families.py"
                    )
                before[stream] = many[stream].of(x)

        def learn(block, returned):
            for stream, out in returned.items():
                sound = torch.isfinite(out).all(-1)
                if stream in padding:
                    sound |= padding[stream]
                finite[block.index, stream] = sound.all()
                kept[stream].append(few[stream].of(out))
                if sums and len(before[stream]):
                    moments.add(stream, block.index, before[stream], many[stream].of(out))

        with modulations.watching(), blocks.watch(sequence, look, learn, stop_after=last) as run:
            run(transformer, batch.arguments)
        modulations.take(~batch.rows["heldout"])
        _refuse_nonfinite(finite)
        moments.settle()
        modulations.settle()
        for stream, values in kept.items():
            values = _on_host(torch.stack(values).float())
            per_row = {
                "prompt": batch.rows["prompt_index"],
                "step": batch.rows["step"],
                "timestep": batch.rows["timestep"],
                "heldout": batch.rows["heldout"],
            }
            found = {name: value[few[stream].samples] for name, value in per_row.items()}
            found["token"] = few[stream].tokens
            sample.add(stream, values, found, first[stream], most)
        sample.batches += 1
        if sample.batches % regular == 0 and sample.batches < len(every):
            moments.settle(everything=True)
            modulations.sum_up(everything=True)
            sample.sums, sample.conditioning = moments.sums, modulations.found
            sample.save(identity)
        progress.update(len(batch))
    moments.settle(everything=True)
    modulations.sum_up(everything=True)
    fitted = {name.split(".")[0] for name in moments.sums}
    to_fit = sums and not reader.index["heldout"][rows].all()
    for stream, store in sample.stores.items():
        boundaries, tokens, _ = store.shape
        if not tokens or (to_fit and boundaries > 1 and stream not in fitted):
            raise UserError(
                f"extract: the {stream} stream of every call {'to fit on ' * bool(tokens)}is "
                "padding alone, by the mask that the pipeline gives; record prompts that are not "
                "empty (record.prompts)"
            )
    if sample.batches > resumed:  # what is made of it may be lost
        sample.sums, sample.conditioning = moments.sums, modulations.found
        sample.save(identity)
    return moments, {
        stream: sample.joined(stream) | {"first": sample.first[stream], "value": store}
        for stream, store in sample.stores.items()
    }


def _on_host(x: Tensor) -> np.ndarray:
    """A copy from the device, for which all that it was asked for must be done: one a call."""
    return x.cpu().numpy()


def _refuse_nonfinite(finite: dict[tuple[int, str], Tensor]) -> None:
    """Reads a call's flags, by block and stream in data-flow order."""
    broken = ~_on_host(torch.stack(list(finite.values())))
    if broken.any():
        block, stream = list(finite)[int(broken.argmax())]
        raise UserError(
            f"extract: the {stream} stream after block {block} holds NaN or infinity; set "
            "teacher.dtype: float32 (or bfloat16 in place of float16)"
        )
