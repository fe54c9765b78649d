"""LoRA files of all styles, into pruned tiny pipelines of several families and out again."""

import copy
import dataclasses
import json

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from ppcl.errors import UserError
from ppcl.export import lora_files, lora_fit, lora_remap, lora_styles
from ppcl.export.lora_layers import Layer
from ppcl.transformer import blocks, calls
from support import tiny, zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
NAMES = ("qwen-image", "flux", "sd3", "wan")


@pytest.fixture(scope="module")
def pipes():
    """Name -> a tiny stock pipeline of four blocks per list."""
    return {name: ZOO[name].make(4) for name in NAMES}


def linears(model, start=""):
    """Path -> every Linear in the blocks."""
    attributes = tuple(f"{x.attribute}." for x in blocks.family(model).lists)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith(attributes)
    }


def layers_of(model, rank=2, magnitudes=False):
    """A random LoRA on every Linear in the blocks."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for path, linear in linears(model).items():
        a = torch.randn(rank, linear.in_features, generator=generator)
        b = 0.1 * torch.randn(linear.out_features, rank, generator=generator)
        length = linear.weight.norm(dim=1) * 1.1 if magnitudes else None
        made[path] = Layer(a, b, magnitude=length)
    return made


def in_diffusers(layers):
    return {f"transformer.{k}": v.contiguous() for k, v in lora_styles.in_peft(layers).items()}


def read(pipe, path, model=None):
    return lora_files.read(type(pipe), path, "transformer", model or pipe.transformer)


def same(one, other):
    assert one.keys() == other.keys()
    for path, layer in one.items():
        probe = torch.randn(layer.a.shape[1], 3, generator=torch.Generator().manual_seed(1))
        given, wanted = (x.scale * x.b @ (x.a @ probe) for x in (other[path], layer))
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-3)
        if layer.magnitude is not None:
            torch.testing.assert_close(layer.magnitude, other[path].magnitude)


def pruned(model):
    """Blocks 1 and 2 of each list are one."""
    sequence = blocks.block_sequence(model)
    starts = {block.list.attribute: block.index for block in reversed(sequence)}.values()
    return blocks.assembled(model, {(s + 1, s + 2): sequence[s + 1].module for s in starts})


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_it_into_the_pruned_pipeline(pipes, name, tmp_path):
    """Each list is renumbered by itself, and the effect is that of the kept blocks' layers."""
    pipe = ZOO[name].make(4)
    layers = layers_of(pipe.transformer)
    save_file(in_diffusers(layers), tmp_path / "a.safetensors")
    model, block_map = pruned(pipe.transformer)
    assert [len(m) for m in block_map].count(2) == len(blocks.family(model).lists)
    made = lora_remap.remap(model, block_map, read(pipe, tmp_path / "a.safetensors"))
    lists = blocks.family(model).lists
    assert len(made.file.unusable) == sum(
        path.startswith(tuple(f"{x.attribute}.2." for x in lists)) for path in layers
    )
    for listed in lists:  # the last block's layers have its new number
        for path in made.file.layers:
            if path.startswith(f"{listed.attribute}.2."):
                before = path.replace(f"{listed.attribute}.2.", f"{listed.attribute}.3.")
                assert made.file.layers[path].b.equal(layers[before].b)
    state = lora_styles.styled(made.file, "diffusers", type(pipe), "transformer", model)
    save_file(state, tmp_path / "b.safetensors")
    pipe.register_modules(transformer=model)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    for path, layer in made.file.layers.items():
        module = pipe.transformer.get_submodule(path)
        (a,), (b,) = module.lora_A.values(), module.lora_B.values()
        scale = next(iter(module.scaling.values()))
        torch.testing.assert_close(scale * b.weight @ a.weight, layer.product())


# Style of each family that diffusers reads back, and why not where it does not.
CAN = {
    ("qwen-image", "kohya"): "",
    ("qwen-image", "comfyui"): "",
    ("flux", "kohya"): "can't read it back",  # its reader counts on 3072 channels in single blocks
    ("flux", "comfyui"): "can't read it back",
    ("sd3", "kohya"): "does not read",
    ("sd3", "comfyui"): "does not read",
    ("wan", "kohya"): "",
    ("wan", "comfyui"): "",
}


