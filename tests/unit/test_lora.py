"""LoRAs of the teacher in pruned models: places, merged exactly, projected, fitted; the program."""

import copy
import json
import runpy

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.export import assembly, lora, lora_files, lora_styles
from ppcl.export.lora_layers import Layer
from ppcl.extraction import conditioning
from ppcl.pruning import narrow, pruned_class
from ppcl.transformer import blocks
from support import SCRIPTS, tiny
from support.modulation_inputs import LAST, WIDTH, Recorded, inputs_of

LAST_OF_FOUR = (4, LAST[1])
TARGETS = ["img_mod.1", "txt_mod.1", "to_q", "norm_out.linear"]


@pytest.fixture(scope="module")
def recorded():
    return Recorded(inputs_of(200, WIDTH, seed=3).mul(0.3))


@pytest.fixture(scope="module")
def call():
    return tiny.arguments((5, 3))


@pytest.fixture(scope="module")
def stock():
    return tiny.transformer(blocks=4, scale=0.2)


@pytest.fixture(scope="module")
def adapted(stock, tmp_path_factory):
    """The teacher with a LoRA, as peft runs it, and its file as diffusers writes it."""
    model = copy.deepcopy(stock)
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config)
    folder = tmp_path_factory.mktemp("lora")
    QwenImagePipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    return model, folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def answer(model, call):
    return model(**call)[0]


def read(model, file, pipeline=QwenImagePipeline):
    return lora_files.read(pipeline, file, "transformer", model).layers


def merge(model, block_map, layers):
    """Merges what has a place; what has none, and why."""
    places, gone = lora.places(model, block_map, layers)
    lora.merge(model, {place.path: place.layer for place in places.values()})
    return gone


def project(model, layers, moments):
    places, gone = lora.places(model, identity(model), layers)
    assert not gone
    return lora.projected(model, places, moments)


def identity(model):
    return [[block.index] for block in blocks.block_sequence(model)]


def every(model, rank):
    return {matrix.key: rank for matrix in modulation.matrices(model)}


def test_merged_it_is_the_lora_on_the_teacher(stock, adapted, recorded, call):
    """At full rank the only other change is rounding."""
    theirs, file = adapted
    layers = read(stock, file)
    assert len(layers) == 4 * 3 + 1 and {layer.scale for layer in layers.values()} == {2.0}
    model = modulation.low_rank(stock, identity(stock), every(stock, WIDTH), recorded)
    model = copy.deepcopy(model)
    before = answer(model, call)
    assert merge(model, identity(stock), layers) == {}
    expected = answer(theirs, call)
    assert (expected - before).square().mean() > 1e-3
    torch.testing.assert_close(answer(model, call), expected, rtol=1e-3, atol=1e-4)


def test_at_low_rank_it_adds_just_what_the_lora_adds(stock, adapted, recorded, call, tmp_path):
    """As peft does beside the same product; and the wider model can be saved and loaded."""
    layers = read(stock, adapted[1])
    made = copy.deepcopy(modulation.low_rank(stock, identity(stock), every(stock, 4), recorded))
    merged = copy.deepcopy(made)
    merge(merged, identity(stock), layers)
    for path, layer in layers.items():  # by hand
        module = made.get_submodule(path)

        def add(_module, args, output, layer=layer):
            return output + layer.scale * args[0] @ layer.a.T @ layer.b.T

        module.register_forward_hook(add)
    torch.testing.assert_close(answer(merged, call), answer(made, call), rtol=1e-4, atol=1e-5)
    saved = pruned_class.from_stock(merged, blocks.family(stock).layouts())
    assert saved.config.narrow_blocks["transformer_blocks.1"] == {
        "ranks": {"img_mod.1": 7, "txt_mod.1": 7}
    }
    assert saved.config.narrow_blocks["norm_out"] == {"ranks": {"linear": 7}}
    saved.save_pretrained(tmp_path)
    again, info = type(saved).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(answer(again, call), answer(merged, call), rtol=1e-5, atol=1e-5)


