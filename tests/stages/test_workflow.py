"""The workflow's own code: lint, targets, what a changed key reruns, and how it fails."""

import re
import resource
import shutil

import pytest
import yaml

from ppcl.storage import schemas, tables
from support import ROOT
from support.dry_runs import counts, run, settings_of_jobs
from support.plotting import block_facts, search_tables, width_table

# Without training, and without depth pruning.
TRAINING = {"distill", "subsets", "plot_training"}
DEPTH = {"sensitivity", "intervals", "prune", *TRAINING}
STAGES = {
    "record",
    "extract",
    "probe",
    "similarity",
    "sensitivity",
    "width",
    "intervals",
    "prune",
    "distill",
    "subsets",
    "choose",
    "assemble",
    "pareto",
    "evaluate",
    "gather_metrics",
    "describe",
    "plot_intervals",
    "plot_training",
    "plot_quality",
}


def test_a_key_twice_is_refused_though_snakemake_takes_the_last(tmp_path):
    (tmp_path / "mine.yaml").write_text("run: a\nseed: 1\nrun: b\n")
    where = ["--nolock", "--cores", "1", "-n", "--configfile", tmp_path / "mine.yaml"]
    assert "mine.yaml: line 3: 'run' is also in line 1" in run("snakemake", *where, code=1)


def test_formatting_and_lint(snakemake):
    run("ruff", "check", ".")
    run("snakefmt", "--check", "Snakefile", "workflow")
    assert "good condition" in snakemake("--lint")


