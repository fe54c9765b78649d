"""The whole workflow on the shrunken config: contract, nothing left to do, resume, report."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from ppcl.storage import schemas, tables, texts
from support import ROOT, fresh
from support.artifacts import content
from support.slurm import cluster

RUN = Path("results/test")
TRAINED = "distill/students.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A copy of the repository in which `snakemake --configfile config/test.yaml` has run."""
    folder = checkout(tmp_path_factory.mktemp("dag") / "repo")
    # Its jobs are forks, too: importing what they import takes most of their time. Where there is
    # SLURM, those of test_slurm.py start from nothing.
    stand_in = sys.executable if cluster.missing() else fresh.python(fresh.SNAKEMAKE)
    first = started(folder, python=stand_in)
    while not list(folder.glob(".snakemake/locks/*")) and first.poll() is None:
        time.sleep(0.1)
    REFUSED.append(started(folder).communicate()[0])
    printed = first.communicate()[0]
    assert first.returncode == 0, printed[-4000:]
    assert re.search(r"^p\w+ .* results/test/models/p", printed, re.M), printed[-4000:]
    return folder


REFUSED: list[str] = []  # what a second run in the folder says while the first is at work


def checkout(folder: Path) -> Path:
    """A copy of the repository."""
    made = (".git", ".venv", ".snakemake", "results", "__pycache__", ".*_cache")
    ignore = shutil.ignore_patterns(*made)
    return shutil.copytree(ROOT, folder, ignore=ignore)


def started(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.Popen:
    """A run of the shrunken config, by this Python or what stands for it."""
    program = [str(Path(sys.executable).with_name("snakemake"))]
    if python != sys.executable:
        program = [python, "-m", "snakemake"]
    command = [*program, "--cores", "2", "--configfile", "config/test.yaml", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )


def snakemake(folder: Path, *arguments: str) -> str:
    words = ["-m", "snakemake", "--cores", "2", "--configfile", "config/test.yaml", *arguments]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    done = fresh.run(fresh.SNAKEMAKE, *words, cwd=folder, env=quiet, merged=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def weights(path: Path) -> dict[str, bytes]:
    with safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}


def test_every_file_of_the_contract_is_there_with_its_columns(finished):
    for name, schema in schemas.TABLES.items():
        if name.startswith(
            ("latency/", "narrow/", "ablation/", "forecast/", "encode/")
        ):  # not with this config and target
            assert not (finished / RUN / name).exists()
            continue
        path = finished / RUN / name.replace("<variant>", "p55")
        # The token table's width is the model's, so only its names can be asked for here.
        table = tables.read(path, None if "tokens" in name else schema)
        assert set(schema.names) <= set(table.column_names), name
        assert len(table), name
        assert tables.provenance(path)["commit"]
    for variant in ("p55", "p85"):
        assert (finished / RUN / "models" / variant / "model_index.json").is_file()
        assert (finished / RUN / "models" / variant / "transformer" / "block_map.json").is_file()
    for figure in ("intervals/search", "training/subsets", "quality/images"):
        for kind in ("svg", "png"):
            assert (finished / RUN / "plots" / f"{figure}.{kind}").stat().st_size > 1000


def test_a_finished_run_has_nothing_to_do(finished):
    assert not (finished / RUN / "state").exists()  # all has been taken
    assert "Nothing to be done" in snakemake(finished, "-n")


def test_touch_leaves_what_an_unfinished_training_kept(finished):
    """It ends well though outputs are missing, as of a training that was killed."""
    kept = finished / RUN / "state/finetune-p55/checkpoint.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    try:
        part = ("--forcerun", "plot_training", "--until", "plot_training")
        printed = snakemake(finished, "--touch", *part)
        assert kept.is_file()
        assert "results/test/models/p" not in printed  # the table of a run that is not over
    finally:
        shutil.rmtree(finished / RUN / "state", ignore_errors=True)


def test_a_plan_changes_what_jobs_ask_for_and_reruns_none(finished):
    needs = finished / RUN / "forecast/resources.json"
    needs.parent.mkdir()
    try:
        texts.write_sealed(needs, {"distill": {"runtime": 77, "mem_mb": 999000}})
        printed = snakemake(finished, "-n")
        assert "Nothing to be done" in printed and "of another config" not in printed
        texts.write_sealed(needs, {"distill": {"runtime": 77}, "config": "another"})
        assert "forecast/resources.json is of another config" in snakemake(finished, "-n")
        needs.write_text(needs.read_text().replace("77", "78"))
        with pytest.raises(AssertionError, match="resources.json is not what was written; delete"):
            snakemake(finished, "-n")
    finally:
        shutil.rmtree(needs.parent)


def rerun_by(finished: Path, changed: str) -> dict[str, int]:
    """Rule to number of jobs that a changed key asks for."""
    (finished / "changed.yaml").write_text(changed)
    printed = snakemake(finished, "changed.yaml", "-n")
    statistics = printed.split("Job stats:")[1].split("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", statistics, re.M)}


