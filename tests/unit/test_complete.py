"""What is loaded is what is stored: no weight of any component is made up, or left out."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.teacher import complete, pipelines, weights
from support import tiny, zoo_parts

CPU = torch.device("cpu")
# Names of the text encoder's weights are older ones, which transformers renames as it reads them.
PARTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    return tmp_path / "teacher"


def changed(file: Path, change) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refused(folder: Path, part: str = "") -> str:
    """The message of whatever loads the component."""
    with pytest.raises(UserError) as raised:
        pipelines.load(tiny.source(folder), CPU)
    message = str(raised.value)
    assert "\n" not in message and part in message
    if part == "transformer":
        with pytest.raises(UserError) as raised:
            pipelines.load_transformer(tiny.source(folder), CPU)
        assert str(raised.value).split(": ")[-1] == message.split(": ")[-1]
    return message


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_is_not_there_is_not_made_up(folder, part):
    file = folder / part / PARTS[part]
    lost = sorted(load_file(file))[-2:]
    changed(file, lambda held: {k: v for k, v in held.items() if k not in lost})
    message = refused(folder, part)
    assert f"{file}: lacks 2 weights (" in message
    assert all(name.removeprefix("model.") in message for name in lost)


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_without_a_place_is_not_left_out(folder, part):
    file = folder / part / PARTS[part]
    name = next(iter(load_file(file)))
    more = f"{name.rsplit('.', 1)[0]}.extra"
    changed(file, lambda held: held | {more: held[name].clone()})
    message = refused(folder, part)
    assert f"{file}: holds 1 weight (" in message and more.removeprefix("model.") in message


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.diffusion_model."])
def test_wrapped_names_are_refused(folder, part, prefix):
    file = folder / part / PARTS[part]
    changed(file, lambda held: {prefix + name: weight for name, weight in held.items()})
    assert str(file) in refused(folder, part)


@pytest.mark.parametrize(
    ("part", "key", "shallower"),
    [("transformer", "num_layers", 3), ("text_encoder", "num_hidden_layers", 0)],
)
def test_a_config_of_fewer_layers_is_refused(folder, part, key, shallower):
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    place = config if key in config else config["text_config"]
    assert place[key] > shallower
    place[key] = shallower
    if "layer_types" in place:
        place["layer_types"] = place["layer_types"][:shallower]
    path.write_text(json.dumps(config))
    assert "would be ignored" in refused(folder, part)


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_of_another_shape_is_named(folder, part):
    file = folder / part / PARTS[part]
    name = next(name for name, weight in load_file(file).items() if weight.ndim > 1)
    changed(file, lambda held: held | {name: torch.zeros(3, 5)})
    message = refused(folder, part)
    assert name in message and "3, 5" in message


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_is_no_number_is_named(folder, part):
    file = folder / part / PARTS[part]
    name = next(iter(load_file(file)))
    changed(file, lambda held: held | {name: torch.full_like(held[name], torch.nan)})
    assert f"{name.removeprefix('model.')}' holds NaN or infinity" in refused(folder, part)


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_is_stored_as_integers_is_named(folder, part):
    file = folder / part / PARTS[part]
    name = next(name for name, weight in load_file(file).items() if weight.ndim > 1)
    changed(file, lambda held: held | {name: held[name].to(torch.int8)})
    assert f"{file}: the weight '{name}' is stored as I8" in refused(folder, part)
    changed(file, lambda held: held | {name: torch.zeros(held[name].shape).bfloat16()})
    pipelines.load(tiny.source(folder), CPU)


def test_what_is_left_without_memory_is_named():
    model = torch.nn.BatchNorm1d(2)
    model.running_mean = model.running_mean.to("meta")
    with pytest.raises(UserError, match="here: the weight 'running_mean' is missing"):
        complete.refuse_incomplete(model, "here")
    for value in (torch.nan, torch.inf, -torch.inf):
        made = torch.nn.Linear(2, 3)
        made.bias.data[1] = value
        with pytest.raises(UserError, match="here: the weight 'bias' holds NaN or infinity"):
            complete.refuse_incomplete(made, "here")
    empty = torch.nn.ParameterDict({"none": torch.empty(0), "two": torch.ones(2).bfloat16()})
    complete.refuse_incomplete(empty, "here")


def test_shards_say_which_file_holds_what_is_left_over(folder):
    part = folder / "transformer"
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(part)
    shutil.rmtree(part)
    model.save_pretrained(part, max_shard_size="60KB")
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"num_layers": 4}))
    index = json.loads((part / "diffusion_pytorch_model.safetensors.index.json").read_text())
    places = {v for k, v in index["weight_map"].items() if k.startswith("transformer_blocks.4")}
    message = refused(folder, "transformer")
    assert len(places) > 1 and message.startswith(tuple(f"{part / name}: " for name in places))


def test_loaders_are_left_as_they_were(folder):
    bases = (diffusers.ModelMixin, transformers.PreTrainedModel)
    before = [vars(base)["from_pretrained"] for base in bases]
    (folder / "vae/config.json").write_text("{}")
    refused(folder, "vae")
    assert [vars(base)["from_pretrained"] for base in bases] == before
    with complete.accounts() as told:
        encoder = transformers.PreTrainedModel.from_pretrained.__func__(
            transformers.Qwen2_5_VLForConditionalGeneration, folder / "text_encoder"
        )
    assert told[0][0] is encoder and set(told[0][1]) >= {"missing_keys", "unexpected_keys"}


def test_the_inner_part_of_a_larger_model_is_whole(tmp_path):
    """Heads, decoders and towers of pictures of the model that the config names are not read; but
    a layer too many of the part itself is refused."""
    layers = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8}
    small = layers | {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    clip = {"text_config": small, "vision_config": small | {"image_size": 8, "patch_size": 4}}
    t5 = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_heads": 1, "num_layers": 2, "vocab_size": 20}
    untied = small | {"head_dim": 8, "tie_word_embeddings": False}
    for inner, larger, config, key in (
        ("Qwen3Model", "Qwen3ForCausalLM", transformers.Qwen3Config(**untied), "num_hidden_layers"),
        ("UMT5EncoderModel", "UMT5ForConditionalGeneration", transformers.UMT5Config(**t5), None),
        ("T5EncoderModel", "T5ForConditionalGeneration", transformers.T5Config(**t5), None),
        ("CLIPTextModelWithProjection", "CLIPModel", transformers.CLIPConfig(**clip), None),
    ):
        folder, made_by = tmp_path / inner, getattr(transformers, inner)
        getattr(transformers, larger)(config).save_pretrained(folder)
        files = weights.headers(folder, "transformers", None)
        model, account = made_by.from_pretrained(folder, output_loading_info=True)
        complete.check(model, account, folder, files)
        # Were it saved as what it is loaded as, nothing but its own weights belongs there.
        path = folder / "config.json"
        known = json.loads(path.read_text())
        if account["unexpected_keys"]:
            path.write_text(json.dumps(known | {"architectures": [inner]}))
            with pytest.raises(UserError, match="would be ignored"):
                complete.check(model, account, folder, files)
        if key:
            fewer = {key: 1, "layer_types": known["layer_types"][:1]}
            path.write_text(json.dumps(known | fewer))
            model, account = made_by.from_pretrained(folder, output_loading_info=True)
            with pytest.raises(UserError, match=r"holds 11 weights \('model.layers.1"):
                complete.check(model, account, folder, files)


def test_weights_that_are_stored_once_or_in_an_older_way_are_whole(tmp_path):
    """A tied embedding that is stored once, and buffers that were weights once."""
    model = zoo_parts.t5(zoo_parts.t5_tokenizer(), umt5=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert "encoder.embed_tokens.weight" not in load_file(file)
    loaded, account = type(model).from_pretrained(tmp_path, output_loading_info=True)
    complete.check(loaded, account, tmp_path, weights.headers(tmp_path, "transformers", None))
    clip = zoo_parts.clip(zoo_parts.clip_tokenizer())
    clip.save_pretrained(tmp_path / "clip")
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    changed(tmp_path / "clip/model.safetensors", lambda held: held | ids)
    loaded, account = type(clip).from_pretrained(tmp_path / "clip", output_loading_info=True)
    complete.check(loaded, account, tmp_path / "clip", {})
