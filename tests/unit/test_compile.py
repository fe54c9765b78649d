"""Compiled blocks of the teacher: the same numbers, hooks that are heeded, students left alone."""

import copy
import inspect

import pytest
import torch
from torch._dynamo.utils import counters

from ppcl.errors import UserError
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.runtime import devices
from ppcl.settings import SubsetsSettings
from ppcl.teacher import pipelines, replays
from ppcl.training import distillation, teaching
from ppcl.transformer import blocks, inside_block
from support import tiny

# The compiled graph runs without a compiler of machine code, which not everybody has.
BACKEND = "aot_eager"
PARTS = [NewBlock(0, 1), NewBlock(3, 4)]


@pytest.fixture(scope="module")
def compiled(teacher):
    made = copy.deepcopy(teacher)
    devices.compile_blocks([b.module for b in blocks.block_sequence(made)], BACKEND)
    return made


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3), (4, 4)])
def test_answers_are_the_same(teacher, compiled, lengths):
    call = tiny.arguments(lengths)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call)[0], teacher(**call)[0], rtol=1e-5, atol=1e-6)


def test_blocks_of_one_class_share_their_code(teacher):
    made = copy.deepcopy(teacher)
    torch._dynamo.reset()
    counters.clear()
    devices.compile_blocks([b.module for b in blocks.block_sequence(made)], BACKEND)
    with torch.no_grad():
        made(**tiny.arguments())
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_what_is_watched_is_the_same_and_it_stops_early(teacher, compiled):
    call, ran = tiny.arguments((5, 3)), []
    handle = compiled.transformer_blocks[5].register_forward_hook(lambda *_: ran.append(5))
    with torch.no_grad():
        compiled(**call)
    assert ran == [5]
    lessons, expected = (
        teaching.teacher_states(model, PARTS, call) for model in (compiled, teacher)
    )
    handle.remove()
    assert ran == [5]  # not again
    for part in PARTS:
        torch.testing.assert_close(lessons[part].target, expected[part].target)
        torch.testing.assert_close(lessons[part].bound, expected[part].bound)


def test_taps_see_what_passes_inside(teacher, compiled):
    call, seen = tiny.arguments((5, 3)), []
    for model in (compiled, teacher):
        block = blocks.block_sequence(model)[2]
        with torch.no_grad():
            model(**call)  # compiled before the taps are there
            with inside_block.taps(block) as taps:
                model(**call)
        seen.append(dict(taps))
    assert seen[0].keys() == seen[1].keys() == {"text/input", "ffn/image", "ffn/text"}
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_pass_through_compiled_blocks(teacher, compiled, reader, accelerator, recompute):
    gradients = []
    for model in (copy.deepcopy(teacher), copy.copy(compiled)):
        taught = students.start(model, PARTS, "first")
        units = [Unit((part,)) for part in PARTS]
        options = SubsetsSettings.of({"batch_size": 4, "gradient_checkpointing": recompute})
        ((_, loss, _),) = distillation.any_subset(
            tiny.context(model, reader, 0, accelerator), units, taught, options
        )(0)
        loss.backward()
        grads = [p.grad for s in taught.values() for p in s.parameters() if p.grad is not None]
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    compiled.disable_gradient_checkpointing()
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_students_are_plain_blocks(teacher, compiled):
    made = students.start(compiled, PARTS, "average")
    for part, student in made.items():
        stock = teacher.transformer_blocks[part.first]
        assert type(student) is type(stock)
        assert "_Compiled" not in {base.__name__ for base in type(student).__mro__}
        assert student.state_dict().keys() == stock.state_dict().keys()
    block = compiled.transformer_blocks[0]
    assert inspect.signature(block.forward) == inspect.signature(stock.forward)
    assert type(block).__name__ == type(stock).__name__


def test_streamed_blocks_can_be_compiled(teacher):
    made = copy.deepcopy(teacher)
    every = [b.module for b in blocks.block_sequence(made)]
    devices.compile_blocks(every, BACKEND)
    devices.stream(made, every, torch.device("cpu"))
    call = tiny.arguments((5, 3))
    with torch.no_grad():
        torch.testing.assert_close(made(**call)[0], teacher(**call)[0], rtol=1e-5, atol=1e-6)


def test_the_teacher_alone_runs_the_same_code(compiled):
    call, made = tiny.arguments((5, 3)), replays.alone(compiled, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(made(**call)[0], compiled(**call)[0])
    assert type(made.transformer_blocks[0]) is type(compiled.transformer_blocks[0])


def test_the_config_decides(tiny_teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(devices, "compile_blocks", lambda modules: seen.append(len(modules)))
    for compile, asked in ((True, True), (True, False), (False, True)):
        source = tiny.source(tiny_teacher).replace(compile=compile)
        pipelines.load_transformer(source, torch.device("cpu"), compiled=asked)
    assert seen == [5]


def test_a_missing_compiler_is_named(teacher):
    def fails(_graph, _inputs):
        raise RuntimeError("no compiler")

    made = copy.deepcopy(teacher)
    torch._dynamo.reset()
    devices.compile_blocks([b.module for b in blocks.block_sequence(made)], fails)
    with pytest.raises(UserError, match=r"teacher\.compile: .* can't be compiled here .*to false"):
        made(**tiny.arguments())
