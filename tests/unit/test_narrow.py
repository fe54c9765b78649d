"""Narrow blocks: what they compute, what they save, and that diffusers can treat them as stock."""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ppcl.errors import UserError
from ppcl.pruning import narrow, pruned_class
from ppcl.transformer import blocks, claims, families
from ppcl.transformer.family import TEXT, BlockList
from support import tiny

WIDTH, LENGTHS = 32, (5, 3)  # the second prompt is padded
TOKENS, BATCH = max(LENGTHS), len(LENGTHS)
RUN = ({"text": "source"}, {"text": "borrow", "linear_ffn": ["image"]}, {"text": "close"})


# ---- the publication's equations, written out for each family


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def qwen_block(w, bound, image, text, linear=(), attended=None):
    """A block of Qwen-Image in float64: image stream, text stream, the attention's text input.

    Args:
        w: the block's weights by name.
        bound: its call, for temb, rotary embedding and mask.
        linear: streams whose FFN is h + W h + b (Eq. 9).
        attended: z_a, which a borrower maps and attends to, instead of its text stream (Eq. 8).

    A text stream is updated if the block still has what that takes; else it comes back as it was.
    """
    lends = attended is None and "attn.to_add_out.weight" not in w

    def map_of(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulation(name):
        temb = bound["temb"].double()
        return map_of(name, temb / (1 + torch.exp(-temb)))[:, None].split(WIDTH, dim=-1)

    def rms(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"attn.{name}.weight"]

    def turned(x, stream):  # rotary embedding of pairs of channels
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        freqs = bound["image_rotary_emb"][0 if stream == "img" else 1].to(torch.complex128)
        return torch.view_as_real(pairs * freqs).flatten(-2)

    mods = {"img": modulation("img_mod.1")}
    z = {"img": layer_norm(image) * (1 + mods["img"][1]) + mods["img"][0]}
    if attended is None:
        mods["txt"] = modulation("txt_mod.1")
        z["txt"] = layer_norm(text) * (1 + mods["txt"][1]) + mods["txt"][0]
    else:
        z["txt"] = attended + map_of("txt_norm1.linear", attended)

    q = {"img": turned(rms("norm_q", map_of("attn.to_q", z["img"])), "img")}
    if attended is None and not lends:
        q["txt"] = turned(rms("norm_added_q", map_of("attn.add_q_proj", z["txt"])), "txt")
    k = torch.cat(
        [
            turned(rms("norm_added_k", map_of("attn.add_k_proj", z["txt"])), "txt"),
            turned(rms("norm_k", map_of("attn.to_k", z["img"])), "img"),
        ],
        dim=1,
    )
    v = torch.cat([map_of("attn.add_v_proj", z["txt"]), map_of("attn.to_v", z["img"])], dim=1)
    hidden = torch.zeros(BATCH, 1, k.shape[1], dtype=torch.bool)
    hidden[:, 0, :TOKENS] = ~bound["encoder_hidden_states_mask"]

    def updated(h, name, output, stream):
        scores = q[name] @ k.mT / math.sqrt(WIDTH)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        h = h + mods[name][2] * map_of(output, weights @ v)
        if stream in linear:
            return h + map_of(f"linear_ffn.{stream}", h)
        x = layer_norm(h) * (1 + mods[name][4]) + mods[name][3]
        x = map_of(f"{name}_mlp.net.0.proj", x)
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return h + mods[name][5] * map_of(f"{name}_mlp.net.2", x)

    image = updated(image, "img", "attn.to_out.0", "image")
    if attended is None and not lends:
        text = updated(text, "txt", "attn.to_add_out", "text")
    return image, text, z["txt"]


@dataclass(frozen=True)
class Case:
    """A family under test: a small model of it, a call, and its blocks by hand."""

    name: str
    transformer: Callable
    arguments: Callable
    block: Callable


CASES = [Case("QwenImageTransformer2DModel", tiny.transformer, tiny.arguments, qwen_block)]


@pytest.fixture(params=CASES, ids=[case.name for case in CASES], scope="module")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def stock(case):
    """A stock model of 5 blocks that all matter."""
    return case.transformer(blocks=5, scale=0.2)


@pytest.fixture(scope="module")
def call(case):
    return case.arguments(LENGTHS)


@pytest.fixture(scope="module")
def bound(stock, call):
    """The arguments of the first block in a real call."""
    arguments = {}
    first = blocks.block_sequence(stock)[0]
    with blocks.watch([first], lambda _block, given: arguments.update(given), stop_after=0) as run:
        run(stock, call)
    return arguments


def narrowed(stock, index, spec, maps=0.2):
    """A narrow copy of a block, its new maps drawn at random with this scale."""
    block = blocks.block_sequence(stock)[index]
    made = narrow.narrow(copy.deepcopy(block.module), block.list.layout(), spec)
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for linear in narrow.maps(made).values():
            for parameter in linear.parameters():
                parameter.add_(maps * torch.randn(parameter.shape, generator=generator))
    return made


def assembled(stock, specs, maps=0.2):
    made = {(i, i): narrowed(stock, i, spec, maps) for i, spec in specs.items()}
    return blocks.assembled(stock, made)[0].eval()


def run_of(stock, start=1, maps=0.2):
    """A model with a text run of three blocks, and a block that has linear FFNs only."""
    specs = {start + i: spec for i, spec in enumerate(RUN)}
    return assembled(stock, specs | {0: {"linear_ffn": ["image", "text"]}}, maps)


def weights(block):
    return {k: v.double() for k, v in block.state_dict().items()}


@torch.no_grad()
def called(block, bound, image, text):
    """Image and text stream that a block returns."""
    streams = {"hidden_states": image, "encoder_hidden_states": text}
    text, image = block(**bound | streams)
    return image, text


def close_to(output, expected):
    scale = expected.abs().max()
    return torch.allclose(output.double(), expected, rtol=0, atol=1e-5 * scale.item())


# ---- what they compute


@pytest.mark.parametrize("streams", [(), ("image",), ("text",), ("image", "text")])
def test_a_linear_ffn_is_equation_9(case, stock, bound, streams):
    block = narrowed(stock, 2, {"linear_ffn": list(streams)})
    image, text = bound["hidden_states"], bound["encoder_hidden_states"]
    outputs = called(block, bound, image, text)
    expected = case.block(weights(block), bound, image.double(), text.double(), streams)
    assert close_to(outputs[0], expected[0]) and close_to(outputs[1], expected[1])
    whole = called(stock.transformer_blocks[2], bound, image, text)
    assert torch.equal(outputs[0], whole[0]) == ("image" not in streams)
    assert torch.equal(outputs[1], whole[1]) == ("text" not in streams)


@pytest.mark.parametrize("maps", [0.0, 0.2])
@pytest.mark.parametrize("first", ["source", "lend"])
def test_a_text_run_is_equation_8(case, stock, bound, maps, first):
    run = ({"text": first}, *RUN[1:])
    made = [narrowed(stock, i, spec, maps) for i, spec in enumerate(run)]
    image, text = bound["hidden_states"], bound["encoder_hidden_states"]
    exact, h = image.double(), text.double()
    for block, spec in zip(made, run, strict=True):
        image, text = called(block, bound, image, text)
        linear = spec.get("linear_ffn", ())
        if spec["text"] == first:
            exact, h, z = case.block(weights(block), bound, exact, h, linear)
        else:
            exact, *_ = case.block(weights(block), bound, exact, None, linear, attended=z)
        if spec["text"] == "close":
            w = weights(block)
            h = h + h @ w["text_output.linear.weight"].T + w["text_output.linear.bias"]
        assert close_to(image, exact), spec
        assert close_to(text, h if spec["text"] == "close" else torch.cat([h, z], -1)), spec


def test_a_source_is_stock_to_the_bit(stock, bound):
    block, whole = narrowed(stock, 1, {"text": "source"}), stock.transformer_blocks[1]
    seen = []
    handle = whole.attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(handle.remove)
        image, text = called(whole, bound, bound["hidden_states"], bound["encoder_hidden_states"])
    outputs = called(block, bound, bound["hidden_states"], bound["encoder_hidden_states"])
    assert torch.equal(outputs[0], image)
    assert torch.equal(outputs[1], torch.cat([text, seen[0]], dim=-1))


def test_zero_maps_pass_the_source_on(stock, bound):
    made = [narrowed(stock, i, spec, maps=0) for i, spec in enumerate(RUN)]
    image, carry = called(made[0], bound, bound["hidden_states"], bound["encoder_hidden_states"])
    attended = []
    made[1].attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: attended.append(kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    image, text = called(made[1], bound, image, carry)
    assert torch.equal(text, carry)
    assert torch.equal(attended[0], carry[..., WIDTH:])
    assert torch.equal(called(made[2], bound, image, text)[1], carry[..., :WIDTH])


def test_nothing_reads_the_text_after_the_last_block(stock, call):
    """The family's claim, by which a run that ends there needs no close."""
    assert blocks.family(stock).unread == (TEXT,)
    specs = {2: {"text": "source"}, 3: {"text": "borrow"}, 4: {"text": "borrow"}}
    answers = [
        assembled(stock, specs | other)(**call)[0]
        for other in ({}, {4: {"text": "close"}}, {2: {"text": "lend"}})
    ]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_text_queries_of_a_run_have_no_effect(stock, call, monkeypatch):
    """Whatever stands where they were made, and however large it is."""
    model = run_of(stock)
    expected = model(**call)[0]
    for index in (2, 3):
        attention = model.transformer_blocks[index].attn
        assert attention.add_q_proj(torch.ones(2, 3)).eq(0).all()
        monkeypatch.setattr(attention, "add_q_proj", lambda z: 1e3 * torch.randn_like(z))
    assert torch.equal(model(**call)[0], expected)


# ---- what they save


def ffn_saved(d):
    """FFN of 4d, half a modulation of 6d; for a map of d."""
    return (4 * d * d + 4 * d) + (4 * d * d + d) + (3 * d * d + 3 * d) - (d * d + d)


def text_saved(d):
    """Modulation, FFN, projections of output and query, whose norm has one head; for the map of
    the attention's input."""
    return (6 * d * d + 6 * d) + (8 * d * d + 5 * d) + 2 * (d * d + d) + d - (d * d + d)


COSTS = [  # spec, parameters saved, multiplications saved per image token, text token and sample
    ({"linear_ffn": ["image"]}, ffn_saved(WIDTH), (7, 0, 3)),
    ({"linear_ffn": ["text"]}, ffn_saved(WIDTH), (0, 7, 3)),
    ({"text": "source"}, 0, (0, 0, 0)),
    # As a borrower, but with a third of its modulation and without a map.
    ({"text": "lend"}, text_saved(WIDTH) - WIDTH * WIDTH - WIDTH, (0, 10, 4)),
    ({"text": "borrow"}, text_saved(WIDTH), (0, 9, 6)),
    ({"text": "close"}, text_saved(WIDTH) - WIDTH * WIDTH - WIDTH, (0, 8, 6)),
    (
        {"text": "borrow", "linear_ffn": ["image"]},
        text_saved(WIDTH) + ffn_saved(WIDTH),
        (7, 9, 9),
    ),
]


@pytest.mark.parametrize(("spec", "saved", "products"), COSTS, ids=[str(c[0]) for c in COSTS])
def test_what_is_dropped_is_gone(stock, bound, spec, saved, products):
    whole, block = stock.transformer_blocks[2], narrowed(stock, 2, spec)
    assert blocks.parameter_count(whole) - blocks.parameter_count(block) == saved
    held = [sum(t.nbytes for t in b.state_dict().values()) for b in (whole, block)]
    assert held[0] - held[1] == 4 * saved
    assert not list(block.buffers())

    text = bound["encoder_hidden_states"]
    borrows = spec.get("text") in ("borrow", "close")
    carry = torch.cat([text, text], -1) if borrows else text
    with FlopCounterMode(display=False) as before:
        called(whole, bound, bound["hidden_states"], text)
    with FlopCounterMode(display=False) as after:
        called(block, bound, bound["hidden_states"], carry)
    tokens = (BATCH * bound["hidden_states"].shape[1], BATCH * TOKENS, BATCH)
    expected = sum(2 * WIDTH**2 * p * n for p, n in zip(products, tokens, strict=True))
    assert before.get_total_flops() - after.get_total_flops() == expected


@pytest.mark.parametrize("spec", [c[0] for c in COSTS], ids=[str(c[0]) for c in COSTS])
def test_what_is_kept_keeps_its_name_and_value(stock, spec):
    whole = stock.transformer_blocks[2].state_dict()
    block = narrowed(stock, 2, spec)
    state = block.state_dict()
    new = {
        f"{block.map_paths[name]}.{k}" for name in narrow.maps(block) for k in ("weight", "bias")
    }
    assert set(state) - set(whole) <= new
    for name in set(state) - new:
        kept = whole[name][: len(state[name])]  # the first half of a modulation, or all
        assert torch.equal(state[name], kept), name
    assert all(p.requires_grad for m in narrow.maps(block).values() for p in m.parameters())


def test_maps_have_names_and_start_as_identities(stock):
    block = blocks.block_sequence(stock)[1]
    state = torch.random.get_rng_state()
    specs = [
        ({"linear_ffn": ["image", "text"]}, {"ffn/image", "ffn/text"}),
        ({"text": "own"}, set()),
        ({"text": "source"}, set()),
        ({"text": "lend", "linear_ffn": ["image"]}, {"ffn/image"}),
        ({"text": "borrow", "linear_ffn": ["image"]}, {"ffn/image", "text/input"}),
        ({"text": "close"}, {"text/input", "text/output"}),
    ]
    for spec, names in specs:
        made = narrow.narrow(copy.deepcopy(block.module), block.list.layout(), spec)
        assert set(narrow.maps(made)) == names
        for linear in narrow.maps(made).values():
            assert type(linear) is nn.Linear and not any(p.any() for p in linear.parameters())
        assert made.narrowed["text"] == spec.get("text", "own")
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    assert narrow.maps(block.module) == {}


# ---- what diffusers and torch do with blocks


def test_a_narrow_block_passes_for_stock(stock):
    whole = stock.transformer_blocks[0]
    for spec in RUN:
        block = narrowed(stock, 0, spec)
        assert isinstance(block, type(whole))
        assert type(block).__name__ in stock._repeated_blocks + stock._no_split_modules
        assert inspect.signature(block.forward) == inspect.signature(whole.forward)
        assert type(block) is type(narrowed(stock, 1, spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moves_and_copies(stock, call, dtype):
    model = run_of(stock)
    with torch.no_grad():
        expected = model(**call)[0]
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**call)[0], expected)
        narrow.maps(twin.transformer_blocks[2])["text/input"].weight.zero_()
        assert torch.equal(model(**call)[0], expected)  # nothing is shared
        low = twin.to(dtype)
        given = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in call.items()
        }
        answer = low(**given)[0]
        assert answer.dtype == dtype and answer.isfinite().all()
        assert all(p.dtype == dtype for p in low.parameters())
        low.to("meta")
        assert all(p.is_meta for p in low.parameters())


def test_narrowing_on_meta(stock):
    """As from_pretrained builds a model: nothing has values yet."""
    block = blocks.block_sequence(stock)[0]
    for spec, saved, _ in COSTS:
        empty = copy.deepcopy(block.module).to("meta")
        made = narrow.narrow(empty, block.list.layout(), spec)
        assert all(p.is_meta for p in made.parameters())
        assert blocks.parameter_count(made) == blocks.parameter_count(block.module) - saved


def test_gradient_checkpointing_gives_the_same_gradients(stock, call):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(run_of(stock)).requires_grad_(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**call)[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        again = gradients[1][name]
        assert again is gradient is None or torch.equal(again, gradient), name
    for index in (0, 2, 3):
        for linear in narrow.maps(model.transformer_blocks[index]).values():
            assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_whole_model_compiles_without_a_graph_break(stock, call, checkpointing):
    model = copy.deepcopy(run_of(stock))
    for index in (0, 1):  # a halved modulation, and a whole one, of low rank
        product = narrow.lower(model.transformer_blocks[index], {"img_mod.1": 4}).img_mod[1]
        for parameter in product.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(checkpointing)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    expected = model(**call)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**call)[0], expected, atol=1e-5)


