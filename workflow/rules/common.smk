# Helpers of the rules: paths, the parts of the config that a stage depends on, and its code.

import contextlib
import functools
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

# Relative where possible: Snakemake remembers inputs by path, and a moved folder should not rerun.
SCRIPTS = Path(os.path.relpath(Path(workflow.current_basedir) / ".." / "scripts"))
# Their paths are words of every command.
if shlex.quote(str(SCRIPTS)) != str(SCRIPTS):
    sys.exit(
        f"error: the workflow's folder, {SCRIPTS.parents[1]}, has spaces or signs in its name that a "
        "shell would not take as they are; rename it, or start Snakemake inside it"
    )
sys.path.insert(0, str(SCRIPTS.resolve()))

from ppcl.ablation import methods
from ppcl.configuration import config as configuration
from ppcl.configuration import preflight
from ppcl.errors import UserError, trouble
from ppcl.figures import catalogue
from ppcl.figures.run_tables import TABLES
from ppcl.provenance import code_digest, digest, stamps
from ppcl.runtime import collector, cores, gpus
from ppcl.settings import Settings
from ppcl.storage import schemas, texts, whole
from ppcl.teacher import hub, prompts, teacher_identity, weights

collector.work()

# Jobs use the Python that runs Snakemake, activated or not, unless conda brings its own (--sdm
# conda); of progress bars, which go to the logs too, one line now and then is enough.
OWN_PYTHON = DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method
PATHS = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH" if OWN_PYTHON else ""
shell.prefix(
    f"set -euo pipefail; source {SCRIPTS}/job.sh; export TQDM_MININTERVAL=10 {PATHS}; ".replace(
        "{", "{{"
    ).replace("}", "}}")
)

ENVIRONMENT = "../../environment.yml"
# Snakemake lowers it to --cores. Clusters set their own by profile.
THREADS = cores.MOST
# Keys of the config's `width` that fits of linear maps, and prices of candidates, depend on.
WIDTH_FITS = ["width.fit_rows", "width.batch_size", "width.ridge"]
WIDTH_PRICES = [*WIDTH_FITS, "width.rows", "width.longest", "width.cka_floor"]
# And what is required and forbidden, that stages which search read.
CONSTRAINTS = [
    "intervals.enabled",
    "intervals.require",
    "intervals.forbid",
    "intervals.protect_first",
    "intervals.protect_last",
    *(f"width.{key}" for key in ("enabled", "cka_floor", "text", "ffn_image", "ffn_text")),
    *(f"modulation.{key}" for key in ("enabled", "require", "forbid")),
]
# Targets as they were called before.
OLD_TARGETS = {"plan": "forecast"}
# What a forecast, and so the limits of jobs, depend on.
FORECAST_KEYS = [
    "seed",
    "device",
    "processes",
    "teacher",
    "similarity",
    "pipeline",
    "forecast",
    "record",
    "extract",
    "sensitivity",
    "intervals",
    "width",
    "modulation",
    "distill",
    "subsets",
    "choose",
    "finetune",
    "evaluate",
    "pareto",
    "variants",
]


def targets():
    """Which of the workflow's own targets the command line names; empty for the default one.

    Snakemake parses rules before it knows its targets (workflow.dag_settings is still None), so
    the arguments are all there is to look at.
    """
    return {"all", "interval_plots", "train_teacher", "ablation", "forecast"} & set(sys.argv[1:])


def refuse(problem):
    """Ends Snakemake with one line; a WorkflowError would begin with a line number of this file."""
    sys.exit(f"error: {problem}")


def validate():
    """Complete the config with its defaults; check it against schema, teacher and prompts."""
    source = ", ".join(map(os.path.relpath, workflow.configfiles)) or "--config"
    for old in OLD_TARGETS.keys() & set(sys.argv[1:]):
        refuse(f"the target {old} is called {OLD_TARGETS[old]} now")
    try:
        configuration.refuse_surprises(map(os.path.relpath, workflow.configfiles))
        config.update(configuration.complete(config, source))
        if workflow.is_main_process:
            preflight.check_results(config["run"], source)
        # The teacher may be missing where it is about to be made, or where only figures are drawn
        # or a forecast is made.
        if (
            workflow.is_main_process
            and targets() not in ({"train_teacher"}, {"forecast"})
            and not interval_plots_only()
        ):
            preflight.check(settings(), source)
    except UserError as error:
        refuse(error)
    except OSError as error:  # such as a folder that you may not look into
        if (problem := trouble(error)) is None:
            raise
        refuse(f"{source}: {problem}")


