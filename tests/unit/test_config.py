"""Config: schema, default config and README agree, and every bad input is one clear message."""

import datetime
import json

import jsonschema
import pytest
import yaml

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.settings import Variant
from support import ROOT
from support.schema_keys import nodes
from tools.readme_tables import TABLES, renewed

CONFIGS = ("digits", "digits-depth", "digits-fast", "digits-full", "test")


REQUIRED = {  # in every entry of a list
    "variants[].name",
    "teacher.loras[].path",
    "evaluate.benchmarks[].name",
    "evaluate.benchmarks[].prompts",
}


def test_schema_describes_every_key_and_gives_leaves_a_default():
    rules = config.schema()
    jsonschema.Draft202012Validator.check_schema(rules)
    for key, node in nodes(rules):
        assert node.get("description", "").endswith("."), f"{key} has no description"
        if "properties" in node:
            assert node["additionalProperties"] is False, f"{key} lets unknown keys pass"
        elif key not in REQUIRED and not node.get("optional"):
            assert "default" in node, f"{key} has no default"


def test_defaults_are_valid_and_are_the_main_config():
    main = yaml.safe_load((ROOT / "config/digits.yaml").read_text(encoding="utf-8"))
    complete = config.complete({}, "defaults")
    for key in config.AUTO:  # decided while it is completed
        assert main["intervals"].pop(key) == "auto" and complete["intervals"].pop(key)
    # No size of image fits every pipeline, so `pipeline` alone has no useful default.
    assert {**complete, "pipeline": main["pipeline"]} == main