def test_blocks_are_renumbered_and_what_is_gone_is_told(stock, adapted, recorded, call):
    """Blocks 0 and 1 are one, block 2 has linear FFNs, block 3 borrows from it."""
    layers = read(stock, adapted[1])
    made = {(0, 1): copy.deepcopy(stock.transformer_blocks[0])}
    for index, spec in (
        (2, {"linear_ffn": ["image", "text"], "text": "source"}),
        (3, {"text": "close"}),
    ):
        block = blocks.block_sequence(stock)[index]
        whole = copy.deepcopy(block.module)
        made[index, index] = narrow.narrow(whole, block.list.layout(), spec)
    model, block_map = blocks.assembled(stock, made)
    ranks = {(2, "img_mod.1"): 4, (3, "img_mod.1"): 4, LAST_OF_FOUR: 4}
    model = copy.deepcopy(modulation.low_rank(model, block_map, ranks, recorded))
    places, gone = lora.places(model, block_map, layers)
    assert set(gone) == {
        *(f"transformer_blocks.1.{path}" for path in ("img_mod.1", "txt_mod.1", "attn.to_q")),
        "transformer_blocks.3.txt_mod.1",
    }
    assert "stands for 0 to 1" in gone["transformer_blocks.1.attn.to_q"]
    assert "was cut out" in gone["transformer_blocks.3.txt_mod.1"]
    assert places["transformer_blocks.3.attn.to_q"].path == "transformer_blocks.2.attn.to_q"
    assert places["transformer_blocks.2.img_mod.1"].layer.b.shape == (3 * WIDTH, 3)
    assert places["transformer_blocks.2.img_mod.1"].matrix == (2, "img_mod.1")
    assert places["norm_out.linear"].matrix == LAST_OF_FOUR
    assert merge(model, block_map, layers) == gone
    assert narrow.specs(model)["transformer_blocks.1"]["ranks"] == {"img_mod.1": 7}
    assert model.transformer_blocks[1].txt_mod[1].weight.shape == (3 * WIDTH, WIDTH)
    assert answer(model, call).isfinite().all()


@torch.no_grad()
def test_what_is_cut_out_of_the_middle_is_cut_out_of_a_layer():
    """As of a block with two attentions, whose FFN has the middle third of the outputs."""
    linear = torch.nn.Linear(4, 9, bias=False)
    holder = torch.nn.ModuleDict({"norm": torch.nn.ModuleDict({"linear": linear})})
    narrow._cut_modulation(holder, "norm.linear", 3, 6)
    opened = lora._opened(holder, "norm.linear.0")
    layer = Layer(torch.randn(2, 4), torch.randn(9, 2), 0.5, torch.randn(9))
    kept, rows = layer.without(opened.at, opened.width), [0, 1, 2, 6, 7, 8]
    assert kept.b.equal(layer.b[rows]) and kept.bias.equal(layer.bias[rows])
    assert linear.weight.shape == (6, 4) and (kept.a is layer.a, kept.scale) == (True, 0.5)


def test_projected_it_is_least_squares(stock, adapted, recorded, call, tmp_path):
    """No other LoRA of `up`, with an offset, is nearer on the inputs; the lost share is that."""
    layers = read(stock, adapted[1])
    model = modulation.low_rank(stock, identity(stock), every(stock, 4), recorded)
    made, lost = project(model, layers, recorded)
    assert set(lost) == {path for path in layers if "to_q" not in path}
    path, x = "transformer_blocks.2.img_mod.1", recorded.inputs.double()
    layer, own = layers[path], made[f"{path}.up"]
    wanted = layer.scale * x @ layer.a.double().T @ layer.b.double().T
    seen = x @ model.get_submodule(path).down.weight.double().T
    given = torch.cat([seen, torch.ones(len(x), 1)], dim=1).double()
    best = given @ torch.linalg.lstsq(given, wanted).solution
    reached = own.scale * (seen @ own.a.double().T @ own.b.double().T + own.bias.double())
    torch.testing.assert_close(reached, best, rtol=1e-4, atol=1e-4)
    share = float((wanted - best).square().sum() / wanted.square().sum())
    assert share > 0 and abs(lost[path] - share) < 1e-4 * share

    # diffusers loads the file into the model, and it does the same there.
    twin, hand = copy.deepcopy(model), copy.deepcopy(model)
    twin.load_lora_adapter(lora_styles.in_peft(made), prefix=None, adapter_name="theirs")
    for place, one in made.items():

        def add(_module, args, output, one=one):
            bias = 0 if one.bias is None else one.bias
            return output + one.scale * (args[0] @ one.a.T @ one.b.T + bias)

        hand.get_submodule(place).register_forward_hook(add)
    torch.testing.assert_close(answer(twin, call), answer(hand, call), rtol=1e-4, atol=1e-5)


def test_at_full_rank_nothing_is_lost(stock, adapted, recorded, call):
    layers = read(stock, adapted[1])
    model = modulation.low_rank(stock, identity(stock), every(stock, WIDTH), recorded)
    _, lost = project(model, layers, recorded)
    assert max(lost.values()) < 1e-9


