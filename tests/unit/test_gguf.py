"""GGUF files: their metadata and types, and what diffusers and gguf itself read from them."""

import runpy
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.export import gguf_file, single_file
from ppcl.transformer import original_files, registry
from support import SCRIPTS, original_sizes, pruned, tiny, zoo_images, zoo_videos

gguf = pytest.importorskip("gguf", reason="no gguf: pip install -r requirements.txt")
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor  # noqa: E402

FILE_TYPES = {"F16": 1, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's enum llama_ftype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pruned.folder(tmp_path_factory.mktemp("variants") / "b16", merged=pruned.MERGED)


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """A file of each type."""
    place, opened = tmp_path_factory.mktemp("gguf"), single_file.opened(folder, "transformer")
    for kind in gguf_file.TYPES:
        gguf_file.write(place / f"{kind}.gguf", opened, kind)
    return place


def stock(folder, **more):
    made_as = diffusers.QwenImageTransformer2DModel
    if not more:
        return made_as.from_pretrained(folder / "transformer")
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return made_as.from_single_file(
        str(more["file"]), config=str(folder / "transformer"), quantization_config=config
    )


@pytest.mark.parametrize("kind", gguf_file.TYPES)
def test_metadata_and_types_are_the_fields(files, folder, kind):
    reader = gguf.GGUFReader(files / f"{kind}.gguf")
    fields = {name: reader.fields[name].contents() for name in reader.fields if "." in name}
    assert {k: v for k, v in fields.items() if k.startswith("general.")} == {
        "general.architecture": "qwen_image",
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": FILE_TYPES[kind],
    }
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    own = stock(folder).state_dict()
    assert types.keys() == own.keys()
    for name, tensor in own.items():
        small = tensor.ndim == 1 or tensor.numel() <= 1024
        inside = name.startswith("transformer_blocks.")
        assert types[name] == ("F32" if small else kind if inside else "F16"), name
    assert types["transformer_blocks.15.attn.to_q.weight"] == kind
    assert types["txt_in.weight"] == types["norm_out.linear.weight"] == "F16"


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 2**-11), ("Q8_0", 0.5 / 127 + 2**-11), ("Q4_0", 1 / 8)]
)
def test_it_reads_back_as_what_was_written(files, folder, kind, error):
    """In diffusers, as gguf's own reader; off by half a step of the block's largest, at most
    (Q4_0: by a whole one, since its steps go from -8 to 7), and by the rounding of the scale."""
    model, own = stock(folder, file=files / f"{kind}.gguf"), stock(folder).state_dict()
    quantised = 0
    for tensor in gguf.GGUFReader(files / f"{kind}.gguf").tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        read = dequantize_gguf_tensor(model.get_parameter(tensor.name)).detach()
        # diffusers multiplies in float16, where gguf does in float32.
        exact = tensor.tensor_type.name in ("F32", "F16")
        quantised += not exact
        np.testing.assert_allclose(read.float().numpy(), theirs, rtol=0 if exact else 1e-3)
        expected = own[tensor.name].numpy()
        if tensor.tensor_type.name == "F32":
            assert np.array_equal(theirs, expected)
        else:
            rows = np.abs(expected).reshape(-1, 1 if exact else 32).max(axis=1, keepdims=True)
            off = np.abs(theirs - expected).reshape(len(rows), -1)
            assert (off <= rows * error * 1.01 + 2**-25).all(), tensor.name
    assert quantised == (0 if kind == "F16" else 224)


@torch.no_grad()
def test_the_models_answers_stay_near(files, folder):
    model = stock(folder)
    call = tiny.arguments((5, 5)) | {
        "hidden_states": torch.randn(2, 16, model.config.in_channels),
        "encoder_hidden_states": torch.randn(2, 5, model.config.joint_attention_dim),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }
    expected, cosines = model(**call)[0], {}
    for kind in gguf_file.TYPES:
        answer = stock(folder, file=files / f"{kind}.gguf")(**call)[0]
        cosines[kind] = torch.nn.functional.cosine_similarity(
            answer.flatten(), expected.flatten(), dim=0
        )
    assert cosines["F16"] > 0.99999 and cosines["Q8_0"] > 0.999 and cosines["Q4_0"] > 0.95
    sizes = [(files / f"{kind}.gguf").stat().st_size for kind in gguf_file.TYPES]
    assert sizes[0] > 1.7 * sizes[1] and sizes[1] > 1.6 * sizes[2]


CUT = ("FluxTransformer2DModel", "WanTransformer3DModel", "HunyuanVideoTransformer3DModel")