@pytest.mark.parametrize("name", TABLES)
def test_readme_table_is_up_to_date(name):
    assert (ROOT / name).read_text(encoding="utf-8") == renewed(name), "run: make tables"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid(name):
    loaded = config.load(str(ROOT / f"config/{name}.yaml"))
    assert loaded.run == name


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
        (
            "variants",
            [{"name": "a", "budget": {"blocks": 9, "latency": 0}}],
            [
                "'variants[0].budget' is {",
                "a mapping with any of `fraction` (number > 0, <= 1), `parameters` (int",
            ],
        ),
        ("variants", [{"name": "a", "budget": {"block": 9}}], ["variants[0].budget", "`blocks`"]),
        ("variants", [{"name": "a", "budget": {"latency": 2}}], ["`latency` (number > 0, <= 1)"]),
        ("variants", [{"name": "a", "budget": {}}], ["'variants[0].budget' is {}"]),
        ("intervals.require", [[3]], ["'intervals.require[0]' is [3]", "list of 2: integer >= 0"]),
        ("intervals.forbid", [3, 5], ["'intervals.forbid[0]' is 3", "list of 2"]),
        ("width.text.require", [[1, -1]], ["'width.text.require[0][1]' is -1"]),
        (
            "width.ffn_text.require",
            [[1, 2]],
            ["'width.ffn_text.require[0]' is [1, 2]", "integer >= 0"],
        ),
        ("width.ffn.require", [1], ["unknown key 'width.ffn'"]),
        ("width.schedule", "stage", ["did you mean 'staged'"]),
        ("variants", [{"name": "a"}], ["variants: 'a' has no budget; give it one"]),
        ("variants", [{"name": "teacher", "budget": 0.5}], ["'variants[0].name'", "other than"]),
        ("variants", [{"name": "a", "budget": 0.5}] * 2, ["variants", "'a' is used twice"]),
        ("modulation.guidance", [9, 1.5], ["modulation.guidance: [9, 1.5] has to be [low, high]"]),
        (
            "variants",
            [{"name": "a", "budget": 0.5, "train": False, "finetune_steps": 3}],
            ["'a' has train: false", "finetune_steps is 3"],
        ),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: a\nseed: 1\nrun: b", "line 3: 'run' is also in line 1"),
        ("pipeline: {yes: 1, true: 2}", "line 1: the key 'pipeline.yes' is true or false to"),
        ("pipeline: {0x1: 1, 1: 2}", "line 1: the key 'pipeline.0x1' is a whole number to YAML"),
        ("seed: 1\n<<: [{run: 3}]", "line 2: 'run' is 3, which YAML reads as a whole number"),
        ("distill:\n  lr: 0.1\n  lr: 0.2", "line 3: 'distill.lr' is also in line 2"),
        ("variants:\n  - {name: a, budget: 0.5, name: b}", "line 2: 'variants[0].name' is also"),
        ("pipeline:\n  height: 8\n  height: 9", "line 3: 'pipeline.height' is also in line 2"),
        ('{"run": "a", "run": "b"}', "has the key 'run' twice"),
        *[
            (
                f"seed: 1\nrun: {raw}",
                f"line 2: 'run' is {raw}, which YAML reads as {what}; quote it",
            )
            for raw, what in (
                ("3", "a whole number"),
                ("010", "a whole number"),
                ("1_000", "a whole number"),
                ("0x1f", "a whole number"),
                ("1:30", "a whole number"),
                ("1.0", "a number"),
                ("1.0e+3", "a number"),
                (".nan", "a number"),
                ("yes", "true or false"),
                ("No", "true or false"),
                ("null", "nothing"),
                ("~", "nothing"),
                ("2026-01-01", "a date"),
            )
        ],
        ("run:", "line 1: 'run' is empty, and has to be a text"),
        ("teacher: {revision: 12345678}", 'quote it: revision: "12345678"'),
        ("teacher:\n  path: 3", "line 2: 'teacher.path' is 3"),
        ("teacher: {variant: 16}", 'quote it: variant: "16"'),
        ("record: {prompts: 3}", "'record.prompts' is 3"),
        ("variants:\n  - {name: no, budget: 1}", "line 2: 'variants[0].name' is no"),
        ("distill: {mixed_precision: no}", 'quote it: mixed_precision: "no"'),
        ("pipeline: {negative_prompt: no}", 'quote it: negative_prompt: "no"'),
        ("pipeline: {prompt_2: [a, 3]}", "'pipeline.prompt_2[1]' is 3"),
        (
            "pipeline: {then: 2026-01-01}",
            "'pipeline.then' is 2026-01-01, which YAML reads as a date",
        ),
        ("seed: 010", "'seed' is 010, which YAML reads as 8"),
        ("distill: {steps: 1:30}", "'distill.steps' is 1:30, which YAML reads as 90"),
        ("distill: {steps: 1.0e4}", "YAML reads 1.0e4 as text, write 1.0e+4"),
    ],
)
def test_what_yaml_would_read_as_something_else(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        config.load(str(path))
    assert str(path) in str(raised.value) and expected in str(raised.value)


def test_what_yaml_reads_as_it_looks(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run: '3'\nseed: 1_000\nteacher: &t {revision: 1e10, variant: null}\n"
        'pipeline: {x: [*t, *t], negative_prompt: "no", height: 0x20}\n'
    )
    loaded = config.load(str(path))
    assert (loaded.run, loaded.seed, loaded.teacher.revision) == ("3", 1000, "1e10")
    assert loaded.pipeline["negative_prompt"] == "no" and loaded.pipeline["height"] == 32


@pytest.mark.parametrize("value", [3, True, None, 1.5])
def test_values_of_the_command_line_that_are_no_text(value):
    with pytest.raises(UserError, match="'run' is .* put it in quotes"):
        config.complete({"run": value}, "--config")
    with pytest.raises(
        UserError, match="pipeline.negative_prompt' is \\[1\\], and has to be a text"
    ):
        config.complete({"pipeline": {"negative_prompt": [1]}}, "--config")


def test_inline_object_holds_only_what_it_was_given():
    loaded = config.load('{"distill": {"steps": 7}}')
    assert loaded.distill.steps == 7 and loaded.distill.clip_norm == 1.0
    with pytest.raises(UserError, match="'probe' was not given"):
        loaded.probe  # noqa: B018
    with pytest.raises(UserError, match="not JSON"):
        config.load("{steps: 7}")
    with pytest.raises(UserError, match="has the key 'seed' twice"):
        config.load('{"seed": 7, "seed": 8}')


def test_subset_holds_only_the_named_keys():
    complete = config.complete({}, "defaults")
    part = json.loads(config.subset(complete, "seed", "similarity.streams"))
    assert part == {"seed": 0, "similarity": {"streams": "image"}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), datetime.date(2026, 1, 1)])