def test_blocks_compile_one_by_one(stock, call):
    model = copy.deepcopy(run_of(stock))
    with torch.no_grad():
        expected = model(**call)[0]
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert all(b._compiled_call_impl for b in model.transformer_blocks)
        assert torch.allclose(model(**call)[0], expected, atol=1e-5)


def test_hooks_on_a_block_see_what_passes_between_blocks(stock, call):
    claims.verify(run_of(stock), call)


def test_a_lora_of_the_stock_class_loads(stock, call, caplog):
    """Made for all linear layers of the stock model; what a narrow block lacks is skipped."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    source = copy.deepcopy(stock)
    targets = r".*(to_q|to_k|to_v|to_out\.0|add_._proj|to_add_out|_mlp\.net\.0\.proj|net\.2)"
    torch.manual_seed(0)
    source.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    lora = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(source).items()}

    model = copy.deepcopy(run_of(stock))
    with torch.no_grad():
        before = model(**call)[0]
        with caplog.at_level("WARNING"):
            model.load_lora_adapter(lora, adapter_name="theirs")
        after = model(**call)[0]
        assert not torch.allclose(before, after)
        taken = {k.replace(".theirs", "") for k in model.state_dict() if "lora" in k}
        gone = [".0.img_mlp", ".0.txt_mlp", ".2.img_mlp"]
        parts = ("txt_mlp", "attn.to_add_out", "attn.add_q_proj")
        gone += [f".{i}.{name}" for i in (2, 3) for name in parts]
        known = {k.removeprefix("transformer.") for k in lora}
        assert taken == {k for k in known if not any(name in k for name in gone)}
        assert any("unexpected keys" in r.getMessage() for r in caplog.records)
        model.set_adapters("theirs", 0.0)
        assert torch.allclose(model(**call)[0], before, atol=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"linear_ffn": ["audio"]}, "no audio FFN that could be linear"),
        ({"text": "last"}, "is not what `narrow` can do"),
        ({"texts": "source"}, "is not what `narrow` can do"),
        ({"linear_ffn": "image"}, "is not what `narrow` can do"),
        ({"linear_ffn": None}, "is not what `narrow` can do"),
        ({"ranks": ["img_mod.1"]}, "is not what `narrow` can do"),
        ({"text": "lend", "linear_ffn": ["text"]}, "that is borrowed, or unread, has no FFN"),
        ({"text": "borrow", "linear_ffn": ["text"]}, "that is borrowed, or unread, has no FFN"),
        ({"text": "close", "linear_ffn": ["text"]}, "that is borrowed, or unread, has no FFN"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(stock, spec, message):
    block = blocks.block_sequence(stock)[0]
    whole = copy.deepcopy(block.module)
    with pytest.raises(ValueError, match=message):
        narrow.narrow(whole, block.list.layout(), spec)
    assert whole.state_dict().keys() == block.module.state_dict().keys()


def test_a_family_without_the_part_is_refused(stock):
    bare = BlockList("b", "n", {"image": "x"}, ("image",))
    assert bare.layout() == {"outputs": ["image"], "ffn": {}, "text": None}
    whole = copy.deepcopy(stock.transformer_blocks[0])
    with pytest.raises(ValueError, match="no text stream that could be borrowed"):
        narrow.narrow(whole, bare.layout(), {"text": "source"})
    with pytest.raises(ValueError, match="no image FFN that could be linear"):
        narrow.narrow(whole, bare.layout(), {"linear_ffn": ["image"]})


def test_a_narrow_block_is_not_narrowed_again(stock):
    block = blocks.block_sequence(stock)[0]
    with pytest.raises(ValueError, match="narrow already"):
        narrow.narrow(narrowed(stock, 0, RUN[0]), block.list.layout(), RUN[1])


# ---- the class with narrow blocks


def test_the_class_round_trips(case, stock, call, tmp_path):
    model = run_of(stock)
    family = blocks.family(stock)
    made = pruned_class.from_stock(model, family.layouts())
    assert type(made).__name__ == f"Pruned{case.name}" and isinstance(made, type(stock))
    assert blocks.family(made) is family
    assert "narrow_blocks" not in model.config and type(model) is type(stock)
    for own, shared in zip(model.parameters(), made.parameters(), strict=True):
        assert own is shared
    assert made.config.narrow_blocks == {
        "transformer_blocks.0": {"linear_ffn": ["image", "text"], "text": "own"},
        "transformer_blocks.1": {"linear_ffn": [], "text": "source"},
        "transformer_blocks.2": {"linear_ffn": ["image"], "text": "borrow"},
        "transformer_blocks.3": {"linear_ffn": [], "text": "close"},
    }
    made.save_pretrained(tmp_path)
    again, info = type(made).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert dict(again.config)["narrow_blocks"] == made.config.narrow_blocks
    with torch.no_grad():
        assert torch.equal(again(**call)[0], model(**call)[0])
    fresh = type(made).from_config(made.config)  # with values, not on meta
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in made.state_dict().items()
    }
    assert type(made).from_config(stock.config).config.narrow_blocks == {}
    assert pruned_class.from_stock(made, family.layouts()).config == made.config
    for wrong in ([], "", ["transformer_blocks.0"], {"transformer_blocks.0": "image"}):
        with pytest.raises(ValueError, match="config.json: narrow_blocks should map the path"):
            type(made).from_config(dict(made.config) | {"narrow_blocks": wrong})


def test_subclasses_are_of_the_family_and_strangers_are_not(case, stock):
    class Theirs(type(stock)):
        pass

    other = copy.copy(stock)
    other.__class__ = Theirs
    assert blocks.family(other) is families.FAMILIES[case.name]
    with pytest.raises(UserError, match="is a Linear, which has no entry"):
        blocks.family(nn.Linear(1, 1))
