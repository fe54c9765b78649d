"""Pruned pipelines of the embedded teacher, as folders; made in seconds, without any training."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl.export import assembly
from ppcl.pruning import narrow
from ppcl.transformer import blocks
from support import ROOT

TEACHER = ROOT / "resources" / "digits"
# Ends of the teacher's intervals that one block each stands for: 16 of 24 blocks are left.
MERGED = ((1, 3), (5, 7), (9, 11), (17, 19))
# Block -> what of it is narrow (`narrow.narrow`).
NARROW = {
    0: {"linear_ffn": ["image", "text"]},
    4: {"text": "source"},
    5: {"text": "borrow", "linear_ffn": ["image"]},
    6: {"text": "close"},
    8: {"ranks": {"img_mod.1": 4, "txt_mod.1": 2}},
}


def model(
    transformer: nn.Module,
    merged: Iterable[tuple[int, int]] = (),
    narrowed: Mapping[int, Mapping] = {},
) -> tuple[nn.Module, list[list[int]]]:
    """A transformer whose intervals `merged` are their first blocks, with narrow blocks besides.

    Maps of narrow blocks are small random ones, so that each of them matters.

    Returns:
        It, and its block map: of each block, the teacher's that it stands for.
    """
    sequence = blocks.block_sequence(transformer)
    made = {(first, last): copy.deepcopy(sequence[first].module) for first, last in merged}
    torch.manual_seed(0)
    for number, spec in narrowed.items():
        block = sequence[number]
        made[number, number] = narrow.narrow(
            copy.deepcopy(block.module), block.list.layout(), dict(spec)
        )
        for linear in narrow.maps(made[number, number]).values():
            nn.init.normal_(linear.weight, std=0.02)
    return blocks.assembled(transformer, made)


def folder(
    path: Path,
    merged: Iterable[tuple[int, int]] = (),
    narrowed: Mapping[int, Mapping] = {},
    teacher: Path = TEACHER,
) -> Path:
    """Writes such a pipeline, as `assemble` does, but for its proof and its card."""
    pipe = DiffusionPipeline.from_pretrained(teacher)
    made, block_map = model(pipe.transformer, merged, narrowed)
    made = assembly.with_code(made.requires_grad_(False).eval())
    path.mkdir(parents=True)
    assembly.save(assembly.TeacherPipeline(pipe), made, block_map, path)
    return path
