"""IP-adapters of the teacher on pruned pipelines: blocks get the weights of those they stand for.

What they should be is not taken from numbers in a file, but from the attentions of the teacher,
into which diffusers has loaded the file: they are known by the names of their blocks.
"""

import copy
import dataclasses
import json
import re
import runpy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ppcl.errors import UserError
from ppcl.export import ip_adapters, pruned_models
from support import SCRIPTS, ip_files, pruned
from support.ip_files import PICTURE, drawn
from support.zoo_images import SPECIMENS

DEPTH = 6
# At the start, in the middle and at the end of FLUX's list of double blocks, and among its single
# blocks, which have no weights; in SD3, of blocks with two attentions, and of blocks with one.
MERGED = {"flux": ((0, 1), (3, 5), (6, 8)), "sd3": ((0, 1), (3, 4))}


def prepared(name, style, place):
    """The teacher's pipeline, with the IP-adapter; a variant without; the block map; and paths of
    the adapter's file and of the variant."""
    torch.manual_seed(0)
    pipe = SPECIMENS[name].make(DEPTH)
    pipe.set_progress_bar_config(disable=True)
    variant, block_map = pruned.model(pipe.transformer, MERGED[name])
    variant = copy.deepcopy(variant)
    flux = name == "flux"
    made = ip_files.flux(pipe.transformer, style) if flux else ip_files.sd3(pipe.transformer)
    save_file(made, place / "ip.safetensors")
    folder = place / "model"
    variant.save_pretrained(folder / "transformer")
    index = {"transformer": ["diffusers", type(variant).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer/block_map.json").write_text(json.dumps(block_map))
    load(pipe, place / "ip.safetensors")
    return pipe, variant, block_map, place / "ip.safetensors", folder


def load(pipe, file):
    more = {"image_encoder_folder": None}
    if "Flux" in type(pipe).__name__:
        more = {"image_encoder_pretrained_model_name_or_path": None}
    pipe.load_ip_adapter(str(file.parent), weight_name=file.name, **more)
    pipe.set_ip_adapter_scale(0.7)


def call(pipe, settings):
    torch.manual_seed(3)
    flux = "Flux" in type(pipe).__name__
    picture = torch.randn(1, 1, PICTURE) if flux else torch.randn(2, 5, PICTURE)
    more = {"negative_ip_adapter_image_embeds": [torch.zeros(1, 1, PICTURE)]} if flux else {}
    return pipe(
        **settings | {"num_inference_steps": 2} | more,
        prompt="a red cat",
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        ip_adapter_image_embeds=[picture] if flux else picture,
    ).images.float()


@torch.no_grad()
def expected(teacher, variant, block_map):
    """Gives each attention of a variant the processor of the first of the teacher's attentions
    that its block stands for; in FLUX with the sum of their values."""
    theirs, mine = teacher.attn_processors, {}
    doubles = [each for each in block_map if each[0] < DEPTH]
    for name in variant.attn_processors:
        which, number, rest = name.split(".", 2)
        if which != "transformer_blocks":
            mine[name] = theirs[name.replace(f".{number}.", ".0.")]
            continue
        olds = [theirs[f"{which}.{old}.{rest}"] for old in doubles[int(number)]]
        made = copy.deepcopy(olds[0])
        if hasattr(teacher, "image_proj"):  # SD3: the first's alone
            mine[name] = made
            continue
        values, target = [value_of(old) for old in olds], value_of(made)
        target.weight.copy_(sum(value.weight for value in values))
        if target.bias is not None:
            target.bias.copy_(sum(value.bias for value in values))
        mine[name] = made
    variant.set_attn_processor(mine)
    if hasattr(teacher, "image_proj"):
        variant.image_proj = teacher.image_proj
    else:
        variant.encoder_hid_proj = teacher.encoder_hid_proj
        variant.config.encoder_hid_dim_type = "ip_image_proj"


def value_of(processor):
    """Its Linear of the values; FLUX has a list, with one for each adapter."""
    value = processor.to_v_ip
    return value[0] if isinstance(value, nn.ModuleList) else value


def parts(pipe, variant):
    made = type(pipe)(**pipe.components | {"transformer": variant})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name, style", [("flux", "diffusers"), ("flux", "xlabs"), ("sd3", "")])
def test_a_block_gets_the_weights_of_those_that_it_stands_for(name, style, tmp_path):
    pipe, variant, block_map, file, folder = prepared(name, style, tmp_path)
    run({"adapter": file, "model": folder, "output": tmp_path / "mine.safetensors"})
    settings = SPECIMENS[name].settings
    whole = parts(pipe, copy.deepcopy(variant))
    load(whole, tmp_path / "mine.safetensors")
    got = call(whole, settings)
    whole.set_ip_adapter_scale(0.0)
    without = call(whole, settings)
    right = parts(pipe, copy.deepcopy(variant))
    expected(pipe.transformer, right.transformer, block_map)
    wanted = call(right, settings)
    assert apart(got, wanted) < 1e-5
    assert apart(got, without) > 1e-2


@pytest.mark.parametrize("name", MERGED)
def test_a_narrow_variant_takes_the_teacher_s_file_as_it_is(name, tmp_path):
    """With a linear FFN, and with blocks that share or leave out their text stream."""
    roles = ("source", "borrow", "close")
    specs = {0: {"linear_ffn": ["image"]}} | {n: {"text": r} for n, r in enumerate(roles, 2)}
    pipe = SPECIMENS[name].make(DEPTH)
    save_file(getattr(ip_files, name)(pipe.transformer), tmp_path / "ip.safetensors")
    whole = parts(pipe, pruned.model(pipe.transformer, narrowed=specs)[0])
    load(whole, tmp_path / "ip.safetensors")
    got = call(whole, SPECIMENS[name].settings)
    whole.set_ip_adapter_scale(0.0)
    assert apart(call(whole, SPECIMENS[name].settings), got) > 1e-2


def apart(a, b):
    """How far two tensors are apart, relative to the second."""
    return float((a - b).norm() / b.norm())


def test_names_of_its_style_stay_and_the_rest_is_as_it_was(tmp_path):
    _, _, _, file, folder = prepared("flux", "xlabs", tmp_path)
    before = load_file(file)
    after = ip_adapters.remap(file, pruned_models.read(folder, "transformer"))
    key = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj.weight"
    assert sorted(after) == sorted(
        name for name in before if not re.match(r"double_blocks\.[345]\.", name)
    )
    for name in before:
        if name.startswith("ip_adapter_proj_model"):
            assert torch.equal(after[name], before[name])
    assert torch.equal(after[key.format(1, "v")], before[key.format(2, "v")])  # one block
    assert torch.equal(after[key.format(2, "k")], before[key.format(3, "k")])
    three = sum(before[key.format(old, "v")].double() for old in (3, 4, 5))
    assert torch.equal(after[key.format(2, "v")], three.float())


def test_what_is_no_adapter_of_this_teacher_is_refused(tmp_path):
    _, _, _, file, folder = prepared("flux", "diffusers", tmp_path)
    model, weights = pruned_models.read(folder, "transformer"), load_file(file)
    wan = pruned_models.FAMILIES["WanTransformer3DModel"]
    other = dataclasses.replace(model, name="WanTransformer3DModel", family=wan)
    with pytest.raises(UserError, match="for which diffusers loads no IP-adapters"):
        ip_adapters.remap(file, other)
    changed = {
        "has weights for 5 attentions, but the teacher has 6": {
            name: w for name, w in weights.items() if not name.startswith("ip_adapter.5.")
        },
        "other weights for attention 3 than for 5": {
            name: w for name, w in weights.items() if name != "ip_adapter.4.to_v_ip.bias"
        },
        "'ip_adapter.4.to_k_ip.weight' is of the shape .* of another model": weights
        | {"ip_adapter.4.to_k_ip.weight": drawn(model.config["attention_head_dim"], 8)},
        "has no weights such as ip_adapter.0": {"ip_adapter.x.to_k_ip.weight": drawn(2, 2)},
    }
    for message, content in changed.items():
        save_file(content, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=message):
            ip_adapters.remap(tmp_path / "bad.safetensors", model)
    (tmp_path / "bad.safetensors").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        ip_adapters.remap(tmp_path / "bad.safetensors", model)
    with pytest.raises(UserError, match="convert it"):
        ip_adapters.remap(tmp_path / "ip.bin", model)
    with pytest.raises(UserError, match="does not exist"):
        ip_adapters.remap(tmp_path / "none.safetensors", model)


def test_sums_of_one_byte_per_number_become_bfloat16(tmp_path):
    _, _, _, file, folder = prepared("flux", "diffusers", tmp_path)
    small = {name: w.to(torch.float8_e4m3fn) for name, w in load_file(file).items()}
    save_file(small, tmp_path / "small.safetensors")
    model = pruned_models.read(folder, "transformer")
    made = ip_adapters.remap(tmp_path / "small.safetensors", model)
    three = sum(small[f"ip_adapter.{old}.to_v_ip.weight"].double() for old in (3, 4, 5))
    assert torch.equal(made["ip_adapter.2.to_v_ip.weight"], three.bfloat16())
    assert made["ip_adapter.2.to_k_ip.weight"].dtype == torch.float8_e4m3fn


def run(paths):
    words = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["remap_ip_adapter", *words])
        runpy.run_path(str(SCRIPTS / "remap_ip_adapter.py"), run_name="__main__")