@pytest.mark.parametrize(("name", "style"), CAN)
def test_styles_are_written_and_read(pipes, name, style, tmp_path):
    pipe = pipes[name]
    layers = layers_of(pipe.transformer)
    file = lora_files.LoraFile(layers)
    given = file, style, type(pipe), "transformer", pipe.transformer
    if CAN[name, style]:
        with pytest.raises(UserError, match=f"--style: {style} can't hold .*{CAN[name, style]}"):
            lora_styles.styled(*given)
        return
    state = lora_styles.styled(*given)
    assert not any(".lora_A." in key for key in state)
    save_file(state, tmp_path / "a.safetensors")
    same(read(pipe, tmp_path / "a.safetensors").layers, layers)


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_flux_of_its_real_width(style, tmp_path):
    """Double and single blocks, of which the original code has one Linear for several; the parts
    that have no layer add nothing."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2)
    generator, layers = torch.Generator().manual_seed(0), {}
    for path, linear in linears(model).items():
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "norm.linear")):
            if path == "single_transformer_blocks.1.proj_mlp":
                continue
            rank = 3 if path.endswith("to_k") else 2
            a = 0.1 * torch.randn(rank, linear.in_features, generator=generator)
            layers[path] = Layer(a, torch.randn(linear.out_features, rank, generator=generator))
    file = lora_files.LoraFile(layers)
    state = lora_styles.styled(file, style, FluxPipeline, "transformer", model)
    assert any("single_blocks" in key for key in state)
    save_file(state, tmp_path / "a.safetensors")
    again = lora_files.read(FluxPipeline, tmp_path / "a.safetensors", "transformer", model)
    added = again.layers.pop("single_transformer_blocks.1.proj_mlp")
    assert not added.b.any()
    same(again.layers, layers)


@pytest.mark.parametrize("style", ["diffusers", "peft", "kohya", "comfyui"])
def test_magnitudes_are_kept(pipes, style, tmp_path):
    pipe = pipes["qwen-image"]
    layers = layers_of(pipe.transformer, magnitudes=True)
    file = lora_files.LoraFile(layers)
    state = lora_styles.styled(file, style, type(pipe), "transformer", pipe.transformer)
    save_file(state, tmp_path / "a.safetensors")
    again = read(pipe, tmp_path / "a.safetensors")
    same(again.layers, layers)
    assert all(layer.magnitude is not None for layer in again.layers.values())


def test_flux_splits_magnitudes_as_its_rows(tmp_path):
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {
        f"{name}.lora_down.weight": torch.randn(2, 3072),
        f"{name}.lora_up.weight": torch.randn(3 * 3072, 2),
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.dora_scale": torch.arange(3.0 * 3072)[:, None],
    }
    save_file(state, tmp_path / "a.safetensors")
    layers = lora_files.read(FluxPipeline, tmp_path / "a.safetensors", "transformer", model).layers
    assert layers["transformer_blocks.0.attn.to_k"].magnitude.equal(torch.arange(3072.0, 6144.0))
    up, down = state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"]
    torch.testing.assert_close(
        layers["transformer_blocks.0.attn.to_k"].product(), 0.5 * up[3072:6144] @ down
    )


def test_merged_magnitudes_are_dora(pipes):
    """As peft runs it."""
    model = ZOO["qwen-image"].make(2).transformer
    layers = layers_of(model, magnitudes=True)
    by_peft = ZOO["qwen-image"].make(2).transformer
    by_peft.load_lora_adapter(lora_styles.in_peft(layers), prefix=None, adapter_name="x")
    assert next(iter(by_peft.peft_config.values())).use_dora
    file = lora_files.LoraFile(layers)
    lora_remap.merge(model, [[0], [1]], file)
    for path in layers:
        module = by_peft.get_submodule(path)
        module.merge()
        torch.testing.assert_close(
            model.get_submodule(path).weight, module.get_base_layer().weight, rtol=1e-4, atol=1e-5
        )


def test_peft_reads_its_folder(pipes, tmp_path):
    pipe = ZOO["qwen-image"].make(2)
    layers = layers_of(pipe.transformer)
    file = lora_files.LoraFile(layers)
    given = "peft", type(pipe), "transformer", pipe.transformer
    save_file(lora_styles.styled(file, *given), tmp_path / "adapter_model.safetensors")
    lora_fit.peft_config(pipe.transformer, layers).save_pretrained(tmp_path)
    assert not getattr(pipe.transformer, "peft_config", {})
    same(read(pipe, tmp_path / "adapter_model.safetensors").layers, layers)
    model = PeftModel.from_pretrained(pipe.transformer, tmp_path).base_model.model
    for path, layer in layers.items():
        module = model.get_submodule(path)
        delta = module.get_delta_weight("default")
        torch.testing.assert_close(delta, layer.product())


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 3}}])
def test_scales_of_a_folder_of_peft_are_those_beside_it(more, tmp_path):
    pipe = ZOO["qwen-image"].make(2)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k"], **more)
    model = get_peft_model(pipe.transformer, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    layers = read(pipe, tmp_path / "adapter_model.safetensors").layers
    for path, layer in layers.items():
        module = model.base_model.model.get_submodule(path)
        torch.testing.assert_close(module.get_delta_weight("default"), layer.product())
    assert len(layers) == 4
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOHA"'))
    with pytest.raises(UserError, match=r"adapter_config.json is of LOHA"):
        read(pipe, tmp_path / "adapter_model.safetensors")


def test_text_encoders_keep_their_layers(pipes, tmp_path):
    pipe = ZOO["sd3"].make(4)
    layers = layers_of(pipe.transformer)
    place = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = pipe.text_encoder.config.hidden_size
    theirs = {
        f"{place}.lora_A.weight": torch.randn(2, width),
        f"{place}.lora_B.weight": torch.randn(width, 2),
    }
    notes = {"text_encoder.lora_alpha": 4, "text_encoder.r": 2}
    about = {lora_files.NOTES: json.dumps(notes)}
    save_file(in_diffusers(layers) | theirs, tmp_path / "a.safetensors", about)
    model, block_map = pruned(pipe.transformer)
    made = lora_remap.remap(model, block_map, read(pipe, tmp_path / "a.safetensors")).file
    assert made.others.keys() == theirs.keys()
    state = lora_styles.styled(made, "diffusers", type(pipe), "transformer", model)
    save_file(state, tmp_path / "b.safetensors")
    pipe.register_modules(transformer=model)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    (module,) = (
        m
        for path, m in pipe.text_encoder.named_modules()
        if path.endswith("layers.0.self_attn.q_proj")
    )
    (adapter,) = module.lora_A
    wanted = 2 * theirs[f"{place}.lora_B.weight"] @ theirs[f"{place}.lora_A.weight"]
    torch.testing.assert_close(module.get_delta_weight(adapter), wanted)
    with pytest.raises(UserError, match="layers of other components"):
        lora_styles.styled(made, "peft", type(pipe), "transformer", model)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("diffusion_model.blocks.0.norm3.diff", torch.ones(8), "left out by diffusers"),
        ("transformer.blocks.0.attn1.to_q.hada_w1_a", torch.ones(8, 2), "no LoRA of a linear"),
        ("transformer.blocks.9.attn1.to_q", None, "names a block that the teacher's blocks"),
        ("transformer.blocks.0.attn1.to_x", None, "is no linear layer of a Wan"),
    ],
)
def test_keys_without_use_are_listed(pipes, key, value, why, tmp_path):
    pipe = pipes["wan"]
    layers = layers_of(pipe.transformer)
    file = lora_files.LoraFile(layers)
    more = {key: value}
    if value is None:
        more = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    style = "comfyui" if key.startswith("diffusion") else "diffusers"
    state = lora_styles.styled(file, style, type(pipe), "transformer", pipe.transformer)
    save_file(state | more, tmp_path / "a.safetensors")
    got = read(pipe, tmp_path / "a.safetensors")
    made = lora_remap.remap(pipe.transformer, [[i] for i in range(4)], got).file
    (reason,) = made.unusable.values()
    assert why in reason and made.layers.keys() == layers.keys()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: {k: v.fill_(float("nan")) for k, v in s.items()}, "holds NaN"),
        (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "quantised"),
        (lambda s: {k: v for k, v in s.items() if "lora_B" not in k}, "no lora_B beside it"),
        (lambda s: {k: v for k, v in s.items() if "lora_A" not in k}, "no lora_A beside it"),
        (lambda s: {f"unheard.{k}": v for k, v in s.items()}, "has no layers of 'transformer'"),
        (lambda s: {}, "has no layers"),
        (lambda s: {k.replace("blocks.", "blocks.7"): v for k, v in s.items()}, "none of its"),
    ],
)
def test_other_files_are_one_message(pipes, change, why, tmp_path):
    pipe, path = pipes["sd3"], tmp_path / "a.safetensors"
    save_file(change(in_diffusers(layers_of(pipe.transformer))), path)
    with pytest.raises(UserError, match=f"--lora.*{why}"):
        file = read(pipe, path)
        lora_remap.remap(pipe.transformer, [[i] for i in range(4)], file)


@pytest.mark.parametrize("style", ["diffusers", "peft"])
def test_another_familys_lora_is_refused_though_parts_of_it_fit(pipes, style, tmp_path):
    """Blocks of FLUX and Qwen-Image are of one width, and both call the first list the same."""
    flux, path = pipes["flux"], tmp_path / "a.safetensors"
    file = lora_files.LoraFile(layers_of(flux.transformer))
    save_file(lora_styles.styled(file, style, type(flux), "transformer", flux.transformer), path)
    why = "layers of single_transformer_blocks.*FluxTransformer2DModel.*of another family"
    with pytest.raises(UserError, match=f"--lora: {path} has {why}"):
        read(pipes["qwen-image"], path)
    read(flux, path)


@pytest.mark.parametrize("name", ["qwen-image", "wan", "sd3"])
def test_original_names_of_another_family_are_told(pipes, name, tmp_path):
    key, path = "lora_unet_double_blocks_0_img_attn_qkv", tmp_path / "a.safetensors"
    down, up = torch.ones(2, 8), torch.ones(24, 2)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    with pytest.raises(UserError, match="double_blocks, which LoRAs of Flux.* of another family"):
        read(pipes[name], path)


@pytest.mark.parametrize("name", ["qwen-image", "flux", "sd3"])
@pytest.mark.parametrize(
    ("end", "method"), [("hada_w1_a", "LoHa"), ("oft_blocks", "OFT"), ("oft_R.weight", "OFT")]
)
@pytest.mark.parametrize("start", ["transformer.transformer_blocks.0.attn.", "lora_unet_x_0_"])
def test_what_is_of_another_method_is_told(pipes, name, end, method, start, tmp_path):
    save_file({f"{start}to_q.{end}": torch.ones(8, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"is a {method} .*is no LoRA"):
        read(pipes[name], tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("style", lora_styles.STYLES)
def test_a_file_of_one_byte_per_number_becomes_bfloat16(pipes, dtype, style, tmp_path):
    pipe = pipes["qwen-image"]
    state = in_diffusers(layers_of(pipe.transformer))
    key = "transformer.transformer_blocks.0.attn.to_q"
    save_file({k: v.to(dtype) for k, v in state.items()}, tmp_path / "a.safetensors")
    file = read(pipe, tmp_path / "a.safetensors")
    layer = file.layers[key.removeprefix("transformer.")]
    file.layers[key.removeprefix("transformer.")] = dataclasses.replace(layer, scale=0.3 / 2)
    made = lora_styles.styled(file, style, type(pipe), "transformer", pipe.transformer)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x08" + b"\0" * 7 + b"[[[[[[[["])
def test_what_is_no_safetensors_file(pipes, content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="--lora: .*a.safetensors"):
        read(pipes["sd3"], tmp_path / "a.safetensors")


def test_a_fit_comes_nearer_to_the_teacher(tiny_teacher, tmp_path):
    """On calls that it has not seen; and both models are as before."""
    teacher = tiny.load(tiny_teacher).transformer
    tiny.record(tiny_teacher, tmp_path / "calls.parquet", batch=4, renoised=3)
    context = tiny.context(teacher, calls.Reader(tmp_path / "calls.parquet"))
    layers = {p: x for p, x in layers_of(teacher).items() if p.endswith(("to_q", "to_out.0"))}
    sequence = blocks.block_sequence(teacher)
    model, block_map = blocks.assembled(teacher, {(0, 1): sequence[0].module})
    model = copy.deepcopy(model)
    given = lora_remap.Given(None, context, lora_fit.FitOptions(steps=40, batch_size=4, rate=0.1))
    names = set(teacher.state_dict()) | set(model.state_dict())
    with torch.no_grad(), lora_fit.adapted(teacher, layers) as adapters:
        aims = lora_fit._lessons(context, adapters, model, given.options)
    assert set(aims.answers) == set(context.reader.rows(heldout=False))
    one = context.reader.batch(context.reader.rows(heldout=False)[:1])
    with torch.no_grad():
        bare, own = (blocks.answer(x, one.arguments)[0] for x in (teacher, model))
        with lora_fit.adapted(teacher, layers):
            changed = blocks.answer(teacher, one.arguments)[0] - bare
    aim = aims.answers[int(one.numbers[0])]
    shares = (aim - own - changed) / (bare - own)  # of the model's own error, the same everywhere
    torch.testing.assert_close(shares, shares.mean().expand_as(shares), rtol=1e-2, atol=1e-2)
    assert 0 < shares.mean() < 1
    made = lora_remap.remap(model, block_map, lora_files.LoraFile(layers), given)
    assert set(teacher.state_dict()) | set(model.state_dict()) == names
    assert len(made.errors) == 40 and sum(made.errors[-5:]) < 0.8 * sum(made.errors[:5])
    ranks = {path: len(layer.a) for path, layer in made.file.layers.items()}
    assert ranks == {  # the first block stands for two
        path: 4 if path.startswith("transformer_blocks.0.") else 2
        for path in linears(model)
        if path.startswith("transformer_blocks.") and "_mod." not in path
    }