def test_a_teacher_in_place_of_another_reruns_all_though_it_is_older(finished):
    """As mv and rsync leave it: Snakemake itself looks for newer inputs only."""
    index = finished / "resources/digits/model_index.json"
    seen = index.stat()
    os.utime(index, ns=(seen.st_atime_ns, seen.st_mtime_ns - 10**12))
    try:
        assert {"record", "extract", "distill", "evaluate"} <= set(rerun_by(finished, "{}"))
    finally:
        os.utime(index, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def test_a_changed_key_reruns_its_stage_and_what_follows(finished):
    results = {"finetune": 1, "assemble": 2, "evaluate": 1, "describe": 2, "plot_quality": 1}
    results |= {"all": 1, "plot_training": 1, "pareto": 1, "choose": 1}
    results["gather_metrics"] = 1
    assert rerun_by(finished, "subsets: {lr: 0.5}") == results | {"subsets": 1}
    later = {name: 1 for name in ("intervals", "plot_intervals", "prune", "distill", "subsets")}
    assert rerun_by(finished, "intervals: {cost: cka}") == results | later


def test_pictures_of_ones_own_train_one_variant_and_nothing_else(finished, tmp_path):
    """A variant that is added to a finished run, and one that is trained further."""
    for number, colour in enumerate(("red", "green")):
        (tmp_path / "mine").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"mine/{number}.png")
        (tmp_path / f"mine/{number}.txt").write_text(f"a {colour} seven on {colour}")
    first, second = yaml.safe_load((finished / "config/test.yaml").read_text())["variants"]
    after = {"evaluate": 1, "gather_metrics": 1, "plot_quality": 1, "plot_training": 1, "all": 1}
    own = {"encode": 1, "finetune": 1, "assemble": 1, "describe": 2}
    further = first | {"finetune_steps": 6, "finetune_data": str(tmp_path / "mine")}
    assert rerun_by(finished, json.dumps({"variants": [further, second]})) == after | own
    folder = tmp_path / "added"
    shutil.copytree(finished, folder)
    added = second | further | {"name": "own", "budget": 0.85}
    changed = json.dumps({"variants": [first, second, added]})
    trained = {"record", "extract", "sensitivity", "distill", "subsets"}
    assert not trained & rerun_by(folder, changed).keys()
    # Which variants' sets have changed is known once `choose` has run.
    snakemake(folder, "changed.yaml", "--until", "choose")
    rerun = rerun_by(folder, changed)
    assert rerun == after | own | {"describe": 3, "pareto": 1}


