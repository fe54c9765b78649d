"""All that depends on the device: choice, number format, synchronisation, memory."""

import copy
import functools
import itertools
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ppcl.errors import UserError
from ppcl.runtime import cores, gpus


def choose(setting: str) -> torch.device:
    """The device to run on: `auto` takes CUDA, then MPS, then the CPU.

    Of several GPUs this process takes one that no other job has, and sees no other one.

    Raises:
        UserError: the device that the config asks for is not there.
    """
    if setting.split(":")[0] in ("auto", "cuda"):
        gpus.take()
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if setting == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(setting.split(":")[0], False):
        there = ", ".join(name for name, ok in available.items() if ok)
        raise UserError(
            f"config key 'device': {setting} is not available here; use auto, or {there}"
        )
    return torch.device(setting)


def dtype(name: str) -> torch.dtype:
    """A torch number format by name, such as bfloat16."""
    return getattr(torch, name)


def use_threads(weights: Iterable[torch.Tensor], device: torch.device) -> bool:
    """On the CPU, sets torch's threads for a model with these weights: all cores of this process
    if `cores.worth_threads`, else one. Returns whether several are; False on other devices."""
    if device.type != "cpu":
        return False
    several = cores.worth_threads(weight.shape for weight in weights)
    torch.set_num_threads(cores.available() if several else 1)
    return several


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it, for honest timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def statistics_device(device: torch.device) -> torch.device:
    """Where float64 sums are kept: on the device, unless it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def to_main_memory(x: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU. From CUDA it is asynchronous: it has its values after `synchronise`."""
    return x.to("cpu", non_blocking=x.device.type == "cuda", copy=True)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """torch's global random states: the CPU's and, if it has its own, the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_random_states(device: torch.device, states: Iterable[torch.Tensor]) -> None:
    """Sets torch's global random states to what `random_states` returned."""
    first, *rest = states
    torch.set_rng_state(first)
    for state in rest:
        torch.get_device_module(device).set_rng_state(state, device)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of `peak_memory`, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the peak of tensors since `reset_peak_memory`; on MPS what the driver holds
    now; on the CPU the peak of the whole process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- models that do not fit on the device

ROOM = 0.7  # the share of a device's free memory that weights may take; the rest is activations'


def plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor consists of: itself, or, of a quantised one of torchao, its integers and
    scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain(getattr(tensor, name))]


