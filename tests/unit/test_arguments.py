"""The config's `pipeline` mapping against what diffusers' pipelines take, without loading any."""

import json
import re
from pathlib import Path

import pytest

from ppcl.configuration import config, preflight
from ppcl.errors import UserError
from ppcl.settings import Settings, TeacherSettings
from ppcl.teacher import arguments, hub, signatures


def refused(settings: dict, name: str = "FluxPipeline") -> str:
    with pytest.raises(UserError) as raised:
        arguments.refuse_call(name, signatures.of(name), settings)
    return str(raised.value)


def accepted(settings: dict, name: str = "FluxPipeline") -> None:
    arguments.refuse_call(name, signatures.of(name), settings)


def test_what_people_write_passes():
    accepted({"height": 1024, "width": 1024, "guidance_scale": 0, "max_sequence_length": 256})
    accepted({"sigmas": [1.0, 0.5], "negative_prompt": "blurry", "num_images_per_prompt": 1})
    accepted({"joint_attention_kwargs": {"scale": 0.5}, "height": None})
    # None turns these instructions off, though the annotation does not say so.
    accepted({"complex_human_instruction": None, "negative_prompt": ""}, "SanaPipeline")
    accepted({"complex_human_instruction": []}, "SanaPipeline")
    accepted({"frame_rate": 24, "decode_timestep": 0.05}, "LTXPipeline")
    accepted({"text_encoder_out_layers": [7, 8]}, "Flux2Pipeline")
    accepted({"text_encoder_out_layers": [9, 18]}, "Flux2KleinPipeline")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_inference_step": 4}, "'pipeline.num_inference_step' is not .*FluxPipeline; did you"),
        ({"num_inference_step": 4}, "mean 'num_inference_steps'"),
        ({"zzz": 4}, "known: .*guidance_scale"),
        ({"prompt": "a"}, "'pipeline.prompt' is set by the workflow: from the prompts files"),
        ({"generator": 4}, "'pipeline.generator' is set by the workflow: .*seed"),
        ({"callback_on_step_end_tensor_inputs": []}, "is set by the workflow: recording"),
        ({"latents": [1.0]}, "'pipeline.latents' of FluxPipeline is a tensor"),
        ({"negative_pooled_prompt_embeds": "a"}, "negative_pooled_prompt_embeds.* is a tensor"),
        ({"ip_adapter_image": "a.png"}, "'pipeline.ip_adapter_image' .*is a picture"),
        ({"num_images_per_prompt": 2}, "pipeline.num_images_per_prompt is 2, .*leave it out"),
        ({"num_images_per_prompt": None}, "pipeline.num_images_per_prompt is null"),
        ({"num_inference_steps": 0}, "pipeline.num_inference_steps is 0; it must be 1 or more"),
        ({"num_inference_steps": 4.5}, "num_inference_steps is 4.5; it must be a whole number"),
        ({"num_inference_steps": None}, "num_inference_steps is null; .*own default, 28"),
        ({"height": -16}, "pipeline.height is -16; it must be 1 or more"),
        ({"width": "512"}, 'pipeline.width is "512"; allowed: a number; it is text'),
        ({"guidance_scale": "1e-3"}, "write it without quotes, with a point"),
        ({"guidance_scale": True}, "guidance_scale is true; allowed: a number"),
        ({"prompt_2": 3}, "pipeline.prompt_2 is 3; allowed: text, a list"),
        ({"sigmas": []}, "pipeline.sigmas is an empty list; leave it out"),
        ({"negative_prompt": []}, "pipeline.negative_prompt is an empty list"),
        ({"sigmas": 1.0}, "pipeline.sigmas is 1.0; allowed: a list$"),
        ({"sigmas": ["a"]}, "pipeline.sigmas is .*; allowed: a list, a number"),
    ],
)
def test_what_can_not_be_is_refused_by_name(settings, said):
    assert re.search(said, refused(settings))


