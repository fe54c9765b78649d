"""The planner measures the steps that are trained: a loss that needs more is forecast to."""

from pathlib import Path

import pytest
import torch

from ppcl.configuration import config
from ppcl.planning import planner, trainings, weightless
from ppcl.pruning import students
from ppcl.pruning.units import new_blocks_of
from ppcl.settings import Settings
from ppcl.training import distillation, losses
from ppcl.transformer import calls, example_calls
from support import tiny

# Of a toy loss: how many copies of a stream it keeps for the backward pass.
COPIES = 64
# Narrow new blocks, whose L_linear counts too, and a whole one.
SELECTION = {
    "intervals": {"require": [[1, 2]]},
    "width": {"text": {"require": [[3, 4]]}, "ffn_image": {"require": [0]}},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    pipeline = tiny.pipeline(folder / "teacher", blocks=6)
    return pipeline, tiny.record(pipeline, folder / "calls.parquet")


@pytest.fixture
def settings() -> Settings:
    same = {"batch_size": 4, "mixed_precision": "no"}
    trained = {name: same for name in ("distill", "subsets", "finetune")}
    return Settings.of(config.complete(SELECTION | trained, "test"))


@pytest.fixture
def made(recorded, settings) -> planner.Planner:
    transformer = tiny.load(recorded[0]).transformer
    empty = weightless.on_meta(dict(transformer.config), torch.float32, "here")
    depth, every = weightless.selection(settings, empty)
    example = example_calls.recorded(recorded[1])
    return planner.Planner(settings, empty, depth, every, example, None)


def forecast(made: planner.Planner, name: str) -> float:
    """Bytes of a training's activations."""
    if name == "distill":
        stage = trainings.distill(made, name, made.every)
    else:
        stage = getattr(trainings, name)(made)
    return stage.parts["activations"]


def trained(recorded, made: planner.Planner, name: str, accelerator) -> float:
    """The sum of the losses of a training's first step."""
    teacher = tiny.load(recorded[0]).transformer.requires_grad_(False)
    new_blocks, options = new_blocks_of(made.every), getattr(made.settings, name)
    taught = students.start(teacher, new_blocks, "first")
    for new_block, student in taught.items():
        students.shaped(teacher, new_block, student).requires_grad_(True)
    context = tiny.context(teacher, calls.Reader(recorded[1]), 0, accelerator)
    if name == "distill":
        of_step = distillation.independent(context, taught, options)
    elif name == "subsets":
        of_step = distillation.any_subset(
            context, made.every, taught, options, lambda _: made.every
        )
    else:
        model = teacher.requires_grad_(True)
        of_step = distillation.output_distillation(
            context, lambda _: model, name, options, in_float32=True
        )
    return sum(loss.item() for _, loss, _ in of_step(0))


@pytest.mark.parametrize(
    "changed, names",
    [
        ("normalised", ["distill"]),
        ("squared_error", ["distill"]),  # of L_linear alone
        ("velocity_error", ["subsets", "finetune"]),
    ],
)
def test_a_changed_loss_changes_training_and_forecast(
    changed, names, recorded, made, accelerator, monkeypatch
):
    before = {n: (forecast(made, n), trained(recorded, made, n, accelerator)) for n in names}
    catalogued = changed in losses.STREAM_LOSSES
    stock = losses.STREAM_LOSSES[changed] if catalogued else getattr(losses, changed)

    def toy(output, target, *more):
        copies = output.float()[..., None].expand(*output.shape, COPIES)
        return stock(output, target, *more) + copies.exp().mean()

    if catalogued:
        monkeypatch.setitem(losses.STREAM_LOSSES, changed, toy)
    else:
        monkeypatch.setattr(losses, changed, toy)
    for name, (bytes_before, loss_before) in before.items():
        # At least the copies of one sample's latents: 64 float32 of each value.
        assert forecast(made, name) > bytes_before + 4 * COPIES * 64
        assert trained(recorded, made, name, accelerator) > loss_before
