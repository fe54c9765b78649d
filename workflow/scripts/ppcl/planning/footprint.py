"""What a step needs, measured without weights: bytes and floating-point operations.

The step runs on tensors of the meta device, which have shapes and no content. Every storage that
PyTorch would allocate is counted from its birth to its end; attention is taken for a fused kernel,
as GPUs have it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ppcl.transformer import blocks

META = torch.device("meta")


@contextmanager
def _fused_attention():
    """A context in which attention is one fused kernel. For tensors without content PyTorch picks
    the unfused one, which keeps all attention weights [tokens, tokens]."""
    stock = F.scaled_dot_product_attention
    # Not a TorchFunctionMode: what checkpointing computes again would bypass it.
    F.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    # This kernel's shapes, and what it keeps for the backward pass, are those of the CUDA kernels.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]


_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_args, out_shape=None, **_kwargs: sdpa_flop_count(
            query, key, value
        )
    )
}


class Meter(TorchDispatchMode):
    """Records when operations allocate storages and when these are freed."""

    # (operation, shapes and dtypes of its arguments) -> layouts of its results. PyTorch works
    # shapes out in Python, step by step; blocks that are alike need that once.
    _known: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self._alive: dict[int, tuple[int, int, weakref.ref]] = {}
        self._events: list[tuple[int, int]] = []  # (number of a storage, its bytes or minus those)
        self._born = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        given: set[int] = set()
        key = (func, _signature(args, given), _signature(kwargs or {}, given))
        if layouts := self._known.get(key):
            made = [torch.empty_strided(a, b, dtype=c, device=META) for a, b, c in layouts]
            returned = made[0] if len(made) == 1 else tuple(made)
        else:
            returned = func(*args, **(kwargs or {}))
            several = returned if isinstance(returned, tuple | list) else [returned]
            made = [t for t in several if isinstance(t, Tensor)]
            if _all_new(func, returned, made, given):
                self._known[key] = [(t.shape, t.stride(), t.dtype) for t in made]
        for tensor in made:
            if _storage(tensor) not in given:
                self._see(tensor)
        return returned

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        number = self._born = self._born + 1

        def end(_reference):
            del self._alive[key]
            self._events.append((number, -size))

        self._alive[key] = (number, size, weakref.ref(storage, end))
        self._events.append((number, size))

    def peak(self, gradients: Iterable[Tensor] = (), times: float = 1.0) -> int:
        """Most bytes that were alive at once.

        Args:
            gradients: tensors, alive still, whose bytes count `times` as much.
        """
        special = {self._alive[k][0] for k in map(_storage, gradients) if k in self._alive}
        alive = most = 0.0
        for number, change in self._events:
            alive += change * (times if number in special else 1)
            most = max(most, alive)
        return int(most)


@contextmanager
def without_content() -> Iterator[Meter]:
    """A context in which new tensors are on the meta device, and attention is one fused kernel."""
    with _fused_attention(), META, Meter() as meter:
        yield meter


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _signature(value: Any, storages: set[int]) -> Any:
    """What of an operation's arguments decides its result's layout.

    storages: the arguments' storages are added to it.
    """
    if isinstance(value, Tensor):
        storages.add(_storage(value))
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, tuple | list):
        return tuple(_signature(v, storages) for v in value)
    if isinstance(value, dict):
        return tuple((k, _signature(v, storages)) for k, v in value.items())
    return type(value), value


def _all_new(func, returned: Any, made: list[Tensor], given: set[int]) -> bool:
    """Whether an operation returns nothing but one or several new tensors."""
    results = func._schema.returns
    storages = {_storage(t) for t in made}
    return (
        bool(made)
        and not func._schema.is_mutable
        and all(one.alias_info is None for one in results)
        and len(results) == len(made) == len(storages)
        and isinstance(returned, Tensor | tuple)
        and not storages & given
        and all(t.is_meta and t.storage_offset() == 0 for t in made)
    )


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step needs beside weights and optimizer states.

    Attributes:
        activations: the peak, without gradients of weights.
        peak: the peak, with the gradients of weights that are there at that moment.
    """

    activations: int
    peak: int

    def beside(self, others: int) -> "Footprint":
        """This footprint with `others` bytes more, which are there all along."""
        return Footprint(self.activations + others, self.peak + others)


def measured(
    run: Callable[[], Any], trained: Iterable[nn.Module] = (), times: float = 1.0
) -> Footprint:
    """The footprint of a step whose modules and inputs are on the meta device.

    Args:
        run: the step; it differentiates its losses itself, with `torch.autograd.backward`.
        trained: what gets gradients.
        times: bytes of a weight's gradient in training over those of its gradient in `run`.
    """
    with without_content() as meter:
        kept = run()  # what a step returns is there until its end
    gradients = [p.grad for m in trained for p in m.parameters() if p.grad is not None]
    footprint = Footprint(meter.peak(gradients, 0), meter.peak(gradients, times))
    del kept
    for module in trained:
        module.zero_grad(set_to_none=True)
    return footprint


def flops(transformer: nn.Module, arguments: dict[str, Any]) -> tuple[list[int], int]:
    """Floating-point operations of one call: of every block, and of all.

    A multiply and an add are two; only products of matrices, attention and convolutions count.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
    sequence = blocks.block_sequence(transformer)
    per_block = [0] * len(sequence)

    def before(block, _bound):
        per_block[block.index] -= counter.get_total_flops()

    def after(block, _streams):
        per_block[block.index] += counter.get_total_flops()

    with torch.no_grad(), blocks.watch(sequence, before, after) as run:
        with without_content(), counter:
            run(transformer, arguments)
    return per_block, counter.get_total_flops()
