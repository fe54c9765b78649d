"""What the work of a stage is done with: the teacher, its recorded calls, the processes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ppcl.transformer import calls


@dataclass(frozen=True)
class Context:
    """What the functions of a stage share.

    Attributes:
        transformer: the recorded teacher's, frozen, on the device unless it is offloaded; of a
            fine-tuning, the model that is trained.
        reader: the teacher's recorded calls.
        seed: of whatever is drawn at random.
        accelerator: the processes that work together, this one among them.
    """

    transformer: nn.Module
    reader: calls.Reader
    seed: int
    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device


@dataclass(frozen=True)
class State:
    """Where a stage keeps what it has finished, so that a killed run goes on from there.

    Attributes:
        folder: for the files, on a disk that the processes share.
        identity: digest of what decides them. A file that carries another one is not used.
    """

    folder: Path
    identity: str

    def within(self, name: str) -> "State":
        """The same in a folder of its own in this one."""
        return State(self.folder / name, self.identity)
