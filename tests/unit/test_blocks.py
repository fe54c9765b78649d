"""Blocks as one sequence: watching, calling and replacing them in a stock transformer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.transformer import blocks, claims, families, registry
from ppcl.transformer.family import BlockList, Family
from support import tiny

NAME = "QwenImageTransformer2DModel"


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(blocks=5)


class TwoLists(nn.Module):
    """Two block lists, as FLUX has them."""

    def __init__(self):
        super().__init__()
        self.doubles = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.singles = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


def test_order_seams_and_untouchable_blocks(model, monkeypatch):
    every = blocks.block_sequence(model)
    assert [b.module for b in every] == list(model.transformer_blocks)
    assert [b.index for b in every] == list(range(5))
    assert blocks.seams(model) == [0] and blocks.untouchable(model) == {}

    lists = tuple(
        BlockList(name, f"num_{name}", {"image": "input"}, ("image",))
        for name in ("doubles", "singles")
    )
    reasons = {("doubles", -1): "the last one", ("singles", 0): "the first one"}
    family = Family(lists, untouchable=reasons)
    monkeypatch.setitem(families.FAMILIES, "TwoLists", family)
    two = TwoLists()
    assert [b.module for b in blocks.block_sequence(two)] == [*two.doubles, *two.singles]
    assert blocks.seams(two) == [0, 3]
    assert blocks.untouchable(two) == {2: "the last one", 3: "the first one"}


def test_an_unknown_class_is_refused():
    with pytest.raises(UserError, match=r"a Linear, which has no entry.*no list of.*families\.py"):
        blocks.block_sequence(nn.Linear(2, 2))


def seen(model, call):
    bounds = []
    with blocks.watch(blocks.block_sequence(model), lambda _b, bound: bounds.append(bound)) as run:
        run(model, call)
    return bounds


def test_keyword_and_positional_calls_bind_alike(model):
    call = tiny.arguments((5, 3))
    by_keyword = seen(model, call)
    model.enable_gradient_checkpointing()
    try:
        with torch.enable_grad():
            by_position = seen(model, call)  # checkpointing passes arguments by position
    finally:
        model.disable_gradient_checkpointing()
    assert len(by_keyword) == len(by_position) == 5
    for one, other in zip(by_keyword, by_position, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name


def test_bound_arguments_call_the_block_again(model):
    inputs, outputs = [], []
    with blocks.watch(
        blocks.block_sequence(model),
        lambda block, bound: inputs.append((block, bound)),
        lambda _block, streams: outputs.append(streams),
    ) as run:
        run(model, tiny.arguments((5, 3)))
    for (block, bound), streams in zip(inputs, outputs, strict=True):
        again = block.outputs(block.module(**bound))
        assert {s: tuple(t.shape) for s, t in again.items()} == {
            "text": (2, 5, 32),
            "image": (2, 16, 32),
        }
        assert all(torch.equal(again[s], streams[s]) for s in streams)


def test_stop_after_ends_the_pass_and_hooks_leave(model):
    ran = []
    handles = [
        b.register_forward_pre_hook(lambda module, _args: ran.append(module))
        for b in model.transformer_blocks
    ]
    shown = []
    watched = blocks.block_sequence(model)[1:3]
    with blocks.watch(watched, after=lambda b, _s: shown.append(b.index), stop_after=2) as run:
        assert run(model, tiny.arguments()) is None
    assert ran == list(model.transformer_blocks[:3]) and shown == [1, 2]
    with pytest.raises(ZeroDivisionError), blocks.watch(watched, lambda _b, _s: 1 / 0) as run:
        run(model, tiny.arguments())
    for handle in handles:
        handle.remove()
    ran.clear()
    model(**tiny.arguments())
    assert not any(b._forward_pre_hooks or b._forward_hooks for b in model.transformer_blocks)


def test_verify_accepts_the_registry_and_refuses_swapped_streams(model, monkeypatch):
    call = tiny.arguments((16, 16))  # as many text tokens as image tokens: shapes tell nothing
    claims.verify(model, call)
    (true,) = families.FAMILIES[NAME].lists
    for wrong in (
        replace(true, outputs=("image", "text")),
        replace(true, inputs={"image": "encoder_hidden_states", "text": "hidden_states"}),
    ):
        monkeypatch.setitem(families.FAMILIES, NAME, Family((wrong,)))
        with pytest.raises(UserError, match=r"block 0 does not return its \w+ stream"):
            claims.verify(model, call)


def test_verify_refuses_missing_streams_and_outputs(model, monkeypatch):
    (true,) = families.FAMILIES[NAME].lists
    extra = replace(true, inputs=true.inputs | {"audio": "audio_states"})
    monkeypatch.setitem(families.FAMILIES, NAME, Family((extra,)))
    with pytest.raises(UserError, match="block 0 got no audio stream"):
        claims.verify(model, tiny.arguments())
    single = replace(true, inputs={"image": "hidden_states"}, outputs=("image",))
    monkeypatch.setitem(families.FAMILIES, NAME, Family((single,)))
    with pytest.raises(UserError, match=r"block 0 returns 2 .*families\.py"):
        claims.verify(model, tiny.arguments())


def test_teachers_own_blocks_plugged_back_are_the_teacher(model):
    call = tiny.arguments((5, 3))
    own = {(i, i): module for i, module in enumerate(model.transformer_blocks)}
    again, block_map = blocks.assembled(model, own)
    assert torch.equal(again(**call)[0], model(**call)[0])
    assert block_map == [[0], [1], [2], [3], [4]]


def test_assembled_model(model):
    call = tiny.arguments((5, 3))
    before, config = model(**call)[0], dict(model.config)
    modules, state = list(model.transformer_blocks), model.state_dict()
    other = tiny.transformer(blocks=2, seed=1).transformer_blocks
    small, block_map = blocks.assembled(model, {(3, 4): other[1], (0, 1): other[0]})

    assert list(small.transformer_blocks) == [other[0], modules[2], other[1]]
    assert block_map == [[0, 1], [2], [3, 4]]
    assert small.config.num_layers == 3 and small.img_in is model.img_in
    # The same as running the three blocks by hand, in a stock model built from the new config.
    stock = type(model).from_config(small.config)
    stock.load_state_dict(small.state_dict())
    assert torch.equal(stock.eval()(**call)[0], small(**call)[0])
    assert blocks.parameter_count(small) == blocks.parameter_count(stock)

    assert list(model.transformer_blocks) == modules and dict(model.config) == config
    assert torch.equal(model(**call)[0], before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_interval_of_identities_is_its_first_block():
    model = tiny.transformer(blocks=5, scale=0.2)
    for index in (2, 3):
        tiny.silence(model.transformer_blocks[index])
    call = tiny.arguments()
    small, block_map = blocks.assembled(model, {(1, 3): model.transformer_blocks[1]})
    assert torch.equal(small(**call)[0], model(**call)[0])
    assert block_map == [[0], [1, 2, 3], [4]]


def test_token_masks(model):
    family = registry.family_of(NAME)
    streams = {"image": torch.ones(2, 16, 4), "text": torch.ones(2, 5, 4)}
    assert blocks.token_masks(family, tiny.arguments(), streams) == {}
    masks = blocks.token_masks(family, tiny.arguments((5, 3)), streams)
    assert masks["text"].dtype == torch.bool and masks["text"].sum(1).tolist() == [5, 3]
