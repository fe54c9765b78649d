"""Few-step teachers: LoRAs that are fused in, a scheduler and a schedule of their own."""

import math
import os
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl.configuration import config, preflight
from ppcl.errors import UserError
from ppcl.evaluation import model_folders
from ppcl.export import assembly
from ppcl.settings import Settings, TeacherSettings
from ppcl.teacher import arguments, lora_files, pipelines, recording, teacher_identity
from ppcl.teacher import loras as fusing
from ppcl.transformer import blocks
from support import loras, tiny, zoo_images, zoo_videos
from support.hub_cache import NAME, put
from support.schedules import LIGHTNING

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tiny_teacher, tmp_path_factory) -> dict[str, Path]:
    """LoRAs of the tiny teacher, by name."""
    folder, pipe = tmp_path_factory.mktemp("loras"), DiffusionPipeline.from_pretrained(tiny_teacher)
    return {
        "attention": loras.save(pipe, folder / "attention.safetensors"),
        "rest": loras.save(
            pipe, folder / "rest.safetensors", ("img_mod.1", "img_mlp.net.2", "proj_out"), seed=1
        ),
        "dora": loras.save(pipe, folder / "dora.safetensors", use_dora=True),
    }


def source(folder: Path, *paths: Path, scale: float = 0.7, **keys) -> TeacherSettings:
    """A teacher with LoRAs."""
    fused = [{"path": str(path), "scale": scale} for path in paths]
    return TeacherSettings.of({"path": str(folder), "loras": fused, **keys})


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    held = b.state_dict()
    return a.state_dict().keys() == held.keys() and all(
        torch.equal(tensor, held[name]) for name, tensor in a.state_dict().items()
    )


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("attention",), "float32"),
        (("dora",), "float32"),
        (("attention", "rest"), "bfloat16"),
    ],
)
def test_weights_are_those_of_stock_diffusers_wherever_the_teacher_is_loaded(
    tiny_teacher, files, names, dtype
):
    stock = DiffusionPipeline.from_pretrained(tiny_teacher, dtype=getattr(torch, dtype))
    for name in names:
        stock.load_lora_weights(str(files[name]), adapter_name=name)
        stock.fuse_lora(lora_scale=0.7, adapter_names=[name])
        stock.unload_lora_weights()
    teacher = source(tiny_teacher, *(files[name] for name in names), dtype=dtype)
    state = torch.get_rng_state()
    alone = pipelines.load_transformer(teacher, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(alone, stock.transformer)
    assert same(pipelines.load(teacher, CPU).transformer, stock.transformer)
    assert type(alone) is type(stock.transformer) and not hasattr(alone, "peft_config")
    assert not any(p.requires_grad for p in alone.parameters())
    bare = DiffusionPipeline.from_pretrained(tiny_teacher, dtype=getattr(torch, dtype)).transformer
    assert not same(alone, bare)


def test_each_has_its_own_scale(tiny_teacher, files):
    """Stock diffusers multiplies all that are loaded by the scale of each `fuse_lora`."""
    teacher = source(tiny_teacher)
    teacher = teacher.replace(
        loras=[{"path": str(files["attention"]), "scale": 0.5}, {"path": str(files["rest"])}]
    )
    stock = DiffusionPipeline.from_pretrained(tiny_teacher)
    for name in ("attention", "rest"):
        stock.load_lora_weights(str(files[name]), adapter_name=name)
    stock.set_adapters(["attention", "rest"], [0.5, 1.0])
    call = tiny.arguments()
    with torch.no_grad():
        expected = blocks.answer(stock.transformer, call)
        fused = blocks.answer(pipelines.load_transformer(teacher, CPU), call)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


def other_keys(pipe: DiffusionPipeline, path: Path) -> Path:
    """The same LoRA as kohya's and ComfyUI's `diffusion_model.` keys, with alphas."""
    held = load_file(loras.save(pipe, path))
    plain = {}
    for name, tensor in held.items():
        name = name.replace("transformer.", "diffusion_model.", 1)
        plain[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        plain[name.rsplit(".lora_", 1)[0] + ".alpha"] = torch.tensor(8.0)
    save_file(plain, path)
    return path


def test_other_programs_keys_are_the_same_lora(tiny_teacher, files, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_teacher)
    path = other_keys(pipe, tmp_path / "comfy.safetensors")
    one = pipelines.load_transformer(source(tiny_teacher, files["attention"]), CPU)
    other = pipelines.load_transformer(source(tiny_teacher, path), CPU)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-6)


FAMILIES = {
    "flux": (zoo_images.SPECIMENS["flux"], "transformer"),
    "sd3": (zoo_images.SPECIMENS["sd3"], "transformer"),
    "wan22": (zoo_videos.SPECIMENS["wan22"], "transformer_2"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_and_a_second_transformer(name, tmp_path):
    specimen, component = FAMILIES[name]
    pipe = specimen.make(2)
    pipe.save_pretrained(tmp_path / "teacher")
    path = loras.save(pipe, tmp_path / "lora.safetensors", component=component)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    second = {"load_into_transformer_2": True} if component == "transformer_2" else {}
    stock.load_lora_weights(str(path), **second)
    stock.fuse_lora(components=[component])
    stock.unload_lora_weights()
    teacher = source(tmp_path / "teacher")
    teacher = teacher.replace(loras=[{"path": str(path), "component": component}])
    made = pipelines.load(teacher, CPU)
    assert same(getattr(made, component), getattr(stock, component))
    other = "transformer"
    assert same(getattr(made, other), getattr(stock, other))
    assert same(pipelines.load_transformer(teacher, CPU), stock.transformer)
    alone = pipelines.load_transformer(teacher.replace(component=component), CPU)
    assert same(alone, getattr(stock, component))


TEXTS = {
    "flux": ("text_encoder",),
    "sd3": ("text_encoder", "text_encoder_2"),
}


@pytest.fixture(scope="module", params=TEXTS)
def spoken(request, tmp_path_factory):
    """A pipeline's folder, and a LoRA of its transformer and text encoders."""
    folder, names = tmp_path_factory.mktemp(request.param), TEXTS[request.param]
    pipe = zoo_images.SPECIMENS[request.param].make(2)
    pipe.save_pretrained(folder / "teacher")
    return folder / "teacher", loras.save_with_text_encoders(pipe, folder / "l.safetensors", names)


def test_text_encoders_are_those_of_stock_diffusers_and_are_exported(spoken, tmp_path):
    folder, path = spoken
    teacher = source(folder, path)
    stock, bare = (DiffusionPipeline.from_pretrained(folder) for _ in range(2))
    names = TEXTS["flux" if "Flux" in type(stock).__name__ else "sd3"]
    stock.load_lora_weights(str(path))
    stock.fuse_lora(components=["transformer", *names], lora_scale=0.7)
    stock.unload_lora_weights()
    made = pipelines.load(teacher, CPU)
    for name in ("transformer", *names):
        assert same(getattr(made, name), getattr(stock, name)), name
        assert not same(getattr(made, name), getattr(bare, name)), name
    assert same(pipelines.load_transformer(teacher, CPU), stock.transformer)
    # What an export copies has the teacher's own weights.
    changed = fusing.text_encoders(teacher, folder)
    assert changed == set(names) and fusing.text_encoders(source(folder), folder) == set()
    left_out = assembly.copied(folder, changed)
    assert left_out and not changed & {*left_out} and changed < {*assembly.copied(folder)}
    lighter = pipelines.load(teacher, CPU, without=left_out)
    whole = assembly.TeacherPipeline(lighter, source=folder)
    assembly.save(whole, lighter.transformer, [[0], [1]], tmp_path / "v")
    alone = DiffusionPipeline.from_pretrained(tmp_path / "v")
    for name in ("transformer", *names, *left_out):
        assert same(getattr(alone, name), getattr(stock, name)), name


def test_a_lora_of_text_encoders_alone_is_fused_too(spoken, tmp_path):
    folder, path = spoken
    held = {name: v for name, v in load_file(path).items() if not name.startswith("transformer")}
    save_file(held, tmp_path / "l.safetensors")
    teacher = source(folder, tmp_path / "l.safetensors")
    bare = DiffusionPipeline.from_pretrained(folder)
    made = pipelines.load(teacher, CPU)
    assert same(pipelines.load_transformer(teacher, CPU), bare.transformer)
    assert same(made.transformer, bare.transformer)
    assert not same(made.text_encoder, bare.text_encoder)
    save_file({name: torch.zeros_like(v) for name, v in held.items()}, tmp_path / "l.safetensors")
    for load in (pipelines.load_transformer, pipelines.load):
        with pytest.raises(UserError, match="changes nothing"):
            load(teacher, CPU)


@pytest.mark.parametrize("place", ["text_encoder.nowhere", "text_encoder_3.q_proj"])
def test_layers_without_a_place_in_text_encoders_are_refused(spoken, tmp_path, place):
    folder, path = spoken
    odd = {f"{place}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(load_file(path) | odd, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=f"teacher.loras: .*(.|\n)*{place}(.|\n)*has no place"):
        pipelines.load(source(folder, tmp_path / "l.safetensors"), CPU)


# ---- what is refused


def changed(files: dict[str, Path], folder: Path, change) -> Path:
    """A LoRA's file with other tensors."""
    held = load_file(files["attention"])
    with safe_open(files["attention"], "pt") as file:
        metadata = file.metadata()
    change(held)
    save_file(held, folder / "x.safetensors", metadata)
    return folder / "x.safetensors"


def first(held: dict) -> str:
    return sorted(held)[0]


def shallower(held: dict) -> None:
    held.update({k.replace("blocks.0", "blocks.77"): held.pop(k) for k in list(held)})


def narrower(held: dict) -> None:
    for name in held:
        held[name] = held[name][:, :3].clone() if "lora_A" in name else held[name]


TENSORS = {
    "of another model": (shallower, "has no place"),
    "of another width": (narrower, r"is it a LoRA of another model\?"),
    "some keys without a place": (
        lambda held: held.update({"transformer.nowhere.lora_A.weight": torch.ones(4, 8)}),
        "1 tensors .*has no place",
    ),
    "of a text encoder too": (
        lambda held: held.update({"text_encoder.q.lora_A.weight": torch.ones(4, 8)}),
        "loads LoRAs of its transformer alone, not of text_encoder",
    ),
    "a DoRA of kohya": (
        lambda held: held.update({f"{first(held)}.dora_scale": torch.ones(4)}),
        "which diffusers leaves out",
    ),
    "NaN": (lambda held: held[first(held)].fill_(math.nan), "scale 0.7: .* holds NaN or infinity"),
    "zero": (
        lambda held: [held[name].zero_() for name in held if "lora_B" in name],
        "changes nothing",
    ),
    "no LoRA": (
        lambda held: held.update({f"weight{i}": held.pop(k) for i, k in enumerate(list(held))}),
        "holds no LoRA",
    ),
}


@pytest.mark.parametrize(("change", "reason"), TENSORS.values(), ids=TENSORS)
def test_a_lora_that_would_not_be_used_in_full_is_refused(
    tiny_teacher, files, tmp_path, change, reason
):
    teacher = source(tiny_teacher, changed(files, tmp_path, change))
    for load in (pipelines.load_transformer, pipelines.load):
        with pytest.raises(UserError, match=rf"^teacher.loras: .*x.safetensors(.|\n)*({reason})"):
            load(teacher, CPU)


def damaged(files: dict[str, Path], folder: Path) -> Path:
    (folder / "cut.safetensors").write_bytes(files["attention"].read_bytes()[:-7])
    return folder / "cut.safetensors"


def pickled(files: dict[str, Path], folder: Path) -> Path:
    torch.save(load_file(files["attention"]), folder / "lora.bin")
    return folder / "lora.bin"


def pipe_file(files: dict[str, Path], folder: Path) -> Path:
    os.mkfifo(folder / "pipe.safetensors")
    return folder / "pipe.safetensors"


PATHS = {
    "missing": (lambda files, folder: folder / "none.safetensors", "does not exist"),
    "a folder without it": (lambda files, folder: folder, "set weight_name"),
    "damaged": (damaged, "truncated"),
    "pickled": (pickled, "could run code"),
    "a pipe": (pipe_file, "not a regular file"),
}


@pytest.mark.parametrize(("make", "reason"), PATHS.values(), ids=PATHS)
def test_a_file_is_refused_before_anything_is_loaded(tiny_teacher, files, tmp_path, make, reason):
    teacher = source(tiny_teacher, make(files, tmp_path))
    with pytest.raises(UserError, match=rf"^c.yaml: (teacher.loras: )?.*{reason}"):
        lora_files.check(teacher, tiny_teacher, "c.yaml")
    with pytest.raises(UserError, match=reason):
        pipelines.load_transformer(teacher, CPU)


def test_pipelines_and_components_without_loras_are_refused(tiny_teacher, files, tmp_path):
    teacher = source(tiny_teacher, files["attention"])
    other = teacher.replace(loras=[{"path": str(files["attention"]), "component": "vae"}])
    with pytest.raises(UserError, match="c.yaml: teacher.loras: component vae: .* has no transfor"):
        lora_files.check(other, tiny_teacher, "c.yaml")
    pixart = zoo_images.SPECIMENS["pixart-sigma"].make(2)
    pixart.save_pretrained(tmp_path / "pixart")
    with pytest.raises(UserError, match="no LoRAs for a PixArtSigmaPipeline; fuse them yourself"):
        pipelines.load(source(tmp_path / "pixart", files["attention"]), CPU)


# ---- which LoRA it was


def test_another_lora_is_another_teacher(tiny_teacher, files, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(files["attention"].read_bytes())
    teacher = source(tiny_teacher, path)
    assert path in teacher_identity.files(teacher)  # inputs of the rules
    before, noted = (
        teacher_identity.stamp(teacher),
        teacher_identity.note(teacher_identity.resolved(teacher)),
    )
    known = teacher_identity.recorded(teacher, noted)
    pipelines.load_transformer(known, CPU)
    with pytest.raises(UserError, match="teacher.loras: .*: 1 of them were fused then, and 0 now"):
        teacher_identity.recorded(source(tiny_teacher), noted)
    with pytest.raises(UserError, match="another place, file, scale or component now"):
        teacher_identity.recorded(source(tiny_teacher, path, scale=0.5), noted)
    path.write_bytes(files["rest"].read_bytes())
    assert teacher_identity.stamp(teacher) != before
    for late in (
        lambda: teacher_identity.recorded(teacher, noted),
        lambda: pipelines.load_transformer(known, CPU),
    ):
        with pytest.raises(UserError, match="another size, time or contents now"):
            late()


def test_a_lora_on_the_hub_is_kept_at_its_commit(tiny_teacher, files, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/four.safetensors").write_bytes(files["attention"].read_bytes())
    put(tmp_path / "repository", tmp_path / "cache")
    entry = {"path": NAME, "weight_name": "four.safetensors", "scale": 0.7}
    teacher = source(tiny_teacher).replace(loras=[entry])
    known = teacher_identity.recorded(
        teacher, teacher_identity.note(teacher_identity.resolved(teacher))
    )
    assert known.loras[0].revision == "0123456789" * 4
    local = pipelines.load_transformer(source(tiny_teacher, files["attention"]), CPU)
    assert same(pipelines.load_transformer(known, CPU), local)
    gone = teacher.replace(loras=[entry | {"weight_name": "eight.safetensors"}])
    with pytest.raises(UserError, match="eight.safetensors of some-owner/some-model at revision"):
        pipelines.load_transformer(gone, CPU)


# ---- the scheduler and the schedule


def test_an_export_holds_the_loras_and_the_scheduler(tiny_teacher, files, tmp_path):
    teacher = source(tiny_teacher, files["attention"], scheduler=LIGHTNING)
    pipe = pipelines.load(teacher, CPU)
    call = tiny.arguments()
    with torch.no_grad():
        expected = blocks.answer(pipe.transformer, call)
    given = dict(height=32, width=32, num_inference_steps=4, output_type="latent")
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    latents = pipe(prompt="a red 1 on blue", generator=seeded(), **given).images
    assembly.save(assembly.TeacherPipeline(pipe), pipe.transformer, [[0], [1], [2]], tmp_path / "v")
    alone = DiffusionPipeline.from_pretrained(tmp_path / "v")  # diffusers knows no LoRA
    with torch.no_grad():
        assert torch.equal(blocks.answer(alone.transformer, call), expected)
    assert alone.scheduler.config.shift_terminal is None
    assert alone.scheduler.config.base_shift == pytest.approx(math.log(3))
    assert torch.equal(alone(prompt="a red 1 on blue", generator=seeded(), **given).images, latents)
    wanted = [3 / (3 + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)] + [0]
    torch.testing.assert_close(alone.scheduler.sigmas, torch.tensor(wanted))
    # A variant is loaded as it is, though its settings are the teacher's.
    variant = model_folders.models(teacher_identity.resolved(teacher), [tmp_path / "v"])[1]
    assert same(variant.transformer(CPU), alone.transformer)
    assert len(variant.digest()) == 64


def test_another_class_of_scheduler_is_exported_too(tiny_teacher, tmp_path):
    keys = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}
    pipe = pipelines.load(source(tiny_teacher, scheduler=keys), CPU)
    assert type(pipe.scheduler).__name__ == keys["_class_name"] and pipe.scheduler.shift == 3.0
    assembly.save(assembly.TeacherPipeline(pipe), pipe.transformer, [[0], [1], [2]], tmp_path / "v")
    again = DiffusionPipeline.from_pretrained(tmp_path / "v").scheduler
    assert type(again).__name__ == keys["_class_name"] and again.config.shift == 3.0


SCHEDULERS = {
    "an unknown key": ({"shifts": 3.0}, r"scheduler\.shifts is not an .*; did you mean 'shift'\?"),
    "text for a number": ({"shift": "3"}, r"scheduler\.shift is \"3\"; allowed: a number"),
    "a number for a switch": ({"use_dynamic_shifting": 1}, "allowed: true or false"),
    "no scheduler": ({"_class_name": "QwenImagePipeline"}, "is no scheduler of diffusers"),
    "no class": ({"_class_name": "../x"}, "is no scheduler of diffusers"),
    "no text": ({"_class_name": 3}, "is no scheduler of diffusers"),
    "what excludes each other": (
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        "can't be made with",
    ),
}


@pytest.mark.parametrize(("keys", "reason"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_that_can_not_be_is_refused(tiny_teacher, keys, reason):
    with pytest.raises(UserError, match=rf"^teacher\.(.|\n)*{reason}"):
        pipelines.load(source(tiny_teacher, scheduler=keys), CPU)


def test_both_are_checked_before_a_run(tmp_path, monkeypatch, files):
    plain = config.load("config/digits.yaml").given
    for changed_keys, reason in (
        ({"scheduler": {"shifts": 1}}, r"c.yaml: teacher.scheduler.shifts is not an argument"),
        ({"loras": [{"path": "none.safetensors"}]}, r"c.yaml: teacher.loras: none.safetensors"),
    ):
        given = {**plain, "teacher": {**plain["teacher"], **changed_keys}}
        with pytest.raises(UserError, match=reason):
            preflight.check(Settings.of(config.complete(given, "c.yaml")), "c.yaml")


def test_a_schedule_of_its_own_is_recorded_and_renoised_in_its_range(tiny_teacher):
    pipe, sigmas = tiny.load(tiny_teacher), [1.0, 0.65, 0.3, 0.1]
    settings = {"height": 32, "width": 32, "sigmas": sigmas}
    every = tiny.samples(tiny.CALIBRATION[:2])
    tables = recording.record_batch(pipe, pipe.transformer, every[:1], settings, 8, 0)
    rows = [row for table in tables for row in table.select(["kind", "sigma"]).to_pylist()]
    levels = {row["sigma"] for row in rows if row["kind"] == "pipeline"}
    assert sorted(levels, reverse=True) == pytest.approx(sigmas)
    fresh = [row["sigma"] for row in rows if row["kind"] == "renoised"]
    assert len(fresh) == 8 and 0.1 <= min(fresh) and max(fresh) <= 1.0


def test_steps_are_those_of_the_schedule():
    assert arguments.steps_asked({}, 50) == 50
    assert arguments.steps_asked({"num_inference_steps": 4}, 50) == 4
    assert arguments.steps_asked({"sigmas": [1.0, 0.5]}, 50) == 2
    for given, reason in (
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 4}, "is 4, but pipeline.sigmas has 2"),
        ({"sigmas": [1.0], "timesteps": [1]}, "both give a schedule"),
    ):
        with pytest.raises(UserError, match=reason):
            arguments._refuse_steps(given)
