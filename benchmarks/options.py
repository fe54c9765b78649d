"""What each option for large models does to a training step: seconds, and memory.

Mixed precision, 8-bit moments, gradient checkpointing and the teacher's compiled blocks, each alone
against none of them, in a step of distillation and, where it applies, of a fine-tune.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import material, measuring, teaching
from benchmarks.material import Size
from benchmarks.measuring import Ratio
from ppcl.pruning import students
from ppcl.runtime import devices
from ppcl.settings import FinetuneSettings
from ppcl.training import distillation, loop, optimizers
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context

NAME = "options"
SEED = 0


@dataclass(frozen=True)
class Option:
    """What is on: nothing unless told. Names of the config's keys."""

    mixed_precision: str = "no"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    compile: bool = False


OFF = "off"
OPTIONS = {
    OFF: Option(),
    "mixed_precision: bf16": Option(mixed_precision="bf16"),
    "optimizer: adamw8bit": Option(optimizer="adamw8bit"),
    "gradient_checkpointing: true": Option(gradient_checkpointing=True),
    "teacher.compile: true": Option(compile=True),
}


class Stepping:
    """Training steps of the library's loop, one at a time, and what is alive between two."""

    def __init__(
        self,
        frozen: int,
        modules: Mapping[str, nn.Module],
        losses: Callable[[Accelerator], loop.Losses],
        option: Option,
    ):
        self.frozen, self.modules = frozen, modules
        self.accelerator = Accelerator(cpu=True)
        if option.mixed_precision == "bf16":  # a process has but one setting of accelerate's own
            self.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        self.losses = losses(self.accelerator)
        every = [p for m in modules.values() for p in m.parameters()]
        groups, how = [{"params": every, "scale": 1.0}], teaching.HOW
        self.optimizer = optimizers.adamw(
            option.optimizer, groups, how.lr, how.betas, how.weight_decay
        )
        self.number = 0

    def step(self) -> None:
        """The next one; all batches are of one shape."""
        loop._one_step(
            self.number,
            self.modules,
            self.losses,
            teaching.HOW,
            self.accelerator,
            self.optimizer,
            {},
        )
        self.number += 1

    def held(self) -> int:
        """Bytes of frozen weights, trained weights and moments, once a step was made."""
        moments = {
            tensor.data_ptr(): tensor.nbytes
            for state in self.optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor)
        }
        weights = sum(map(teaching.tensors_of, self.modules.values()))
        return self.frozen + weights + sum(moments.values())


def distilling(size: Size, path: Path, option: Option) -> Stepping:
    """Steps of `distill`: Eq. 6 for as many students as fit."""
    teacher = material.transformer(size)
    taught = students.start(teacher, teaching.intervals(size.blocks, teaching.most(size)), "first")
    if option.compile:
        devices.compile_blocks([block.module for block in blocks.block_sequence(teacher)])
    how = teaching.OPTIONS.replace(
        batch_size=size.batch, gradient_checkpointing=option.gradient_checkpointing
    )
    reader = calls.Reader(path)
    return Stepping(
        teaching.tensors_of(teacher),
        {part.name: student for part, student in taught.items()},
        lambda accelerator: distillation.independent(
            Context(teacher, reader, SEED, accelerator), taught, how
        ),
        option,
    )


def tuning(size: Size, path: Path, option: Option) -> Stepping:
    """Steps of `finetune`: all weights of a variant, without its teacher."""
    teacher = material.transformer(size)
    parts = teaching.intervals(size.blocks, teaching.most(size))
    taught = {part.ends: copy.deepcopy(teacher.transformer_blocks[part.first]) for part in parts}
    model = blocks.assembled(teacher, taught)[0].requires_grad_(True)
    if option.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    reader, how = calls.Reader(path), FinetuneSettings.of({"batch_size": size.batch})
    return Stepping(
        0,
        {"transformer": model},
        lambda accelerator: distillation.output_distillation(
            Context(model, reader, SEED, accelerator),
            lambda _step: model,
            "transformer",
            how,
            in_float32=True,
        ),
        option,
    )


def run(size: Size, folder: Path) -> list[Ratio]:
    """Every option on over off, in both kinds of step; no bars, as all depends on the device.

    8-bit moments only where there is bitsandbytes.
    """
    path = material.record(folder / "calls.parquet", size, size.rows)
    sys.path.append(str(Path(sys.prefix) / "alone"))  # where `make test` keeps bitsandbytes
    here = dict(OPTIONS)
    if find_spec("bitsandbytes") is None:
        here = {k: v for k, v in here.items() if v.optimizer != "adamw8bit"}
    kinds = {"distill": (distilling, here)}
    kinds["fine-tune"] = tuning, {k: v for k, v in here.items() if not v.compile}
    found = []
    for kind, (made_by, options) in kinds.items():
        steps = {name: made_by(size, path, option) for name, option in options.items()}
        runs = {name: stepping.step for name, stepping in steps.items()}
        times = measuring.interleaved(runs, size.repeats)
        seconds = {name: measuring.least(values) for name, values in times.items()}
        # The profiler counts what a step adds; compiled code it sees as well.
        mib = {
            name: (stepping.held() + measuring.torch_peak(stepping.step)) / 2**20
            for name, stepping in steps.items()
        }
        for name in list(options)[1:]:
            found += [
                Ratio(NAME, f"{kind}, {name}, seconds", seconds[name], seconds[OFF], "s"),
                Ratio(NAME, f"{kind}, {name}, peak", mib[name], mib[OFF], "MiB"),
            ]
    return found
