"""A run of two students, for tests that end its training early."""

import pytest

from support import tiny
from support.killing import TRAINING, distill_paths


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls, tmp_path_factory):
    """A folder with the selection and the start weights of two students, and the settings."""
    folder = tmp_path_factory.mktemp("kill")
    settings, _ = tiny.pruned(
        folder,
        tiny_teacher,
        tiny_calls,
        runs=((1, 2), (3, 4)),  # not from the first block on: streams before it can be kept
        # 5 samples do not divide evenly among two processes.
        distill=TRAINING
        | {"steps": 6, "heldout_rows": 4, "batch_size": 5, "cache_inputs": "never"},
        subsets=TRAINING | {"steps": 6, "heldout_rows": 4},
        finetune=TRAINING,
    )
    return folder, settings, tiny_calls


@pytest.fixture(scope="module")
def distilled(world):
    """Paths of an uninterrupted distillation in this process, the teacher run as a whole."""
    paths = distill_paths(world, "distilled")
    tiny.stage("distill", world[1], **paths)
    return paths
