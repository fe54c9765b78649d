"""Narrow blocks in every family: what they compute, against the stock block under hooks; and their
low-rank modulation."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map

from ppcl.closed_forms import linear_map_candidates, modulation, solved
from ppcl.pruning import narrow, pruned_class, students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.training import teaching
from ppcl.transformer import blocks, calls, families, inside_block
from ppcl.transformer.family import TEXT
from support import tiny, zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
ONE_EACH = {one.family: name for name, one in ZOO.items() if one.family in families.FAMILIES}
FFN = [
    (name, listed.attribute, stream)
    for family, name in ONE_EACH.items()
    for listed in families.FAMILIES[family].lists
    if listed.width
    for stream in listed.width.ffn
]
GATED = [
    (name, attribute)
    for family, name in ONE_EACH.items()
    for attribute in families.FAMILIES[family].gated
]
SHARED_TEXT = [
    name
    for family, name in ONE_EACH.items()
    if any(listed.width and listed.width.text for listed in families.FAMILIES[family].lists)
]
MODULATED = [name for family, name in ONE_EACH.items() if families.FAMILIES[family].last_modulation]


@pytest.fixture(scope="module")
def calls_of():
    """name -> a transformer of 4 blocks per list, and the arguments of one real call of it.

    A late one, for some pipelines begin at time 0, whose embedding is zero, and with the prompt,
    not without; letters are to be written, for which some have an encoder of their own."""
    made = {}

    def marked(arguments) -> int:
        values = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
        return sum(int(v.sum()) for v in values if not v.is_floating_point())

    def make(name: str):
        if name not in made:
            one, seen = ZOO[name], []
            pipe = one.make(4)
            transformer = getattr(pipe, one.component)

            def look(module, args, kwargs):
                seen.append(blocks.signature_arguments(module, args, kwargs))

            handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
            pipe.set_progress_bar_config(disable=True)
            more = {}
            if one.image:
                more["image"] = Image.new("RGB", (64, 64))
            with torch.no_grad():
                pipe(
                    prompt=['a red "1"'],
                    generator=[torch.Generator().manual_seed(0)],
                    output_type="latent",
                    **one.settings,
                    **more,
                )
            handle.remove()
            made[name] = transformer, max(reversed(seen[-2:]), key=marked)
        return made[name]

    return make


def seen_by(transformer, arguments, block):
    """The bound arguments and outputs of one block in a call."""
    given, returned = {}, {}
    with (
        torch.no_grad(),
        blocks.watch(
            [block],
            lambda _block, bound: given.update(bound),
            lambda _block, streams: returned.update(streams),
            stop_after=block.index,
        ) as run,
    ):
        run(transformer, arguments)
    return given, returned


def random_maps(block) -> None:
    generator = torch.Generator().manual_seed(1)
    for linear in narrow.maps(block).values():
        for parameter in linear.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def test_what_goes_with_a_block_counts(calls_of):
    """HiDream has a projection of texts for every block, which goes with it."""
    (family,) = (name for name, entry in families.FAMILIES.items() if entry.companions)
    transformer, _ = calls_of(ONE_EACH[family])
    unit = Unit((NewBlock(1, 3),))
    student = blocks.block_sequence(transformer)[1].module
    model, _ = blocks.assembled(transformer, {(1, 3): student})
    saved = blocks.parameter_count(transformer) - blocks.parameter_count(model)
    assert linear_map_candidates.saved_parameters(transformer, unit) == saved
    assert sum(blocks.parameters_of_blocks(transformer)[2:4]) == saved


@pytest.mark.parametrize(("name", "attribute"), GATED)
def test_a_refitted_start_is_nearer_to_its_interval(calls_of, name, attribute):
    """On the call that it is refitted on: the registry is right about the linears."""
    transformer, arguments = calls_of(name)
    sequence = blocks.block_sequence(transformer)
    first = next(block.index for block in sequence if block.list.attribute == attribute)
    part = NewBlock(first, first + 1)
    lesson = teaching.teacher_states(transformer, [part], arguments)[part]
    rows = np.arange(len(next(iter(lesson.target.values()))))  # guidance may have made two of one
    batch = calls.Batch(arguments, torch.zeros(len(rows)), {}, rows)
    reader = SimpleNamespace(index={"timestep": 0.0 * rows}, batches=lambda *_: [batch])

    def missing(block) -> float:
        with torch.no_grad():
            output = sequence[first].outputs(block(**lesson.bound))
        target = lesson.target
        real = {s: torch.ones(x.shape[:2]).bool() for s, x in target.items()}
        real |= blocks.token_masks(blocks.family(transformer), arguments, target)
        return sum(float((output[s] - x)[real[s]].square().sum()) for s, x in target.items())

    copied = students.start(transformer, [part], "first")
    before = missing(copied[part])
    solved.refit(tiny.context(transformer, reader), copied, rows, 1)
    assert missing(copied[part]) < 0.9 * before


@pytest.mark.parametrize(("name", "attribute", "stream"), FFN)
def test_a_linear_ffn_is_equation_9(calls_of, name, attribute, stream):
    """The stream is x + W x + b of what the stock block's norm before the FFN gets; what the FFN
    does not touch stays as it is; and the FFN's parameters are gone."""
    transformer, arguments = calls_of(name)
    block = next(b for b in blocks.block_sequence(transformer) if b.list.attribute == attribute)
    bound, stock = seen_by(transformer, arguments, block)
    with torch.no_grad(), inside_block.taps(block) as tapped:
        block.module(**bound)
    made = narrow.narrow(copy.deepcopy(block.module), block.list.layout(), {"linear_ffn": [stream]})
    random_maps(made)
    with torch.no_grad():
        output = block.outputs(made(**bound))
    linear, h = narrow.maps(made)[f"ffn/{stream}"], tapped[f"ffn/{stream}"].double()
    expected = h + h @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(output[stream].double(), expected, rtol=1e-5, atol=1e-5)
    for other in set(stock) - {stream}:
        torch.testing.assert_close(output[other], stock[other], rtol=1e-5, atol=1e-6)
    parts = block.width.ffn[stream]
    assert not [key for key in made.state_dict() if key.startswith(f"{parts.ffn}.")]
    paths = filter(None, (parts.ffn, parts.norm, parts.after))
    dropped = [block.module.get_submodule(path) for path in paths]
    gone = sum(p.numel() for module in dropped for p in module.parameters())
    new = sum(p.numel() for p in linear.parameters())
    kept = blocks.parameter_count(block.module) - gone + new
    if parts.modulation:
        first, end = parts.parts
        inputs = block.module.get_submodule(parts.modulation).in_features
        kept -= (end - first) * linear.in_features * (inputs + 1)
    assert blocks.parameter_count(made) == kept


