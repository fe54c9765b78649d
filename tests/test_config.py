"""Config: schema, default config and README agree, and every bad input is one clear message."""

import datetime
import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml
from readme_tables import ROOT, TABLES, renewed

from ppcl import config
from ppcl.errors import UserError

CONFIGS = ("digits", "digits-full", "test")


def nodes(node, key=""):
    """(dotted key, schema node) of every key, sections and list entries included."""
    for name, child in node.get("properties", {}).items():
        yield f"{key}{name}", child
        yield from nodes(child, f"{key}{name}.")
        yield from nodes(child.get("items", {}), f"{key}{name}[].")


def test_schema_describes_every_key_and_gives_leaves_a_default():
    rules = config.schema()
    jsonschema.Draft202012Validator.check_schema(rules)
    for key, node in nodes(rules):
        assert node.get("description", "").endswith("."), f"{key} has no description"
        if "properties" in node:
            assert node["additionalProperties"] is False, f"{key} lets unknown keys pass"
        elif key not in ("variants[].name", "variants[].budget"):
            assert "default" in node, f"{key} has no default"


def test_defaults_are_valid_and_are_the_main_config():
    main = yaml.safe_load((ROOT / "config/digits.yaml").read_text(encoding="utf-8"))
    complete = config.complete({}, "defaults")
    # No size of image fits every pipeline, so `pipeline` alone has no useful default.
    assert {**complete, "pipeline": main["pipeline"]} == main


@pytest.mark.parametrize("name", TABLES)
def test_readme_table_is_up_to_date(name):
    assert (ROOT / name).read_text(encoding="utf-8") == renewed(name), "run: make tables"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid(name):
    loaded = config.load(str(ROOT / f"config/{name}.yaml"))
    assert loaded["run"] == name


def test_example_of_the_readme_is_valid():
    text = (ROOT / "config/README.md").read_text(encoding="utf-8")
    example = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config.complete(example, "config/README.md")["run"] == "mine"


