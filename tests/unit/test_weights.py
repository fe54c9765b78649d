"""Which files hold weights: the choice is the loaders' own; all else is refused early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ppcl.configuration import config, preflight
from ppcl.errors import UserError
from ppcl.settings import Settings
from ppcl.teacher import hub, pipelines, weights
from support import tiny

SHAPE = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


def encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**SHAPE, num_attention_heads=1))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_of_a_file_and_shards_those_are_read_that_the_library_reads(tmp_path, library, variant):
    """Marked: the single file's weights are all 1, and those of the shards all 2."""
    model = encoder() if library == "transformers" else tiny.transformer(blocks=1)
    for value, size in ((2, "3KB"), (1, "1GB")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        for mark in {None, variant}:  # each to a folder of its own: saving removes other shards
            place = tmp_path / f"{size}-{mark}"
            model.save_pretrained(place, max_shard_size=size, variant=mark)
            shutil.copytree(place, tmp_path / "both", dirs_exist_ok=True)
    options = {"variant": variant, "use_safetensors": True}
    read = type(model).from_pretrained(tmp_path / "both", **options)
    headers = weights.headers(tmp_path / "both", library, variant)
    shards = next(read.parameters()).flatten()[0] == 2
    assert (len(headers) > 1) == shards == (library == "diffusers")
    assert all((f".{variant}" in path.name) == bool(variant) for path in headers)
    every = {name for header in headers.values() for name in header}
    assert every == {name for name, _ in model.named_parameters()}
    names = [path.name for path in (tmp_path / "both").iterdir()]
    index = {name for name in weights.wanted(names, variant) if name.endswith(".json")}
    assert set(weights.wanted(names, variant)) - index == {path.name for path in headers}
    assert len(index) == shards


def test_the_variant_is_the_loaders_too():
    shard = "diffusion_pytorch_model-00001-of-00002.fp16.safetensors"  # as it once was
    for names in (["a.fp16.safetensors"], [shard], ["model.fp16-00001-of-00002.safetensors"]):
        assert weights.variant_of([*names, "config.json"], "fp16") == "fp16"
    for names in (["model.safetensors"], ["LICENSE", "model.safetensors.index.fp16.json"], []):
        assert weights.variant_of(names, "fp16") is None
    assert weights.variant_of([shard], None) is None
    old = "diffusion_pytorch_model.safetensors.fp16.index.json"
    assert weights.first([old], "diffusion_pytorch_model", "fp16") == old
    assert weights.wanted([old, shard, "diffusion_pytorch_model.safetensors"], "fp16") == [
        old,
        shard,
    ]


@pytest.fixture
def sharded(tiny_teacher, tmp_path) -> Path:
    """A teacher's folder with a sharded transformer."""
    shutil.copytree(tiny_teacher, tmp_path / "sharded")
    folder = tmp_path / "sharded/transformer"
    model = tiny.transformer(blocks=2)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def refused(folder: Path, parts: dict | None = None, **more) -> str:
    """The message, which the checks before a run and the programs both end with."""
    source = tiny.source(folder.parent).replace(**more)
    said = []
    for check in (
        lambda: preflight._check_teacher(source, "mine.yaml"),
        lambda: pipelines.load(source, torch.device("cpu")),
    ):
        with pytest.raises(UserError) as raised:
            check()
        said.append(str(raised.value).removeprefix("mine.yaml: ").removeprefix("teacher.path: "))
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0]


def test_an_index_and_its_shards_must_agree(sharded):
    path = sharded / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(path.read_text())
    name, shard = min(whole["weight_map"].items())
    for change, expected in (
        ({"weight_map": whole["weight_map"] | {name: "gone.safetensors"}}, "gone.safetensors, wh"),
        ({"weight_map": whole["weight_map"] | {"odd": shard}}, "lacks the weight 'odd'"),
        ({"weight_map": {**whole["weight_map"], name: None}}, "not an index of shards"),
        ({"weight_map": {name: "../vae/diffusion_pytorch_model.safetensors"}}, "not an index"),
        ({"weight_map": {name: "/etc/a.safetensors"}}, "not an index of shards"),
        ({"weight_map": {name: "a\0.safetensors"}}, "not an index of shards"),
        ({"weight_map": [name]}, "not an index of shards"),
        ({"weight_map": {}}, "not an index of shards"),
        ({"metadata": None}, "not an index of shards"),
    ):
        path.write_text(json.dumps(whole | change))
        assert expected in refused(sharded)
    left = {k: v for k, v in whole["weight_map"].items() if k != name}
    path.write_text(json.dumps(whole | {"weight_map": left}))
    message = refused(sharded)
    assert str(sharded / shard) in message and f"also holds the weight '{name}'" in message
    path.write_text(json.dumps(whole))
    shutil.copy(sharded / shard, sharded / "diffusion_pytorch_model-00009-of-00009.safetensors")
    preflight._check_teacher(tiny.source(sharded.parent), "mine.yaml")


