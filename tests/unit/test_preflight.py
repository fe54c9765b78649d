"""What is checked before anything runs: teacher, prompts, budgets."""

import json
import shutil
from pathlib import Path

import pytest

from ppcl.configuration import config, preflight
from ppcl.errors import UserError
from ppcl.settings import Settings
from ppcl.teacher import prompts
from ppcl.transformer import families, registry


@pytest.fixture
def inputs(stand_in):
    """A complete config that passes."""
    variants = [{"name": "half", "budget": 0.5}]
    off = {"enabled": False}
    given = {**stand_in, "variants": variants, "width": off, "modulation": off}
    given["intervals"] = {"cost": "velocity"}
    return config.complete(given, "mine.yaml")


def refused(inputs) -> str:
    with pytest.raises(UserError) as raised:
        preflight.check(Settings.of(inputs), "mine.yaml")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_good_inputs_pass(inputs):
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_teacher_on_the_hub_is_left_to_the_download(inputs):
    inputs["teacher"]["path"] = "some-owner/some-model"
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_teacher_is_missing_or_no_pipeline(inputs, tmp_path):
    teacher = Path(inputs["teacher"]["path"])
    (teacher / "transformer/config.json").unlink()
    assert "has no config.json" in refused(inputs)
    (teacher / "model_index.json").write_text('{"_class_name": "AnyPipeline", "unet": null}')
    assert "names no transformer" in refused(inputs)
    (teacher / "model_index.json").write_text("{")
    assert "not valid JSON" in refused(inputs)
    (teacher / "model_index.json").unlink()
    message = refused(inputs)
    assert "teacher.path" in message and "is not a diffusers pipeline" in message
    shutil.rmtree(teacher)
    assert f"{teacher} does not exist" in refused(inputs)


def test_truncated_teacher_weights(inputs):
    weights = Path(inputs["teacher"]["path"]) / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refused(inputs)
    assert str(weights) in message and "truncated" in message


def test_impossible_budget(inputs):
    # One student instead of ten blocks leaves (20 + 8) / 100.
    inputs["sensitivity"]["longest"] = 10
    inputs["variants"] = [{"name": "tiny", "budget": 0.27, "finetune_steps": 0, "train": True}]
    message = refused(inputs)
    assert "budget 0.27 of 'tiny' is impossible" in message and "0.280" in message
    inputs["variants"][0]["budget"] = 0.28
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["intervals"]["protect_first"] = 1
    assert "0.360" in refused(inputs)


