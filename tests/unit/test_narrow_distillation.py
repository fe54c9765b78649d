"""How narrow blocks learn: what a text run's new blocks get and answer for, and that they go in
together."""

import copy

import pytest
import torch
from torch import nn

from ppcl.pruning import narrow, students
from ppcl.pruning.units import NewBlock, new_blocks_of, units_of
from ppcl.settings import SubsetsSettings
from ppcl.training import distillation, losses, steps, teaching
from ppcl.transformer import blocks
from support import tiny
from support.narrow_students import OPTIONS, UNITS, made

SOURCE, BORROW, CLOSE, LAST = new_blocks_of(UNITS)
D = 32


def batch_of(reader, seed=0):
    return reader.batch(reader.draw(reader.rows(heldout=False), 4, (seed, 0)))


def test_the_parts_are_those_that_this_file_means():
    assert [unit.name for unit in UNITS] == ["00-04", "05-05"]
    assert [part.text for part in (SOURCE, BORROW, CLOSE, LAST)] == [
        "source",
        "borrow",
        "close",
        "own",
    ]


@torch.no_grad()
def test_borrowers_get_what_a_source_like_the_teacher_passes(teacher):
    """With blocks of the teacher as source: in a model that really runs, to the bit."""
    source, borrow, close = (
        NewBlock(1, 1, text="source"),
        *(
            NewBlock(block, block, text=text, source=(1, 1))
            for block, text in ((2, "borrow"), (3, "close"))
        ),
    )
    call, passed = tiny.arguments((5, 3)), {}
    kept = {
        part: students.shaped(teacher, part, copy.deepcopy(teacher.transformer_blocks[part.first]))
        for part in (source, borrow, close)
    }
    model, fitting, _ = students.plugged(teacher, kept)
    for part in (borrow, close):
        fitting[part].register_forward_pre_hook(
            lambda _m, _args, kwargs, part=part: passed.update({part: kwargs}), with_kwargs=True
        )
    model(**call)
    lessons = teaching.teacher_states(teacher, [close, source, borrow], call)
    for part in (borrow, close):
        carry = lessons[part].bound["encoder_hidden_states"]
        assert carry.shape == (2, 5, 2 * D)
        assert torch.equal(carry, passed[part]["encoder_hidden_states"])
        assert torch.equal(lessons[part].lent, carry[..., D:])
    # The image stream is the teacher's, whatever a borrower before it did.
    whole = teaching.teacher_states(teacher, [NewBlock(2, 2)], call)[NewBlock(2, 2)]
    assert torch.equal(lessons[close].bound["hidden_states"], whole.target["image"])
    assert lessons[borrow].target.keys() == {"image"}
    assert lessons[close].target.keys() == {"image", "text"}
    assert lessons[source].lent is lessons[source].text_input is None


def attention_input(block, bound):
    """What a stock block's attention gets as text."""
    seen = []
    handle = block.attn.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    block(**bound)
    handle.remove()
    return seen[0].double()


def test_the_loss_is_l_width_and_l_linear_on_real_tokens(teacher, reader, accelerator):
    """Literally, in float64, from the teacher's blocks run one after the other."""
    taught, batch = made(teacher), batch_of(reader)
    loss_and_metrics = {
        name: (loss.item(), {k: v.item() for k, v in metrics.items()})
        for name, loss, metrics in distillation.independent(
            tiny.context(teacher, reader, 0, accelerator), taught, OPTIONS
        )(0)
    }
    given, outputs, handles = {}, {}, []
    for index, block in enumerate(teacher.transformer_blocks):
        handles += [
            block.register_forward_pre_hook(
                lambda _m, _a, kwargs, i=index: given.update({i: kwargs}), with_kwargs=True
            ),
            block.register_forward_hook(lambda _m, _a, out, i=index: outputs.update({i: out})),
        ]
    teacher(**batch.arguments)
    for handle in handles:
        handle.remove()
    real = {"text": batch.arguments["encoder_hidden_states_mask"].bool()}
    real["image"] = torch.ones(4, 16).bool()
    z = {i: attention_input(teacher.transformer_blocks[i], given[i]) for i in (0, 2, 3)}

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def affine(linear, x):
        weight, bias = linear.weight.double(), linear.bias.double()
        return x.double() + x.double() @ weight.T + bias

    for part, student in taught.items():
        bound = dict(given[part.first])
        if part.borrows:
            bound["encoder_hidden_states"] = torch.cat([outputs[1][0], z[0].float()], dim=-1)
        with torch.no_grad():
            text, image = student(**bound)
        answers = {"image": image, "text": text[..., :D]}
        wanted = {"image": outputs[part.last][1], "text": outputs[part.last][0]}
        learned = {
            SOURCE: "image text",
            BORROW: "image",
            CLOSE: "image text",
            LAST: "image",
        }  # the text after it is not read
        width = 0.0
        for stream in learned[part].split():
            a, b = (x[stream][real[stream]].double() for x in (answers, wanted))
            width += (unit(a) - unit(b)).square().sum(-1).mean().item()
        pairs = [(answers["image"], wanted["image"], "image")] * ("image" in part.linear_ffn)
        maps = narrow.maps(student)
        if part.borrows:
            pairs.append((affine(maps["text/input"], z[0]), z[part.first], "text"))
        if part == CLOSE:
            pairs.append((affine(maps["text/output"], outputs[1][0]), wanted["text"], "text"))
        linear = 0.0
        for a, b, stream in pairs:
            difference = (a.double() - b.double())[real[stream]]
            linear += difference.square().mean().item()
        loss, metrics = loss_and_metrics[part.name]
        if part == SOURCE:
            assert "linear" not in metrics and loss == pytest.approx(width, rel=1e-4)
            continue
        assert metrics["linear"] == pytest.approx(linear, rel=1e-4) and linear > 1e-3
        assert loss == pytest.approx(width + 0.25 * linear, rel=1e-4)