def put(given: dict, key: str, value):
    *parents, last = key.split(".")
    for parent in parents:
        given = given.setdefault(parent, {})
    given[last] = value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("distil", {}, ["unknown key 'distil'", "did you mean 'distill'"]),
        ("distill.step", 5, ["unknown key 'distill.step'", "did you mean 'steps'"]),
        ("lr", 0.1, ["unknown key 'lr'", "did you mean 'distill.lr'"]),
        ("probe.unheard_of", 1, ["unknown key 'probe.unheard_of'", "allowed here: ridge"]),
        ("distill.steps", "many", ["'distill.steps' is \"many\"", "integer >= 1"]),
        ("distill.steps", 2.5, ["'distill.steps' is 2.5", "integer >= 1"]),
        ("distill.steps", True, ["'distill.steps' is true"]),
        ("distill.steps", "500", ["'distill.steps' is \"500\"", "drop the quotes"]),
        ("distill.lr", "1e-3", ["'distill.lr'", "write 1.0e-3"]),
        ("distill.mixed_precision", False, ["'distill.mixed_precision'", '"no" in quotes']),
        ("distill.betas", [0.9], ["'distill.betas' is [0.9]", "list of 2"]),
        ("distill.betas", [0.9, 1.0], ["'distill.betas[1]' is 1.0", "< 1"]),
        ("device", "cud", ["'device' is \"cud\"", "did you mean 'cuda'"]),
        ("processes", 0, ["'processes' is 0", "`auto` or integer >= 1"]),
        ("seed", -1, ["'seed' is -1", ">= 0"]),
        ("run", "../outside", ["'run'", "matching"]),
        ("record", [], ["'record' is []", "object"]),
        ("variants", [], ["'variants' is []", "1 or more"]),
        ("variants", [{"name": "a", "budget": 1.5}], ["'variants[0].budget' is 1.5", "<= 1"]),
        ("variants", [{"name": "a", "budget": 0}], ["'variants[0].budget' is 0", "> 0"]),
        ("variants", [{"name": "a"}], ["variants[0]", "'budget' is a required property"]),
        ("variants", [{"name": "teacher", "budget": 0.5}], ["'variants[0].name'", "other than"]),
        ("variants", [{"name": "a", "budget": 0.5}] * 2, ["variants", "'a' is used twice"]),
    ],
)
def test_invalid_value_is_one_message(key, value, expected):
    given = {}
    put(given, key, value)
    with pytest.raises(UserError) as raised:
        config.complete(given, "mine.yaml")
    message = str(raised.value)
    assert message.startswith("mine.yaml: ") and "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: [", "not valid YAML"),
        (b"- run", "must hold keys and values"),
        (b"run: \xff\xfe", "not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_unreadable_config_file(tmp_path, content, expected):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as raised:
        config.load(str(path))
    assert str(path) in str(raised.value)


def test_inline_object_holds_only_what_it_was_given():
    loaded = config.load('{"distill": {"steps": 7}}')
    assert loaded["distill"]["steps"] == 7 and loaded["distill"]["clip_norm"] == 1.0
    with pytest.raises(UserError, match="'probe' was not given"):
        loaded["probe"]
    with pytest.raises(UserError, match="not JSON"):
        config.load("{steps: 7}")


def test_subset_holds_only_the_named_keys():
    complete = config.complete({}, "defaults")
    part = json.loads(config.subset(complete, "seed", "similarity.streams"))
    assert part == {"seed": 0, "similarity": {"streams": "image"}}


@pytest.fixture
def inputs(stand_in):
    """A complete config that passes."""
    variants = [{"name": "half", "budget": 0.5}]
    return config.complete({**stand_in, "variants": variants}, "mine.yaml")


def refused(inputs) -> str:
    with pytest.raises(UserError) as raised:
        config.check(inputs, "mine.yaml")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_good_inputs_pass(inputs):
    config.check(inputs, "mine.yaml")


def test_teacher_on_the_hub_is_left_to_the_download(inputs):
    inputs["teacher"]["path"] = "some-owner/some-model"
    config.check(inputs, "mine.yaml")


def test_teacher_is_missing_or_no_pipeline(inputs, tmp_path):
    teacher = Path(inputs["teacher"]["path"])
    (teacher / "transformer/config.json").unlink()
    assert "has no config.json" in refused(inputs)
    (teacher / "model_index.json").write_text('{"_class_name": "AnyPipeline", "unet": []}')
    assert "names no transformer" in refused(inputs)
    (teacher / "model_index.json").write_text("{")
    assert "not valid JSON" in refused(inputs)
    (teacher / "model_index.json").unlink()
    message = refused(inputs)
    assert "teacher.path" in message and "is not a diffusers pipeline" in message
    shutil.rmtree(teacher)
    assert f"{teacher} does not exist" in refused(inputs)


def test_truncated_teacher_weights(inputs):
    weights = Path(inputs["teacher"]["path"]) / "transformer/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refused(inputs)
    assert str(weights) in message and "truncated" in message


def test_impossible_budget(inputs):
    # One student instead of ten blocks leaves (20 + 8) / 100.
    inputs["variants"] = [{"name": "tiny", "budget": 0.27, "finetune_steps": 0}]
    message = refused(inputs)
    assert "budget 0.27 of 'tiny' is impossible" in message and "0.280" in message
    inputs["variants"][0]["budget"] = 0.28
    config.check(inputs, "mine.yaml")
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
    path.write_text("prompt\nthe digit 6\n")
    config.check({**inputs, "evaluate": {**inputs["evaluate"], "judge": "none"}}, "mine.yaml")
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


def test_a_family_without_an_entry_is_refused(inputs):
    index = Path(inputs["teacher"]["path"]) / "model_index.json"
    index.write_text(index.read_text().replace("QwenImageT", "UnheardOfT"))
    assert "UnheardOfTransformer2DModel, which can't be pruned" in refused(inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), datetime.date(2026, 1, 1)])
def test_values_that_json_lacks_are_refused(value):
    with pytest.raises(UserError, match="mine.yaml: holds a value that is no text"):
        config.complete({"seed": value}, "mine.yaml")


def test_whole_floats_are_integers():
    steps = config.complete({"distill": {"steps": 1e3}}, "mine.yaml")["distill"]["steps"]
    assert steps == 1000 and isinstance(steps, int)


def test_prompts_as_written(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_bytes("\ufeffone\n\n  two, three \n".encode())
    assert [row["prompt"] for row in config.prompts(lines)] == ["one", "two, three"]
    table = tmp_path / "a.csv"
    table.write_text('prompt,digit\n"one\ntwo",7\n')
    assert config.prompts(table) == [{"prompt": "one\ntwo", "digit": "7"}]