def test_other_multipliers_and_counts_are_found_by_their_names():
    blocks = refused({"skip_guidance_layers": [7, 8]}, "StableDiffusion3Pipeline")
    assert blocks.startswith("pipeline.skip_guidance_layers is [7, 8], numbers of blocks")
    assert "num_videos_per_prompt" in refused({"num_videos_per_prompt": 3}, "WanPipeline")
    assert "1 or more" in refused({"num_frames": 0}, "WanPipeline")
    given = signatures.Signature(
        {k: signatures.Parameter(k, False) for k in ("prompt", "generator", "output_type")}
        | {"num_waveforms_per_prompt": signatures.Parameter("num_waveforms_per_prompt", False, 1)}
    )
    with pytest.raises(UserError, match="num_waveforms_per_prompt is 2"):
        arguments.refuse_call("TheirPipeline", given, {"num_waveforms_per_prompt": 2})


@pytest.mark.parametrize(
    ("name", "needs", "instead"),
    [
        ("FluxControlNetPipeline", "control_image", "FluxPipeline"),
        ("QwenImageControlNetInpaintPipeline", "control_image", "QwenImagePipeline"),
        ("StableDiffusion3InpaintPipeline", "mask_image", "StableDiffusion3Pipeline"),
        ("FluxKontextInpaintPipeline", "mask_image", "FluxKontextPipeline"),
        ("Flux2KleinInpaintPipeline", "mask_image", "Flux2KleinPipeline"),
        ("WanVideoToVideoPipeline", "video", "WanPipeline"),
        ("ZImageControlNetPipeline", "control_image", "ZImagePipeline"),
        # The picture comes as further channels of these transformers.
        ("FluxControlPipeline", "control_image", None),
        ("FluxFillPipeline", "mask_image", None),
        ("LucyEditPipeline", "video", None),
        ("CogVideoXFunControlPipeline", "control_video", None),
    ],
)
def test_pipelines_that_need_what_nothing_can_give(name, needs, instead):
    said = refused({}, name)
    assert f"a {name} can't be recorded: its call needs {needs}, " in said
    assert (f"that of {instead}: save it as one" in said) == (instead is not None)


def test_what_a_pipeline_can_not_do_comes_before_the_settings():
    assert "needs control_image" in refused({"control_image": "a.png"}, "FluxControlNetPipeline")


def test_pipelines_without_prompts_are_refused():
    assert "DiTPipeline can't be recorded: its call takes no prompt" in refused({}, "DiTPipeline")


def test_a_required_value_that_a_config_can_hold_is_asked_for():
    given = {k: signatures.Parameter(k, False) for k in ("prompt", "generator", "output_type")}
    signature = signatures.Signature(given | {"style": signatures.Parameter("style", True)})
    with pytest.raises(UserError, match="pipeline.style: TheirPipeline can't do without it"):
        arguments.refuse_call("TheirPipeline", signature, {})
    arguments.refuse_call("TheirPipeline", signature, {"style": "oil"})


def test_a_pipeline_of_their_own_with_open_keywords_takes_any_key():
    def call(self, prompt, generator=None, output_type="pil", **more): ...

    made = type("TheirPipeline", (), {"__call__": call})
    signature = signatures.of_class(made)
    assert signature.open
    arguments.refuse_call("TheirPipeline", signature, {"style": "oil"})


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("FluxPipeline", ["prompt_2", "negative_prompt", "negative_prompt_2"]),
        ("StableDiffusion3Pipeline", ["prompt_3", "negative_prompt_3"]),
        ("HiDreamImagePipeline", ["prompt_4", "negative_prompt_4"]),
        ("SanaPipeline", ["negative_prompt"]),
        ("ZImageInpaintPipeline", ["negative_prompt"]),  # Optional[Union[str, List[str]]]
    ],
)
def test_texts_that_go_with_the_prompt_are_there_as_often(name, keys):
    signature = signatures.of(name)
    for key in keys:
        assert arguments.for_batch(signature, {key: "a"}, 3) == {key: ["a"] * 3}
        assert arguments.for_batch(signature, {key: ["a"]}, 2) == {key: ["a"] * 2}
        assert arguments.for_batch(signature, {key: ["a", "b"]}, 2) == {key: ["a", "b"]}
        with pytest.raises(UserError, match=f"pipeline.{key}: a list of 2 for a batch of 3"):
            arguments.for_batch(signature, {key: ["a", "b"]}, 3)


