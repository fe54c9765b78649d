"""Models too large for every process: parameters, gradients and moments shared out (FSDP2).

Every process keeps its rows of every parameter; it gathers all rows of a block when the block runs,
and frees them afterwards. Here is what a training loop has to know of that: how a model is shared
out, and how a parameter becomes whole again, as files have it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, cast

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ppcl.errors import UserError


def shard(
    model: nn.Module,
    block_modules: Iterable[nn.Module],
    accelerator: Accelerator,
    cpu_offload: bool,
) -> None:
    """Shares a float32 model out over the processes, in place; it comes to the device in parts.

    With bf16 mixed precision blocks are gathered in bfloat16: autocast alone would keep a cast of
    every weight until the backward pass, on every device.

    Tried in its place: accelerate's FSDP2 plugin. On CPUs it wraps the model in DDP instead, shares
    out nothing (0 of 77 parameters), and with one process does not offload; where it shares out,
    it finds blocks by the names of classes, not by a list of modules.

    Args:
        model: the same in every process, on any device.
        block_modules: its blocks, each gathered by itself; the rest is gathered together.
        cpu_offload: keep the shares, and what is optimised, in CPU memory. Of use with one process
            too.

    Raises:
        UserError: the device is neither CUDA nor a CPU.
    """
    device = accelerator.device
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"finetune.sharding: fsdp does not run on {device.type}; set it to none, or device to "
            "cuda or cpu"
        )
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1)
    lowered = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    how: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (accelerator.num_processes,)),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
        ),
        # Inputs stay as they are: a timestep in bfloat16 would be another timestep.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=lowered, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for module in block_modules:
        fully_shard(module, **how)
    fully_shard(model, **how)


def is_shared(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether this process has but a share of it."""
    return isinstance(tensor, DTensor)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, as files have them. All processes must ask for the same ones at once.

    Tried in its place: torch's get_model_state_dict and get_optimizer_state_dict. They gather the
    same bits with the same memory, but know a model and its optimizer only, not averaged weights.

    Args:
        keep: whether this process wants them; the others' dict is empty.
    """
    whole = {}
    for name in sorted(tensors):  # in one order everywhere, or processes would mix them up
        tensor = tensors[name]
        if is_shared(tensor):
            # On the mesh's device: NCCL cannot gather shares that are kept in CPU memory.
            there = tensor.detach().to(tensor.device_mesh.device_type)
            assert is_shared(there)
            full = there.full_tensor()
            # A copy: if the rows do not divide evenly, `full` is a view of a buffer of more rows.
            if keep:
                whole[name] = full.to("cpu", copy=True)
        elif keep:
            whole[name] = tensor
    return whole


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, on `other`'s device and shared out as `other` is, without communication.

    Tried in its place: torch's set_optimizer_state_dict. It also makes moments, with a step of 1,
    for parameters that never had a gradient, and sends every tensor whole to every process.
    """
    if not is_shared(other):
        return value.to(other.device)
    placed = distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
    return placed.to(other.device)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float, accelerator: Accelerator) -> Tensor:
    """Scales gradients down to a norm of `largest`, in place; returns the norm that they had.

    Tried in place of the sum over shares: torch's clip_grad_norm_ (accelerate's calls it). It adds
    up in another order, which changes the norm by 1e-7 of itself, and on the device where the
    shares are, which fails with NCCL and shares in CPU memory (pytorch issue 148532).
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_shared, grads)):
        return nn.utils.clip_grad_norm_(parameters, largest)
    # On the device, wherever the shares are: processes need no way to talk between CPUs.
    first, *others = (cast(DTensor, grad).to_local().square().sum() for grad in grads)
    squares = sum(others, first).to(accelerator.device)
    norm = accelerator.reduce(squares, reduction="sum").sqrt()
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
