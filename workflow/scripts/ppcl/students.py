"""Students: one block per interval. Their plan, their start weights and their file."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl import blocks, tensors
from ppcl.errors import UserError


@dataclass(frozen=True)
class Interval:
    """Blocks first..last (inclusive), replaced by one student."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """Such as 03-05; the key of its student in files and logs."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def key(self) -> tuple[int, int]:
        return self.first, self.last


Students = dict[Interval, nn.Module]


def start_weights(modules: list[nn.Module], how: str) -> dict[str, Tensor]:
    """Start weights of the student of an interval, as a float32 state dict.

    Args:
        modules: the interval's teacher blocks, in order.
        how: `first` (block u, PPCL), `middle` (block floor((u+v)/2), PPCL's published script), or
            `average`: weights that fall linearly with the distance from the middle (Amber-Image,
            arXiv 2602.17047).
    """
    states = [m.state_dict() for m in modules]
    count = len(states)
    if how == "first":
        weights = [1.0] + [0.0] * (count - 1)
    elif how == "middle":
        weights = [float(i == (count - 1) // 2) for i in range(count)]
    else:
        raw = [1 - abs(i - (count - 1) / 2) / ((count + 1) / 2) for i in range(count)]
        weights = [w / sum(raw) for w in raw]
    return {
        key: sum(w * s[key].float() for w, s in zip(weights, states, strict=True) if w)
        for key in states[0]
    }


def start(transformer: nn.Module, intervals: list[Interval], how: str) -> Students:
    """Students with their start weights, float32, on the CPU."""
    sequence = blocks.block_sequence(transformer)
    found = {}
    for interval in intervals:
        modules = [sequence[i].module for i in range(interval.first, interval.last + 1)]
        student = copy.deepcopy(modules[0]).float().cpu().requires_grad_(True)
        student.load_state_dict(start_weights(modules, how))
        found[interval] = student
    return found


def save(path: Path, students: Students, metadata: dict[str, str]) -> None:
    """Writes all students to one file, parameters named `<interval>/<parameter>`."""
    state = {f"{i.name}/{k}": v for i, m in students.items() for k, v in m.state_dict().items()}
    tensors.write(path, state, metadata)


def load(path: Path, transformer: nn.Module, intervals: list[Interval]) -> Students:
    """Reads students; their architecture is that of the teacher's block at the interval's start.

    Raises:
        UserError: the file lacks an interval, or holds other shapes, or NaN.
    """
    state, _ = tensors.read(path)
    sequence, found = blocks.block_sequence(transformer), {}
    for interval in intervals:
        student = copy.deepcopy(sequence[interval.first].module).float().cpu().requires_grad_(True)
        part = {
            k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(interval.name + "/")
        }
        try:
            student.load_state_dict(part)
        except RuntimeError as error:
            raise UserError(
                f"{path} does not fit interval {interval.name} of this teacher; delete it and "
                f"rerun. {error}"
            ) from error
        for key, value in part.items():
            if not torch.isfinite(value).all():
                raise UserError(f"{path}: '{interval.name}/{key}' holds NaN or infinity; delete it")
        found[interval] = student
    return found


def read_plan(path: Path) -> tuple[list[Interval], dict]:
    """The plan's intervals, and the whole plan.

    Raises:
        UserError: the plan is missing or not one that `prune` wrote.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        found = [Interval(i["first"], i["last"]) for i in plan["intervals"]]
        for entry in plan["intervals"]:
            int(entry["saved_parameters"])
        int(plan["transformer_parameters"])
        return found, plan
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); run the prune stage") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole plan ({error}); delete it and rerun") from error