def test_other_settings_are_left_as_they_are():
    given = {"system_prompt": "a", "sigmas": [1.0, 0.5], "negative_prompt": None}
    assert arguments.for_batch(signatures.of("Lumina2Pipeline"), given, 3) == given
    made = arguments.for_batch(signatures.of("FluxPipeline"), {"height": 64.0, "sigmas": [1]}, 3)
    assert made == {"height": 64, "sigmas": [1]} and isinstance(made["height"], int)
    given = {"complex_human_instruction": ["a", "b"]}
    assert arguments.for_batch(signatures.of("SanaPipeline"), given, 3) == given


# ---- before any job, and before weights


@pytest.fixture
def inputs(stand_in):
    given = {**stand_in, "variants": [{"name": "half", "budget": 0.5}]}
    return config.complete({**given, "width": {"enabled": False}}, "mine.yaml")


def checked(inputs) -> str:
    with pytest.raises(UserError) as raised:
        preflight.check(Settings.of(inputs), "mine.yaml")
    return str(raised.value)


def named(inputs, pipeline: str) -> None:
    path = Path(inputs["teacher"]["path"]) / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": pipeline}))


def test_the_checks_before_a_run_read_the_index(inputs):
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["pipeline"] = {"true_cfg_scal": 3.0}
    assert "mine.yaml: config key 'pipeline.true_cfg_scal' is not" in checked(inputs)
    inputs["pipeline"] = {"negative_prompt": ["a", "b"]}
    assert "pipeline.negative_prompt: a list of 2, but batches are" in checked(inputs)
    inputs["pipeline"] = {}
    named(inputs, "QwenImageControlNetPipeline")
    assert "needs control_image" in checked(inputs)
    named(inputs, "TheirOwnPipeline")
    inputs["pipeline"] = {"true_cfg_scal": 3.0}
    preflight.check(Settings.of(inputs), "mine.yaml")  # only their code can tell


def test_pictures_of_the_prompts_and_of_the_pipeline_agree(inputs, tmp_path):
    named(inputs, "QwenImageEditPipeline")
    assert "record.prompts: QwenImageEditPipeline takes a picture" in checked(inputs)
    (tmp_path / "a.png").write_bytes(b"")
    header = "prompt,image,digit,digit_color,background_color\n"
    for stage, prompt in (("record", "one"), ("evaluate", "two")):
        lines = "".join(f"{prompt} {n},a.png,1,red,blue\n" for n in (1, 2))
        Path(inputs[stage]["prompts"]).write_text(f"{header}{lines}")
    inputs["record"]["renoised_per_sample"] = 0
    preflight.check(Settings.of(inputs), "mine.yaml")
    named(inputs, "QwenImagePipeline")
    assert "QwenImagePipeline takes no picture; remove the column" in checked(inputs)


def test_a_teacher_on_the_hub_is_checked_with_nothing_but_its_index(inputs, monkeypatch):
    folder, asked = hub.folder(TeacherSettings.of(inputs["teacher"])), []

    def download(teacher, **wanted):
        asked.append(wanted)
        return folder

    monkeypatch.setattr(hub, "folder", download)
    with pytest.raises(UserError, match="num_inference_steps is 0"):
        teacher = TeacherSettings.of({"path": "owner/name"})
        arguments.before_loading(teacher, {"num_inference_steps": 0}, [], "record.prompts")
    assert asked == [{"only": ()}]
