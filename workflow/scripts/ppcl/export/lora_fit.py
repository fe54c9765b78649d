"""A LoRA for a pruned model, fitted to what the LoRA changes in the teacher.

Let t and f be the answers of teacher and pruned model to a call x, t' and f' those with the LoRA.
The matrices begin as those that block map and places give, and go on to

    minimise over them    sum | f'(x) - f(x) - (t'(x) - t(x)) - c (t(x) - f(x)) |^2

by AdamW on a few calls at a time. With c = 0, the LoRA's effect would be the teacher's, and with
c = 1 the answer. The pruned model's own error t - f is its LoRA's business only as far as it is
small beside the effect: a LoRA that changes little would become a repair of something else.

    c = E^2 / (E^2 + A^2),    E = sum |t'(x) - t(x)|^2,    A = sum |t(x) - f(x)|^2

Each block gets the rank of all the layers that it stands for together, on each of its linear
layers: one in place of several has to do what several LoRAs did, through the MLPs between them too,
and those around it help. What is added is random in A and zero in B, so that it changes nothing at
first. The rows of each A are made orthonormal, which changes no product and makes one learning rate
fit all layers. The LoRA's own training and its pictures play no part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.loaders import PeftAdapterMixin
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm

from ppcl.errors import UserError
from ppcl.export import lora_styles
from ppcl.export.lora_files import MAGNITUDE
from ppcl.export.lora_layers import Layer
from ppcl.pruning import narrow
from ppcl.transformer import blocks
from ppcl.transformer.context import Context

NAME = "lora"  # of the adapters


@dataclass(frozen=True)
class FitOptions:
    """How long to fit, and on how much.

    calls: the most that are used. rate: of AdamW, in units of the matrices' root mean square.
    """

    steps: int = 1200
    batch_size: int = 16
    rate: float = 0.1
    calls: int = 8192


def fit(
    context: Context,
    model: nn.Module,
    block_map: list[list[int]],
    teachers: Mapping[str, Layer],
    layers: Mapping[str, Layer],
    options: FitOptions,
) -> tuple[dict[str, Layer], list[float]]:
    """Fits a LoRA; the models are as before when it is done.

    Args:
        context: of the teacher, in float32.
        model: the pruned one, in float32, on the device.
        block_map: new block -> the teacher's that it stands for.
        teachers: the LoRA's layers, by path in the teacher.
        layers: where the fit begins, by path in the model.

    Returns:
        The fitted layers, and the error of each step, relative to what the LoRA changes.

    Raises:
        UserError: the LoRA changes nothing in the teacher, or the class takes no adapters.
    """
    with adapted(context.transformer, teachers) as adapters:
        lessons = _lessons(context, adapters, model, options)
    begin = _widened(model, block_map, layers, max(len(x.a) for x in teachers.values()))
    with adapted(model, {path: _orthonormal(layer) for path, layer in begin.items()}):
        errors = _train(context, model, lessons, options)
        state = get_peft_model_state_dict(model, adapter_name=NAME)
    made = {}
    for path, layer in begin.items():
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
    with adapted(model, layers):
        made: PeftConfig = getattr(model, "peft_config")[NAME]  # noqa: B009  (peft's own)
    return made


@contextmanager
def adapted(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[PeftAdapterMixin]:
    """Within the context, the model has the layers beside its own.

    Raises:
        UserError: diffusers gives its class no adapters.
    """
    if not isinstance(model, PeftAdapterMixin):
        raise UserError(f"--lora: diffusers gives a {type(model).__name__} no adapters to fit")
    try:
        state = lora_styles.in_peft(layers)
        model.load_lora_adapter(state, prefix=None, adapter_name=NAME)
        yield model
    finally:
        model.unload_lora()


# ---- where it begins


def _widened(
    model: nn.Module, block_map: list[list[int]], layers: Mapping[str, Layer], rank: int
) -> dict[str, Layer]:
    """The layers, and more in all whole blocks; none for DoRA, whose magnitudes the new ones would
    lack. rank: of the teacher's layers."""
    made = dict(layers)
    if any(layer.magnitude is not None for layer in layers.values()):
        return made
    generator = torch.Generator().manual_seed(0)
    prefixes = {module: path for path, module in model.named_modules()}
    for block, members in zip(blocks.block_sequence(model), block_map, strict=True):
        if narrow.spec_of(block.module):
            continue
        for inside, module in block.module.named_modules():
            if isinstance(module, nn.Linear) and inside not in block.list.modulations:
                path = f"{prefixes[block.module]}.{inside}"
                made[path] = _wider(module, made.get(path), len(members) * rank, generator)
    return made


