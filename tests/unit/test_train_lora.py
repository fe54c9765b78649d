"""docs/recipes/train_lora.py: LoRAs trained on pruned variants by diffusers' own ways."""

import runpy
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from support import ROOT, pruned

RECIPE = ROOT / "docs" / "recipes" / "train_lora.py"
VARIANTS = {"depth": {"merged": pruned.MERGED}, "narrow": {"narrowed": pruned.NARROW}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sevens that are plain colours: the LoRA has something to learn."""
    folder = tmp_path_factory.mktemp("mine")
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} seven on white")
    return folder


@pytest.mark.parametrize("which", VARIANTS)
def test_a_lora_is_trained_saved_and_loaded(which, pictures, tmp_path, monkeypatch, capsys):
    model, output = pruned.folder(tmp_path / which, **VARIANTS[which]), tmp_path / "lora"
    options = ["--model", model, "--pictures", pictures, "--output", output, "--steps", 25]
    options += ["--trust-remote-code"] if which == "narrow" else []
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *map(str, options)])
    recipe = runpy.run_path(str(RECIPE))
    recipe["main"]()
    assert "step 24: loss" in capsys.readouterr().out

    pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=which == "narrow")
    samples = recipe["encoded"](pipe, pictures)

    @torch.no_grad()
    def loss():
        generator = torch.Generator().manual_seed(1)
        return sum(float(recipe["loss_of"](pipe, samples[i % 2], generator)) for i in range(16))

    before = loss()
    pipe.load_lora_weights(output)
    after = loss()
    assert after < 0.8 * before
    pipe.unload_lora_weights()
    assert loss() == before

    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as file:
        blocks = {int(name.split(".")[2]) for name in file.keys()}
        assert '"transformer.r": 8' in file.metadata()["lora_adapter_metadata"]
    assert blocks == {*range(pipe.transformer.config.num_layers)}  # numbers of the variant's own


def test_a_folder_without_pictures_is_told(tmp_path, monkeypatch):
    model = pruned.folder(tmp_path / "model", **VARIANTS["depth"])
    options = ["--model", model, "--pictures", tmp_path, "--output", tmp_path / "lora"]
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *map(str, options)])
    with pytest.raises(SystemExit, match="holds no .png file"):
        runpy.run_path(str(RECIPE), run_name="__main__")
