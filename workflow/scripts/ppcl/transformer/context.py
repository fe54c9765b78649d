"""What all functions of a stage work with: the teacher, its recorded calls, the processes."""

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
        transformer: the recorded teacher's, frozen, on the device unless it is offloaded; in
            fine-tuning, the model that is trained.
        reader: the teacher's recorded calls.
        seed: decides all random numbers of the stage.
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
        identity: digest of everything that decides their contents. A file with another identity is
            not used.
    """

    folder: Path
    identity: str

    def within(self, name: str) -> "State":
        """A state of the same identity in the subfolder `name`."""
        return State(self.folder / name, self.identity)
