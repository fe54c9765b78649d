"""One training loop for everything that is trained here: teacher parts, students, whole models.

The loop is data parallel over accelerate's processes, keeps one atomic checkpoint file, and is a
pure function of its inputs: what a step sees depends on (seed, step) alone, never on how often the
run was killed, so that a resumed run ends with the weights of an uninterrupted one.
"""

import collections
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from ppcl import provenance
from ppcl.errors import UserError
from ppcl.runtime import stopping
from ppcl.settings import Settings, TrainingSettings
from ppcl.teacher import teacher_identity
from ppcl.training import fsdp, optimizers
from ppcl.training.checkpoints import Checkpoint, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Optimisation:
    """How to optimise; AdamW with linear warm-up, then a cosine down to zero.

    ema: decay of an exponential moving average of the weights, which the modules hold after the
        last step; 0 for none. It is diffusers' EMAModel, whose decay rises as (1 + n) / (10 + n)
        over the first steps n.
    lr_scales: prefix of parameters' names `<module>/<path>` -> factor on their learning rate; it
        is 1 for all others.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    checkpoint_every: int = 200
    log_every: int = 10
    optimizer: str = "adamw"
    ema: float = 0.0
    lr_scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, options: TrainingSettings) -> "Optimisation":
        """What a section of the config says; a key that it lacks has this class's default."""
        given = vars(options)
        return cls(**{key: given[key] for key in cls.__dataclass_fields__ if key in given})

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (0-based): warm-up, then cosine to zero at `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


# A step's number (0-based) -> its losses, one (module name, scalar loss, scalar metrics) after the
# other. Each is differentiated and its graph freed before the next is asked for, so that only one
# graph is in memory at a time.
Losses = Callable[[int], Iterator[tuple[str, Tensor, dict[str, Tensor]]]]


def train(
    modules: Mapping[str, nn.Module],
    losses: Losses,
    options: Optimisation,
    accelerator: Accelerator,
    checkpoint: Path,
    identity: str,
    measure: Callable[[], dict[str, float]] | None = None,
) -> list[dict]:
    """Trains modules in place and returns the log.

    Modules are optimised side by side and independently: each has its own gradient clipping, and
    AdamW is element-wise, so a module ends the same whether trained alone or with others.

    SIGTERM to any of the processes ends them all, with a checkpoint, after the step that they are
    in (SystemExit with `stopping.EXIT_CODE`).

    Args:
        modules: float32 modules by name, already on the accelerator's device, or shared out over
            the processes (`fsdp.shard`).
        losses: yields each module's loss for a step, computed on this process's share of the batch.
        checkpoint: the resume file; written every `checkpoint_every` steps by the main process.
        identity: digest of everything that decides the result. A checkpoint that carries another
            identity belongs to another run and is not used.
        measure: gives more metrics for the rows of steps at which there is a checkpoint, such as
            losses on what is held out. All processes call it.

    Returns:
        One row per module every `log_every` steps: step (1-based), name, lr, seconds (training time
        since step 0) and the means of the metrics over those steps.

    Raises:
        UserError: a loss or gradient is NaN or infinite; says the module and the steps.
    """
    parameters = {
        f"{name}/{key}": p
        for name, module in modules.items()
        for key, p in module.named_parameters()
        if p.requires_grad
    }
    if not parameters:
        return []  # no students: say, the selection has no intervals, and narrow blocks train later
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        scale = next((s for start, s in options.lr_scales.items() if key.startswith(start)), 1.0)
        groups.setdefault(scale, []).append(parameter)
    optimizer = optimizers.adamw(
        options.optimizer,
        [{"params": members, "scale": scale} for scale, members in groups.items()],
        options.lr,
        options.betas,
        options.weight_decay,
    )
    average = EMAModel(parameters.values(), options.ema) if options.ema else None
    kept = Checkpoint(checkpoint, identity, parameters, optimizer, average, accelerator)
    progress = kept.resume()
    began = time.perf_counter() - progress.seconds
    agreement = _Agreement(accelerator)
    bar = tqdm(
        total=options.steps,
        initial=progress.step,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
        mininterval=2,
    )

    def save() -> None:
        # A checkpoint must never hold weights that a NaN has touched.
        for name, total in progress.sums.items():
            means = _mean_over_processes(total, progress.unlogged, accelerator)
            _refuse_nonfinite(means, name, progress.step - progress.unlogged + 1, progress.step)
        kept.save(progress)

    with stopping.part():
        for step in range(progress.step, options.steps):
            _one_step(step, modules, losses, options, accelerator, optimizer, progress.sums)
            if average:
                average.step(parameters.values())
            bar.update()
            progress.step, progress.unlogged = step + 1, progress.unlogged + 1
            progress.seconds = time.perf_counter() - began
            over = progress.step == options.steps
            regular = progress.step % options.checkpoint_every == 0 or over
            if progress.step % options.log_every == 0 or regular:
                _log(progress, options.lr_at(step), accelerator)
                if measure and regular:
                    more = measure()
                    for row in progress.rows:
                        row |= more if row["step"] == progress.step else {}
                bar.set_postfix(loss=f"{progress.rows[-1]['loss']:.4g}")
            warned = agreement.reached()
            if regular or warned:  # after the last step too: what follows may be killed
                save()
            if warned and not over:
                log.warning("SIGTERM: stopped after step %s; rerun to go on", progress.step)
                accelerator.wait_for_everyone()  # once one has ended, the launcher ends the others
                stopping.end()
    bar.close()
    if average:  # after the checkpoint, which keeps the weights themselves to train on from
        average.copy_to(parameters.values())
    return progress.rows


class _Agreement:
    """Tells all processes, at the same step, whether any of them got SIGTERM."""

    def __init__(self, accelerator: Accelerator):
        # A group of its own on the CPU, so that nobody waits for a GPU to answer.
        several = accelerator.num_processes > 1
        self._group = torch.distributed.new_group(backend="gloo") if several else None

    def reached(self) -> bool:
        """To be called by all processes, once a step."""
        if self._group is None:
            return stopping.warned()
        flag = torch.tensor(int(stopping.warned()))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)


def _one_step(
    step: int,
    modules: Mapping[str, nn.Module],
    losses: Losses,
    options: Optimisation,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    sums: dict[str, dict[str, Tensor]],
) -> None:
    """Trains one step (0-based) and adds its metrics to `sums`."""
    for name, loss, metrics in losses(step):
        accelerator.backward(loss)
        total = sums.setdefault(name, {})
        for key, value in (metrics | {"loss": loss}).items():
            value = value.detach().float()
            total[key] = total[key] + value if key in total else value
    # Listed once for averaging and clipping: walking through a module takes as long as either.
    parameters = {
        name: [p for p in module.parameters() if p.grad is not None]
        for name, module in modules.items()
    }
    _average_gradients(itertools.chain(*parameters.values()), accelerator)
    for name, members in parameters.items():
        norm = fsdp.clip(members, options.clip_norm, accelerator)
        sums[name]["gradient_norm"] = sums[name].get("gradient_norm", 0) + norm
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * options.lr_at(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _log(progress: Progress, lr: float, accelerator: Accelerator) -> None:
    """Turns the sums into rows of the log. Raises UserError as `train` does."""
    for name, total in progress.sums.items():
        means = _mean_over_processes(total, progress.unlogged, accelerator)
        _refuse_nonfinite(means, name, progress.step - progress.unlogged + 1, progress.step)
        progress.rows.append(
            {"step": progress.step, "name": name, "lr": lr, "seconds": progress.seconds, **means}
        )
    progress.sums.clear()
    progress.unlogged = 0


BUCKET = 16 << 20  # gradient elements per all-reduce: few messages, little memory for copies


def _average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages gradients over the processes, in flat buckets; afterwards each `grad` is a view of
    its bucket. Needed since students are called outside any DDP wrapper.

    Parameters that are shared out (fsdp) are left out: their gradients are averages already.
    """
    if accelerator.num_processes == 1:
        return
    left = collections.deque(p for p in parameters if not fsdp.is_shared(p.grad))
    while left:
        bucket: list[nn.Parameter] = []
        size = 0
        while left and (not bucket or size + left[0].numel() <= BUCKET):
            bucket.append(left.popleft())
            size += bucket[-1].numel()
        flat = torch.cat([_gradient(p).flatten() for p in bucket])
        flat = accelerator.reduce(flat, reduction="mean")
        for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = mean.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a step reaches all that it trains"
    return parameter.grad


def _mean_over_processes(total: dict[str, Tensor], steps: int, accelerator: Accelerator) -> dict:
    keys = sorted(total)
    stacked = torch.stack([torch.as_tensor(total[k]) for k in keys]) / steps
    return dict(zip(keys, accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))


def _refuse_nonfinite(means: dict[str, float], name: str, first: int, last: int) -> None:
    for key, value in means.items():
        if not math.isfinite(value):
            raise UserError(
                f"{key} of '{name}' became {value} between training steps {first} and {last}. "
                "Lower `lr`, raise `warmup_steps`, or set mixed_precision: 'no'; the last "
                "checkpoint is from before this, and is used if the settings stay as they are."
            )


def identity(script: Path, settings: Settings, inputs: Sequence[Path], **more: Any) -> str:
    """Digest of what decides a training's result: its code, settings, teacher and inputs.

    inputs: files, which count by their contents.
    more: other values that decide it, beside the settings.
    """
    contents = []
    for path in inputs:
        with open(path, "rb") as file:
            contents.append(hashlib.file_digest(file, "sha256").hexdigest())
    teacher = teacher_identity.stamp(settings.teacher)
    return provenance.digest(
        [provenance.code_digest(script), {**settings.given, **more}, teacher, contents]
    )