@functools.cache
def settings():
    """The completed config as typed sections."""
    return Settings.of(config)


def result(path):
    """A path below the folder of this run."""
    return f"results/{config['run']}/{path}"


def program(name):
    """A program of workflow/scripts."""
    return str(SCRIPTS / name)


def code(name):
    """Digest of a program and of the modules that it uses, for params."""
    return code_digest(SCRIPTS / name)


def taken(*stages):
    """First command of a job that reads what stages made: what they kept to resume from goes.

    Not of stages whose outputs the job does without: they may be at work, or half done."""
    states = " ".join(result(f"state/{stage}") for stage in stages)
    return f"python {program('forget.py')} {states}; " if states else ""


def forget_taken(jobs):
    """At the end of a run that succeeded, and so has recorded all outputs of these jobs.

    Not with --touch, which takes missing outputs for success, too."""
    for job in () if workflow.touch else jobs:
        if job.params.get("state"):
            whole.forget(Path(job.params.state))
    with contextlib.suppress(OSError):
        os.rmdir(result("state"))


def as_it_is(value):
    """For params: Snakemake does not look for wildcards, in braces, in what a function returns."""
    return lambda wildcards: value


def subset(*keys):
    """JSON of the config keys that a stage depends on, for params."""
    return as_it_is(configuration.subset(config, *keys))


# Inputs of stages that make models from sets, and of those that search for sets (optional).
MODELS = ["maps", "conditioning", "start", "distill", "narrow", "subsets"]
PRICES = [
    "selection",
    "width",
    "latency",
    "distill_unit_costs",
    "narrow_unit_costs",
    "subsets_unit_costs",
]


def optional(*names):
    """For params: the options that hand over inputs which a run may do without."""
    return lambda wildcards, input: " ".join(
        f"--{name.replace('_', '-')} {path}"
        for name in names
        for path in ([input.get(name)] if input.get(name) else [])
    )


def variants():
    """Names of all variants."""
    return [variant["name"] for variant in config["variants"]]


def finetuned():
    """Names of the variants that are fine-tuned."""
    return [variant["name"] for variant in config["variants"] if variant["finetune_steps"]]


def depth():
    """Whether depth is pruned, so that there are intervals to search for, and students."""
    return config["intervals"]["enabled"]


def trains():
    """Whether students are trained."""
    return settings().trains


def closed():
    """Whether there are closed forms: linear FFNs, text runs or modulations of low rank."""
    return settings().closed


def compared():
    """Whether blocks are compared with each other: for intervals, and for text runs."""
    return settings().compares


def sensitivity():
    """The measured costs, if selection goes by them."""
    measured = settings().searches_by_cost
    return [result("sensitivity/intervals.parquet")] if measured else []


def influences():
    """The probes' table, if selection goes by the influence of blocks."""
    wanted = depth() and config["intervals"]["cost"] == "influence"
    return [result("probes/probes.parquet")] if wanted else []


def similarity(name):
    """An artifact of the comparison of blocks, if they are compared."""
    return [result(f"similarity/{name}")] if compared() else []


def widths(name):
    """An artifact of closed forms, if there are any."""
    return [result(f"width/{name}")] if closed() else []


def candidates():
    """Selection's verdicts on closed forms; it runs for intervals."""
    return widths("candidates.parquet") if depth() else []


def conditioning():
    """What modulations get, if they may become low rank."""
    wanted = config["modulation"]["enabled"]
    return [result("activations/conditioning.safetensors")] if wanted else []


def latency():
    """Measured times, if a budget is one of time."""
    wanted = settings().limited_latency
    return [result("latency/blocks.parquet")] if wanted else []


def staged():
    """Whether distilled blocks become narrow in a training of their own."""
    return settings().staged


