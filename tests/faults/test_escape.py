"""Names, paths and prompts from a config stay data: no shell, no other folder."""

import pandas as pd
import pytest
import yaml

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.settings import Settings
from ppcl.storage import schemas, tables
from ppcl.teacher import prompts
from support import ROOT, tiny
from support.dry_runs import run, settings_of_jobs

EVIL = [
    "../{}",
    "/tmp/{}",
    "a/../../{}",
    "a;touch {}",
    "$(touch {})",
    "`touch {}`",
    "a\ntouch {}",
    "a\n",
    "'; touch {}; '",
    '"; touch {}; "',
    "-rf",
    ".",
    "..",
    "",
    "a b",
    "a\0b",
    "{{wildcard}}",
    "a\u2215b",  # looks like a slash
    "\uff0e\uff0e\uff0fb",  # full-width ../
    "a\u202eb",  # turns what follows around
    "~",
    "a" * 101,
    "%2e%2e%2fb",
    "--config",
]


@pytest.mark.parametrize("text", EVIL)
def test_names_of_runs_and_variants_cannot_be_paths_or_commands(text):
    name = text.format("escaped")
    for given in (
        {"run": name},
        {"variants": [{"name": name, "budget": 0.5}]},
        {"teacher": {"component": name}},
        {"device": name},
    ):
        with pytest.raises(UserError, match="allowed: "):
            config.complete(given, "mine.yaml")


def test_no_text_of_a_config_reaches_the_shell_of_any_job(snakemake, tmp_path):
    """Every job's command, read as a shell would, hands its texts over whole."""
    evil = (
        f"$(touch {tmp_path}/no) ';touch {tmp_path}/no;' \"`touch {tmp_path}/no`\" ../ \n \\ {{x}}"
    )
    printed = snakemake("-n", "-F", "-p", pipeline={"negative_prompt": evil}, seed=7)
    jobs = settings_of_jobs(printed.replace("\n \\\\ ", " "))
    given = [job["pipeline"]["negative_prompt"] for job in jobs.values() if "pipeline" in job]
    # record, evaluate, and of each variant its assembly and its card.
    assert len(given) == 2 + 2 * 3 and set(given) == {evil}
    assert not (tmp_path / "no").exists()


def test_a_run_with_hostile_prompts_paths_and_model_ids(tiny_teacher, tmp_path):
    """A real run of `record`, through the shell that Snakemake starts."""
    odd = tmp_path / "it's $(touch no) ; touch no"
    odd.mkdir()
    teacher = tmp_path / "$(touch no); `touch no` 'quoted'"
    teacher.symlink_to(tiny_teacher)
    texts = [text.format("no") for text in EVIL if text.strip() and "\0" not in text]
    pd.DataFrame({"prompt": texts}).to_csv(odd / "prompts.csv", index=False)
    (odd / "others.txt").write_text("another\n")
    settings = {
        "run": "hostile",
        "device": "cpu",
        "processes": 1,
        "teacher": {"path": str(teacher)},
        "pipeline": tiny.SETTINGS | {"num_inference_steps": 1, "negative_prompt": "'$(touch no)"},
        "record": {
            "prompts": str(odd / "prompts.csv"),
            "samples": len(texts),
            "batch_size": 16,
            "renoised_per_sample": 0,
        },
        "evaluate": {"prompts": str(odd / "others.txt"), "judge": "none"},
        "intervals": {"cost": "cka"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    work = tmp_path / "work"
    work.mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    target = "results/hostile/record/calls.parquet"
    where = ["-s", ROOT / "Snakefile", "--directory", work, "--cores", "1"]
    run("snakemake", target, *where, "--configfile", tmp_path / "mine.yaml")
    recorded = tables.read(work / target, schemas.CALLS).column("prompt").to_pylist()
    assert set(recorded) == {text.strip() for text in texts} or set(recorded) == set(texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not [path for path in tmp_path.rglob("*") if path.name in ("no", "escaped")]
    assert {path.name for path in work.iterdir()} <= {".snakemake", "results"}
    assert [path.name for path in (work / "results").iterdir()] == ["hostile"]


@pytest.mark.parametrize(
    "key",
    [
        "teacher.path",
        "teacher.subfolder",
        "forecast.transformer_config",
        "record.prompts",
        "evaluate.prompts",
    ],
)
@pytest.mark.parametrize("path", ["a{run}", "a\nb", "a\0b", "a\x1b[31m", "a\n"])
def test_braces_in_paths_would_be_wildcards_and_control_characters_forge_messages(key, path):
    section, name = key.split(".")
    with pytest.raises(UserError, match=f"'{key}' is "):
        config.complete({section: {name: path}}, "mine.yaml")


@pytest.mark.parametrize("name", ["{run}.png", "a\nb.png", "a\x1b.png", "}"])
def test_names_of_pictures_are_as_plain(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    pd.DataFrame({"prompt": ["p"], "image": [name]}).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(UserError, match="p.csv: line.* the image .* has braces or control char"):
        prompts.read(tmp_path / "p.csv")


def test_a_config_that_no_command_line_holds_is_refused():
    for text, fits in (("a" * 90_000, True), ("a" * 110_000, False), ("'" * 30_000, False)):
        given = {"pipeline": {"negative_prompt": text}}
        if fits:
            assert config.complete(given, "mine.yaml")["pipeline"] == given["pipeline"]
            continue
        with pytest.raises(UserError, match="mine.yaml: is longer than a command line may be"):
            config.complete(given, "mine.yaml")


def test_a_workflow_in_a_folder_that_a_shell_would_misread_is_refused(tmp_path):
    """Unless Snakemake starts inside it, for its path is part of every command."""
    odd = tmp_path / "it's $(touch no)"
    odd.symlink_to(ROOT)
    where = ["-s", odd / "Snakefile", "--directory", tmp_path, "--nolock", "-n"]
    printed = run(
        "snakemake", "forecast", *where, "--configfile", ROOT / "config/test.yaml", code=1
    )
    assert "a shell would not take as they are" in printed and "rename it" in printed


def test_a_hub_name_is_no_path():
    """Only what looks like owner/name is asked of the Hub; anything else must be a folder."""
    from ppcl.configuration import preflight

    for text in (text for text in EVIL if "{{" not in text):
        with pytest.raises(UserError, match="teacher.path"):
            given = config.complete({"teacher": {"path": text.format("x") or "x"}}, "mine.yaml")
            preflight.check(Settings.of(given), "mine.yaml")