@torch.no_grad()
def in_the_model(teacher, taught, batch):
    """Real tokens of z_a as the maps of a model that runs get it, by new block; by hooks of our
    own."""
    model, held, _ = students.plugged(teacher, taught)
    real, seen, handles = batch.arguments["encoder_hidden_states_mask"].bool(), {}, []
    for part, student in held.items():
        if part.borrows:

            def look(_module, args, part=part):
                seen[part] = args[0][real].double()

            handles.append(narrow.maps(student)["text/input"].register_forward_pre_hook(look))
    model(**batch.arguments)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["independent", "sequential"])
@pytest.mark.parametrize("how", ["first", "middle", "average"])
@pytest.mark.parametrize(
    ("intervals", "ffns"),
    [
        ([], [(0, "image"), (0, "text")]),
        ([(0, 2)], []),
        ([(1, 3)], []),
        ([(0, 2), (3, 5)], [(0, "text")]),
    ],
)
def test_borrowers_learn_from_what_the_model_lends(
    teacher, reader, accelerator, intervals, ffns, how, mode
):
    """L_linear of l^z is of z_a in the assembled model, and of what the whole block had in z_p's
    place, before anything is trained and when the source has become another."""
    units = units_of(intervals, [(0, 5)], ffns, unread_after=5)
    wholes = students.start(teacher, new_blocks_of(units), how)
    batch, wanted = batch_of(reader), {}
    real = batch.arguments["encoder_hidden_states_mask"].bool()
    for part, block in wholes.items():
        lesson = teaching.teacher_states(teacher, [NewBlock(*part.ends)], batch.arguments)
        bound = lesson[NewBlock(*part.ends)].bound
        with torch.no_grad():
            wanted[part] = attention_input(block, bound)[real]
    uncut = students.uncut(wholes)
    taught = {part: students.shaped(teacher, part, block) for part, block in wholes.items()}
    (source,) = (part for part in taught if part.text == "lend")
    others = [part for part in taught if part.borrows and not part.linear_ffn]
    for _ in range(2):
        lent = in_the_model(teacher, taught, batch)
        losses = distillation.independent(
            tiny.context(teacher, reader, 0, accelerator),
            taught,
            OPTIONS.replace(mode=mode),
            uncut=uncut,
        )
        linear_losses = {name: metrics.get("linear") for name, _, metrics in losses(0)}
        for part in others:
            # Its map is the identity still.
            expected = (lent[part] - wanted[part]).square().mean().item()
            assert linear_losses[part.name].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
        generator = torch.Generator().manual_seed(0)
        weight = taught[source].txt_mod[1].weight
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    assert linear_losses[others[-1].name] > 1e-3


def test_padding_that_is_lent_reaches_no_map(teacher, reader):
    """Neither the loss of a map nor its slope."""
    student, batch = made(teacher)[BORROW], batch_of(reader)
    lesson = teaching.teacher_states(teacher, [BORROW], batch.arguments)[BORROW]
    mask, slopes = batch.arguments["encoder_hidden_states_mask"].bool(), []
    for padding in (0.0, torch.nan):
        lesson.lend(torch.where(mask[..., None], lesson.lent, padding))
        real = {"text": losses.Real(mask)}
        streams = lesson.target
        loss = teaching.linear_loss(BORROW, student, streams, lesson, real)
        student.zero_grad()
        loss.backward()
        slopes.append(narrow.maps(student)["text/input"].weight.grad)
    assert torch.equal(*slopes) and slopes[0].any()