@pytest.mark.parametrize(
    ("config", "assembled", "finetuned"),
    [
        ("digits", 3, 1),
        ("digits-depth", 3, 1),
        ("digits-free", 2, 0),
        ("digits-full", 3, 2),
        ("test", 2, 1),
    ],
)
def test_dry_run_resolves_every_stage_without_torch(
    snakemake, tmp_path, config, assembled, finetuned
):
    # The catalog lints without torch, and a Snakefile that imports it is slow.
    for package in ("torch", "diffusers", "transformers", "accelerate"):
        blocked = tmp_path / "blocked" / package
        blocked.mkdir(parents=True)
        (blocked / "__init__.py").write_text(f"raise ImportError('{package} was imported')")
    variables, keys = {"PYTHONPATH": str(tmp_path / "blocked")}, {}
    if config == "digits-depth":  # of the stand-in's 10 blocks, not of 24
        written = yaml.safe_load((ROOT / "config/digits-depth.yaml").read_text())["variants"]
        keys["variants"] = [
            {**entry, "budget": {"blocks": entry["budget"]["blocks"] // 3}} for entry in written
        ]
    printed = snakemake("-n", "-F", config=config, variables=variables, **keys)
    jobs = counts(printed)
    free = DEPTH | {"probe", "similarity", "plot_intervals"} if config == "digits-free" else set()
    free |= {"width"} if config == "digits-depth" else set()
    timed = {"latency"} if config in ("digits", "digits-full") else set()  # by their budgets
    tuned = {"finetune"} if finetuned else set()
    assert jobs.keys() == STAGES - free | {"all"} | tuned | timed
    assert (jobs["assemble"], jobs.get("finetune", 0)) == (assembled, finetuned)


def test_variants_without_finetuning_train_nothing_of_their_own(snakemake):
    jobs = counts(snakemake("-n", "-F", variants=[{"name": "p85", "budget": 0.85}]))
    assert jobs.keys() == STAGES | {"all"}


FREE = [{"name": "p85", "budget": 0.85, "train": False}]


@pytest.mark.parametrize(
    ("keys", "less"),
    [
        ({"variants": FREE}, TRAINING),  # start students may be in it
        ({"variants": FREE, "intervals": {"enabled": False}}, DEPTH),
        (
            {
                "variants": [{"name": "p85", "budget": 0.85, "finetune_steps": 3}],
                "intervals": {"enabled": False},
                "width": {"enabled": False},
            },
            DEPTH - {"plot_training"} | {"probe", "similarity", "plot_intervals"},
        ),
        (
            {
                "variants": FREE,
                "intervals": {"enabled": False},
                "modulation": {"enabled": False},
                "width": {"longest": 1},
            },
            DEPTH | {"probe", "similarity", "plot_intervals", "extract"},
        ),
    ],
)
def test_a_run_without_training_trains_nothing(snakemake, keys, less):
    printed = snakemake("-n", "-F", "-p", **keys)
    rules = counts(printed).keys()
    assert rules == STAGES - less | {"all"} | ({"finetune"} if "train" not in str(keys) else set())
    (line,) = [line for line in printed.splitlines() if "scripts/choose.py --" in line]
    assert ("--start " in line) == ("--selection " in line) == ("prune" in rules)
    assert "--distill" not in line and "--subsets" not in line
    # Who reads what a stage made has what it kept removed, whoever that is.
    removed = " ".join(re.findall(r"forget\.py ([^;]*);", printed))
    kept = {"extract", "sensitivity", "width"} & rules
    assert kept <= set(re.findall(r"state/(\w+)", removed))


@pytest.mark.parametrize(
    ("keys", "more", "less"),
    [
        (
            {
                "width": {"enabled": False, "schedule": "staged"},
                "modulation": {"enabled": False},
                "variants": [{"name": "p", "budget": {"latency": 0.7}, "finetune_steps": 2}],
            },
            {"latency"},
            {"width", "sensitivity"},  # of depth alone, the influence of blocks decides
        ),
        (
            {
                "width": {"schedule": "staged"},
                "variants": [{"name": "fast", "budget": {"latency": 0.9}}],
            },
            {"narrow", "latency"},
            {"finetune"},
        ),
    ],
)
def test_only_what_the_config_asks_for_runs(snakemake, keys, more, less):
    printed = snakemake("-n", "-F", "-p", **keys)
    assert counts(printed).keys() == (STAGES | {"finetune", "all"} | more) - less
    given = {
        program: line
        for line in printed.splitlines()
        for program in ("intervals", "prune", "subsets")
        if f"scripts/{program}.py --" in line
    }
    trained = "narrow" if "narrow" in more else "distill"
    assert f"--students results/digits/{trained}/students.safetensors " in given["subsets"]
    assert ("--candidates results/digits/width/candidates.parquet" in given["prune"]) == (
        "width" not in less
    )
    for program in ("intervals", "prune"):
        timed = "--latency results/digits/latency/blocks.parquet" in given[program]
        assert timed == ("latency" in more)
    # Whoever reads what a stage made has what it kept to resume from removed.
    assert "forget.py results/digits/state/extract; " in printed
    influence = "--probes results/digits/probes/probes.parquet" in given["intervals"]
    assert influence == ("sensitivity" in less)
    states = " ".join(f"results/digits/state/{s}" for s in ("sensitivity", "width"))
    assert (f"forget.py {states}; " in printed) == (not influence)
    assert f"forget.py results/digits/state/{trained}; " in given["subsets"]


@pytest.mark.parametrize("shards", [2, "auto"])
def test_a_sharded_distillation_asks_the_plan_how_many_jobs_it_takes(snakemake, shards):
    sharded = {"distill": {"shards": shards}}
    jobs = counts(snakemake("-n", "-F", **sharded))
    assert {"assign_shards", "join_shards"} <= jobs.keys() and "distill" not in jobs
    printed = snakemake("-n", "-p", "results/digits/distill/shards/1.safetensors", **sharded)
    assert "--shards results/digits/distill/shards/shards.json --shard 1 " in printed
    assert "--state results/digits/state/distill-1 " in printed
    sequential = {"distill": {"shards": shards, "mode": "sequential"}}
    assert "distill.mode is sequential" in snakemake("-n", code=1, **sequential)


def test_without_subsets_variants_are_made_of_distilled_students(snakemake):
    printed = snakemake("-n", "-F", "-p", subsets={"steps": 0})
    assert counts(printed).keys() == STAGES - {"subsets"} | {"finetune", "latency", "all"}
    assert "results/digits/subsets/" not in printed
    for program, jobs in (("choose", 1), ("assemble", 3), ("finetune", 1)):
        lines = [line for line in printed.splitlines() if f"scripts/{program}.py --" in line]
        assert len(lines) == jobs
        for line in lines:
            assert "--distill results/digits/distill/students.safetensors " in line
            errors = "--distill-unit-costs results/digits/distill/unit_costs.parquet " in line
            assert errors == (program == "choose")


def test_catalog_entry_has_the_same_default_target(snakemake):
    assert counts(snakemake("-n", "-F", "-s", "workflow/Snakefile"))["all"] == 1


def test_the_ablation_is_a_target_of_its_own(snakemake):
    jobs = counts(snakemake("-n", "-F", "ablation"))
    shared = {"record", "extract", "probe", "similarity", "sensitivity", "width", "latency"}
    own = {"ablate", "rank_rivals", "gather_ablation", "calibrate", "plot_ablation", "ablation"}
    assert jobs.keys() == shared | own
    # The teacher; 13 rungs, 2 schedules, 1 of equal latency and 3 rivals with 3 seeds; the rest of
    # 13 choices, 8 schedules and 10 rivals. Who runs again shows later.
    assert jobs["ablate"] == 1 + 3 * (13 + 2 + 1 + 3) + 13 + 6 + 7


def test_train_teacher_stands_alone(snakemake):
    missing = {"path": "resources/nowhere"}
    jobs = counts(snakemake("-n", "-F", "train_teacher", teacher=missing))
    assert jobs == {"train_teacher": 1}


def test_a_folder_that_cannot_be_looked_at_is_told(snakemake):
    said = snakemake("-n", code=1, teacher={"path": "a" * 300})
    assert "File name too long; shorten the names" in said and "Traceback" not in said


VARIANTS = ("p27", "p50", "p70")
# Several keys at a time, of stages that do not share any: each dry run takes seconds.
CHANGES = [
    (
        {"extract": {"rows": 10}, "intervals": {"cost": "cka"}, "distill": {"steps": 7}},
        {"extract", "sensitivity", "intervals", "distill"},  # sensitivity is not needed then
    ),
    (
        {"probe": {"ridge": 0.5}, "prune": {"start": "middle"}, "finetune": {"lr": 0.5}},
        # Untrained students are what sensitivity measures.
        {"probe", "prune", "sensitivity", "finetune p27"},
    ),
    (
        {"similarity": {"bootstrap": 7}, "processes": 1, "subsets": {"lr": 0.5}},
        {"similarity", "evaluate", "subsets"},
    ),
    (
        {"pipeline": {"num_inference_steps": 3}, "sensitivity": {"longest": 3}},
        # The call is on the card, and in pruning.json.
        {"record", "evaluate", "sensitivity"}
        | {f"{stage} {name}" for stage in ("assemble", "describe") for name in VARIANTS},
    ),
    (
        {
            "width": {"rows": 5, "linear_weight": 0.5, "text": {"require": [[1, 2]]}, "steps": 7},
            "pareto": {"budgets": 3},
        },
        # Steps are only those of a staged schedule.
        {"width", "distill", "intervals", "prune", "choose", "pareto"},
    ),
    (
        {
            "width": {"schedule": "staged", "ridge": 0.5, "floor": 0.5},
            "modulation": {"ladder": [4]},
            "choose": {"rows": 7},
            "evaluate": {"samples": 5},
        },
        {"width", "prune", "choose", "pareto", "evaluate"},
    ),
    (
        {
            "variants": [
                {
                    "name": "p27",
                    "budget": {"fraction": 0.27, "latency": 0.55},
                    "finetune_steps": 7,
                },
                {"name": "p50", "budget": 0.5},
                {"name": "p70", "budget": 0.75},
            ]
        },
        {
            "finetune p27",
            "assemble p27",
            "assemble p70",
            "choose",
            "pareto",
            "plot_training",
            "plot_quality",
        },
    ),
]


def test_changed_key_changes_exactly_the_stages_that_read_it(snakemake):
    before = settings_of_jobs(snakemake("-n", "-F", "-p"))
    assert len(before) == 25
    for keys, affected in CHANGES:
        after = settings_of_jobs(snakemake("-n", "-F", "-p", **keys))
        assert {name for name in before if before[name] != after.get(name)} == affected, keys


def test_interval_plots_need_nothing_but_their_tables(snakemake, tmp_path):
    work = tmp_path / "work"
    places = {"cka": "similarity", "blocks": "similarity", "probes": "probes"}
    for name, frame in search_tables(12, 3).items():
        schema = getattr(schemas, name.upper())
        path = work / f"results/digits/{places.get(name, 'intervals')}/{name}.parquet"
        tables.write(path, frame, schema, {})
    table = width_table(search_tables(12, 3)["intervals"], 12)
    candidates = work / "results/digits/width/candidates.parquet"
    tables.write(candidates, table, schemas.WIDTH_CANDIDATES, {"blocks": "12"})
    facts = work / "results/digits/record/blocks.parquet"
    tables.write(facts, block_facts(12), schemas.BLOCK_FACTS, {})
    blocked = tmp_path / "blocked/torch"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('torch was imported')")
    arguments = ["-s", ROOT / "Snakefile", "--directory", work, "interval_plots"]
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    snakemake(
        *arguments,
        variables={"PYTHONPATH": str(blocked.parent)},
        teacher={"path": "resources/nowhere"},
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = {path.name for path in (work / "results/digits/plots/intervals").iterdir()}
    names = ("search", "heatmap", "probes", "width", "modulation")
    assert made == {f"{n}.{e}" for n in names for e in ("svg", "png")}
    # 10 seconds are promised; on a busy machine only the processor's time can be tested.
    assert used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime < 10
    assert "Nothing to be done" in snakemake(*arguments, "-n")
    # Without width pruning there is no such table and no such figure.
    shutil.rmtree(candidates.parent)
    shutil.rmtree(work / "results/digits/plots")
    off = {"width": {"enabled": False}, "modulation": {"enabled": False}}
    snakemake(*arguments, teacher={"path": "resources/nowhere"}, **off)
    made = {path.name for path in (work / "results/digits/plots/intervals").iterdir()}
    assert made == {f"{n}.{e}" for n in names[:3] for e in ("svg", "png")}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distil": {}}, "unknown key 'distil'; did you mean 'distill'?"),
        ({"variants": [{"name": "p", "budget": 0.05}]}, "budget 0.05 of 'p' is impossible"),
        ({"teacher": {"path": "config"}}, "config is not a diffusers pipeline"),
    ],
)
def test_bad_config_ends_before_any_job(snakemake, keys, message):
    printed = snakemake(code=1, **keys)
    assert printed.count(message) == 1 and "overlay.yaml" in printed
    assert "Traceback" not in printed and "Building DAG" not in printed


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_a_target_behind_the_config_files_is_not_taken_for_one_of_them(profile):
    command = ["-n", "--workflow-profile", f"profiles/{profile}", "--configfile"]
    printed = run("snakemake", *command, "config/test.yaml", "interval_plots", code=1)
    assert "error: --configfile: there is no file interval_plots; a target goes" in printed
    assert "Traceback" not in printed


def test_a_report_before_there_are_results_says_so(snakemake, tmp_path):
    printed = snakemake("--report", tmp_path / "report.zip", run="unfinished", code=1)
    assert "error: run 'unfinished' has no results/unfinished/evaluation/metrics" in printed
    assert "--configfile" in printed and "Traceback" not in printed
    after = ("--report", tmp_path / "report.zip", "--report-after-run")
    # A dry run makes no figures, which Snakemake finds out when it makes the report.
    assert "Job stats" in snakemake("-n", *after, run="unfinished", code=1)


@pytest.mark.parametrize("target", ["forecast", "train_teacher"])
def test_a_report_of_a_target_without_checks_reads_the_config_too(snakemake, tmp_path, target):
    """What makes the report's table stands in the config, and is no key of it."""
    printed = snakemake("-n", target, "--report", tmp_path / "report.zip", run="unfinished")
    assert "Traceback" not in printed and "has no key" not in printed


@pytest.mark.parametrize("processes", [1, 2])
def test_launched_program_ends_with_its_own_message(tmp_path, processes):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "if os.environ.get('RANK', '0') == '0':\n"
        "    sys.exit('error: what went wrong')\n"
        "import time; time.sleep(60)\n"
    )
    launcher = ROOT / "workflow/scripts/launch.py"
    arguments = ["--processes", processes, "--threads", 2, "--device", "cpu", program]
    assert run("python", launcher, *arguments, code=1) == "error: what went wrong\n"