@pytest.mark.parametrize("made_as", CUT)
def test_what_is_cut_and_what_has_five_dimensions_is_read(made_as, tmp_path, monkeypatch):
    """Rows of a quantised matrix are cut by diffusers; Wan and HunyuanVideo embed by 3D patches."""
    original_sizes.tell(monkeypatch, made_as)
    transformer = zoo_transformer(made_as)
    transformer.save_pretrained(tmp_path / "transformer")
    index = f'{{"_class_name": "DiffusionPipeline", "transformer": ["diffusers", "{made_as}"]}}'
    (tmp_path / "model_index.json").write_text(index)
    opened = single_file.opened(tmp_path, "transformer")
    gguf_file.write(tmp_path / "a.gguf", opened, "Q8_0")
    read = type(transformer).from_single_file(
        str(tmp_path / "a.gguf"),
        config=str(tmp_path / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    quantised = [n for n, p in read.named_parameters() if isinstance(p, GGUFParameter)]
    assert any("to_q" in name or "ffn" in name for name in quantised)
    for name, tensor in transformer.state_dict().items():
        numbers = dequantize_gguf_tensor(read.get_parameter(name)).detach().float()
        limit = 0.005 if name in quantised else 0.0005
        assert numbers.shape == tensor.shape, name
        assert (numbers - tensor).abs().max() <= limit * tensor.abs().max(), name


def zoo_transformer(made_as):
    every = (zoo_images.SPECIMENS | zoo_videos.SPECIMENS).values()
    return next(one for one in every if one.family == made_as).make(2).transformer


def test_types_by_name_and_shape():
    """As ComfyUI-GGUF's converter has them."""
    wan = original_files.WAN
    kinds = {
        ("blocks.0.ffn.0.weight", (64, 64)): "Q4_0",
        ("blocks.0.ffn.0.bias", (6400,)): "F32",
        ("blocks.0.modulation", (1, 6, 640)): "F32",
        ("head.modulation", (1, 2, 640)): "F32",
        ("head.head.weight", (64, 64)): "F16",
        ("patch_embedding.weight", (64, 16, 1, 2, 2)): "F32",
        ("blocks.0.cross_attn.q.weight", (64, 40)): "F16",  # no blocks of 32
        ("blocks.0.cross_attn.q.weight", (32, 32)): "F32",  # small
        ("blocks.0.conv.weight", (64, 64, 1)): "F16",
    }
    assert {key: gguf_file.kind_of(*key, "Q4_0", wan) for key in kinds} == kinds
    assert gguf_file.kind_of("blocks.0.ffn.0.weight", (64, 64), "F16", wan) == "F16"


def test_every_architecture_is_one_that_comfyui_gguf_reads():
    """IMG_ARCH_LIST of its loader.py at 795e451."""
    read = {"flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan"}
    named = {registry.original_files(name).gguf for name in registry.with_original_files()}
    assert named - {""} <= read | {"lumina2", "qwen_image"}


def test_what_float16_cannot_hold_is_refused_and_nothing_is_left(folder, tmp_path):
    model = stock(folder)
    model.txt_in.weight.data[0, 0] = 1e5
    place = tmp_path / "model"
    (place / "transformer").mkdir(parents=True)
    model.save_pretrained(place / "transformer")
    (place / "model_index.json").write_text((folder / "model_index.json").read_text())
    opened = single_file.opened(place, "transformer")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="'txt_in.weight' holds numbers that F16 can't"):
        gguf_file.write(tmp_path / "out" / "a.gguf", opened, "Q8_0")
    assert not list((tmp_path / "out").iterdir())


def test_weights_of_one_byte_per_number_are_read(folder, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    file = place / "transformer/diffusion_pytorch_model.safetensors"
    weights, name = load_file(file), "transformer_blocks.0.attn.to_q.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, file, {"format": "pt"})
    gguf_file.write(tmp_path / "a.gguf", single_file.opened(place, "transformer"), "F16")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert np.array_equal(read[name].data, weights[name].half().numpy())


def test_a_full_disk_is_one_message_and_nothing_is_left(folder, tmp_path, monkeypatch):
    """numpy tells no errno of what it could not write."""

    def full(*_):
        raise OSError("17408 requested and 15360 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="a.gguf could not be written .*disk is full"):
        gguf_file.write(tmp_path / "a.gguf", single_file.opened(folder, "transformer"), "F16")
    assert not list(tmp_path.iterdir())


def test_a_class_that_nobody_reads_as_gguf_is_refused(folder, tmp_path):
    opened = single_file.opened(folder, "transformer")
    other = single_file.Transformer("MochiTransformer3DModel", original_files.MOCHI, opened.tensors)
    with pytest.raises(
        UserError, match="no program reads a GGUF file of a MochiTransformer3DModel"
    ):
        gguf_file.write(tmp_path / "a.gguf", other, "F16")


def test_the_program_writes_one(folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "b16-Q8_0.gguf"
    options = ["--model", folder, "--output", file, "--type", "Q8_0"]
    monkeypatch.setattr("sys.argv", ["to_single_file.py", *map(str, options)])
    runpy.run_path(str(SCRIPTS / "to_single_file.py"), run_name="__main__")
    assert "525 tensors" in capsys.readouterr().out
    assert len(gguf.GGUFReader(file).tensors) == 525


def test_without_the_package_it_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        gguf_file.write(tmp_path / "a.gguf", single_file.opened(folder, "transformer"), "F16")
