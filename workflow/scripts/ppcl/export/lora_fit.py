"""A LoRA for a pruned model, fitted to what the LoRA changes in the teacher.

What it adds to the model's answers to recorded calls, f' - f, is to be what it adds to the
teacher's, t' - t. Its matrices begin as those that block map and places give, and go on to

    minimise over them    sum | (f'(x) - f(x)) - (t'(x) - t(x)) |^2 / sum | t'(x) - t(x) |^2

by AdamW on a few calls at a time. The rows of each A are made orthonormal first, which changes no
product and makes one learning rate fit all layers. Answers, pictures and data of the LoRA's own
training play no part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.loaders import PeftAdapterMixin
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from tqdm import tqdm

from ppcl.errors import UserError
from ppcl.export import lora_styles
from ppcl.export.lora_files import MAGNITUDE
from ppcl.export.lora_layers import Layer
from ppcl.transformer import blocks
from ppcl.transformer.context import Context

NAME = "lora"  # of the adapters


@dataclass(frozen=True)
class FitOptions:
    """How long to fit.

    rate: of AdamW, in units of the matrices' root mean square.
    """

    steps: int = 400
    batch_size: int = 16
    rate: float = 0.03


def fit(
    context: Context,
    model: nn.Module,
    teachers: Mapping[str, Layer],
    layers: Mapping[str, Layer],
    options: FitOptions,
) -> tuple[dict[str, Layer], list[float]]:
    """Fits a LoRA; the models are as before when it is done.

    Args:
        context: of the teacher, in float32.
        model: the pruned one, in float32, on the device.
        teachers: the LoRA's layers, by path in the teacher.
        layers: where the fit begins, by path in the model.

    Returns:
        The fitted layers, and the error of each step, relative to what the LoRA changes.

    Raises:
        UserError: the LoRA changes nothing in the teacher, or the class takes no adapters.
    """
    _adapt(context.transformer, teachers)
    _adapt(model, {path: _orthonormal(layer) for path, layer in layers.items()})
    try:
        errors = _train(context, model, options)
        state = get_peft_model_state_dict(model, adapter_name=NAME)
    finally:
        for each in (context.transformer, model):
            _adapters(each).unload_lora()
    made = {}
    for path, layer in layers.items():
        a, b = (state[f"{path}.lora_{x}.weight"].detach().cpu().clone() for x in "AB")
        bias = state.get(f"{path}.lora_B.bias")
        length = state.get(path + MAGNITUDE)
        made[path] = Layer(
            a,
            b,
            1.0,
            None if bias is None or layer.bias is None else bias.detach().cpu().clone(),
            None if length is None else length.detach().cpu().clone(),
        )
    return made, errors


def peft_config(model: nn.Module, layers: Mapping[str, Layer]) -> PeftConfig:
    """What peft has to know of layers beside their matrices; the model is as before."""
    _adapt(model, layers)
    made: PeftConfig = getattr(model, "peft_config")[NAME]  # noqa: B009  (peft's own)
    _adapters(model).unload_lora()
    return made


def _adapters(model: nn.Module) -> PeftAdapterMixin:
    if not isinstance(model, PeftAdapterMixin):
        raise UserError(f"--calls: diffusers gives a {type(model).__name__} no adapters to fit")
    return model


def _adapt(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    state = lora_styles.in_peft(layers)
    _adapters(model).load_lora_adapter(state, prefix=None, adapter_name=NAME)


def _orthonormal(layer: Layer) -> Layer:
    """The same product with an A of orthonormal rows, all of its scale in B."""
    q, r = torch.linalg.qr(layer.a.T)
    bias = None if layer.bias is None else layer.scale * layer.bias
    return replace(layer, a=q.T.contiguous(), b=layer.scale * layer.b @ r.T, scale=1.0, bias=bias)


def _train(context: Context, model: nn.Module, options: FitOptions) -> list[float]:
    model.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    rates: list[float] = []
    for kind in ("lora_A", "lora_B"):
        matrices = [p for name, p in model.named_parameters() if f".{kind}." in name]
        size = torch.cat([p.detach().flatten() for p in matrices]).square().mean().sqrt()
        rates.append(options.rate * float(size) * (0.1 if kind == "lora_A" else 1.0))
        groups.append({"params": [p.requires_grad_() for p in matrices], "lr": rates[-1]})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=options.steps, pct_start=0.1
    )
    rows, errors = context.reader.rows(heldout=False), []
    for step in tqdm(range(options.steps), desc="fitting", unit="step", mininterval=2):
        picked = context.reader.draw(rows, options.batch_size, (context.seed, step))
        loss = _error(context, model, picked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(float(loss.detach()))
    return errors


def _error(context: Context, model: nn.Module, rows: np.ndarray) -> torch.Tensor:
    """The relative squared error of the change of the answers to some calls."""
    arguments = context.reader.batch(rows).to_float32().to(context.device).arguments
    with torch.no_grad():
        wanted = _change(context.transformer, arguments)
        _adapters(model).disable_lora()
        before = blocks.answer(model, arguments)
        _adapters(model).enable_lora()
    if not (power := wanted.square().sum()) > 0:
        raise UserError("--lora: it changes nothing in the teacher, so there is nothing to fit")
    return (blocks.answer(model, arguments) - before - wanted).square().sum() / power


def _change(teacher: nn.Module, arguments: dict) -> torch.Tensor:
    with_it = blocks.answer(teacher, arguments)
    _adapters(teacher).disable_lora()
    without = blocks.answer(teacher, arguments)
    _adapters(teacher).enable_lora()
    return with_it - without
