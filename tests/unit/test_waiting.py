"""Work that waits for nothing: no step asks the device for a value, and the next batch is read
while one is in use."""

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ppcl.extraction import activations, call_tokens, token_store
from ppcl.runtime import devices
from ppcl.settings import ExtractSettings
from ppcl.training import distillation, loop, optimizers
from ppcl.transformer import calls
from ppcl.transformer.context import State
from support import tiny
from support.narrow_students import OPTIONS, UNITS, made

META = torch.device("meta")
PATIENCE = 30  # seconds until a thread is given up


# ---- the device is asked for nothing


class OnMeta(Accelerator):
    """Of a device whose tensors hold nothing: all that would wait for their values fails there,
    be it .item(), bool(), .cpu(), .tolist(), torch.equal or a boolean index."""

    device = META


@pytest.fixture
def logged(monkeypatch):
    """The steps at which a training on that device reads from it."""
    steps = []

    def log(progress, _lr, _accelerator):
        steps.append(progress.step)
        progress.rows.append({"loss": 0.0})
        progress.sums.clear()

    monkeypatch.setattr(loop, "_log", log)
    monkeypatch.setattr(loop.Checkpoint, "save", lambda *_: None)
    # The fused kernel, which does not wait either, is not for that device.
    monkeypatch.setattr(optimizers, "adamw", lambda _kind, groups, *_: torch.optim.AdamW(groups))
    return steps


def steps_of(stage, teacher, reader, accelerator):
    """Modules and losses of a stage's training; with narrow students, where it has students."""
    model = copy.deepcopy(teacher).to(META)
    if stage == "finetune":
        model.requires_grad_(True)
        losses = distillation.output_distillation(
            tiny.context(model, reader, 0, accelerator),
            lambda _step: model,
            "m",
            OPTIONS,
            in_float32=True,
        )
        return {"m": model}, losses
    taught = {part: student.to(META) for part, student in made(teacher).items()}
    if stage == "subsets":
        losses = distillation.any_subset(
            tiny.context(model, reader, 0, accelerator), UNITS, taught, OPTIONS
        )
        return {"students": torch.nn.ModuleList(taught.values())}, losses
    losses = distillation.independent(tiny.context(model, reader, 0, accelerator), taught, OPTIONS)
    return {part.name: student for part, student in taught.items()}, losses


@pytest.mark.parametrize("stage", ["distill", "subsets", "finetune"])
def test_training_asks_the_device_only_where_it_logs(logged, teacher, reader, tmp_path, stage):
    accelerator = OnMeta(cpu=True)
    modules, losses = steps_of(stage, teacher, reader, accelerator)
    before = [p for module in modules.values() for p in module.parameters()]
    how = loop.Optimisation(steps=4, lr=0.1, log_every=3)
    loop.train(modules, losses, how, accelerator, tmp_path / "c.safetensors", "i")
    assert logged == [3, 4] and all(p.device == META for p in before)


