"""What students are taught: Eq. 6 on the teacher's own activations, in any number of processes."""

import copy

import numpy as np
import pytest
import torch

from ppcl.ablation import chain
from ppcl.errors import UserError
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.settings import DistillSettings
from ppcl.training import distillation, loop, losses, steps, teaching
from support import tiny

FIRST, SECOND = NewBlock(0, 1), NewBlock(3, 4)
OPTIONS = DistillSettings.of(
    {
        "loss": "normalised",
        "relative_weight": 0.5,
        "mode": "independent",
        "batch_size": 4,
        "gradient_checkpointing": False,
        "linear_weight": 1.0,
        "outliers": 0.0,
    }
)


def losses_of(teacher, taught, reader, accelerator, **options):
    return distillation.independent(
        tiny.context(teacher, reader, 0, accelerator), taught, OPTIONS.replace(**options)
    )


def train(teacher, taught, reader, accelerator, path, **options):
    losses = losses_of(teacher, taught, reader, accelerator, **options)
    how = loop.Optimisation(steps=3, lr=1e-3)
    modules = {part.name: student for part, student in taught.items()}
    return loop.train(modules, losses, how, accelerator, path / "c.safetensors", "i")


# ---- teaching


def test_teacher_states_are_the_activations_at_the_ends(teacher):
    call, boundaries = tiny.arguments((5, 3)), []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: boundaries.append(out))
        for b in teacher.transformer_blocks
    ]
    teacher(**call)
    whole, boundaries = boundaries, []
    lessons = teaching.teacher_states(teacher, [SECOND, FIRST], call)
    for handle in handles:
        handle.remove()
    assert len(boundaries) == 5  # the last block, 5, did not run
    for part in (FIRST, SECOND):
        assert torch.equal(lessons[part].target["text"], whole[part.last][0])
        assert torch.equal(lessons[part].target["image"], whole[part.last][1])
        assert lessons[part].text_input is lessons[part].lent is None
    assert torch.equal(lessons[SECOND].bound["hidden_states"], whole[2][1])
    assert torch.equal(lessons[SECOND].bound["encoder_hidden_states"], whole[2][0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["independent", "sequential"])
def test_a_student_equal_to_its_interval_has_no_loss(reader, accelerator, mode, recompute):
    """Blocks 1 and 4 are identities, so the first block of each interval is the whole of it."""
    teacher = tiny.transformer(blocks=6, scale=0.2)
    for index in (1, 4):
        tiny.silence(teacher.transformer_blocks[index])
    taught = students.start(teacher, [FIRST, SECOND], "first")
    options = {"mode": mode, "gradient_checkpointing": recompute}
    step_losses = list(losses_of(teacher, taught, reader, accelerator, **options)(0))
    assert [name for name, *_ in step_losses] == ["00-01", "03-04"]
    for _, loss, metrics in step_losses:
        assert loss.item() == 0 and loss.requires_grad
        assert set(metrics) == {
            f"{stream}/{kind}"
            for stream in ("image", "text")
            for kind in ("normalised", "relative")
        }
        assert all(value.item() == 0 for value in metrics.values())


def test_losses_are_sums_over_streams(teacher, reader, accelerator):
    taught = students.start(teacher, [FIRST], "first")

    def one(loss, **options):
        options |= {"loss": loss}
        ((_, value, metrics),) = losses_of(teacher, taught, reader, accelerator, **options)(0)
        return value.item(), {key: m.item() for key, m in metrics.items()}

    normalised, metrics = one("normalised")
    assert min(metrics.values()) > 1e-4
    assert normalised == pytest.approx(metrics["image/normalised"] + metrics["text/normalised"])
    relative, same = one("relative")
    assert same == metrics
    assert relative == pytest.approx(metrics["image/relative"] + metrics["text/relative"])
    assert one("mixed")[0] == pytest.approx(normalised + 0.5 * relative)
    total, same = one("mixed", outliers=1e6)  # of which there are none
    assert same == metrics and total == pytest.approx(normalised + 0.5 * relative)


def test_outliers_are_left_out_of_the_loss_alone():
    output, target = ({"image": x} for x in torch.randn(2, 2, 6, 4))
    options = OPTIONS.replace(outliers=1.2)
    loss, metrics = teaching.interval_losses(output, target, {}, options)
    kept = [losses.without_outliers(x["image"], 1.2) for x in (output, target)]
    assert loss == losses.normalised_error(*kept)
    assert metrics["image/normalised"] == losses.normalised_error(output["image"], target["image"])
    assert loss != metrics["image/normalised"]


def test_the_loss_is_eq_6_on_real_tokens(teacher, reader, accelerator):
    taught = students.start(teacher, [SECOND], "middle")
    ((_, loss, _),) = losses_of(teacher, taught, reader, accelerator)(0)
    batch = reader.batch(reader.draw(reader.rows(heldout=False), 4, (0, 0)))
    lesson = teaching.teacher_states(teacher, [SECOND], batch.arguments)[SECOND]
    with torch.no_grad():
        text, image = taught[SECOND](**lesson.bound)
    mask, expected = batch.arguments["encoder_hidden_states_mask"].bool(), 0.0
    for output, target, keep in (
        (image, lesson.target["image"], torch.ones(4, 16).bool()),
        (text, lesson.target["text"], mask),
    ):
        output, target = output[keep].double(), target[keep].double()
        unit = output / output.norm(dim=1, keepdim=True) - target / target.norm(dim=1, keepdim=True)
        expected += unit.square().sum(1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(teacher, reader, accelerator):
    gradients = []
    for recompute in (False, True):
        taught = students.start(teacher, [FIRST], "first")
        losses = losses_of(teacher, taught, reader, accelerator, gradient_checkpointing=recompute)
        ((_, loss, _),) = losses(0)
        loss.backward()
        gradients.append([p.grad for p in taught[FIRST].parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_independent_students_do_not_know_each_other(teacher, reader, accelerator, tmp_path):
    together = students.start(teacher, [FIRST, SECOND], "first")
    train(teacher, together, reader, accelerator, tmp_path / "both")
    for part in (FIRST, SECOND):
        alone = students.start(teacher, [part], "first")
        started = copy.deepcopy(alone[part].state_dict())
        train(teacher, alone, reader, accelerator, tmp_path / part.name)
        trained = alone[part].state_dict()
        assert any(not torch.equal(trained[key], started[key]) for key in trained)
        for key, value in together[part].state_dict().items():
            assert torch.equal(value, trained[key]), key
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_sequential_students_get_what_came_before(teacher, reader, accelerator):
    taught = students.start(teacher, [FIRST, SECOND], "middle")
    tiny.silence(taught[FIRST])
    call = tiny.arguments((5, 3))
    inputs = steps.sequential_inputs(teacher, taught, call, accelerator)
    # By hand: the first student is an identity, so its input goes straight to block 2.
    first = inputs[FIRST]
    text, image = teacher.transformer_blocks[2](**first)
    assert torch.equal(inputs[SECOND]["hidden_states"], image)
    assert torch.equal(inputs[SECOND]["encoder_hidden_states"], text)
    lessons = teaching.teacher_states(teacher, [FIRST, SECOND], call)
    assert torch.equal(first["hidden_states"], lessons[FIRST].bound["hidden_states"])
    assert not torch.equal(image, lessons[SECOND].bound["hidden_states"])

    _, (_, loss, _) = losses_of(teacher, taught, reader, accelerator, mode="sequential")(0)
    batch = reader.batch(reader.draw(reader.rows(heldout=False), 4, (0, 0)))
    inputs = steps.sequential_inputs(teacher, taught, batch.arguments, accelerator)
    target = teaching.teacher_states(teacher, [SECOND], batch.arguments)[SECOND].target
    text, image = taught[SECOND](**inputs[SECOND])
    real = {"text": losses.Real(batch.arguments["encoder_hidden_states_mask"].bool())}
    output = {"text": text, "image": image}
    expected, _ = teaching.interval_losses(output, target, real, OPTIONS)
    assert loss.item() == expected.item()
    loss.backward()
    assert all(p.grad is None for p in taught[FIRST].parameters())


def test_steps_see_batches_of_their_own(teacher, reader, accelerator):
    taught = students.start(teacher, [FIRST], "first")
    losses = losses_of(teacher, taught, reader, accelerator)
    values = [[loss.item() for _, loss, _ in losses(step)] for step in (0, 1, 0)]
    assert values[0] == values[2] != values[1]


def test_shares_are_disjoint_and_whole():
    class Three:
        num_processes = 3

    every = np.arange(8)
    parts = []
    for Three.process_index in range(3):
        parts.append(distillation.share(every, Three))
    assert sorted(np.concatenate(parts)) == every.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UserError, match="batch_size 2 is less than the number of training proc"):
        distillation.share(every[:2], Three)


@pytest.mark.parametrize("stage", ["distill", "subsets", "finetune"])
def test_gradients_of_unequal_shares_average_to_the_batch(teacher, reader, stage):
    """5 samples in 2 processes: the mean of the processes' gradients is that of one process."""
    model = tiny.transformer(blocks=2, seed=7, scale=0.2).requires_grad_(True)
    taught = students.start(teacher, [FIRST], "first")
    module = model if stage == "finetune" else taught[FIRST]
    rows = reader.rows(heldout=True)  # these have no padding

    class Unpadded:
        rows = staticmethod(lambda heldout: rows[[0, 1, 3]])
        draw, batch = staticmethod(reader.draw), staticmethod(reader.batch)

    def gradient(process):
        options = OPTIONS.replace(batch_size=5)
        if stage == "distill":
            losses = distillation.independent(
                tiny.context(teacher, Unpadded, 0, process), taught, options
            )
        elif stage == "subsets":
            losses = distillation.any_subset(
                tiny.context(teacher, Unpadded, 0, process), [Unit((FIRST,))], taught, options
            )
        else:
            losses = distillation.output_distillation(
                tiny.context(model, Unpadded, 0, process),
                lambda _step: model,
                "m",
                options,
                in_float32=True,
            )
        ((_, loss, _),) = losses(0)
        module.zero_grad()
        loss.backward()
        every = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        return torch.cat(every).clone()

    (whole,), parts = (tiny.in_processes(count, gradient) for count in (1, 2))
    size = whole.norm()
    assert size > 1e-3 and (parts[0] - parts[1]).norm() > 0.01 * size
    assert ((parts[0] + parts[1]) / 2 - whole).norm() < 1e-5 * size


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("step_of", [distillation.independent, chain.through_chain])
def test_padded_shares_average_to_the_batch(teacher, reader, step_of, count):
    """Shares of 5, 3 and no real text tokens a sample: losses, metrics and gradients are those of
    one process, whoever has which."""
    taught = students.start(teacher, [FIRST, SECOND], "middle")

    class Padded:
        rows = staticmethod(reader.rows)
        draw = staticmethod(lambda *_: np.arange(5))

        @staticmethod
        def batch(rows):
            padded = reader.batch(rows)
            padded.arguments["encoder_hidden_states_mask"][rows == 3] = 0
            return padded

    def step(process):
        options = OPTIONS.replace(batch_size=5, loss="mixed")
        figures = {}
        for student in taught.values():
            student.zero_grad()
        context = tiny.context(teacher, Padded, 0, process)
        for name, loss, metrics in step_of(context, taught, options)(0):
            loss.backward()
            figures |= {f"{name} {key}": m.detach() for key, m in metrics.items()}
            figures[name] = loss.detach()
        for part, student in taught.items():
            slopes = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
            figures[f"{part.name} slope"] = torch.cat(slopes)
        return figures

    (whole,), shares = (tiny.in_processes(processes, step) for processes in (1, count))
    unlike = []
    for key, value in whole.items():
        mean = sum(share[key] for share in shares) / count
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
        unlike.append(max((share[key] - value).norm() / value.norm() for share in shares))
    assert min(unlike) > 1e-3  # no share alone is the batch