@pytest.mark.parametrize("name", SHARED_TEXT)
def test_a_text_run_is_equation_8(calls_of, name):
    """Block 1 borrows from block 0 and closes: the image is that of a stock block whose attention
    gets z_a + W z_a + b as text; the text is h_a + W h_a + b."""
    transformer, arguments = calls_of(name)
    # Blocks of one kind: SD3.5's first ones have a second attention.
    first = next(
        b
        for b in blocks.block_sequence(transformer)
        if b.width.text and b.index + 1 not in blocks.seams(transformer)
    )
    second = blocks.block_sequence(transformer)[first.index + 1]
    path = first.width.text
    layout = first.list.layout()
    bound, stock_first = seen_by(transformer, arguments, first)
    source = narrow.narrow(copy.deepcopy(first.module), layout, {"text": "source"})
    closing = narrow.narrow(copy.deepcopy(second.module), layout, {"text": "close"})
    random_maps(closing)
    with torch.no_grad():
        carried = first.outputs(source(**bound))
        text, z_a = carried[TEXT].chunk(2, dim=-1)
        assert torch.equal(text, stock_first[TEXT])
        assert torch.equal(carried["image"], stock_first["image"])
        given = bound | {
            second.list.inputs["image"]: carried["image"],
            second.list.inputs[TEXT]: carried[TEXT],
        }
        output = second.outputs(closing(**given))

    maps = narrow.maps(closing)
    z = z_a + maps["text/input"](z_a)

    def instead(_module, args, kwargs):
        return args, kwargs | {path.argument: z}

    handle = second.module.get_submodule(path.attention).register_forward_pre_hook(
        instead, with_kwargs=True
    )
    with torch.no_grad():
        stock = second.outputs(second.module(**given | {second.list.inputs[TEXT]: text}))
    handle.remove()
    torch.testing.assert_close(output["image"], stock["image"], rtol=1e-5, atol=1e-5)
    expected = text + maps["text/output"](text)
    torch.testing.assert_close(output[TEXT], expected, rtol=1e-5, atol=1e-6)
    kept = {key for key in closing.state_dict() if key.startswith(f"{path.attention}.add_")}
    assert any("add_k_proj" in key for key in kept)
    assert not [key for key in closing.state_dict() if key.startswith((path.output, *path.query))]