def test_another_budget_of_one_variant_trains_no_other_again(finished, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(finished, folder)
    variants = yaml.safe_load((folder / "config/test.yaml").read_text())["variants"]
    assert [variant["name"] for variant in variants] == ["p55", "p85"]
    variants[1]["budget"] = 0.9
    (folder / "other.yaml").write_text(json.dumps({"variants": variants}))
    models = [str(RUN / f"models/{name}") for name in ("p55", "p85")]
    cards = [folder / model / "pruning.json" for model in models]
    tuned = folder / RUN / "finetune/p55.safetensors"
    before = [path.read_bytes() for path in (*cards, tuned)]
    snakemake(folder, "other.yaml", "--", *models)
    after = [path.read_bytes() for path in (*cards, tuned)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert "Nothing to be done" in snakemake(folder, "other.yaml", "-n", "--", *models)


def test_budgets_are_kept(finished):
    metrics = pd.read_parquet(finished / RUN / "evaluation/metrics.parquet")
    fraction = metrics[metrics["metric"] == "parameter_fraction"].set_index("variant")["value"]
    assert fraction["teacher"] == 1
    assert fraction["p55"] <= 0.55 and fraction["p85"] <= 0.85


def test_a_deleted_output_is_remade_from_that_stage_on_with_the_same_numbers(finished):
    before = weights(finished / RUN / TRAINED)
    metrics = finished / RUN / "evaluation/metrics.parquet"
    table = pd.read_parquet(metrics)
    recorded = (finished / RUN / "record/calls.parquet").stat().st_mtime_ns
    (finished / RUN / TRAINED).unlink()
    snakemake(finished)
    assert weights(finished / RUN / TRAINED) == before
    assert (finished / RUN / "record/calls.parquet").stat().st_mtime_ns == recorded
    again = pd.read_parquet(metrics)
    # Seconds and bytes are measured anew; all else is the same to the bit on one machine.
    measured = table["metric"].str.contains("latency|memory")
    pd.testing.assert_frame_equal(table[~measured], again[~measured])


def test_shards_make_the_same_students(finished, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(finished, folder)
    (folder / "sharded.yaml").write_text("distill: {shards: 2}")
    made = [str(RUN / f"distill/{name}") for name in ("students.safetensors", "unit_costs.parquet")]
    before = [weights(folder / made[0]), pd.read_parquet(folder / made[1])]
    for name in made:  # as they are, they are what two jobs would make
        (folder / name).unlink()
    snakemake(folder, "sharded.yaml", "--", made[0])
    assert weights(folder / made[0]) == before[0]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / made[1]), before[1])
    left = [path.name for path in (folder / RUN / "distill/shards").iterdir()]
    assert left == ["shards.json"]
    assert (folder / RUN / "logs/distill-1.log").is_file()  # there were two
    assert "Nothing to be done" in snakemake(folder, "sharded.yaml", "-n", "--", made[0])


def test_the_report_opens_with_the_table_and_holds_every_figure(finished):
    snakemake(finished, "--report", "report.zip")
    assert (finished / "report.zip").stat().st_size > 100_000
    with zipfile.ZipFile(finished / "report.zip") as archive:
        opens = archive.read("report/report.html").decode().split("workflow_desc = ")[1]
    assert "worst metric" in opens.split("\n")[0] and "results/test/models/" in opens


# ---- two runs at once


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(finished):
    assert "Directory cannot be locked" in REFUSED[0] and "no other Snakemake" in REFUSED[0]


@pytest.mark.skipif("PPCL_FAULTS" not in os.environ, reason="takes minutes; PPCL_FAULTS=1 runs it")
@pytest.mark.parametrize("folders", [1, 2])
@pytest.mark.parametrize("delay", [0, 25])
def test_two_whole_runs_that_share_their_results_end_as_one(finished, tmp_path, folders, delay):
    """Without a lock in one folder; and in two checkouts, of which each has a lock of its own."""
    first = checkout(tmp_path / "first")
    (first / "results").mkdir()
    second = first
    if folders == 2:
        second = checkout(tmp_path / "second")
        (second / "results").symlink_to(first / "results")
    printed = {}

    def follow(number: int, folder: Path) -> None:
        time.sleep(number * delay)
        run = started(folder, "--nolock")
        printed[number] = run.communicate()[0], run.returncode

    threads = [threading.Thread(target=follow, args=pair) for pair in enumerate([first, second])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{folders} folders, {delay} s apart: exit codes", [code for _, code in printed.values()])
    for text, _ in printed.values():
        for line in text.splitlines():
            if line.startswith("error: ") or "Exception" in line:
                print(line)
        # What a job ends with is a message for people; Snakemake may say that a file is gone.
        for trace in text.split("Traceback (most recent call last)")[1:]:
            assert "workflow/scripts" not in trace.split("\n\n")[0], trace[:4000]
    snakemake(first, "--nolock")
    for path in sorted((finished / RUN).rglob("*")):
        name = path.relative_to(finished / RUN)
        kind = path.suffix in (".parquet", ".safetensors", ".json") and "models" not in name.parts
        if kind or path.parent.name == "models":
            assert content(first / RUN / name) == content(path), name
