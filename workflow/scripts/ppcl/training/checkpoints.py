"""The file from which a killed training goes on."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.storage import tensors
from ppcl.training import fsdp, optimizers

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a training is: what a checkpoint holds beside the weights and the optimizer's state.

    Attributes:
        step: number of steps done.
        seconds: training time since step 0.
        rows: the log so far.
        sums: module -> metric -> this process's sum over the last `unlogged` steps.
        unlogged: number of steps since the last row of the log.
    """

    step: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unlogged: int = 0


class Checkpoint:
    """A training's file: weights, the optimizer's state, averaged weights (EMA), the log.

    Args:
        identity: digest of what decides the training. A file of another one is not used.
        parameters: by name.
        average: moving average of the parameters, if there is one.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        average: EMAModel | None,
        accelerator: Accelerator,
    ):
        self._path, self._identity, self._accelerator = path, identity, accelerator
        self._parameters, self._optimizer, self._average = parameters, optimizer, average

    def save(self, progress: Progress) -> None:
        """Writes whole tensors, so that any number of processes can go on from them.

        To be called by all processes.
        """
        sums = _of_all_processes(progress.sums, self._accelerator)
        state: dict[str, Tensor] = {f"weight/{k}": p for k, p in self._parameters.items()}
        if self._average:
            state |= self._averages(self._average)
        for key, p in self._parameters.items():
            moments = optimizers.state_of(self._optimizer, p)
            state |= {f"{name}/{key}": value for name, value in moments.items()}
        state = fsdp.gathered(state, keep=self._accelerator.is_main_process)
        if not self._accelerator.is_main_process:
            return
        rows = progress.rows
        columns = sorted({key for row in rows for key in row} - {"name"})
        names = sorted({row["name"] for row in rows})
        table = [
            [names.index(row["name"])] + [row.get(c, math.nan) for c in columns] for row in rows
        ]
        state["log"] = torch.tensor(table, dtype=torch.float64)
        state |= {f"sum/{key}": value for key, value in sums.items()}
        metadata = {
            "identity": self._identity,
            "step": str(progress.step),
            "unlogged": str(progress.unlogged),
            "seconds": repr(progress.seconds),
            "names": "\n".join(names),
            "columns": "\n".join(columns),
        }
        tensors.write(self._path, state, metadata)

    def resume(self) -> Progress:
        """Loads the file, if there is one of this run, into parameters, optimizer and average.

        To be called by all processes. Returns where the training goes on: step 0 without a file.

        Raises:
            UserError: processes go on from different steps; or the file is damaged.
        """
        progress = self._read()
        _refuse_two_steps(progress.step, self._path, self._accelerator)
        return progress

    def _read(self) -> Progress:
        if not self._path.exists():
            return Progress()
        state, metadata = tensors.read(self._path)
        if metadata.get("identity") != self._identity:
            log.warning("%s belongs to other settings or inputs; starting from step 0", self._path)
            return Progress()
        kept: dict[str, dict[str, Tensor]] = {}
        for place, value in state.items():
            name, _, key = place.partition("/")
            if name not in ("weight", "average", "log", "sum"):
                kept.setdefault(key, {})[name] = value
        with torch.no_grad():
            for key, p in self._parameters.items():
                p.copy_(fsdp.like(state[f"weight/{key}"], p))
                # A parameter that never had a gradient (the last block's text output) has no state.
                if key in kept:
                    optimizers.restore(self._optimizer, p, kept[key])
            if self._average:
                self._average.optimization_step = int(metadata["step"])  # decides its decay
                for key, mean in self._averages(self._average).items():
                    mean.copy_(fsdp.like(state[key], mean))
        names, columns = metadata["names"].split("\n"), metadata["columns"].split("\n")
        rows = [
            {"name": names[int(values[0])]}
            | {
                c: (int(v) if c == "step" else v)
                for c, v in zip(columns, values[1:], strict=True)
                if not math.isnan(v)  # which stands for a metric that the row's module lacks
            }
            for values in state["log"].tolist()
        ]
        sums: dict[str, dict[str, Tensor]] = {}
        for key in (key for key in state if key.startswith("sum/")):
            name, metric = key.removeprefix("sum/").split("\n")
            every = state[key].to(self._accelerator.device)
            # If the number of processes has changed, each takes the mean of the old ones' sums.
            same = len(every) == self._accelerator.num_processes
            mine = every[self._accelerator.process_index] if same else every.mean()
            sums.setdefault(name, {})[metric] = mine
        log.warning("resuming %s at step %s", self._path, metadata["step"])
        seconds, unlogged = float(metadata["seconds"]), int(metadata["unlogged"])
        return Progress(int(metadata["step"]), seconds, rows, sums, unlogged)

    def _averages(self, average: EMAModel) -> dict[str, Tensor]:
        keys = (f"average/{key}" for key in self._parameters)
        return dict(zip(keys, average.shadow_params, strict=True))


def _of_all_processes(
    sums: dict[str, dict[str, Tensor]], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Every process's sums [processes], by the module's and the metric's name, with a line break
    between the two."""
    names = [(name, key) for name in sums for key in sorted(sums[name])]
    if not names:
        return {}
    mine = torch.stack([sums[name][key].float() for name, key in names])[None]
    every = accelerator.gather(mine)
    return {f"{name}\n{key}": every[:, i] for i, (name, key) in enumerate(names)}


def _refuse_two_steps(step: int, checkpoint: Path, accelerator: Accelerator) -> None:
    """Processes that go on from different steps would wait for each other forever."""
    if accelerator.num_processes == 1:
        return
    every = accelerator.gather(torch.tensor([step], device=accelerator.device))
    if len(set(every.tolist())) > 1:
        raise UserError(
            f"{checkpoint}: was replaced while processes of this run read it; another run of this "
            "config is at work: wait for it or stop it, then rerun"
        )