@pytest.mark.parametrize("name", SHARED_TEXT)
def test_z_a_is_what_the_attention_of_the_source_gets(calls_of, name):
    transformer, arguments = calls_of(name)
    first = next(b for b in blocks.block_sequence(transformer) if b.width.text)
    bound, _ = seen_by(transformer, arguments, first)
    with torch.no_grad(), inside_block.taps(first) as tapped:
        first.module(**bound)
    source = narrow.narrow(copy.deepcopy(first.module), first.list.layout(), {"text": "source"})
    with torch.no_grad():
        carried = first.outputs(source(**bound))[TEXT]
    assert torch.equal(carried.chunk(2, dim=-1)[1], tapped["text/input"])


@pytest.mark.parametrize("family", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_projections_are_fused_as_in_the_stock_class(calls_of, family):
    """Where blocks have no text queries, too. The stock class of Qwen-Image fuses nothing; that of
    SD3.5 can't run fused if it attends twice."""
    transformer, arguments = calls_of(ONE_EACH[family])
    model = copy.deepcopy(narrow_everywhere(transformer, unread=False))
    made = pruned_class.from_stock(model, blocks.family(transformer).layouts())
    with torch.no_grad():
        expected = blocks.answer(made, arguments)
        made.fuse_qkv_projections()
        torch.testing.assert_close(blocks.answer(made, arguments), expected, rtol=1e-5, atol=1e-5)
        fused = any("to_added_qkv" in key for key in made.state_dict())
        assert fused == family.startswith("Flux")
        made.unfuse_qkv_projections()
        torch.testing.assert_close(blocks.answer(made, arguments), expected, rtol=1e-5, atol=1e-5)


# ---- what is kept has an effect

KEYS = "softmax does not change if all its scores do alike"
UNREAD = "the stock class makes a text stream that nothing reads"
# Of a block with a linear FFN, which is the first; 3 d numbers beside 12 d^2 and more.
TABLE = {r"(?<!_)\b(transformer_)?blocks\.0\.scale_shift_table$": (1 / 2, "it is added as a whole")}
# Class -> pattern of parameters' names -> share of them that is dead in the stock class, and why.
DEAD = {
    "QwenImageTransformer2DModel": {
        r"^transformer_blocks\.3\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\.": (
            1,
            UNREAD,
        ),
        r"^transformer_blocks\.3\.txt_mod\.": (4 / 6, UNREAD),
    },
    "SD3Transformer2DModel": {
        r"^transformer_blocks\.3\.attn\.(add_q_proj|norm_added_q)\.": (1, UNREAD),
    },
    "MochiTransformer3DModel": {
        r"^transformer_blocks\.3\.attn1\.(add_q_proj|norm_added_q)\.": (1, UNREAD),
        r"\.pooler\.to_kv\.bias$": (1 / 2, KEYS),
    },
    "CogVideoXTransformer3DModel": {
        r"^transformer_blocks\.3\.norm1\.linear\.": (1 / 6, UNREAD),
        r"^transformer_blocks\.3\.norm2\.linear\.": (3 / 6, UNREAD),
    },
    "PixArtTransformer2DModel": {r"\.attn[12]\.to_k\.bias$": (1, KEYS)} | TABLE,
    "SanaTransformer2DModel": {
        r"\.attn2\.to_k\.bias$": (1, KEYS),
        # Some of 16 rows in some blocks: not dead, and so not perturbed.
        r"\.attn1\.to_[qk]\.weight$": (None, "no token of this call opens these rows' ReLU"),
    }
    | TABLE,
    "WanTransformer3DModel": TABLE,
    "LTXVideoTransformer3DModel": TABLE,
    "HunyuanImageTransformer2DModel": {r"\.refiner_blocks\..*\.to_k\.bias$": (1, KEYS)},
    "HunyuanVideoTransformer3DModel": {r"\.refiner_blocks\..*\.to_k\.bias$": (1, KEYS)},
}


def narrow_everywhere(transformer, unread: bool):
    """A model with a narrow block of every kind: in each list that can, one without FFNs, and a
    text run of up to three blocks; `unread`: the last three, after which nothing reads text."""
    sequence, seams, made = blocks.block_sequence(transformer), blocks.seams(transformer), {}
    for listed in blocks.family(transformer).lists:
        members = [b for b in sequence if b.list is listed]
        specs = {members[0].index: {"linear_ffn": list(members[0].width.ffn)}}
        if members[0].width.text:
            texts = [b.index for b in members if b.width.text and b.index not in seams[1:]]
            first, *others = texts[-3:] if unread else texts[:3]
            specs = {first: {"text": "lend" if unread else "source", "linear_ffn": ["image"]}}
            specs |= {index: {"text": "borrow"} for index in others}
            if not unread:
                specs[first]["linear_ffn"].append("text")
                specs[others[-1]] = {"text": "close", "linear_ffn": ["image"]}
        for index, spec in specs.items():
            if spec.get("linear_ffn") != []:
                block = copy.deepcopy(sequence[index].module)
                made[index, index] = narrow.narrow(block, listed.layout(), spec)
                random_maps(made[index, index])
    return blocks.assembled(transformer, made)[0]


RUNS = [(family, False) for family in ONE_EACH] + [("QwenImageTransformer2DModel", True)]


@pytest.mark.parametrize(("family", "unread"), RUNS)
def test_every_parameter_that_is_left_moves_the_output(calls_of, family, unread):
    """Each number of each by itself: what it moves is not zero to first order, in float64. What is
    dead (DEAD) moves nothing, however far it is moved. Other blocks of the models are stock."""

    def double(value):
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floats else value

    transformer, arguments = calls_of(ONE_EACH[family])
    model = copy.deepcopy(narrow_everywhere(transformer, unread)).double().requires_grad_(True)
    for module in model.modules():
        module.training = hasattr(module, "experts")  # which have no derivatives otherwise
    arguments = tree_map(double, arguments)
    output = blocks.answer(model, arguments)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (output * draw).sum().backward()

    expected = {} if unread else DEAD.get(family, {})
    dead_numbers = {}
    for name, parameter in model.named_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dead = slope.abs() < 1e-14
        (share,) = [s for p, (s, _) in expected.items() if re.search(p, name)] or [0]
        if share is None:
            assert dead.all(1).double().mean() < 0.5 and torch.equal(dead.all(1), dead.any(1)), name
            continue
        assert dead.double().mean().item() == pytest.approx(share), name
        if share:
            dead_numbers[name] = dead
    asserted = [pattern for pattern, (share, _) in expected.items() if share]
    assert all(any(re.search(pattern, name) for name in dead_numbers) for pattern in asserted)
    with torch.no_grad():
        for name, dead in dead_numbers.items():
            parameter = model.get_parameter(name)
            parameter += dead * torch.randn(dead.shape, generator=generator, dtype=torch.float64)
        moved = blocks.answer(model, arguments)
    assert torch.allclose(moved, output, rtol=0, atol=1e-10)


# ---- low-rank modulation


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_every_matrix_that_sees_the_conditioning_is_named(calls_of, name):
    """Of the Linears in blocks, and of those from the last block on, the ones that get one vector
    per sample, and no tokens: no other, and none but in families where one table serves all."""
    transformer, arguments = calls_of(name)
    sequence, seen, handles = blocks.block_sequence(transformer), [], []
    inside = {id(m): b for b in sequence for m in b.module.modules()}
    paths = {id(m): path for b in sequence for path, m in b.module.named_modules()}
    outside = {id(m): path for path, m in transformer.named_modules()}
    batch = len(arguments[blocks.family(transformer).state])

    def look(module, args):
        block = inside.get(id(module))
        if args[0].ndim == 2 and len(args[0]) == batch:
            key = (block.index, paths[id(module)]) if block else outside[id(module)]
            seen.append(key)

    def done(*_call):
        seen.append("blocks end")

    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(look))
    handles.append(sequence[-1].module.register_forward_hook(done))
    with torch.no_grad():
        transformer(**arguments)
    for handle in handles:
        handle.remove()
    last = seen[seen.index("blocks end") + 1 :]
    conditioned = {key for key in seen if isinstance(key, tuple)} | {
        (len(sequence), p) for p in last
    }
    if name == "flux2":  # of a last AdaLN alone there is too little to gain
        assert conditioned == {(len(sequence), "norm_out.linear")}
        conditioned = set()
    assert conditioned == {matrix.key for matrix in modulation.matrices(transformer)}