def test_weights_that_are_pickles_are_not_read(sharded):
    """Of any component, and whatever the pickle is called."""
    part = sharded.parent / "text_encoder"
    (part / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "tf_model.h5", "flax_model.msgpack"):
        (part / name).write_bytes(b"anything")
        message = refused(sharded)
        assert f"{part} holds no .safetensors file under a name that transformers" in message
        assert f"{name} could run code" in message and "save_pretrained" in message
        (part / name).unlink()
    assert "could run code" not in refused(sharded)
    (part / "other.safetensors").write_bytes(b"")
    assert f"{part} holds no" in refused(sharded)
    shutil.rmtree(part)
    assert f"{part} is not there" in refused(sharded)


def test_what_sends_loaders_elsewhere_is_refused(sharded):
    part = sharded.parent / "text_encoder"
    (part / "adapter_config.json").write_text("{}")
    assert f"{part / 'adapter_config.json'}: neither adapters nor" in refused(sharded)
    (part / "adapter_config.json").rename(part / "shard-00000-model-00000-of-00001.safetensors")
    assert "neither adapters nor training checkpoints" in refused(sharded)
    (part / "shard-00000-model-00000-of-00001.safetensors").unlink()
    path = part / "config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"transformers_weights": "adapter_model.bin"}))
    assert "names weights of its own" in refused(sharded)


def test_quantised_weights_are_named(sharded, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda _name: None)
    for name, expected in (("transformer", "can't be pruned"), ("vae", "need the package torchao")):
        path = sharded.parent / name / "config.json"
        whole = path.read_text()
        about = {"quantization_config": {"quant_method": "torchao"}}
        path.write_text(json.dumps(json.loads(whole) | about))
        message = refused(sharded)
        assert f"{path}: its weights are quantised (torchao)" in message and expected in message
        path.write_text(whole)


def test_a_variant_of_some_parts(sharded):
    """Wherever a component has files of the variant they are read, elsewhere the plain ones."""
    source = tiny.source(sharded.parent).replace(variant="fp16")
    assert "none of its components has weights of teacher.variant fp16" in refused(
        sharded, variant="fp16"
    )
    file = sharded.parent / "vae/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    preflight._check_teacher(source, "mine.yaml")
    whole = pipelines.load(source, torch.device("cpu")).transformer
    alone = pipelines.load_transformer(source, torch.device("cpu"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, alone.state_dict()[name])
    (sharded / "LICENSE").touch()
    assert f"{sharded / 'LICENSE'}: diffusers can't look" in refused(sharded, variant="fp16")


def test_a_config_of_fewer_blocks_is_refused_before_anything_runs(sharded, stand_in):
    path = sharded / "config.json"
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 1'))
    stand_in["teacher"]["path"] = str(sharded.parent)
    given = config.complete(stand_in, "mine.yaml")
    with pytest.raises(UserError, match="num_layers is 1, but the weights are of 2 blocks"):
        preflight.check(Settings.of(given), "mine.yaml")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"": ["diffusers", "X"]}, "'' can't be the name of a component"),
        ({"../../evil": ["diffusers", "X"]}, "'../../evil' can't be"),
        ({"a\0b": ["diffusers", "X"]}, "can't be the name"),
        ({"a" * 101: ["diffusers", "X"]}, "can't be the name"),
        ({"vae": []}, "'vae' is '[]'"),
        ({"vae": ["diffusers", 7]}, "should be the library and the class"),
        ({"vae": ["diffusers", None]}, "should be the library and the class"),
        ({"vae": [["os"], "system"]}, "should be the library and the class"),
        ({"vae": ["../evil", "X"]}, "should be the library and the class"),
        ({"vae": ["diffusers", "X", "Y"]}, "should be the library and the class"),
        ({"_class_name": 7}, "'_class_name' is '7'"),
        ({"_class_name": ["..", "X"]}, "'_class_name' is"),
    ],
)
def test_an_index_names_nothing_but_components(tmp_path, entry, expected):
    (tmp_path / hub.INDEX).write_text(json.dumps({"_class_name": "X"} | entry))
    with pytest.raises(UserError) as raised:
        hub.read_index(tmp_path)
    assert str(tmp_path / hub.INDEX) in str(raised.value) and expected in str(raised.value)


def test_an_index_with_options_is_one(tmp_path):
    given = {
        "_class_name": ["pipeline", "MyPipeline"],
        "_ignore_files": ["a.bin"],
        "_diffusers_version": "0.42.1",
        "boundary_ratio": 0.9,
        "is_distilled": False,
        "text_encoder_select_layers": [10, 20],
        "image_encoder": [None, None],
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["my_code.model", "MyModel"],
    }
    (tmp_path / hub.INDEX).write_text(json.dumps(given))
    assert hub.read_index(tmp_path) == given
    assert hub.parts(tmp_path) == {
        "vae": ("diffusers", "AutoencoderKL"),
        "transformer": ("my_code.model", "MyModel"),
    }