@pytest.mark.parametrize(
    "ask", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.cpu(), lambda x: x[x > 0]]
)
def test_a_step_that_asks_is_noticed(logged, teacher, reader, tmp_path, ask):
    accelerator = OnMeta(cpu=True)
    modules, losses = steps_of("distill", teacher, reader, accelerator)

    def asking(step):
        for name, loss, metrics in losses(step):
            ask(loss.detach())
            yield name, loss, metrics

    how = loop.Optimisation(steps=1, lr=0.1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|Meta"):
        loop.train(modules, asking, how, accelerator, tmp_path / "c.safetensors", "i")


@pytest.mark.parametrize("apart", [False, True])
def test_extraction_reads_from_the_device_once_a_call(
    teacher, reader, tmp_path, monkeypatch, apart
):
    """Whether all is finite, and the tokens of both streams; apart: as on a GPU, whose tokens for
    the moments are only sent on their way."""
    asked = []
    if apart:
        monkeypatch.setattr(devices, "free_memory", lambda _: 1)
        monkeypatch.setattr(devices, "to_main_memory", lambda x: x)
        monkeypatch.setattr(
            activations.Moments,
            "_sum",
            lambda self, stream, block, *_: self.sums.setdefault(f"{stream}.{block}.count", 1),
        )

    def answer(x):
        asked.append(tuple(x.shape))
        return np.ones(x.shape, bool if x.dtype == torch.bool else np.float32)

    monkeypatch.setattr(call_tokens, "_on_host", answer)
    options = ExtractSettings.of(
        {"batch_size": 4, "moment_tokens": 4, "sample_tokens": 2, "checkpoint_every": 99}
    )
    # At its end it keeps its sums, which are on no device here.
    monkeypatch.setattr(token_store.Kept, "save", lambda *_: None)
    model = copy.deepcopy(teacher).to(META)
    rows = reader.rows()
    context = tiny.context(model, reader, 0, SimpleNamespace(device=META))
    activations.collect(context, rows, options, State(tmp_path, ""), tiny.NoBar())
    passed = [(2 * len(teacher.transformer_blocks),)]
    passed += 2 * [(1 + len(teacher.transformer_blocks), 4 * 2, 32)]
    assert asked == len(list(reader.batches(rows, 4))) * passed


# ---- the next batch is read meanwhile


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batch ")]


def test_the_next_is_begun_while_one_is_in_use():
    begun = [threading.Event() for _ in range(4)]
    main = threading.get_ident()
    makers = {}

    def make(number):
        makers[number] = threading.get_ident()
        begun[number].set()
        return number

    ahead, numbers = calls.Ahead(make, count=4), []
    for number in range(4):
        numbers.append(ahead(number))
        if number < 3:
            assert begun[number + 1].wait(PATIENCE)  # before the use of this one ends
    assert numbers == [0, 1, 2, 3] and makers[0] == main and main not in list(makers.values())[1:]
    assert not threads()


def test_any_number_may_come_next():
    made = []
    ahead = calls.Ahead(lambda number: made.append(number) or 10 * number)
    assert [ahead(n) for n in (7, 8, 3, 3, 4)] == [70, 80, 30, 30, 40]
    for thread in threads():
        thread.join(PATIENCE)
    assert sorted(made) == sorted([7, 8, 9, 3, 4, 3, 4, 5])  # 9, 4 and 5 of no use


def test_an_error_comes_when_its_batch_is_asked_for():
    def make(number):
        if number == 2:
            raise FileNotFoundError("calls.parquet went away")
        return number

    ahead = calls.Ahead(make, count=5)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(FileNotFoundError, match="went away"):
        ahead(2)
    assert not threads() and ahead(3) == 3


def test_a_reader_reads_ahead_in_order_and_leaves_no_thread(reader):
    begun, own, rows = [], reader.batch, reader.rows()
    expected = [own(rows[[i, i + 1]]) for i in range(0, len(rows), 2)]
    arrived = threading.Condition()

    class Watched(calls.Reader):
        def batch(self, numbers):
            with arrived:
                begun.append(list(numbers))
                arrived.notify()
            return super().batch(numbers)

    batches = []
    for batch in Watched(reader.path, memory=0).batches(rows, 2):
        batches.append(batch)
        with arrived:
            more = min(len(expected), len(batches) + 1)
            assert arrived.wait_for(lambda more=more: len(begun) == more, PATIENCE)
    assert not threads()
    for one, other in zip(batches, expected, strict=True):
        assert one.numbers.tolist() == other.numbers.tolist()
        assert torch.equal(one.output, other.output)


def test_steps_draw_what_they_would_without(reader, accelerator):
    batch_of = distillation.batches_of_steps(tiny.context(None, reader, 3, accelerator), OPTIONS)
    for step in (5, 6, 7, 2):  # as after a resume
        drawn = reader.draw(reader.rows(heldout=False), 4, (3, step))
        assert batch_of(step).numbers.tolist() == drawn.tolist()