def test_shares_of_narrow_students_average_to_the_batch(teacher, reader):
    taught = made(teacher)

    def linear(process):
        losses = distillation.independent(
            tiny.context(teacher, reader, 0, process), taught, OPTIONS
        )(0)
        return {
            name: metrics["linear"].item() for name, _, metrics in losses if "linear" in metrics
        }

    (whole,), shares = (tiny.in_processes(count, linear) for count in (1, 4))
    assert whole.keys() == {part.name for part in (BORROW, CLOSE, LAST)}
    for name, value in whole.items():
        assert sum(share[name] for share in shares) / 4 == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["independent", "sequential"])
def test_a_narrow_student_equal_to_its_target_has_no_loss(reader, accelerator, mode, recompute):
    """Block 2's FFNs do nothing, and block 3 is an identity: both are a linear FFN."""
    teacher = tiny.transformer(blocks=6, scale=0.2)
    with torch.no_grad():
        for modulation in (
            b[1]
            for b in (teacher.transformer_blocks[2].img_mod, teacher.transformer_blocks[2].txt_mod)
        ):
            modulation.weight[5 * D :] = 0
            modulation.bias[5 * D :] = 0
    tiny.silence(teacher.transformer_blocks[3])
    part = NewBlock(2, 3, ("image", "text"))
    taught = students.start(teacher, [part], "first")
    students.shaped(teacher, part, taught[part])
    options = OPTIONS.replace(mode=mode, gradient_checkpointing=recompute)
    losses = distillation.independent(
        tiny.context(teacher, reader, 0, accelerator), taught, options
    )
    ((name, loss, metrics),) = losses(0)
    assert name == "02-03" and loss.requires_grad
    assert loss.item() < 1e-10 and all(value.item() < 1e-10 for value in metrics.values())
    assert {"linear", "image/normalised", "text/relative"} <= metrics.keys()


def literal_model(teacher, taught, parts):
    """The teacher with blocks replaced, put together by hand."""
    model = copy.copy(teacher)
    model._modules = dict(teacher._modules)
    every = list(teacher.transformer_blocks)
    for part in sorted(parts, key=lambda part: -part.first):
        every[part.first : part.last + 1] = [taught[part]]
    model.transformer_blocks = nn.ModuleList(every)
    return model


def test_units_go_in_together_and_every_part_learns(teacher, reader, accelerator):
    taught = made(teacher)
    options = SubsetsSettings.of({"batch_size": 4, "gradient_checkpointing": False})
    drawn = {}
    for step in range(20):
        subset = distillation.random_subset(UNITS, (0, step))
        drawn.setdefault(tuple(unit.name for unit in subset), (step, subset))
    assert drawn.keys() == {("00-04",), ("05-05",), ("00-04", "05-05")}
    losses = distillation.any_subset(
        tiny.context(teacher, reader, 0, accelerator), UNITS, taught, options
    )
    for step, subset in drawn.values():
        ((_, loss, _),) = losses(step)
        for student in taught.values():
            student.zero_grad()
        loss.backward()
        plugged = new_blocks_of(subset)
        batch = reader.batch(reader.draw(reader.rows(heldout=False), 4, (0, step)))
        with torch.no_grad():
            answer = literal_model(teacher, taught, plugged)(**batch.arguments)[0]
        error = (answer - batch.output).square().sum() / batch.output.square().sum()
        assert loss.item() == pytest.approx(error.item(), rel=1e-5) and loss.item() > 1e-4
        for part, student in taught.items():
            slopes = [p.grad for p in student.parameters() if p.grad is not None]
            assert any(slope.any() for slope in slopes) == (part in plugged), part.name
            if part in plugged:  # but for what nothing reads after the last block
                for name, linear in narrow.maps(student).items():
                    read = not (part.last == 5 and name == "ffn/text")
                    assert (linear.weight.grad is not None and linear.weight.grad.any()) == read


@torch.no_grad()
def test_all_units_plugged_in_is_the_model_put_together_by_hand(teacher, reader, accelerator):
    taught, rows = made(teacher), reader.rows(heldout=True)
    model, _, _ = students.plugged(teacher, taught)
    by_hand, batch = literal_model(teacher, taught, taught), reader.batch(rows)
    assert len(model.transformer_blocks) == 4
    assert torch.equal(model(**batch.arguments)[0], by_hand(**batch.arguments)[0])
    assert len(blocks.block_sequence(teacher)) == 6
    # Sequentially, a borrower gets the carry that the source before it made.
    inputs = steps.sequential_inputs(teacher, taught, batch.arguments, accelerator)
    carry = taught[SOURCE](**inputs[SOURCE])[0]
    assert torch.equal(inputs[BORROW]["encoder_hidden_states"], carry)
    assert torch.equal(inputs[CLOSE]["encoder_hidden_states"], carry)
