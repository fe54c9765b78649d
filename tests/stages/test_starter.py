"""A config for a model of one's own: it passes all checks, and says how its pipeline is called."""

import json
from pathlib import Path

import pytest
import yaml

from ppcl.configuration import config, preflight, starter
from ppcl.errors import UserError
from support import ROOT, zoo_images, zoo_videos
from support.dry_runs import counts, run

NOTHING = {"revision": None, "variant": None, "subfolder": None, "trust_remote_code": False}
GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": " ", "num_inference_steps": 50}
WIDE = {"num_layers": 40, "num_attention_heads": 24, "attention_head_dim": 128}
# Of several kinds of autoencoder: what each pipeline looks for.
VAE = {"block_out_channels": [1, 1, 1, 1], "temperal_downsample": [0, 1, 1]}
VAE |= {"spatial_compression_ratio": 8}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def teacher(folder: Path, component: str = "transformer") -> dict:
    return {"path": str(folder), "component": component} | NOTHING


def folder(place: Path, pipeline: str, transformer: str, shape: dict, vae: dict = VAE) -> Path:
    """The configs of a pipeline, and no weights."""
    index = {"_class_name": pipeline}
    for name, kind, content in (("transformer", transformer, shape), ("vae", "Any", vae)):
        index[name] = ["diffusers", kind]
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(json.dumps(content))
    (place / "model_index.json").write_text(json.dumps(index))
    return place


@pytest.mark.parametrize(
    ("pipeline", "transformer", "shape", "called", "renoised"),
    [
        ("QwenImagePipeline", "QwenImage", WIDE, GUIDED | {"height": 1024, "width": 1024}, 8),
        ("FluxPipeline", "Flux", WIDE, {"num_inference_steps": 28, "guidance_scale": 3.5}, 8),
        ("FluxKontextPipeline", "Flux", WIDE, {"guidance_scale": 3.5}, 0),
        (
            "StableDiffusion3Pipeline",
            "SD3",
            WIDE | {"sample_size": 96},
            {"height": 768, "width": 768, "guidance_scale": 7.0},
            8,
        ),
        ("PixArtSigmaPipeline", "PixArt", WIDE | {"sample_size": 128}, {"height": 1024}, 0),
        ("ZImagePipeline", "ZImage", {"dim": 3840, "n_layers": 30}, {"width": 1024}, 0),
        ("HunyuanImagePipeline", "HunyuanImage", WIDE, {"height": 512}, 8),
    ],
)
def test_what_a_pipeline_takes_by_default(tmp_path, pipeline, transformer, shape, called, renoised):
    place = folder(tmp_path / "t", pipeline, f"{transformer}Transformer2DModel", shape)
    made = config.complete(yaml.safe_load(starter.made(teacher(place), "mine")), "mine.yaml")
    assert called.items() <= made["pipeline"].items()
    assert made["record"]["renoised_per_sample"] == renoised
    rates = [made[stage]["lr"] for stage in ("distill", "subsets", "finetune")]
    preset = config.load(str(ROOT / "config/presets/flux1-dev.yaml"))
    assert rates == [preset.distill.lr, preset.subsets.lr, preset.finetune.lr]
    assert made["teacher"]["dtype"] == "bfloat16" and made["evaluate"]["judge"] == "none"
    if shape is WIDE:  # as the preset of that width has it
        assert made["extract"]["sample_tokens"] == preset.extract.sample_tokens


def test_without_training_no_block_goes_and_every_variant_is_of_closed_forms(tmp_path):
    place = folder(tmp_path / "t", "FluxPipeline", "FluxTransformer2DModel", WIDE)
    made = yaml.safe_load(starter.made(teacher(place), "mine", free=True))
    settings = config.complete(made, "mine.yaml")
    assert not settings["intervals"]["enabled"] and settings["width"]["enabled"]
    assert settings["modulation"]["enabled"] and not {"distill", "subsets", "finetune"} & set(made)
    assert [v["train"] for v in settings["variants"]] == [False, False]
    trained = yaml.safe_load(starter.made(teacher(place), "mine"))["variants"]
    assert [v["name"] for v in trained if not v.get("train", True)] == ["free"]
    # A class that inspection alone knows has no closed forms.
    kind = "LTXVideoTransformer3DModelOfSomebody"
    place = folder(tmp_path / "o", "FluxPipeline", kind, WIDE)
    with pytest.raises(UserError, match="--free: of a LTX.* nothing has a closed form"):
        starter.made(teacher(place), "mine", free=True)
    assert "modulation" not in yaml.safe_load(starter.made(teacher(place), "mine"))


