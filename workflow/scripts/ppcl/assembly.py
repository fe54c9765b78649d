"""Variants: which students each budget takes, and pipeline folders that stock diffusers loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl import schemas, tables, tensors, texts
from ppcl.errors import UserError
from ppcl.intervals import parameters_needed
from ppcl.students import Interval


def variant(settings: dict, name: str) -> dict:
    """The variant's mapping in the config."""
    for found in settings["variants"]:
        if found["name"] == name:
            return found
    known = ", ".join(v["name"] for v in settings["variants"])
    raise UserError(f"--variant: the config has no variant '{name}'; it has {known}")


def choose(errors: Path, plan: dict, wanted: dict) -> list[Interval]:
    """The students of a variant: those that cost least and bring the model within its budget.

    The cost of a set is the sum of its students' measured velocity errors, each plugged alone.

    Raises:
        UserError: all students together do not reach the budget.
    """
    found = tables.read(errors, schemas.STUDENT_ERRORS).to_pandas()
    total = plan["transformer_parameters"]
    needed = parameters_needed(total, wanted["budget"])
    chosen = cheapest(found["velocity_error"].tolist(), found["saved_parameters"].tolist(), needed)
    if chosen is None:
        reached = 1 - found["saved_parameters"].sum() / total
        raise UserError(
            f"variant '{wanted['name']}': all students together leave {reached:.3f} of the "
            f"parameters, above its budget {wanted['budget']}; delete intervals/ and rerun, so "
            "that enough blocks are selected"
        )
    return [Interval(int(found["first"][i]), int(found["last"][i])) for i in chosen]


def cheapest(costs: list[float], savings: list[int], needed: int) -> list[int] | None:
    """Indices with the least total cost whose savings add up to at least `needed`.

    Exact: for every reachable amount of savings (capped at `needed`) the cheapest subset is kept.
    None when all together do not suffice.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for index, (cost, saving) in enumerate(zip(costs, savings, strict=True)):
        for saved, (spent, members) in list(best.items()):
            reached = min(needed, saved + saving)
            if reached not in best or spent + cost < best[reached][0]:
                best[reached] = (spent + cost, [*members, index])
    return best[needed][1] if needed in best else None


def export(
    pipe: DiffusionPipeline,
    transformer: nn.Module,
    block_map: list[list[int]],
    folder: Path,
    card: dict,
    call: dict,
) -> None:
    """Writes a pipeline folder and proves, in a fresh process, that stock diffusers loads it.

    Args:
        pipe: the teacher's pipeline; everything but the transformer is saved as it is.
        block_map: new block -> the old blocks that it stands for; saved beside the weights, since
            LoRA and ControlNet files carry the old numbers.
        card: provenance and choices, saved as pruning.json.
        call: keyword arguments of one transformer call, for the comparison.

    Raises:
        UserError: the reloaded model misses weights or answers differently. Nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipe.register_modules(transformer=transformer)
        pipe.save_pretrained(temporary)
        texts.write_json(temporary / "transformer" / "block_map.json", block_map)
        texts.write_json(temporary / "pruning.json", card)
        prove(temporary, transformer, call)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def prove(folder: Path, transformer: nn.Module, call: dict) -> None:
    """The reload gate: a fresh process that knows only diffusers must get the same answer."""
    expected = transformer(**call)[0]
    held = {k: v for k, v in call.items() if isinstance(v, torch.Tensor)}
    other = {k: v for k, v in call.items() if not isinstance(v, torch.Tensor)}
    probe = folder / ".call.safetensors"
    tensors.write(probe, held | {"expected": expected}, {"arguments": json.dumps(other)})
    gate = Path(__file__).with_name("reload_gate.py")
    done = subprocess.run(
        [sys.executable, "-I", str(gate), str(folder), str(probe)], capture_output=True, text=True
    )
    probe.unlink()
    if done.returncode:
        raise UserError(
            f"{folder.name.strip('.')}: the exported pipeline does not reload as it was written, "
            f"so it was not kept:\n{done.stdout.strip()}\n{done.stderr.strip()[-2000:]}"
        )