def distill_keys():
    """The keys of `distill`, for stages that train as it does; how it shares and keeps is its own."""
    own = ("shards", "cache_inputs")
    return [f"distill.{key}" for key in config["distill"] if key not in own]


def distill_shards(ending):
    """For what joins shards: a function that finds one file of each, in order of depth."""

    def found(wildcards):
        table = checkpoints.allot.get().output.shards
        count = len(texts.read_sealed(table)["jobs"])
        return [result(f"distill/shards/{shard}{ending}") for shard in range(count)]

    return found


def distilled(name):
    """An artifact of the students as Eq. 6 leaves them."""
    return result(f"{'narrow' if staged() else 'distill'}/{name}")


def training():
    """The stages, by their folders, that train students, in their order."""
    stages = ["distill", "narrow", "subsets"]
    wanted = [trains(), staged(), trains() and config["subsets"]["steps"]]
    return [stage for stage, on in zip(stages, wanted) if on]


def taught(stage, name):
    """An artifact of a stage that trains students, if it is one of this run."""
    return [result(f"{stage}/{name}")] if stage in training() else []


def start():
    """The students before any training, if depth is pruned."""
    return [result("prune/students.safetensors")] if depth() else []


def selection():
    """What each student stands for, if depth is pruned."""
    return [result("prune/selection.json")] if depth() else []


def subset_for_variant(name, *keys):
    """As subset, with the named variant as the only one: the others' settings do not matter."""
    chosen = [variant for variant in config["variants"] if variant["name"] == name]
    return configuration.subset({**config, "variants": chosen}, "variants", *keys)


def subset_for_smallest_budgets(*keys):
    """As subset, with nothing of the variants but the smallest budgets: they decide selection."""
    smallest = configuration.tightest(settings().variants)
    return as_it_is(configuration.subset({**config, "variants": smallest}, "variants", *keys))


def teacher_files():
    """Weights and configs of a local teacher; a newer file reruns what loads the teacher."""
    found = map(str, teacher_identity.files(settings().teacher))
    return [path for path in found if not set("{}") & set(path)]  # they would be wildcards


def teacher_stamp():
    """For params: what tells this teacher from any other. One that mv or rsync has put in its place
    may be older than what was made with the other, which Snakemake does not take for a change."""
    return teacher_identity.fingerprint(settings().teacher)


def prompts_stamp(stage):
    """For params, as teacher_stamp: of a stage's prompts, and the pictures that they name."""
    path = config[stage]["prompts"]
    return digest(stamps([path, *pictures(stage)])) if Path(path).is_file() else ""


@functools.cache  # of a config that is complete: several rules ask, and a file may be long
def pictures(stage):
    """Pictures that a stage's prompts name: a changed one reruns it."""
    if not Path(config[stage]["prompts"]).is_file():
        return []  # which preflight reports
    return prompts.pictures(prompts.read(config[stage]["prompts"], f"{stage}.prompts"))


def memory(megabytes):
    """MB of main memory for a stage that loads the teacher: its own need, and twice the pipeline.

    Weights pass through memory on their way to a GPU, or stay there with teacher.offload. Those of
    a teacher on the Hub can't be counted before they are here; --set-resources says more.
    """
    size = sum(Path(path).stat().st_size for path in teacher_files())
    return megabytes + 2 * size // 10**6


def on_cpu():
    """Whether jobs compute on the CPU: as configured, or for want of a GPU on this machine. Of a
    cluster's nodes this machine says nothing."""
    if config["device"] != "auto":
        return config["device"].split(":")[0] == "cpu"
    return workflow.local_exec and not gpus.possible()


def gpu(wildcards):
    """For resources: GPUs that a job asks for. None on a cluster with device: cpu, nor for a small
    teacher on a CPU, whose stages share the cores. One for a large teacher on this machine's CPU,
    too, so that its stages take turns: memory for several may not be there."""
    return 0 if small_on_cpu() or (on_cpu() and workflow.non_local_exec) else 1