def _wider(linear: nn.Linear, layer: Layer | None, rank: int, generator: torch.Generator) -> Layer:
    """The layer, or nothing, with as many more rows of A as there are short of a rank."""
    if layer is None:
        layer = Layer(torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0))
    more = max(0, min(rank, *linear.weight.shape) - len(layer.a))
    rows = torch.randn(more, linear.in_features, generator=generator)
    rows /= linear.in_features**0.5
    return replace(layer, a=torch.cat([layer.a, rows]), b=nn.functional.pad(layer.b, (0, more)))


def _orthonormal(layer: Layer) -> Layer:
    """The same product with an A of orthonormal rows, all of its scale in B."""
    q, r = torch.linalg.qr(layer.a.T)
    bias = None if layer.bias is None else layer.scale * layer.bias
    return replace(layer, a=q.T.contiguous(), b=layer.scale * layer.b @ r.T, scale=1.0, bias=bias)


# ---- what it is fitted to


@dataclass(frozen=True)
class _Lessons:
    """What the pruned model is to answer.

    Attributes:
        answers: number of a recorded call -> the answer [...] that is aimed at, on the CPU.
        power: sum of squares of what the LoRA changes in the teacher's answer, mean of all calls.
    """

    answers: Mapping[int, Tensor]
    power: float


@torch.no_grad()
def _lessons(
    context: Context, teacher: PeftAdapterMixin, model: nn.Module, options: FitOptions
) -> _Lessons:
    """Asks the teacher with and without its LoRA, and the model, once for each call."""
    rows = np.random.default_rng(context.seed).permutation(context.reader.rows(heldout=False))
    rows = rows[: min(options.calls, options.steps * options.batch_size)]
    with_it: dict[int, Tensor] = {}
    own: dict[int, Tensor] = {}
    effect = error = 0.0
    every = context.reader.batches(rows, options.batch_size, context.device)
    total = len(context.reader.in_batches(rows, options.batch_size))
    for batch in tqdm(every, desc="asking", unit="batch", total=total, mininterval=2):
        arguments = batch.to_float32().to(context.device).arguments
        wanted = blocks.answer(context.transformer, arguments)
        teacher.disable_lora()
        bare = blocks.answer(context.transformer, arguments)
        teacher.enable_lora()
        short = blocks.answer(model, arguments) - bare
        effect += float((wanted - bare).square().sum())
        error += float(short.square().sum())
        for number, answer, missed in zip(batch.numbers, wanted.cpu(), short.cpu(), strict=True):
            with_it[int(number)], own[int(number)] = answer, missed
    if not effect > 0:
        raise UserError("--lora: it changes nothing in the teacher, so there is nothing to fit")
    left = error**2 / (effect**2 + error**2)
    return _Lessons({n: with_it[n] + left * own[n] for n in with_it}, effect / len(rows))


def _train(
    context: Context, model: nn.Module, lessons: _Lessons, options: FitOptions
) -> list[float]:
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
    rows, errors = np.array(list(lessons.answers)), []
    for step in tqdm(range(options.steps), desc="fitting", unit="step", mininterval=2):
        picked = context.reader.draw(rows, options.batch_size, (context.seed, step))
        batch = context.reader.batch(picked).to_float32().to(context.device)
        aim = torch.stack([lessons.answers[int(n)] for n in picked]).to(context.device)
        missed = (blocks.answer(model, batch.arguments) - aim).square().sum()
        loss = missed / (len(picked) * lessons.power)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(float(loss.detach()))
    return errors
