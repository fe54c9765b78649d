"""docs/after-pruning.md: every block of code runs as it is written."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from support import ROOT, ip_files, pruned, published, quantised
from support.zoo_images import SPECIMENS

PAGE = ROOT / "docs" / "after-pruning.md"
RUN = {"python": [sys.executable, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}


def blocks() -> dict[str, list[tuple[str, str]]]:
    """Heading -> (language, text) of the blocks of code below it; of a config, `yaml`, no block."""
    sections = re.split(r"^## +(.+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    code = re.compile(r"^```(python|sh)\n(.*?)^```$", flags=re.M | re.S)
    sections_code = {
        name: code.findall(text) for name, text in zip(sections[::2], sections[1::2], strict=True)
    }
    return {name: every for name, every in sections_code.items() if every}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which the page's names are: the repository's, a teacher, and two variants."""
    place = tmp_path_factory.mktemp("workplace")
    for name in ("Snakefile", "workflow", "config", "resources", ".venv", "profiles"):
        if (ROOT / name).exists():
            (place / name).symlink_to(ROOT / name)
    pruned.folder(place / "results/digits-depth/models/b16", merged=pruned.MERGED)
    pruned.folder(place / "results/digits/models/p50", narrowed=pruned.NARROW)
    return place


def loras(place: Path) -> None:
    """Two LoRAs of the teacher, of attention and of modulations."""
    torch.manual_seed(0)
    for name, path, outputs in (
        ("style", "attn.to_q", 64),
        ("modulations", "img_mod.1", 384),
    ):
        made = {}
        for number in range(24):
            key = f"transformer.transformer_blocks.{number}.{path}"
            made[f"{key}.lora_A.weight"] = torch.randn(2, 64)
            made[f"{key}.lora_B.weight"] = 0.01 * torch.randn(outputs, 2)
        save_file(made, place / f"{name}.safetensors")


def own_pictures(place: Path) -> None:
    """Two of somebody's own, and the recipe."""
    if (place / "mine").exists():  # made for another section
        return
    (place / "docs").symlink_to(ROOT / "docs")
    (place / "mine").mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (32, 32), colour).save(place / "mine" / f"{number}.png")
        (place / "mine" / f"{number}.txt").write_text(f"a {colour} seven on {colour}")


def sketch(place: Path) -> None:
    """A ControlNet of the teacher, and a picture."""
    teacher = QwenImageTransformer2DModel.from_pretrained(pruned.TEACHER, subfolder="transformer")
    shape = {"num_attention_heads": 2, "attention_head_dim": 32}
    made = QwenImageControlNetModel.from_transformer(teacher, num_layers=5, **shape)
    made.save_pretrained(place / "sketch")
    Image.new("RGB", (32, 32), "white").save(place / "seven.png")


def picture_prompts(place: Path) -> None:
    """A variant of a tiny FLUX, and an IP-adapter of its teacher."""
    teacher = SPECIMENS["flux"].make(6)
    save_file(ip_files.flux(teacher.transformer), place / "ip_adapter.safetensors")
    teacher.save_pretrained(place / "flux")
    pruned.folder(place / "results/flux/models/b8", merged=((0, 2), (6, 8)), teacher=place / "flux")


def benchmarked(place: Path) -> None:
    """A user's copy of a benchmark's prompts, and a config that names it."""
    prompts = ROOT / "tests/support/benchmarks/geneval/prompts.jsonl"
    shutil.copyfile(prompts, place / "evaluation_metadata.jsonl")
    config = yaml.safe_load((ROOT / "config/digits.yaml").read_text(encoding="utf-8"))
    chosen = {"name": "geneval", "prompts": "evaluation_metadata.jsonl", "images_per_prompt": 4}
    config["evaluate"]["benchmarks"] = [chosen]
    (place / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


# What a section's code needs besides, by its heading: a function that puts it into the workplace.
NEEDS: dict[str, Callable[[Path], object]] = {
    "ControlNets of the teacher": sketch,
    "LoRAs of the teacher": loras,
    "IP-adapters of the teacher": picture_prompts,
    "Score it on the field's benchmarks": benchmarked,
    "Publish it": lambda place: published.describe(place / "results/digits/models/p50"),
    "Make a GGUF file": lambda place: pytest.importorskip("gguf"),
    "Train a LoRA on it": own_pictures,
    "Your own pictures": own_pictures,
    "Quantise it": quantised.for_the_page,
}


@pytest.mark.parametrize("heading", blocks())
def test_the_page_runs_as_it_is_written(heading, workplace):
    NEEDS.get(heading, lambda place: None)(workplace)
    for language, text in blocks()[heading]:
        done = subprocess.run(
            [*RUN[language], text],
            cwd=workplace,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (
            f"{heading}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