@pytest.mark.parametrize("stage", ["record", "evaluate"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        ("caf\u00e9".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_bad_prompts_file(inputs, tmp_path, stage, content, expected):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    inputs[stage]["prompts"] = str(path)
    message = refused(inputs)
    assert f"{stage}.prompts" in message and str(path) in message and expected in message


def test_prompts_csv_without_its_columns(inputs, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("text\nthe digit 7\n")
    inputs["record"]["prompts"] = str(path)
    assert "has no column 'prompt'" in refused(inputs)
    path.write_text("prompt\nthe digit 6\nthe digit 4\n")
    preflight.check(
        Settings.of({**inputs, "evaluate": {**inputs["evaluate"], "judge": "none"}}), "mine.yaml"
    )
    other = tmp_path / "other.csv"
    other.write_text("prompt\nthe digit 5\n")
    inputs["evaluate"]["prompts"] = str(other)
    message = refused(inputs)
    assert "has no column digit" in message and "evaluate.judge: none" in message


def test_a_prompt_of_both_files_is_refused(inputs):
    inputs["evaluate"]["prompts"] = inputs["record"]["prompts"]
    message = refused(inputs)
    assert "evaluate.prompts" in message and "'the digit 7' is also a calibration" in message


def test_a_comma_outside_quotes_is_refused(inputs, tmp_path):
    path = tmp_path / "commas.csv"
    path.write_text("prompt\na red cat, sitting\n")
    inputs["record"]["prompts"] = str(path)
    assert "put prompts with commas in double quotes" in refused(inputs)


def test_a_family_that_cannot_be_pruned_is_refused(inputs):
    index = Path(inputs["teacher"]["path"]) / "model_index.json"
    name = next(iter(families.REFUSED))
    index.write_text(index.read_text().replace("QwenImageTransformer2DModel", name))
    assert f"{name}, which can't be pruned" in refused(inputs)


def test_the_component_that_is_pruned_must_be_there(inputs):
    inputs["teacher"]["component"] = "transformer_2"
    message = refused(inputs)
    assert "teacher.component" in message and "names no transformer_2; set it to one of" in message
    folder = Path(inputs["teacher"]["path"])
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"transformer"', '"transformer_2"'))
    (folder / "transformer").rename(folder / "transformer_2")
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["variants"] = [
        {"name": "tiny", "budget": {"blocks": 1}, "finetune_steps": 0, "train": True}
    ]
    assert "leave 2 of this teacher's blocks" in refused(inputs)


def test_a_pipeline_in_a_folder_of_the_path(inputs):
    folder = Path(inputs["teacher"]["path"])
    inputs["teacher"] |= {"path": str(folder.parent), "subfolder": folder.name}
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["teacher"]["subfolder"] = "elsewhere"
    assert "elsewhere does not exist" in refused(inputs)


def test_weights_of_one_variant_are_counted(inputs):
    """Beside the plain weights there are those of a variant: 10 blocks all the same."""
    weights = Path(inputs["teacher"]["path"]) / "transformer/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    inputs["variants"] = [
        {"name": "tiny", "budget": {"parameters": 35}, "finetune_steps": 0, "train": True}
    ]
    assert "leave 36 of this" in refused(inputs)
    inputs["teacher"]["variant"] = "fp16"
    assert "leave 36 of this" in refused(inputs)


def test_a_streamed_teacher_passes_no_gradients(inputs):
    inputs["teacher"]["offload"] = "stream"
    assert "set subsets.steps to 0, or teacher.offload to none" in refused(inputs)
    inputs["subsets"]["steps"] = 0
    inputs["variants"][0]["finetune_steps"] = 1  # which goes without the teacher
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_pictures_of_prompts(tmp_path, monkeypatch):
    """Relative to the file's folder or to the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "a.png").touch()
    (tmp_path / "b.png").touch()
    table = folder / "edits.csv"
    table.write_text("prompt,image\nred,a.png\nblue,b.png\n")
    assert [row["image"] for row in prompts.read(table)] == [str(folder / "a.png"), "b.png"]
    table.write_text("prompt,image\nred,c.png\n")
    with pytest.raises(UserError, match=r"edits.csv: line 2: the image c.png is neither in"):
        prompts.read(table)
    table.write_text("prompt,image\nred,a.png\nblue,\n")
    with pytest.raises(UserError, match="line 3: has no image .*name one in every row"):
        prompts.read(table)


def test_prompts_as_written(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_bytes("\ufeffone\n\n  two, three \n".encode())
    assert [row["prompt"] for row in prompts.read(lines)] == ["one", "two, three"]
    table = tmp_path / "a.csv"
    table.write_text('prompt,digit\n"one\ntwo",7\n')
    assert prompts.read(table) == [{"prompt": "one\ntwo", "digit": "7"}]


def test_starts_that_cannot_be_solved_are_known(inputs):
    solved = inputs | {"prune": {"start": "solved"}}
    preflight._check_start(Settings.of(solved), "mine.yaml")
    index = Path(inputs["teacher"]["path"]) / "model_index.json"
    named = json.loads(index.read_text()) | {
        "transformer": ["diffusers", "MochiTransformer3DModel"]
    }
    index.write_text(json.dumps(named))
    preflight._check_start(Settings.of(inputs), "mine.yaml")
    with pytest.raises(UserError, match="mine.yaml: prune.start is solved, .* set it to first"):
        preflight._check_start(Settings.of(solved), "mine.yaml")


def test_states_that_cannot_be_renoised_are_known(inputs):
    index = Path(inputs["teacher"]["path"]) / "model_index.json"
    text = index.read_text()
    for pipeline, transformer in (
        ("QwenImageEditPipeline", "QwenImageTransformer2DModel"),
        ("FluxFillPipeline", "FluxTransformer2DModel"),
        ("CogVideoXPipeline", "CogVideoXTransformer3DModel"),
        ("Lumina2Pipeline", "Lumina2Transformer2DModel"),
    ):
        index.write_text(
            json.dumps(
                json.loads(text)
                | {"_class_name": pipeline, "transformer": ["diffusers", transformer]}
            )
        )
        with pytest.raises(UserError) as raised:
            preflight._check_renoising(Settings.of(inputs), "mine.yaml")
        message = str(raised.value)
        assert f"record.renoised_per_sample is 12, but pictures of a {pipeline} can't" in message
        assert message.startswith("mine.yaml: ") and message.endswith("set it to 0")
    assert f"a {pipeline} can't be noised again" in refused(inputs)
    for pipeline in ("FluxControlNetPipeline", "QwenImageImg2ImgPipeline"):
        assert not registry.fixed_states("FluxTransformer2DModel", pipeline)


def test_protecting_every_block_is_refused(inputs):
    inputs["intervals"] |= {"protect_first": 5, "protect_last": 4}
    assert "keep 9 of this teacher's 10 blocks, which leaves nothing" in refused(inputs)
    inputs["intervals"]["protect_last"] = 3
    inputs["variants"][0]["budget"] = 0.95
    preflight.check(Settings.of(inputs), "mine.yaml")


@pytest.mark.parametrize("stage", ["distill", "subsets", "finetune"])
def test_more_processes_than_samples_are_refused(inputs, stage):
    inputs["processes"] = 3
    inputs[stage]["batch_size"] = 2
    for variant in inputs["variants"]:
        variant["finetune_steps"] = int(stage == "finetune")
    assert f"processes is 3, but {stage}.batch_size only 2" in refused(inputs)
    inputs["processes"] = 2
    preflight.check(Settings.of(inputs), "mine.yaml")
    # What trains nothing shares no samples out.
    inputs["processes"] = 3
    for variant in inputs["variants"]:
        variant |= {"finetune_steps": 0, "train": False}
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_truncated_weights_of_another_part(inputs):
    folder = Path(inputs["teacher"]["path"])
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert f"{folder / 'vae'} is not there" in refused(inputs)
    (folder / "vae").mkdir()
    assert f"{folder / 'vae'} has no config.json" in refused(inputs)
    (folder / "vae/config.json").write_text("{}")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\0" * 40)
    message = refused(inputs)
    assert str(weights) in message and "truncated" in message


def test_measured_costs_bound_what_a_student_can_replace(inputs):
    """With runs of 2 blocks at most, ten blocks leave five students: (20 + 40) / 100."""
    inputs["sensitivity"]["longest"] = 2
    message = refused(inputs)
    assert "0.600" in message and "raise sensitivity.longest" in message
    for other in ("cka", "influence"):
        inputs["intervals"]["cost"] = other
        preflight.check(Settings.of(inputs), "mine.yaml")


def test_counts_that_cannot_be_reached(inputs):
    """Runs of 6 blocks at most: two students, so at least 2 blocks and 20 + 16 parameters."""
    for kind, least in (("blocks", 2), ("parameters", 36)):
        inputs["variants"] = [
            {"name": "tiny", "budget": {kind: least - 1}, "finetune_steps": 0, "train": True}
        ]
        message = refused(inputs)
        assert "of 'tiny' is impossible" in message and f"leave {least} of this" in message
        inputs["variants"][0]["budget"] = {kind: least}
        preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["variants"][0]["budget"] = {"latency": 0.01}  # only measuring can tell
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_narrow_students_count_as_nothing(inputs):
    inputs["width"]["enabled"] = True
    inputs["variants"] = [{"name": "tiny", "budget": 0.2, "finetune_steps": 0, "train": True}]
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["variants"][0]["budget"] = 0.19
    assert "0.200" in refused(inputs)
    inputs["variants"][0]["budget"] = {"blocks": 1}
    assert "leave 2 of this teacher's blocks" in refused(inputs)


def test_a_long_pin_makes_more_possible(inputs):
    inputs["variants"] = [
        {"name": "tiny", "budget": {"blocks": 1}, "finetune_steps": 0, "train": True}
    ]
    inputs["intervals"]["require"] = [[0, 9]]
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_pins_are_checked(inputs):
    inputs["intervals"]["require"] = [[8, 10]]
    assert "mine.yaml: intervals.require: [8,10] is beyond this teacher's blocks" in refused(inputs)
    inputs["teacher"]["path"] = "some-owner/some-model"  # whose depth only the download tells
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["intervals"]["require"] = [[2, 3], [3, 4]]
    assert "overlap" in refused(inputs)


@pytest.mark.parametrize("budget", [1.0, {"parameters": 100}, {"blocks": 12}, {"latency": 1}])
def test_budgets_that_prune_nothing_are_refused(inputs, budget):
    inputs["variants"] = [{"name": "whole", "budget": budget, "finetune_steps": 0, "train": True}]
    assert "prunes nothing; lower one of them" in refused(inputs)
    inputs["variants"].append(
        {"name": "half", "budget": {"blocks": 5}, "finetune_steps": 0, "train": True}
    )
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_closed_forms_of_no_search_are_refused(inputs):
    inputs["choose"]["closed_forms"] = False
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["intervals"]["enabled"] = False
    inputs["width"]["enabled"] = True
    assert "choose.closed_forms is false, so variants take" in refused(inputs)


def test_float16_is_refused_for_gradients_through_the_teacher(inputs):
    inputs["teacher"]["dtype"] = "float16"
    assert "set it to bfloat16 or float32, or subsets.steps to 0" in refused(inputs)
    inputs["subsets"]["steps"] = 0
    preflight.check(Settings.of(inputs), "mine.yaml")


def test_what_does_not_go_together_is_refused(inputs, monkeypatch):
    inputs["distill"] |= {"shards": "auto", "mode": "sequential"}
    assert "distill.mode is sequential" in refused(inputs)
    inputs["distill"] |= {"shards": 1, "cache_inputs": "always"}
    assert "distill.cache_inputs to auto or never" in refused(inputs)
    inputs["distill"]["mode"] = "independent"
    inputs["similarity"]["bootstrap"] = 0
    assert "similarity.bootstrap is 0; set tolerance to a number" in refused(inputs)
    inputs["intervals"]["tolerance"] = 0.01
    inputs["finetune"]["cpu_offload"] = True
    assert "finetune.cpu_offload is of use with finetune.sharding: fsdp alone" in refused(inputs)
    inputs["finetune"]["sharding"] = "fsdp"
    preflight.check(Settings.of(inputs), "mine.yaml")
    inputs["finetune"]["optimizer"] = "adamw8bit"
    preflight.check(Settings.of(inputs), "mine.yaml")  # of no variant
    inputs["variants"][0]["finetune_steps"] = 1
    monkeypatch.setattr(preflight, "find_spec", lambda _name: None)
    assert "finetune.optimizer is adamw8bit, which needs the package" in refused(inputs)
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    assert "can't take weights that are shared out" in refused(inputs)
    inputs["finetune"] |= {"sharding": "none", "cpu_offload": False}
    preflight.check(Settings.of(inputs), "mine.yaml")


@pytest.mark.parametrize("name", ["results", "results/mine", "results/mine/logs"])
def test_a_file_where_results_have_to_be_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("")
    with pytest.raises(UserError, match=f"^mine.yaml: run: {name} has to be a folder"):
        preflight.check_results("mine", "mine.yaml")
    Path(name).unlink()
    preflight.check_results("mine", "mine.yaml")