class Drawn:
    """Inputs for the matrices of a transformer, drawn at random."""

    def __init__(self, matrices):
        self.matrices = {matrix.key: matrix for matrix in matrices}

    def of(self, key):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(99, self.matrices[key].inputs, generator=generator).double()
        return Sums(len(inputs), inputs.sum(0), inputs.T @ inputs)


class Sums:
    def __init__(self, count, total, outer):
        self.count, self.sum, self.outer = count, total, outer


@pytest.mark.parametrize("name", MODULATED)
@torch.no_grad()
def test_every_matrix_can_be_a_product(calls_of, name, tmp_path):
    """At full rank the model answers as before; at low rank it has as many parameters as was told,
    and loads as its own class, every weight to the bit."""
    transformer, arguments = calls_of(name)
    matrices = modulation.matrices(transformer)
    block_map = [[b.index] for b in blocks.block_sequence(transformer)]
    expected = blocks.answer(transformer, arguments)
    full = {matrix.key: min(matrix.inputs, matrix.outputs) for matrix in matrices}
    same = modulation.low_rank(transformer, block_map, full, Drawn(matrices))
    torch.testing.assert_close(blocks.answer(same, arguments), expected, rtol=1e-4, atol=1e-5)

    low = modulation.low_rank(transformer, block_map, dict.fromkeys(full, 2), Drawn(matrices))
    answer = blocks.answer(low, arguments)
    assert not torch.allclose(answer, expected, rtol=1e-4, atol=1e-5)
    saved = sum(matrix.parameters() - matrix.parameters(2) for matrix in matrices)
    assert blocks.parameter_count(transformer) - blocks.parameter_count(low) == saved
    made = pruned_class.from_stock(low, blocks.family(transformer).layouts())
    made.save_pretrained(tmp_path)
    again, info = type(made).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    # Products as thin as these round differently where weights lie elsewhere in memory.
    torch.testing.assert_close(blocks.answer(again, arguments), answer, rtol=1e-5, atol=1e-5)
    kept = again.state_dict()
    assert all(torch.equal(kept.pop(name), value) for name, value in low.state_dict().items())
    assert not kept
    assert narrow.specs(again) == narrow.specs(low)
