"""One file per transformer, under its authors' names: what diffusers' reader makes of it is the
model to the bit."""

import hashlib
import runpy

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file

from ppcl.errors import UserError
from ppcl.export import original_format, single_file
from ppcl.storage import texts
from ppcl.storage.tensors import metadata
from ppcl.transformer import registry
from ppcl.transformer.original_files import SAME, OriginalFiles
from support import SCRIPTS, original_sizes, pruned, zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
# One specimen of each class whose files are known.
KNOWN = {
    ZOO[name].family: name
    for name in reversed(ZOO)
    if registry.original_files(ZOO[name].family) and ZOO[name].component == "transformer"
}
REFUSED = {
    "SanaTransformer2DModel": "diffusers drops 'pos_embed'",
    "MochiTransformer3DModel": "asks such a file for 'blocks.3.mod_x.weight'",
}
READ = sorted(KNOWN.keys() - REFUSED.keys())


def saved(folder, made_as, transformer):
    """A pipeline's folder with nothing but a transformer."""
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", made_as]}
    texts.write_json(folder / "model_index.json", index)
    return folder


def tiny(made_as, depth=3):
    """The zoo's transformer of a class, and the same with the first two blocks of each list merged.

    Blocks 0 and 1 of SD3 have two attentions, 2 has one.
    """
    made = ZOO[KNOWN[made_as]].make(depth).transformer
    lists = len(registry.depth_keys(made_as))
    first = [(n * depth, n * depth + 1) for n in range(lists)]
    return {"teacher": made, "pruned": pruned.model(made, merged=first)[0]}


@pytest.mark.parametrize("made_as", READ)
def test_from_single_file_reads_the_same_model(made_as, tmp_path, monkeypatch):
    original_sizes.tell(monkeypatch, made_as)
    counts = {}
    for which, transformer in tiny(made_as).items():
        folder = saved(tmp_path / which, made_as, transformer)
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 1  # of shards, too
        file = tmp_path / f"{which}.safetensors"
        single_file.write(file, single_file.opened(folder, "transformer"))
        again = type(transformer).from_single_file(str(file), config=str(folder / "transformer"))
        own, read = transformer.state_dict(), again.state_dict()
        assert own.keys() == read.keys()
        assert all(tensor.equal(read[name]) for name, tensor in own.items())
        assert {v.device.type for v in again.state_dict().values()} == {"cpu"}
        counts[which] = len(load_file(file))
        names = registry.original_files(made_as).names
        assert (load_file(file).keys() == own.keys()) == (names == SAME)
    assert counts["pruned"] < counts["teacher"]


@pytest.mark.parametrize("made_as", REFUSED)
def test_what_has_no_way_back_is_refused(made_as, tmp_path):
    folder = saved(tmp_path, made_as, tiny(made_as)["teacher"])
    with pytest.raises(UserError, match=f"can't be one file: .*{REFUSED[made_as]}"):
        single_file.opened(folder, "transformer")


@pytest.mark.parametrize("made_as", original_sizes.SIZES)
def test_other_sizes_than_the_reader_knows_are_refused(made_as, tmp_path):
    folder = saved(tmp_path, made_as, tiny(made_as)["teacher"])
    with pytest.raises(UserError, match="reads such a file of other sizes alone"):
        single_file.opened(folder, "transformer")