def test_values_that_json_lacks_are_refused(value):
    with pytest.raises(UserError, match="mine.yaml: holds a value that is no text"):
        config.complete({"seed": value}, "mine.yaml")


def test_budgets_of_four_kinds_in_one_config():
    several = {"fraction": 0.4, "blocks": 30}
    budgets = [0.5, {"parameters": 1.2e10}, {"blocks": 35}, {"latency": 0.7}, several]
    variants = [{"name": f"v{n}", "budget": budget} for n, budget in enumerate(budgets)]
    completed = config.complete({"variants": variants}, "mine.yaml")["variants"]
    variants = [Variant.of(variant) for variant in completed]
    assert [variant.budget for variant in variants] == [
        {"fraction": 0.5},
        {"parameters": 12_000_000_000},
        {"blocks": 35},
        {"latency": 0.7},
        {"fraction": 0.4, "blocks": 30},
    ]
    least = [variant["budget"] for variant in config.tightest(variants)]
    assert least == [
        {"blocks": 30},
        {"fraction": 0.4},
        {"latency": 0.7},
        {"parameters": 12_000_000_000},
    ]


def test_whole_floats_are_integers():
    steps = config.complete({"distill": {"steps": 1e3}}, "mine.yaml")["distill"]["steps"]
    assert steps == 1000 and isinstance(steps, int)


@pytest.mark.parametrize("name", ["README.md", "readme.md", "teacher", "Teacher"])
def test_a_run_can_not_have_the_name_of_something_else_in_results(name):
    with pytest.raises(UserError, match=f"^mine.yaml: run: results/{name} is .* another name"):
        config.complete({"run": name}, "mine.yaml")


def test_every_spelling_of_a_place_is_the_same_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    work, away = tmp_path / "home/work", tmp_path / "away/my teacher, {v2}"
    for folder in (work / "models/x y", away / "inside", tmp_path / "away/plain"):
        folder.mkdir(parents=True)
    (work / "link").symlink_to("models/x y")
    (work / "far").symlink_to(tmp_path / "away/plain")
    (work / "odd").symlink_to(away)
    (work / "held.csv").write_text("")
    (work / "models/held.csv").symlink_to("../held.csv")
    monkeypatch.chdir(work)

    def path(path, subfolder=None):
        given = {"teacher": {"path": str(path), "subfolder": subfolder}}
        completed = config.complete(given, "mine.yaml")
        assert config.complete(completed, "again") == completed
        return completed["teacher"]["path"], completed["teacher"]["subfolder"]

    spellings = ["models/x y", "./models//x y/", work / "models/x y", "~/work/models/x y", "link"]
    assert {path(name) for name in spellings} == {("models/x y", None)}
    assert path("models", "x y/") == path("models", "./x y") == ("models/x y", None)
    assert path("far") == path("../../away/plain") == (str(tmp_path / "away/plain"), None)
    assert path("odd", "inside") == ("odd/inside", None)  # no config can name what it leads to
    assert path("owner/name/", "inside/") == ("owner/name", "inside")
    assert path("owner/name", ".") == path("owner/name") == ("owner/name", None)
    assert path("./owner/name") == ("./owner/name", None)  # missing, and not the Hub's for it
    for name in ("./held.csv", "~/work/held.csv", "models/../held.csv"):
        completed = config.complete({"record": {"prompts": name}}, "mine.yaml")
        assert completed["record"]["prompts"] == "held.csv"
    completed = config.complete({"evaluate": {"prompts": "link/../held.csv"}}, "mine.yaml")
    assert completed["evaluate"]["prompts"] == "models/held.csv"


def test_the_search_for_intervals_is_decided_by_what_else_is_pruned():
    off = {"enabled": False}

    def decided(**given):
        intervals = config.complete(given, "mine.yaml")["intervals"]
        return intervals["cost"], intervals["segmentation"]

    assert decided() == decided(width=off) == decided(modulation=off) == ("velocity", "trend")
    assert decided(width=off, modulation=off) == ("influence", "optimal")
    own = {"cost": "cka", "segmentation": "trend"}
    assert decided(width=off, modulation=off, intervals=own) == ("cka", "trend")
    with pytest.raises(UserError, match="'intervals.cost' is \"most\"; allowed: one of `auto`"):
        decided(intervals={"cost": "most"})