@functools.cache
def small_on_cpu():
    """Whether the teacher runs on the CPU, and its matrices are too small for several threads."""
    teacher = settings().teacher
    if hub.is_name(teacher.path) or not on_cpu():
        return False
    try:
        name, folder = hub.component(teacher), hub.folder(teacher)
        library, _ = hub.parts(folder)[name]
        headers = weights.headers(folder / name, library, teacher.variant).values()
    except (UserError, KeyError):  # which is told where the teacher is checked
        return False
    return not cores.worth_threads(
        entry["shape"] for header in headers for entry in header.values()
    )


def cores_of_one_process(wildcards):
    """For threads, of a stage of one process: with a small teacher one, as others can use the other
    cores meanwhile."""
    return 1 if small_on_cpu() else THREADS


def cores_beside_one_process(wildcards):
    """For threads, of a stage of several processes: with a small teacher all cores but one, which
    stages of one process (extract, probe, similarity) use meanwhile."""
    total = workflow.resource_settings.cores
    shared = workflow.local_exec and small_on_cpu() and total
    return max(1, min(THREADS, total - 1)) if shared else THREADS


def every_core(wildcards):
    """For threads, of a stage that measures time: all cores, so that no other job of a small teacher
    runs beside it."""
    total = workflow.resource_settings.cores
    return total if workflow.local_exec and small_on_cpu() and total else THREADS


def forecast():
    """What the forecast says that stages need, if there is one: stage -> `runtime` and `mem_mb`."""
    path = Path(result("forecast/resources.json"))
    if targets() == {"forecast"} or not path.is_file():
        return {}
    try:
        found = texts.read_sealed(path)
    except UserError as error:
        refuse(f"{error}, with the target forecast; without it limits are fixed")
    of = digest(configuration.subset(config, *FORECAST_KEYS))
    if workflow.is_main_process and found.get("config", of) != of:
        logger.warning(
            f"{path} is of another config; for limits of this one run the target forecast"
        )
    return found


def minutes(stage, otherwise):
    """For resources: the time limit of a stage. Shards have their own, once there are some."""

    def found(wildcards):
        shard = f"{stage}/{wildcards.get('shard')}"
        return (FORECAST.get(shard) or FORECAST.get(stage) or {}).get("runtime", otherwise)

    return found


def megabytes(stage, program, teacher=True):
    """For resources: MB of main memory of a stage's program, with what it loads.

    Of one that loads the teacher, it is the greater of what the teacher's files say and what the
    forecast does: the former know the whole pipeline, the latter what is trained, and a teacher that is
    still on the Hub.
    """

    def found(wildcards):
        shard = f"{stage}/{wildcards.get('shard')}"
        needs = FORECAST.get(shard) or FORECAST.get(stage) or {}
        return max(memory(program) if teacher else 0, program + needs.get("mem_mb", 0))

    return found


def artifacts():
    """Every file of the contract: a stage whose output was deleted is remade, and what follows."""
    wanted = {
        "activations/": compared() or conditioning(),
        "probes/": compared(),
        "similarity/": compared(),
        "sensitivity/": sensitivity(),
        "width/candidates.parquet": candidates(),
        "width/": closed(),
        "latency/": latency(),
        "intervals/": depth(),
        "prune/": depth(),
        **{f"{stage}/": stage in training() for stage in ("distill", "narrow", "subsets")},
        "ablation/": False,  # a target of its own, as is the next
        "forecast/": False,
    }
    left_out = tuple(path for path, needed in wanted.items() if not needed)
    named = [
        path
        for path in schemas.ARTIFACTS
        if not path.endswith("/") and not path.startswith(left_out)
    ]
    plain = [result(path) for path in named if "<variant>" not in path]
    per_variant = [path for path in named if "<variant>" in path]
    return plain + [
        result(path.replace("<variant>", name))
        for path in per_variant
        for name in (finetuned() if path.startswith("finetune/") else variants())
    ]


def set_of(wildcards):
    """What one variant is made of. It may have stayed the same where `choose` has run for others:
    what follows is decided once that is known, since only then is the file compared."""
    checkpoints.choose.get()
    return result(f"variants/sets/{wildcards.variant}.json")


def models():
    """Folders of all assembled pipelines."""
    return [result(f"models/{name}") for name in variants()]


def figures(group):
    """The catalogue's entries of a group, as far as this run has what they show."""
    return [entry for entry in catalogue.of_group(group) if entry.shown(settings())]