@pytest.mark.parametrize(
    ("alphas", "metadata", "scale"),
    [
        ({}, {}, 1.0),
        ({"alpha": torch.tensor(3.0)}, {}, 1.5),
        ({}, {"r": 2, "lora_alpha": 4, "alpha_pattern": {}}, 2.0),
        ({}, {"r": 2, "lora_alpha": 4, "alpha_pattern": {"norm1.linear": 8}}, 4.0),
        ({}, {"r": 2, "lora_alpha": 4, "alpha_pattern": {r"norm\d\.lin.*": 8}}, 4.0),
        ({}, {"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
    ],
)
@pytest.mark.parametrize("pipeline", [FluxPipeline, QwenImagePipeline])
def test_scales_are_read(stock, tmp_path, pipeline, alphas, metadata, scale):
    """Alphas in the weights, or peft's own notes; all classes turn the former into something."""
    file, name = tmp_path / "a.safetensors", "transformer.transformer_blocks.0.norm1.linear"
    state = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    if alphas and pipeline is QwenImagePipeline:
        state = {key.replace("transformer.", "diffusion_model.", 1): v for key, v in state.items()}
        alphas = {f"diffusion_model.{name.partition('.')[2]}.alpha": alphas["alpha"]}
    else:
        alphas = {f"{name}.alpha": alpha for alpha in alphas.values()}
    notes = {f"transformer.{key}": value for key, value in metadata.items()}
    save_file(state | alphas, file, {"lora_adapter_metadata": json.dumps(notes)} if notes else None)
    (layer,) = read(stock, file, pipeline).values()
    assert layer.scale * layer.b.double() @ layer.a.double() == pytest.approx(
        torch.full((8, 8), 2 * scale).double().numpy()
    )


def test_what_is_no_lora_of_this_model_is_refused(stock, tmp_path):
    file = tmp_path / "a.safetensors"
    name = "transformer.transformer_blocks.0.img_mod.1"
    good = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(good, file)
    layers = read(stock, file)
    assert layers[name.removeprefix("transformer.")].scale == 1
    with pytest.raises(UserError, match="img_mod.1 is of 8 inputs .* of another model"):
        merge(copy.deepcopy(stock), identity(stock), layers)
    save_file({"text_encoder.x.lora_A.weight": torch.ones(2, 8)}, file)
    with pytest.raises(UserError, match="can't be read|no layers of 'transformer'"):
        read(stock, file)
    with pytest.raises(UserError, match="none.safetensors does not exist"):
        read(stock, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changed", "notes"),
    [
        ({"lora_B.weight": None}, None),
        ({"lora_B.weight": torch.ones(8, 3)}, None),
        ({"lora_B.weight": torch.ones(8)}, None),
        ({"lora_B.bias": torch.ones(7)}, None),
        ({"lora_A.weight": torch.ones(0, 8), "lora_B.weight": torch.ones(8, 0)}, {"lora_alpha": 1}),
        ({}, {"lora_alpha": "much"}),
        ({}, {"lora_alpha": 1, "alpha_pattern": [1]}),
    ],
)
def test_what_is_no_whole_lora_is_one_message(stock, tmp_path, changed, notes):
    file, name = tmp_path / "a.safetensors", "transformer.transformer_blocks.0.img_mod.1"
    state = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)} | changed
    state = {f"{name}.{key}": value for key, value in state.items() if value is not None}
    notes = {f"transformer.{key}": value for key, value in (notes or {}).items()}
    save_file(state, file, {"lora_adapter_metadata": json.dumps(notes)} if notes else None)
    with pytest.raises(UserError, match=f"--lora: {file}"):
        read(stock, file)


@pytest.mark.parametrize(
    "notes", [{"lora_alpha": "much"}, {"lora_alpha": 1, "alpha_pattern": {"(": 1}}]
)
def test_notes_of_a_text_encoder_that_are_wrong_are_one_message(stock, tmp_path, notes):
    file, name = tmp_path / "a.safetensors", "transformer.transformer_blocks.0.img_mod.1"
    state = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    more = {key.replace(name, "text_encoder.x"): value.clone() for key, value in state.items()}
    notes = {f"text_encoder.{key}": value for key, value in notes.items()}
    save_file(state | more, file, {"lora_adapter_metadata": json.dumps(notes)})
    with pytest.raises(UserError, match=f"--lora: {file}"):
        read(stock, file)


