"""AdamW, with its moments in float32 or in a byte each.

8-bit moments (Dettmers et al. 2022) are those of bitsandbytes, which runs on CUDA and on CPUs: a
byte per parameter and moment, and a float32 scale for every 256 of them; tensors of fewer than 4096
parameters keep float32 moments. Parameters are still treated one tensor at a time, so a module ends
the same whoever trains beside it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.training import fsdp


def adamw(
    kind: str, groups: Iterable[dict], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer that the config asks for.

    Args:
        kind: `adamw` or `adamw8bit`.
        groups: parameter groups, as torch's optimizers take them.

    Raises:
        UserError: bitsandbytes is needed and not installed, or can't run here.
    """
    options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if kind == "adamw":
        # One kernel for all tensors; with tiny blocks the plain loop costs a tenth.
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # optional: few need it
    except ImportError as error:
        raise UserError(
            f"optimizer: adamw8bit needs the package bitsandbytes ({error}); install it (pip "
            "install bitsandbytes), or set optimizer to adamw"
        ) from error
    groups = list(groups)
    one = groups[0]["params"][0]
    if one.device.type not in ("cuda", "cpu") or fsdp.is_shared(one):
        where = "weights that are shared out (fsdp)" if fsdp.is_shared(one) else one.device.type
        raise UserError(f"optimizer: adamw8bit does not run on {where}; set optimizer to adamw")
    return AdamW8bit(groups, **options)


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer keeps for a parameter (step, moments), all of it as tensors."""
    return {name: torch.as_tensor(value) for name, value in optimizer.state[parameter].items()}


def restore(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]
) -> None:
    """Puts back what `state_of` gave. `state` has whole tensors, not shares, on any device."""
    step = state["step"]
    kept: dict[str, Any]
    if isinstance(optimizer, torch.optim.AdamW):
        kept = {"step": step.to(parameter.device)}
        kept |= {n: fsdp.like(v, parameter) for n, v in state.items() if n != "step"}
    else:  # bitsandbytes counts in Python
        kept = {"step": int(step)}
        kept |= {n: v.to(parameter.device) for n, v in state.items() if n != "step"}
    optimizer.state[parameter] = kept