def size(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    every = (*module.parameters(), *module.buffers())
    return sum(part.numel() * part.element_size() for t in every for part in plain(t))


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device with memory of its own, else None."""
    if device.type != "cuda":
        return None
    # What torch keeps for later is free too.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def with_room(device: torch.device, needed: int) -> torch.device:
    """The device if so many bytes are free there, else the CPU."""
    free = free_memory(device)
    return device if free is None or needed <= free else torch.device("cpu")


def offload(setting: str, sizes: Mapping[str, int], device: torch.device) -> str:
    """How components get to the device: `none` (all stay), `model` (in turn), `stream` (by block).

    Args:
        setting: the config's `teacher.offload`; `auto` takes the first for which there is room.
        sizes: bytes of every component.
    """
    if setting != "auto":
        return setting
    free = free_memory(device)
    if free is None or sum(sizes.values()) <= ROOM * free:
        return "none"
    return "model" if max(sizes.values()) <= ROOM * free else "stream"


class _Move:
    """A hook that brings a block's weights to `device`; if that is None, back to where they rest.

    diffusers' own group offloading replaces `forward` of the whole transformer, so that a shallow
    copy with other blocks (`blocks.assembled`) would run the original; and its prefetching expects
    every block in one order, while stages stop early and run blocks alone.
    """

    def __init__(self, device: torch.device | None, resting: dict[torch.Tensor, torch.Tensor]):
        self.device, self.resting = device, resting

    def __call__(self, module: nn.Module, *_call) -> None:
        if self.device is None:
            for tensor, data in self.resting.items():
                tensor.data = data
            self.resting.clear()
            return
        for tensor in (*module.parameters(), *module.buffers()):
            # Weights never change here, so there is nothing to copy back; see `stream`.
            self.resting.setdefault(tensor, tensor.data)
            tensor.data = tensor.data.to(self.device, non_blocking=True)

    def __deepcopy__(self, _memo) -> "_Stay":
        return _Stay()


class _Stay:
    """The hook of a copied block: a student stays where it is put."""

    def __call__(self, *_call) -> None:
        pass


def stream(transformer: nn.Module, block_modules: Iterable[nn.Module], device: torch.device):
    """Keeps blocks in CPU memory, and each on the device only while it runs; all other weights of
    the transformer stay on the device.

    In place. For calls without gradients only: autograd would find the weights gone. Blocks may run
    in any order, and deep copies of them are not streamed.
    """
    block_modules = list(block_modules)
    inside = {t for m in block_modules for t in (*m.parameters(), *m.buffers())}
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if tensor not in inside:
            tensor.data = tensor.data.to(device)
        elif device.type == "cuda":
            tensor.data = tensor.data.pin_memory()  # for fast transfers that need no waiting
    for module in block_modules:
        resting: dict[torch.Tensor, torch.Tensor] = {}
        module.register_forward_pre_hook(_Move(device, resting))
        module.register_forward_hook(_Move(None, resting), always_call=True)


# ---- precision


class _Lift:
    """Hooks that have a module's weights in float32 while it runs."""

    def __init__(self):
        self._kept: dict[torch.Tensor, torch.Tensor] = {}

    def up(self, module: nn.Module, *_call) -> None:
        self.up_all([*module.parameters(), *module.buffers()])

    def up_all(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                self._kept[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def down(self, *_call) -> None:
        for tensor, data in self._kept.items():
            tensor.data = data
        self._kept.clear()


def of_16_bits(module: nn.Module) -> bool:
    """Whether any of its weights are bfloat16 or float16."""
    every = itertools.chain(module.parameters(), module.buffers())
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in every)


@contextmanager
def in_float32(transformer: nn.Module, block_modules: Iterable[nn.Module]) -> Iterator[None]:
    """Has a model compute in float32 with the weights that it has, without gradients.

    Blocks, streamed ones too, are converted one at a time, so that the model does not need its
    memory twice. Its calls must be float32 (`calls.Batch.to_float32`). On CUDA, matrix products use
    TensorFloat-32: weights of 16 bits lose nothing by that, activations keep 10 bits of mantissa;
    float32 would take 8 times as long or more. Does nothing to a model that is in float32 already.
    """
    if not of_16_bits(transformer):
        yield
        return
    every = (*transformer.parameters(), *transformer.buffers())
    modules = list(dict.fromkeys(block_modules))
    inside = {t for m in modules for t in (*m.parameters(), *m.buffers())}
    handles, rest = [], _Lift()
    for module in modules:
        lift = _Lift()
        handles.append(module.register_forward_pre_hook(lift.up))
        # Before a streamed block's own hook takes its weights away.
        handles.append(module.register_forward_hook(lift.down, prepend=True, always_call=True))
    rest.up_all(tensor for tensor in every if tensor not in inside)
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, True
    try:
        yield
    finally:
        products.allow_tf32 = before
        rest.down()
        for handle in handles:
            handle.remove()


# ---- compiled blocks


class _Compiled:
    """A base class that the class of a compiled block has before the block's own class."""

    def __deepcopy__(self, memo: dict) -> nn.Module:
        # A student starts as a copy of a block; it is trained, and stays as it was written.
        plain = _plain(type(self))
        copied = memo[id(self)] = plain.__new__(plain)
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied


def _plain(compiled: type[_Compiled]) -> type[nn.Module]:
    return compiled.__mro__[2]


def uncompiled(module: nn.Module) -> type[nn.Module]:
    """A module's class, without what `compile_blocks` has put before it."""
    made_by = type(module)
    return _plain(made_by) if issubclass(made_by, _Compiled) else made_by


def compile_blocks(block_modules: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Has blocks run as compiled code. In place; deep copies of them are not compiled.

    Blocks of one class share their code: it is compiled once for all of them, and again for sizes
    that change. Hooks of a block itself run as ever, outside of the compiled code. A block with
    hooks on modules inside it (`inside_block.taps`) runs uncompiled: compiled code would ignore
    hooks that were added after compilation. The call raises UserError if compilation fails.

    Args:
        backend: of torch.compile.
    """
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for module in block_modules:
        plain = type(module)
        if plain not in made:
            made[plain] = type(
                plain.__name__, (_Compiled, plain), {"forward": _forward(plain, backend)}
            )
        module.__class__ = made[plain]


def _forward(plain: type[nn.Module], backend: str) -> Callable:
    compiled = torch.compile(plain.forward, backend=backend)

    @functools.wraps(plain.forward)
    def forward(self, *args, **kwargs):
        inside = (m for m in self.modules() if m is not self)
        if any(m._forward_hooks or m._forward_pre_hooks for m in inside):
            return plain.forward(self, *args, **kwargs)
        try:
            return compiled(self, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(
                f"teacher.compile: {plain.__name__} can't be compiled here "
                f"({str(error).strip().splitlines()[0]}); set teacher.compile to false, or install "
                "a C++ compiler (on a CPU) or Triton (on CUDA)"
            ) from error

    return forward