# Digests of names and shapes (`digest` below) of the authors' models, built on torch's meta device
# from the code in musubi-tuner (30c658c; FLUX.1, FLUX.2, Wan, HunyuanVideo, Qwen-Image) and
# sd-scripts (48d368f; SD3.5, Lumina 2, of the latter without norm_final, which nothing uses), with
# the depths below; of Mochi, whose code is in neither, what its published depth gives.
PUBLISHED = {
    "FluxTransformer2DModel": (
        {"num_layers": 7, "num_single_layers": 11, "guidance_embeds": True},
        "7c1119fa75fa985c",
    ),
    "Flux2Transformer2DModel": ({"num_layers": 3, "num_single_layers": 5}, "48d294fabec04ce3"),
    "WanTransformer3DModel": (
        {"num_layers": 5, "num_attention_heads": 12, "ffn_dim": 8960},
        "e0d050d15c242905",
    ),
    "WanTransformer3DModel of pictures": (
        {
            **{"num_layers": 5, "num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 36},
            **{"image_dim": 1280, "added_kv_proj_dim": 5120},
        },
        "1b4be373f83378d0",
    ),
    "HunyuanVideoTransformer3DModel": (
        {"num_layers": 3, "num_single_layers": 4},
        "e283635a2c6288f3",
    ),
    "QwenImageTransformer2DModel": (
        {"num_layers": 4, "joint_attention_dim": 3584},
        "2e499e181f9760ae",
    ),
    "SD3Transformer2DModel": (
        {
            **{"num_layers": 38, "num_attention_heads": 38, "joint_attention_dim": 4096},
            **{"caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        },
        "47478f031adcee0c",
    ),
    "Lumina2Transformer2DModel": ({"num_layers": 5, "cap_feat_dim": 2304}, "aed7615e729e05ea"),
}


def planned(made_as, **config):
    """The authors' file of a model that has no weights."""
    with torch.device("meta"):
        model = getattr(diffusers, made_as)(**config)
    convert = SINGLE_FILE_LOADABLE_CLASSES[made_as]["checkpoint_mapping_fn"]
    return original_format.backwards(
        registry.original_files(made_as),
        lambda named: convert(checkpoint=named, config=dict(model.config)),
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )


def digest(planned):
    lines = (f"{name} {list(original.shape)}" for name, original in sorted(planned.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_authors_code(name):
    """At published widths, with the converters as they are."""
    config, expected = PUBLISHED[name]
    assert digest(planned(name.split()[0], **config)) == expected


def test_the_reader_of_mochi_knows_one_depth():
    assert len(planned("MochiTransformer3DModel")) == 48 * 18 - 4 + 19
    with pytest.raises(UserError, match="asks such a file for 'blocks.40.mod_x.weight'"):
        planned("MochiTransformer3DModel", num_layers=40)


# ---- the way back, by hand

FILES = OriginalFiles(("{in,out}.qkv", "b.<blocks>.w", "extra"))


def test_rows_that_are_cut_swapped_and_dealt_out_are_put_back():
    """One tensor's halves are swapped, of another the even rows and the odd ones apart."""

    def read(named):
        first, second = named["in.qkv"].chunk(2)
        made = {"x": torch.cat([second, first])}
        made["even"], made["odd"] = named["out.qkv"][::2], named["out.qkv"][1::2]
        return made | {f"blocks.{n}.w": named[f"b.{n}.w"] for n in range(2)}

    shapes = {"x": (4, 3), "even": (2,), "odd": (2,), "blocks.0.w": (1, 5), "blocks.1.w": (2, 5)}
    made = original_format.backwards(FILES, read, shapes)
    own = {name: torch.randn(shape) for name, shape in shapes.items()}
    file = {
        name: torch.cat([own[rows.name][rows.start : rows.stop] for rows in original.parts])
        for name, original in made.items()
    }
    assert set(file) == {"in.qkv", "out.qkv", "b.0.w", "b.1.w"}
    assert all(file[name].shape == original.shape for name, original in made.items())
    assert len(made["in.qkv"].parts) == 2 and len(made["out.qkv"].parts) == 4
    assert all(tensor.equal(own[name]) for name, tensor in read(file).items())


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda d: {"x": d["in.qkv"] + d["out.qkv"]}, "made of several tensors"),
        (lambda d: {"y": d.get("in.qkv")}, "gives its tensor 'x'"),
        (lambda d: {"x": d["in.qkv"][:2]}, "twice, or not at all|of other sizes"),
        (lambda d: {"x": d["in.qkv"].repeat(2)}, "of other sizes alone"),
        (lambda d: {"x": d["in.qkv"], "extra": d["extra"]}, "drops 'extra'"),
        (lambda d: {"x": d["missing"]}, "asks such a file for 'missing'"),
    ],
)
def test_a_reader_that_loses_rows_has_no_way_back(read, reason):
    with pytest.raises(UserError, match=reason):
        original_format.backwards(FILES, read, {"x": (4,)})


# ---- the program


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A variant that is pruned in depth, and a narrow one."""
    place = tmp_path_factory.mktemp("variants")
    return {
        "depth": pruned.folder(place / "b16", merged=pruned.MERGED),
        "narrow": pruned.folder(place / "p50", narrowed=pruned.NARROW),
    }


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the program, and returns what it printed."""

    def run(*options):
        monkeypatch.setattr("sys.argv", ["to_single_file.py", *map(str, options)])
        try:
            runpy.run_path(str(SCRIPTS / "to_single_file.py"), run_name="__main__")
        except SystemExit as ended:
            assert ended.code == 2
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def test_a_variant_as_one_file(folders, tmp_path, call):
    file = tmp_path / "b16.safetensors"
    assert "525 tensors" in call("--model", folders["depth"], "--output", file)
    config = str(folders["depth"] / "transformer")
    assert metadata(file) == {"format": "pt"}
    read = diffusers.QwenImageTransformer2DModel.from_single_file(str(file), config=config)
    own = diffusers.QwenImageTransformer2DModel.from_pretrained(config)
    assert own.config.num_layers == 16
    assert all(v.equal(read.state_dict()[k]) for k, v in own.state_dict().items())


@pytest.mark.parametrize(
    ("which", "output", "more", "told"),
    [
        ("narrow", "a.safetensors", (), "narrow blocks, which no other program has"),
        ("narrow", "a.gguf", ("--type", "F16"), "narrow blocks, which no other program has"),
        ("depth", "a.bin", (), "no .safetensors and no .gguf file"),
        ("depth", "a.gguf", (), "--type goes with a .gguf file"),
        ("depth", "a.safetensors", ("--type", "F16"), "--type goes with a .gguf file"),
        (
            "depth",
            "a.safetensors",
            ("--component", "vae"),
            "is of the class AutoencoderKLQwenImage",
        ),
        ("depth", "a.safetensors", ("--component", "unet"), "has no model 'unet'"),
        ("depth", "there.safetensors", (), "is there already"),
    ],
)
def test_what_it_refuses(folders, tmp_path, call, which, output, more, told):
    (tmp_path / "there.safetensors").touch()
    assert told in call("--model", folders[which], "--output", tmp_path / output, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_a_config_of_another_depth_is_refused(tmp_path, call):
    """Which diffusers would fill with weights that nobody made, and ComfyUI would not notice."""
    made = tiny("QwenImageTransformer2DModel")["teacher"]
    folder = saved(tmp_path / "model", "QwenImageTransformer2DModel", made)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 3', '"num_layers": 4'))
    told = call("--model", folder, "--output", tmp_path / "a.safetensors")
    assert "numbered [0, 1, 2], but its config says num_layers 4" in told


def test_a_class_whose_blocks_comfyui_does_not_count_is_told(tmp_path, call):
    folder = saved(
        tmp_path / "model", "SD3Transformer2DModel", tiny("SD3Transformer2DModel")["pruned"]
    )
    told = call("--model", folder, "--output", tmp_path / "a.safetensors")
    assert "ComfyUI makes a fixed number of blocks of a SD3Transformer2DModel" in told


def test_parts_of_several_dtypes_are_refused(tmp_path):
    made = tiny("ZImageTransformer2DModel")["teacher"]
    made.layers[0].attention.to_q.half()
    folder = saved(tmp_path / "model", "ZImageTransformer2DModel", made)
    with pytest.raises(UserError, match="'layers.0.attention.qkv.weight' would be of several"):
        single_file.opened(folder, "transformer")
