"""Any-subset distillation: which students a step plugs in, and what they learn from it."""

import collections
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, Unit, new_blocks_of
from ppcl.settings import SubsetsSettings
from ppcl.training import distillation
from ppcl.transformer import calls
from support import tiny

FIRST, SECOND = NewBlock(0, 1), NewBlock(3, 4)
UNITS = [Unit((FIRST,)), Unit((SECOND,))]
SEED = 4


# ---- the draw


@given(st.lists(st.integers(), min_size=1, max_size=6, unique=True), st.integers(0, 10**9))
def test_a_subset_is_in_order_and_a_pure_function_of_its_seed(members, step):
    subset = distillation.random_subset(members, (0, step))
    assert subset and subset == [member for member in members if member in subset]
    assert subset == distillation.random_subset(members, (0, step))


def test_sizes_are_equally_likely_and_so_are_the_subsets_of_a_size():
    steps, members = 3000, "abcd"
    drawn = [tuple(distillation.random_subset(members, (0, step))) for step in range(steps)]
    seen = collections.Counter(drawn)
    for size in range(1, 5):
        subsets = list(itertools.combinations(members, size))
        for subset in subsets:
            share = 1 / 4 / len(subsets)
            deviation = (share * (1 - share) / steps) ** 0.5
            assert abs(seen[subset] / steps - share) < 4 * deviation, subset
    # Batches are drawn from (seed, step) too, and must not go along with the sizes.
    batches = [np.random.default_rng((0, step)).integers(4) for step in range(200)]
    assert len({(batch, len(one)) for batch, one in zip(batches, drawn, strict=False)}) == 16


# ---- what is learned


def loss_at(step, teacher, taught, reader, accelerator, recompute=False):
    for student in taught.values():
        student.zero_grad()
    options = SubsetsSettings.of({"batch_size": 4, "gradient_checkpointing": recompute})
    losses = distillation.any_subset(
        tiny.context(teacher, reader, SEED, accelerator), UNITS, taught, options
    )
    ((name, loss, metrics),) = losses(step)
    assert name == "students" and metrics.keys() == {"velocity_error"}
    assert loss.dtype == torch.float32 and metrics["velocity_error"] is loss
    loss.backward()
    return loss.item()


def flat(student):
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def as_float64(value):
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def test_gradients_are_those_of_the_model_of_the_drawn_subset(teacher, reader, accelerator):
    """Against models put together by hand, in float64."""
    taught = students.start(teacher, [FIRST, SECOND], "middle")
    drawn = {}
    for step in range(20):
        drawn.setdefault(tuple(distillation.random_subset(UNITS, (SEED, step))), step)
    one, other = UNITS
    assert drawn.keys() == {(one,), (other,), (one, other)}
    for units, step in drawn.items():
        subset = new_blocks_of(units)
        loss = loss_at(step, teacher, taught, reader, accelerator)
        model = copy.deepcopy(teacher).double()
        every = list(model.transformer_blocks)
        own = {part: copy.deepcopy(taught[part]).double() for part in subset}
        for part in reversed(subset):
            every[part.first : part.last + 1] = [own[part]]
        model.transformer_blocks = nn.ModuleList(every)
        batch = reader.batch(reader.draw(reader.rows(heldout=False), 4, (SEED, step)))
        answer = model(**{k: as_float64(v) for k, v in batch.arguments.items()})[0]
        wanted = batch.output.double()
        expected = (answer - wanted).square().sum() / wanted.square().sum()
        assert loss == pytest.approx(expected.item(), rel=1e-4) and loss > 1e-4
        for part, student in taught.items():
            if part not in subset:
                assert all(p.grad is None for p in student.parameters())
                continue
            parameters = list(own[part].parameters())
            gradients = torch.autograd.grad(expected, parameters, retain_graph=True)
            literal = torch.cat([gradient.flatten() for gradient in gradients])
            assert literal.norm() > 1e-4
            assert (flat(student) - literal).norm() < 1e-4 * literal.norm()
    assert all(p.grad is None for p in teacher.parameters())
    assert len(teacher.transformer_blocks) == 6


class Rounded:
    """Calls as a teacher in bfloat16 has them, read in some dtype."""

    def __init__(self, reader, dtype):
        self.rows, self.draw, self._reader, self._dtype = reader.rows, reader.draw, reader, dtype

    def _cast(self, value):
        return value.bfloat16().to(self._dtype) if as_float64(value) is not value else value

    def batch(self, rows):
        batch = self._reader.batch(rows)
        arguments = {k: self._cast(v) for k, v in batch.arguments.items()}
        return calls.Batch(arguments, self._cast(batch.output), batch.rows, batch.numbers)


def test_students_stay_float32_in_a_teacher_of_another_dtype(teacher, reader, accelerator):
    """And in any dtype, activations that are computed again change nothing."""
    taught = students.start(teacher, [FIRST, SECOND], "first")
    step = next(s for s in range(20) if len(distillation.random_subset([0, 1], (SEED, s))) == 2)
    seen = []
    handle = taught[SECOND].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    gradients = {}
    for dtype, recompute in itertools.product([torch.float32, torch.bfloat16], [False, True]):
        model = copy.deepcopy(teacher).to(torch.bfloat16).to(dtype)
        loss_at(step, model, taught, Rounded(reader, dtype), accelerator, recompute)
        gradients[dtype, recompute] = torch.cat([flat(student) for student in taught.values()])
        given = [x for x in seen if as_float64(x) is not x]
        # Image, text and time embedding; twice where the backward pass computes them again.
        assert len(given) == (6 if recompute else 3)
        assert {x.dtype for x in given} == {torch.float32}
        seen.clear()
    handle.remove()
    for dtype in (torch.float32, torch.bfloat16):
        plain = gradients[dtype, False]
        assert plain.dtype == torch.float32 and torch.isfinite(plain).all()
        torch.testing.assert_close(gradients[dtype, True], plain, rtol=1e-5, atol=1e-8)
    precise, low = gradients[torch.float32, False], gradients[torch.bfloat16, False]
    assert 0 < (low - precise).norm() < 0.05 * precise.norm()


def test_students_equal_to_their_intervals_have_nothing_to_learn(reader, accelerator):
    """Blocks 1 and 4 are identities, so the first block of each interval is the whole of it."""
    teacher = tiny.transformer(blocks=6, scale=0.2)
    for index in (1, 4):
        tiny.silence(teacher.transformer_blocks[index])

    class Own:
        rows, draw = reader.rows, reader.draw

        @staticmethod
        def batch(rows):
            batch = reader.batch(rows)
            answer = teacher(**batch.arguments)[0]
            return calls.Batch(batch.arguments, answer, batch.rows, batch.numbers)

    taught = students.start(teacher, [FIRST, SECOND], "first")
    for step in range(4):
        assert loss_at(step, teacher, taught, Own, accelerator) == 0
        plugged = distillation.random_subset(UNITS, (SEED, step))
        assert all(not flat(taught[part]).any() for part in new_blocks_of(plugged))