def plots(*groups):
    """The figures of some groups, as SVG and PNG."""
    return [
        result(f"plots/{group}/{entry.name}.{extension}")
        for group in groups
        for entry in figures(group)
        for extension in ("svg", "png")
    ]


def figure_names(group):
    """For params: which figures are to be drawn."""
    return [entry.name for entry in figures(group)]


def figure_keys(group):
    """The config's keys that drawing them depends on."""
    return sorted({key for entry in figures(group) for key in entry.keys})


def figure_tables(group):
    """For a rule's input: their tables, by name; of some, each fine-tuned variant has one."""
    names = {name for entry in figures(group) for name in entry.tables}
    paths = {name: result(path) for name, path in TABLES.items() if name in names}
    return {
        name: (
            [path.replace("<variant>", variant) for variant in finetuned()]
            if "<variant>" in path
            else path
        )
        for name, path in paths.items()
    }


def figure_files(group):
    """For a rule's output: they as SVG, which the report shows, and as PNG."""
    files = {}
    for entry in figures(group):
        files[entry.name] = report(
            result(f"plots/{group}/{entry.name}.svg"),
            caption=f"../report/{entry.name}.rst",
            category=group.capitalize(),
            labels={"figure": entry.title},
        )
        files[f"{entry.name}_png"] = result(f"plots/{group}/{entry.name}.png")
    return files


def interval_plots_only():
    """Whether nothing but the interval plots is asked for, and their tables exist."""
    tables = figure_tables("intervals").values()
    return targets() == {"interval_plots"} and all(Path(table).is_file() for table in tables)


def forecast_inputs():
    """What a forecast takes if it is there."""
    teacher = settings().teacher
    own = Path(teacher.path, teacher.subfolder or "", teacher.component, "config.json")
    names = {
        "architecture": config["forecast"]["transformer_config"] or str(own),
        "intervals": result("intervals/intervals.parquet"),
        "candidates": next(iter(candidates()), ""),
        "calls": result("record/calls.parquet"),
    }
    return {name: path for name, path in names.items() if Path(path).is_file()}


def reporting():
    """Whether a report is made, rather than anything run; of the command line, as in `targets`."""
    return workflow.is_main_process and any(word.startswith("--report") for word in sys.argv[1:])


def reported():
    """What makes the table that a report opens with: of a run that is there, unless it is made
    first (--report-after-run)."""
    if not targets() <= {"all"}:
        return str  # which is empty
    if "--report-after-run" in sys.argv[1:]:
        return lambda: summary("rst")
    table = summary("rst")
    return lambda: table


def summary(form):
    """The table of what the variants reach, as `text` or `rst`."""
    metrics = result("evaluation/metrics.parquet")
    if not Path(metrics).is_file():
        refuse(
            f"run '{config['run']}' has no {metrics} to report on yet: run it first, or name "
            "the config of another run with --configfile"
        )
    from ppcl.evaluation import summary as found  # pandas, which takes a second to import

    try:
        rows = found.rows(metrics, result("models"), config["teacher"]["path"])
    except UserError as error:
        refuse(error)
    return getattr(found, form)(rows)


def ablation_runs(names, seeds=None):
    """Tables of the first runs of some methods, as many as each has in any case."""
    return [
        result(f"ablation/runs/{name}-{number}.parquet")
        for name in names
        for number in range(seeds or methods.seeds(name, settings().ablation))
    ]


def compared_methods():
    """Names of the methods that this part of the ablation is of."""
    try:
        return methods.wanted(settings().ablation)
    except UserError as error:
        refuse(error)


def known_ablation_runs():
    """Tables of the runs that are made in any case."""
    return ablation_runs(compared_methods())


def more_ablation_runs(wildcards):
    """Tables of further runs, of the rivals that did best once each has been run; none in a part of
    the ablation without all of them."""
    if not set(methods.of_group("rival")) <= set(compared_methods()):
        return []
    best = texts.read_sealed(checkpoints.rank_rivals.get().output.best)["best"]
    return sorted({*ablation_runs(best, config["ablation"]["seeds"])} - {*known_ablation_runs()})