def test_videos_have_their_own_prompts(tmp_path):
    place = folder(tmp_path / "t", "WanPipeline", "WanTransformer3DModel", WIDE)
    made = yaml.safe_load(starter.made(teacher(place), "mine"))
    assert made["record"]["prompts"] == "resources/prompts/video_calibration.csv"
    assert made["pipeline"] == {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    }


def test_a_pipeline_that_edits_needs_pictures(tmp_path):
    kind = "QwenImageTransformer2DModel"
    place = folder(tmp_path / "t", "QwenImageEditPipeline", kind, WIDE)
    with pytest.raises(UserError, match="--calibration and --evaluation: QwenImageEditPipeline"):
        starter.made(teacher(place), "mine")
    made = yaml.safe_load(starter.made(teacher(place), "mine", "a.csv", "b.csv"))
    prompts = made["record"]["prompts"], made["evaluate"]["prompts"]
    assert prompts == ("a.csv", "b.csv") and made["record"]["renoised_per_sample"] == 0


@pytest.mark.parametrize(
    ("specimens", "name"),
    [(zoo_images, "z-image"), (zoo_images, "pixart-sigma"), (zoo_videos, "wan22-low")],
)
def test_specimens_pass_every_check(tmp_path, specimens, name):
    """Even where so little of a tiny model is in its blocks that the usual budgets can't be met."""
    specimen = specimens.SPECIMENS[name]
    specimen.make(3).save_pretrained(tmp_path / name)
    output = tmp_path / "new" / "mine.yaml"
    starter.write(teacher(tmp_path / name, specimen.component), output)
    text = output.read_text()
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 100
    preflight.check(config.load(str(output)), str(output))
    with pytest.raises(UserError, match="mine.yaml is there already"):
        starter.write(teacher(tmp_path / name), output)
    assert output.read_text() == text


def test_the_workflow_of_a_started_config_resolves(tiny_teacher, tmp_path):
    output = tmp_path / "mine.yaml"
    starter.write(teacher(tiny_teacher), output, run="started")
    printed = run("snakemake", "-n", "--nolock", "--cores", "2", "--configfile", output)
    assert counts(printed)["assemble"] == 3
    free = tmp_path / "free.yaml"
    starter.write(teacher(tiny_teacher), free, run="free", free=True)
    printed = counts(run("snakemake", "-n", "--nolock", "--cores", "2", "--configfile", free))
    assert printed["assemble"] == 2
    assert not {"sensitivity", "prune", "distill", "subsets", "finetune"} & printed.keys()


def test_configs_are_fetched_from_the_hub(tmp_path, monkeypatch):
    place = folder(tmp_path / "t", "FluxPipeline", "FluxTransformer2DModel", WIDE)
    asked = {}

    def fetch(name, **given):
        asked[name] = given
        if name == "owner/gone":
            raise OSError("no network\nat all")
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    given = teacher("owner/flux") | {"revision": "main"}
    starter.write(given, tmp_path / "mine.yaml")
    source = config.load(str(tmp_path / "mine.yaml")).teacher
    assert source.path == "owner/flux" and source.revision == "main"
    assert asked["owner/flux"]["revision"] == "main"
    assert not any("safetensors" in name for name in asked["owner/flux"]["allow_patterns"])
    with pytest.raises(UserError, match="owner/gone is no folder here, .* \\(no network\\)"):
        starter.write(teacher("owner/gone"), tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        ({"path": "nowhere/at/all"}, "mine.yaml", "no such folder"),
        ({"path": "resources"}, "mine.yaml", "has no model_index.json"),
        ({}, "mine.txt", "let it end in .yaml"),
        ({"component": "vae"}, "mine.yaml", "--component: .*no vae that is a transformer"),
        ({"path": "new\nline"}, "mine.yaml", "'teacher.path' is \"new"),
    ],
)
def test_what_cannot_be_started(tmp_path, given, output, expected):
    known = teacher(Path("resources/digits")) | given
    with pytest.raises(UserError, match=expected):
        starter.write(known, tmp_path / output)
    assert not list(tmp_path.iterdir())


def test_only_components_are_read_and_no_number_is_believed(tmp_path):
    """Of what lies beside the components nothing counts, and nothing in configs ends in a
    traceback."""
    place = folder(tmp_path / "t", "FluxPipeline", "FluxTransformer2DModel", WIDE)
    (place / "notes").mkdir()
    (place / "notes/config.json").write_text("not one of a model")
    starter.made(teacher(place), "mine")
    for odd in ("x", [1, 2], True, -3, 0, 10**400, 1e308):
        assert starter.channels({"num_attention_heads": odd, "hidden_size": odd}) == 64
    assert starter.channels({"num_heads": 2, "attention_head_dim": 10**5}) == 200_000
