"""Checks that the transformer gives the recorded answers also without its pipeline.

Later stages load the transformer alone, replay the calls on it, and expect the recorded answers. In
the pipeline, a guider that skips blocks, another attention processor, a hook, a cache or an adapter
may have changed these answers, and the recorded arguments would not show it.
"""

from collections.abc import Iterable
from typing import Any

import accelerate
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from diffusers.hooks import HookRegistry
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.runtime import devices
from ppcl.teacher import complete
from ppcl.transformer import blocks, diffusers_model


def alone(transformer: nn.Module, device: torch.device) -> nn.Module:
    """The transformer as stock diffusers makes it of its config, without anything that the pipeline
    has attached.

    It shares the original's weights, and is compiled or streamed to the device as the original is.

    Raises:
        UserError: it has other weights than its class makes of its config.
    """
    # As from_pretrained does. The random state is restored, since making layers may draw numbers.
    states = devices.random_states(torch.device("cpu"))
    with no_init_weights(), accelerate.init_empty_weights():
        stock = diffusers_model.of(transformer)
        made = type(stock).from_config(stock.config)
    devices.set_random_states(torch.device("cpu"), states)
    own, wanted = (dict(m.named_parameters(remove_duplicate=False)) for m in (transformer, made))
    if odd := sorted(own.keys() ^ wanted.keys()):
        raise UserError(
            f"{type(transformer).__name__}: while the pipeline runs it has other weights than its "
            f"class makes of its config ({odd[0]} and {len(odd) - 1} more), as with an adapter "
            "that the pipeline's code loads; later stages load the transformer alone, without it: "
            "fuse the adapter and save the pipeline, and give that as teacher.path"
        )
    if hook := getattr(transformer, "_hf_hook", None):
        hook.pre_forward(transformer)  # brings an offloaded transformer to the device
    for name, parameter in own.items():
        path, _, leaf = name.rpartition(".")
        shared = nn.Parameter(parameter.detach(), requires_grad=False)
        made.get_submodule(path)._parameters[leaf] = shared
    buffers = dict(transformer.named_buffers(remove_duplicate=False))
    for name, buffer in list(made.named_buffers(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        made.get_submodule(path)._buffers[leaf] = buffers.get(name, buffer.to(device))
    listed = [[b.module for b in blocks.block_sequence(m)] for m in (transformer, made)]
    for block, new in zip(*listed, strict=True):
        if type(block) is not type(new) and devices.uncompiled(block) is type(new):
            new.__class__ = type(block)  # compiled code belongs to the class
    if any(t.device.type != device.type for t in (*made.parameters(), *made.buffers())):
        devices.stream(made, listed[1], device)
    return made.eval()


@torch.no_grad()
def compare(
    pipe: DiffusionPipeline, transformer: nn.Module, recorded: Iterable[dict[str, Any]]
) -> None:
    """Replays calls on the transformer alone, and compares the answers with the recorded ones.

    Args:
        recorded: the calls, as `recording._Recorder.calls`.

    Raises:
        UserError: an answer differs (names the branches, and what the pipeline has attached to the
            transformer), or the pipeline has changed the transformer's weights.
    """
    if fused := complete.changed(transformer):
        raise UserError(
            f"{type(pipe).__name__}: the pipeline has changed its transformer's weights since they "
            f"were loaded ({fused[0]} and {len(fused) - 1} more), as by fusing an adapter; later "
            "stages load them as they are stored: save the pipeline with the changed weights, and "
            "give that as teacher.path"
        )
    recorded = list(recorded)
    device = recorded[0]["output"].device
    bare = alone(transformer, device)
    kinds = {p.dtype for p in transformer.parameters() if p.is_floating_point()}
    # Both compute the same sums of the same numbers, so they may differ by rounding alone.
    allowed = max([1e-4, *(torch.finfo(kind).eps for kind in kinds)])
    worst: dict[int, tuple[float, dict]] = {}
    for call in recorded:
        try:
            gap = distance(_again(bare, call), call["output"])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:  # a hook may keep weights in another dtype
            raise UserError(
                f"{type(pipe).__name__}: its transformer alone, as in all later stages, fails on "
                f"the calls of the pipeline ({error}); the pipeline has attached to it: "
                f"{', '.join(hanging(pipe, transformer, bare)) or 'nothing that is known'}"
            ) from error
        if not gap <= max(allowed, worst.get(call["branch"], (0.0, None))[0]):
            worst[call["branch"]] = gap, call
    if not worst:
        return
    told = "; ".join(
        f"branch {branch}, step {call['step']}: by {gap:.3g} of its norm"
        for branch, (gap, call) in sorted(worst.items())
    )
    _, call = next(iter(worst.values()))
    if distance(_again(bare, call), _again(bare, call)) > allowed:
        reason = "alone, too, its answers to one call differ, so it draws random numbers"
    elif culprits := hanging(pipe, transformer, bare):
        reason = f"the pipeline has {', '.join(culprits)}"
    else:
        reason = "nothing is attached to it, so its own code keeps a state between calls"
    raise UserError(
        f"{type(pipe).__name__}: its transformer's recorded answers are not those that it gives "
        f"to the same calls alone, as in all later stages ({told}); {reason}. Leave that out of "
        "the pipeline (teacher.path), or switch it off in the config's pipeline"
    )


def _again(bare: nn.Module, call: dict[str, Any]) -> Tensor:
    return blocks.answer(bare, call["arguments"] | {"return_dict": False})


def distance(one: Tensor, other: Tensor) -> float:
    """The largest |one - other| / |other| of a sample, for outputs [batch, ...]. Of a sample whose
    `other` is 0, it is 0 or infinity; infinity if the shapes differ."""
    one, other = (x.detach().float().flatten(1) for x in (one, other))
    if one.shape != other.shape:
        return float("inf")
    gap, norm = torch.linalg.norm(one - other, dim=1), torch.linalg.norm(other, dim=1)
    return torch.where(gap > 0, gap / norm, 0.0).max().item()  # infinity of a zero answer


def hanging(pipe: DiffusionPipeline, transformer: nn.Module, bare: nn.Module) -> list[str]:
    """Descriptions of what a pipeline has attached to its transformer that may change the answers.

    Args:
        bare: the transformer alone.
    """
    changes = [
        f"a guider ({name}: {type(part).__name__})"
        for name, part in pipe.components.items()
        if isinstance(part, BaseGuidance)
    ]
    if getattr(transformer, "is_cache_enabled", False):
        changes.append(f"a cache ({type(transformer._cache_config).__name__})")
    hooks: dict[str, str] = {}
    processors: dict[str, str] = {}
    classes: dict[str, str] = {}
    stock = dict(bare.named_modules())
    for path, module in transformer.named_modules():
        if path in stock and devices.uncompiled(module) is not devices.uncompiled(stock[path]):
            classes[type(module).__name__] = path
        registry = getattr(module, "_diffusers_hook", None)
        named = registry.hooks if isinstance(registry, HookRegistry) else {}
        hooks |= dict.fromkeys(named, path)
        if "forward" in vars(module) and not named and not hasattr(module, "_hf_hook"):
            hooks["a forward of its own"] = path
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if type(hook).__module__ != devices.__name__:  # those of `stream` only move weights
                hooks[getattr(hook, "__qualname__", type(hook).__name__)] = path
        processor = getattr(module, "processor", None)
        usual = getattr(stock.get(path), "processor", None)
        if type(processor) is not type(usual):
            processors[type(processor).__name__] = path
    changes += [f"a hook ({name} of {path or 'the transformer'})" for name, path in hooks.items()]
    changes += [f"an attention processor ({name} of {p})" for name, p in processors.items()]
    changes += [f"a class of its own ({name} of {path})" for name, path in classes.items()]
    return changes