def test_a_layer_that_the_model_can_not_have(stock, recorded):
    path = "transformer_blocks.0.img_mod.1"
    numbered = {"transformer_blocks.first.img_mod.1": Layer(torch.ones(1, 1), torch.ones(1, 1))}
    places, gone = lora.places(stock, identity(stock), numbered)
    assert not places and "do not have" in gone[next(iter(numbered))]
    model = copy.deepcopy(stock)
    linear = model.get_submodule(path)
    linear.bias = None
    outputs, inputs = linear.weight.shape
    layer = Layer(torch.ones(1, inputs), torch.ones(outputs, 1), bias=torch.ones(outputs))
    with pytest.raises(UserError, match="has a bias, but the model's has none"):
        merge(model, identity(stock), {path: layer})


def test_the_program(tiny_teacher, recorded, tmp_path, modules, monkeypatch, capsys):
    """Both ways, from a folder that an export has written."""
    pipe = tiny.load(tiny_teacher)
    stock = pipe.transformer
    low = modulation.low_rank(stock, identity(stock), every(stock, 4), recorded)
    pipe.register_modules(transformer=assembly.with_code(low))
    assembly.save(assembly.TeacherPipeline(pipe), pipe.transformer, identity(stock), tmp_path / "p")
    name = "transformer.transformer_blocks.0.img_mod.1"
    layer = {f"{name}.lora_A.weight": torch.ones(2, WIDTH)}
    layer[f"{name}.lora_B.weight"] = 0.1 * torch.ones(6 * WIDTH, 2)
    save_file(layer, tmp_path / "lora.safetensors")
    moments = recorded.of(None)
    known = conditioning.Moments(moments.count, moments.sum, moments.outer)
    stored = conditioning.Conditioning([known], dict.fromkeys(every(stock, 4), 0))
    monkeypatch.setattr(conditioning, "read", lambda _path: stored)

    def run(*more):
        given = ["--model", tmp_path / "p", "--lora", tmp_path / "lora.safetensors", *more]
        monkeypatch.setattr("sys.argv", ["remap_lora", *map(str, given)])
        runpy.run_path(str(SCRIPTS / "remap_lora.py"), run_name="__main__")

    run("--merge", tmp_path / "m")
    index = json.loads((tmp_path / "m/transformer/config.json").read_text())
    assert index["narrow_blocks"]["transformer_blocks.0"]["ranks"] == {
        "img_mod.1": 6,
        "txt_mod.1": 4,
    }
    assert assembly.own_code(tmp_path / "m")
    assert (tmp_path / "m/transformer/block_map.json").exists()
    made = tmp_path / "l.safetensors"
    run("--output", made, "--conditioning", tmp_path / "c")
    told = capsys.readouterr().out
    assert "% of what it changes is lost" in told and "1 layers are in" in told
    projected = read(stock, made)
    assert projected["transformer_blocks.0.img_mod.1.up"].bias is not None
    (tmp_path / "p/transformer/block_map.json").write_text("[[0], [2]]")
    for more, why in (
        (["--output", tmp_path / "n.safetensors"], "block_map.json is not of the"),
        (["--output", made], "l.safetensors is there already; name a new one"),
        (["--merge", tmp_path / "p"], "is there already; name a new one"),
        (["--output", tmp_path / "n"], "n is not the name of a .safetensors file"),
        (["--output", tmp_path / "n.safetensors", "--style", "peft"], "a folder for peft"),
        (["--merge", tmp_path / "n", "--calls", tmp_path / "c"], "go together"),
    ):
        with pytest.raises(SystemExit):
            run(*more)
        assert why in capsys.readouterr().err


def test_code_of_another_version_is_told(tiny_teacher, recorded, tmp_path, modules, monkeypatch):
    """And not run, unless all code in the folder is trusted."""
    pipe = tiny.load(tiny_teacher)
    stock, folder = pipe.transformer, tmp_path / "p"
    low = modulation.low_rank(stock, identity(stock), every(stock, 4), recorded)
    pipe.register_modules(transformer=assembly.with_code(low))
    assembly.save(assembly.TeacherPipeline(pipe), pipe.transformer, identity(stock), folder)
    assert assembly.may_run(folder, "transformer")
    monkeypatch.setattr(pruned_class, "_TEXT", pruned_class._TEXT + "\n# newer")
    assert assembly.may_run(folder, "transformer", trusted=True)
    given = ["--model", folder, "--lora", folder / "model_index.json", "--merge", tmp_path / "m"]
    monkeypatch.setattr("sys.argv", ["remap_lora", *map(str, given)])
    program = runpy.run_path(str(SCRIPTS / "remap_lora.py"))
    with pytest.raises(UserError, match="by another version of this program .*; run assemble"):
        program["main"]()
    assert not (tmp_path / "m").exists()


def test_nothing_is_unpickled(stock, tmp_path):
    torch.save({"transformer.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin is no \.safetensors file"):
        read(stock, tmp_path / "a.bin")
