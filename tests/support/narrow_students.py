"""Narrow students of one selection, with random maps."""

import torch

from ppcl.pruning import narrow, students
from ppcl.pruning.units import new_blocks_of, units_of
from ppcl.settings import DistillSettings

OPTIONS = DistillSettings.of(
    {
        "loss": "normalised",
        "relative_weight": 0.5,
        "mode": "independent",
        "batch_size": 4,
        "gradient_checkpointing": False,
        "linear_weight": 0.25,
        "outliers": 0.0,
    }
)
# A depth student lends its text to a kept block with a linear FFN and to another student; a block
# of its own has two linear FFNs.
UNITS = units_of([(0, 1), (3, 4)], [(0, 4)], [(2, "image"), (5, "image"), (5, "text")])


def made(teacher, seed=0):
    """Narrow students of all new blocks, with random maps."""
    taught = students.start(teacher, new_blocks_of(UNITS), "first")
    generator = torch.Generator().manual_seed(seed)
    for part, student in taught.items():
        students.shaped(teacher, part, student)
        with torch.no_grad():
            for linear in narrow.maps(student).values():
                for parameter in linear.parameters():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return taught
