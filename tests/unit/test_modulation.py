"""Low-rank modulation: the closed form, and what diffusers and torch do with such products."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppcl.closed_forms import modulation
from ppcl.export import assembly
from ppcl.pruning import narrow, students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import devices
from ppcl.teacher import pipelines
from ppcl.transformer import blocks
from support import tiny
from support.modulation_inputs import LAST, WIDTH, Recorded, Sums, inputs_of

SHAPES = [(48, 8), (12, 8), (5, 8)]  # [out, d]: six parts, a halved one, fewer outputs than inputs
RUN = {
    0: {"linear_ffn": ["image", "text"]},
    1: {"text": "source"},
    2: {"text": "borrow", "linear_ffn": ["image"]},
    3: {"text": "close"},
}


def matrix(shape: tuple[int, int], bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, generator=generator)
    return weight, torch.randn(shape[0], generator=generator) if bias else None


def applied(factors: modulation.Factors, x: torch.Tensor) -> torch.Tensor:
    return x.double() @ factors.down.T @ factors.up.T + factors.bias


# ---- the closed form


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_is_the_truncated_svd_of_the_outputs(shape, rank):
    """Eckart and Young: no map of rank r is nearer to centred outputs than their truncated SVD."""
    weight, bias = matrix(shape, bias=rank != 3)
    x = inputs_of(50).double()
    outputs = x @ weight.double().T + (0 if bias is None else bias.double())
    u, s, v = torch.linalg.svd(outputs - outputs.mean(0), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank] + outputs.mean(0)
    factors = modulation.reduced(weight, bias, Sums.over(x), rank)
    assert factors.down.shape == (rank, 8) and factors.up.shape == (shape[0], rank)
    torch.testing.assert_close(applied(factors, x), best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("samples", [1, 2, 4, 100])
def test_full_rank_gives_the_matrix_back(shape, samples):
    """Also where recorded inputs have fewer directions, or only one value."""
    weight, bias = matrix(shape)
    rank = min(shape)
    factors = modulation.reduced(weight, bias, Sums.over(inputs_of(samples)), rank)
    again = (factors.up @ factors.down).float()
    torch.testing.assert_close(again, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factors.bias.float(), bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_the_rank_of_the_inputs_is_enough(samples):
    """One fewer than there are different inputs; there nothing is lost on them, whatever comes
    twice and however large the inputs are."""
    weight, bias = matrix((48, 8))
    for scale in (1e-4, 1, 1e4):
        x = inputs_of(samples).repeat(3, 1).double() * scale
        rank = modulation.Spread.of(Sums.over(x)).rank
        assert rank == samples - 1
        factors = modulation.reduced(weight, bias, Sums.over(x), rank)
        expected = x @ weight.double().T + bias.double()
        torch.testing.assert_close(applied(factors, x), expected, rtol=1e-6, atol=1e-6)
        with pytest.raises(AssertionError):  # but it is not the matrix
            torch.testing.assert_close((factors.up @ factors.down).float(), weight)


def test_every_rank_more_helps_and_several_are_as_each_alone():
    weight, bias = matrix((48, 8))
    x, sums = inputs_of(50), Sums.over(inputs_of(50))
    outputs = x.double() @ weight.double().T + bias.double()
    every = modulation.reductions(weight, bias, modulation.Spread.of(sums), list(range(1, 9)))
    errors = [float((applied(f, x) - outputs).square().mean()) for f in every.values()]
    assert all(more < 0.5 * less for less, more in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-12 * errors[0]
    for rank in (1, 4):
        alone = modulation.reduced(weight, bias, sums, rank)
        torch.testing.assert_close(alone.up @ alone.down, every[rank].up @ every[rank].down)
    for wrong in (0, 9):
        with pytest.raises(ValueError, match="can't have ranks"):
            modulation.reduced(weight, bias, sums, wrong)


def test_nothing_larger_than_the_matrix_is_formed():
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple) else (made,):
                self.most = max(self.most, getattr(one, "numel", lambda: 0)())
            return made

    (weight, bias), sums = matrix((48, 8)), Sums.over(inputs_of(50))
    for rank in (4, 8):
        with Largest() as largest:
            modulation.reduced(weight, bias, sums, rank)
        assert largest.most == weight.numel()


# ---- in models


@pytest.fixture(scope="module")
def stock():
    return tiny.transformer(blocks=6, scale=0.2)


@pytest.fixture(scope="module")
def call():
    return tiny.arguments((5, 3))


@pytest.fixture(scope="module")
def recorded():
    return Recorded(inputs_of(100, WIDTH).mul(0.3))


@pytest.fixture(scope="module")
def run_of(stock):
    """Blocks 0 to 3 narrow in all roles, block 4 gone into block 5, and the block map."""
    torch.manual_seed(0)
    made = {(4, 5): copy.deepcopy(stock.transformer_blocks[4])}
    for index, spec in RUN.items():
        made[index, index] = narrowed(stock, index, spec)
        for linear in narrow.maps(made[index, index]).values():
            nn.init.normal_(linear.weight, std=0.2)
    model, block_map = blocks.assembled(stock, made)
    return model.requires_grad_(False), block_map


def narrowed(stock, index, spec):
    block = blocks.block_sequence(stock)[index]
    return narrow.narrow(copy.deepcopy(block.module), block.list.layout(), spec)


def ranks_of(rank, without=((2, "txt_mod.1"), (3, "txt_mod.1"))):
    """Every matrix that `run_of` has."""
    ranks = {(b, f"{s}_mod.1"): rank for b in range(5) for s in ("img", "txt")} | {LAST: rank}
    return {matrix: rank for matrix, rank in ranks.items() if matrix not in without}


@pytest.fixture(scope="module")
def low(run_of, recorded):
    """All of `run_of` at rank 4, with the products moved, so that everything has an effect."""
    return modulation.low_rank(*run_of, ranks_of(4), recorded)


@torch.no_grad()
def answer(model, call):
    return model(**call)[0]


def test_a_model_of_full_rank_answers_as_it_did(run_of, recorded, call):
    model, block_map = run_of
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected, whole = answer(model, call), blocks.parameter_count(model)
    made = modulation.low_rank(model, block_map, ranks_of(WIDTH), recorded)
    torch.testing.assert_close(answer(made, call), expected, rtol=1e-4, atol=1e-5)
    assert blocks.parameter_count(made) > whole
    # The given model and its modules stay, and all else is shared.
    assert torch.equal(answer(model, call), expected)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    own, shared = dict(made.named_parameters()), dict(model.named_parameters())
    both = own.keys() & shared.keys()
    assert all(own[name] is shared[name] for name in both)
    assert {
        name for name in own.keys() - both if not name.endswith((".up.weight", ".up.bias"))
    } == {name for name in own.keys() - both if name.endswith(".down.weight")}
    assert len(own.keys() - both) == 3 * len(ranks_of(4))


def test_the_count_is_what_the_matrices_tell(stock, run_of, low):
    """A linear FFN leaves three sixths, a borrower no text modulation."""
    model, _ = run_of
    halved = {(0, "img_mod.1"), (0, "txt_mod.1"), (2, "img_mod.1")}
    saved = 0
    for matrix in modulation.matrices(stock):
        if matrix.key in ranks_of(4):
            sixths = 3 if matrix.key in halved else 6
            saved += matrix.parameters(sixths=sixths) - matrix.parameters(4, sixths)
    assert blocks.parameter_count(model) - blocks.parameter_count(low) == saved


def test_products_fit_what_the_model_has_there(run_of, low, recorded):
    """A student's own matrix, or a halved one, and not the teacher's."""
    model, _ = run_of
    for index in (0, 4):
        old, new = (m.transformer_blocks[index].img_mod[1] for m in (model, low))
        assert new.up.out_features == old.out_features == (3 if index == 0 else 6) * WIDTH
        expected = modulation.reduced(old.weight, old.bias, recorded.of(None), 4)
        torch.testing.assert_close(
            new.up.weight @ new.down.weight, (expected.up @ expected.down).float()
        )


@pytest.mark.parametrize("matrix", [(2, "txt_mod.1"), (5, "img_mod.1"), (0, "mod.1"), (7, "x.y")])
def test_what_is_not_there_is_refused(run_of, recorded, matrix):
    with pytest.raises(ValueError, match="the model has no block|has no modulation|no attribute"):
        modulation.low_rank(*run_of, {matrix: 4}, recorded)


def test_a_product_is_not_reduced_again(low, run_of, recorded):
    assert modulation.matrices(low) == []
    with pytest.raises(ValueError, match=r"img_mod\.1 can't have rank 2"):
        modulation.low_rank(low, run_of[1], {(0, "img_mod.1"): 2}, recorded)


@pytest.mark.parametrize("spec", [*RUN.values(), {"linear_ffn": ["text"], "text": "source"}])
def test_the_order_does_not_matter(stock, spec):
    """Ranks first, last, or at once: one structure, one spec; a text modulation that goes takes
    its rank with it."""
    layout = blocks.block_sequence(stock)[0].list.layout()
    ranks = {"img_mod.1": 4, "txt_mod.1": 3}
    if spec.get("text") in ("borrow", "close"):
        del ranks["txt_mod.1"]
    whole = lambda: copy.deepcopy(stock.transformer_blocks[0])  # noqa: E731
    first = narrow.narrow(narrow.lower(whole(), {"txt_mod.1": 3, "img_mod.1": 4}), layout, spec)
    last = narrow.lower(narrow.narrow(whole(), layout, spec), ranks)
    at_once = narrow.narrow(whole(), layout, spec | {"ranks": ranks})
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (first, last, at_once)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert first.narrowed == last.narrowed == at_once.narrowed
    again = narrow.narrow(whole(), layout, first.narrowed)
    assert again.narrowed == first.narrowed


def test_halving_a_product_keeps_the_first_half(stock, recorded):
    block = blocks.block_sequence(stock)[0]
    low = modulation.low_rank(stock, [[i] for i in range(6)], {(0, "img_mod.1"): 4}, recorded)
    product = copy.deepcopy(low.transformer_blocks[0].img_mod[1])
    made = narrow.narrow(low.transformer_blocks[0], block.list.layout(), {"linear_ffn": ["image"]})
    x = recorded.inputs
    with torch.no_grad():
        half, whole = made.img_mod[1](x), product(x)
    torch.testing.assert_close(half, whole[:, : 3 * WIDTH])
    assert made.img_mod(x).shape == whole.shape


def test_rounding_in_bfloat16_is_that_of_the_matrix(stock, recorded):
    """The product rounds twice, and its inputs are the same; both against float64."""
    x = recorded.inputs.bfloat16()
    linear = copy.deepcopy(stock.transformer_blocks[0].img_mod[1])
    low = modulation.low_rank(stock, [[i] for i in range(6)], {(0, "img_mod.1"): WIDTH}, recorded)
    product = low.transformer_blocks[0].img_mod[1]
    with torch.no_grad():
        exact = copy.deepcopy(linear).double()(x.double())
        wrong = [
            (copy.deepcopy(m).bfloat16()(x).double() - exact).square().mean()
            for m in (linear, product)
        ]
    assert wrong[1] < 9 * wrong[0]


# ---- what diffusers and torch do with them


def test_a_pruned_pipeline_is_a_teacher(
    tiny_teacher, call, tmp_path, modules, monkeypatch, recorded
):
    """Exported with its code, loaded, pruned once more, and exported again."""
    monkeypatch.setattr(assembly, "prove", lambda *_args, **_more: None)
    pipe = tiny.load(tiny_teacher)
    identity = [[i] for i in range(5)]
    every = {(b, f"{s}_mod.1"): 4 for b in range(3) for s in ("img", "txt")} | {(5, LAST[1]): 4}
    low = modulation.low_rank(pipe.transformer, identity, every, recorded)
    assembly.export(assembly.TeacherPipeline(pipe), low, identity, tmp_path / "one", {}, call)
    assert assembly.own_code(tmp_path / "one")
    source = tiny.source(tmp_path / "one").replace(trust_remote_code=True)
    again = pipelines.load(source, torch.device("cpu"))
    teacher = again.transformer
    assert torch.equal(answer(teacher, call), answer(low, call))
    assert [matrix.block for matrix in modulation.matrices(teacher)] == [3, 3, 4, 4]  # the rest are
    parts = [
        NewBlock(0, 0, ("image",)),
        NewBlock(1, 1, (), "source"),
        NewBlock(2, 2, (), "close", (1, 1)),
    ]
    made = students.start(teacher, parts, "first")
    for part, student in made.items():
        students.shaped(teacher, part, student)
    assert set(made[parts[2]].narrowed["ranks"]) == {"img_mod.1"}
    model, _, block_map = students.plugged(teacher, made)
    model = modulation.low_rank(model, block_map, {(4, "img_mod.1"): 2}, recorded)
    assembly.export(assembly.TeacherPipeline(again), model, block_map, tmp_path / "two", {}, call)
    third = pipelines.load(
        tiny.source(tmp_path / "two").replace(trust_remote_code=True), torch.device("cpu")
    )
    assert torch.equal(answer(third.transformer, call), answer(model, call))
    assert third.transformer.config.narrow_blocks["norm_out"] == {"ranks": {"linear": 4}}
    assert third.transformer.config.narrow_blocks["transformer_blocks.0"]["ranks"]["img_mod.1"] == 4


def test_gradient_checkpointing_gives_the_same_gradients(low, call):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(low).requires_grad_(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**call)[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        again = gradients[1][name]
        assert again is gradient is None or torch.equal(again, gradient), name
    assert all(
        gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if ".down." in name
    )


@pytest.mark.parametrize("how", ["stream", "leaves", "group"])
def test_offloaded_it_answers_the_same(low, call, how):
    model, cpu = copy.deepcopy(low), torch.device("cpu")
    if how == "stream":
        devices.stream(model, [b.module for b in blocks.block_sequence(model)], cpu)
    elif how == "leaves":
        pipelines.stream_leaves(model, cpu)
    else:
        model.enable_group_offload(cpu, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(answer(model, call), answer(low, call))


def test_a_streamed_model_can_be_reduced(run_of, low, recorded, call):
    model, cpu = copy.deepcopy(run_of[0]), torch.device("cpu")
    devices.stream(model, [b.module for b in blocks.block_sequence(model)], cpu)
    made = modulation.low_rank(model, run_of[1], ranks_of(4), recorded)
    for _ in range(2):
        assert torch.equal(answer(made, call), answer(low, call))
    assert torch.equal(answer(model, call), answer(run_of[0], call))


def test_a_lora_on_up_and_down(low, call):
    from peft import LoraConfig

    model = copy.deepcopy(low)
    model.add_adapter(LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * len(ranks_of(4))
    assert not torch.allclose(answer(model, call), answer(low, call))
    model.disable_adapters()
    assert torch.equal(answer(model, call), answer(low, call))