def test_the_launcher_tells_which_of_its_processes_a_signal_ended(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    launcher = ROOT / "workflow/scripts/launch.py"
    arguments = ["--processes", 2, "--threads", 2, "--device", "cpu", program]
    printed = run("python", launcher, *arguments, code=1)
    assert printed.startswith("error: process 1 of 2 was ended by signal 9 (SIGKILL), most likely")
    assert printed.count("\n") == 1


def test_a_job_removes_the_state_of_what_it_reads_alone(snakemake):
    """The ablation may be measuring, and a finetune that was switched off may go on one day."""
    finetuned = {"name": "a", "budget": 0.6, "finetune_steps": 4}
    off = {"enabled": False}
    depth = {"intervals": {"cost": "cka"}, "width": off, "modulation": off}
    printed = snakemake("-n", "-p", "all", "ablation", variants=[finetuned], config="test")
    removed = re.findall(r"forget\.py ([^;]*);", printed)
    assert any("sensitivity" in of and "width" in of for of in removed)
    assert any("state/finetune-a" in of for of in removed)
    plain = [finetuned | {"finetune_steps": 0}]
    printed = snakemake("-n", "-p", "all", variants=plain, config="test", **depth)
    removed = re.findall(r"forget\.py ([^;]*);", printed)
    assert removed and not re.search("sensitivity|width|finetune", " ".join(removed))


def test_every_rule_that_reads_teacher_or_prompts_knows_which_ones():
    """By a stamp among its params: a file in the place of another may be older."""
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^(?:rule|checkpoint) ", path.read_text(), flags=re.M)[1:]:
            assert ("teacher=teacher_files()" in rule) == ("teacher=teacher_stamp()" in rule), rule
            assert ("prompts=config[" in rule) == ("prompts=prompts_stamp(" in rule), rule
