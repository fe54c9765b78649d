# What a stage depends on, for its params, so that a change of it reruns the stage: keys of the config,
# the teacher, the prompts.

from ppcl.provenance import digest, stamps
from ppcl.teacher import pictures as own_pictures
from ppcl.teacher import teacher_identity

# Keys of the config's `width` that fits of linear maps, and prices of candidates, depend on.
WIDTH_FITS = ["width.fit_rows", "width.batch_size", "width.ridge"]
WIDTH_PRICES = [*WIDTH_FITS, "width.rows", "width.longest", "width.cka_floor"]
# Keys that say what is required and forbidden, for stages that search for sets.
CONSTRAINTS = [
    "intervals.enabled",
    "intervals.require",
    "intervals.forbid",
    "intervals.protect_first",
    "intervals.protect_last",
    *(f"width.{key}" for key in ("enabled", "cka_floor", "text", "ffn_image", "ffn_text")),
    *(f"modulation.{key}" for key in ("enabled", "require", "forbid")),
]
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


def as_it_is(value):
    """For params: Snakemake does not look for wildcards, in braces, in what a function returns."""
    return lambda wildcards: value


def subset(*keys):
    """JSON of the config keys that a stage depends on, for params."""
    return as_it_is(configuration.subset(config, *keys))


def subset_for_variant(name, *keys, trained=False):
    """As subset, with the named variant as the only one, and the one that it is a quantised copy of:
    the others' settings do not matter. For what trains it, nor does how it is stored in the end.
    """
    (of,) = [variant.get("of") for variant in config["variants"] if variant["name"] == name]
    chosen = [variant for variant in config["variants"] if variant["name"] in (name, of)]
    if trained:
        chosen = [{k: v for k, v in one.items() if k != "quantise"} for one in chosen]
    return configuration.subset({**config, "variants": chosen}, "variants", *keys)


def subset_for_smallest_budgets(*keys):
    """As subset, with nothing of the variants but the smallest budgets: they decide selection."""
    smallest = configuration.tightest(settings().variants)
    return as_it_is(configuration.subset({**config, "variants": smallest}, "variants", *keys))


def subset_for_budgets(*keys):
    """As subset, with all variants, but only the keys that the choice of their sets depends on."""
    budgets = configuration.budgets(config["variants"])
    return as_it_is(configuration.subset({**config, "variants": budgets}, "variants", *keys))


def distill_keys():
    """The keys of `distill` for stages that train as it does: all but those of shards and cache."""
    own = ("shards", "cache_inputs")
    return [f"distill.{key}" for key in config["distill"] if key not in own]


def evaluate_keys():
    """The keys of `evaluate` that its own stage depends on: all but the benchmarks."""
    return [f"evaluate.{key}" for key in config["evaluate"] if key != "benchmarks"]


def subset_for_benchmark(label):
    """As subset, with the named benchmark as the only one."""
    mine = {**config["evaluate"], "benchmarks": [benchmark(label)]}
    keys = "seed", "device", "processes", "teacher", "pipeline"
    keys += "evaluate.batch_size", "evaluate.benchmarks"
    return configuration.subset({**config, "evaluate": mine}, *keys)


def teacher_stamp():
    """For params: what tells this teacher from any other. Where mv or rsync puts another teacher in
    its place, its files may be older than the results, and Snakemake would see no change."""
    return teacher_identity.stamp(settings().teacher)


def file_stamp(path):
    """For params, as teacher_stamp: of a file that may not be there."""
    return digest(stamps([path])) if Path(path).is_file() else ""


@functools.cache
def data_stamp(data):
    """For params, as teacher_stamp: of the user's own pictures."""
    if not Path(data).exists():
        return ""
    every = own_pictures.listed(data)
    return digest([[p.caption for p in every], stamps(own_pictures.files(every))])


def prompts_stamp(stage):
    """For params, as teacher_stamp: of a stage's prompts, and the pictures that they name."""
    path = config[stage]["prompts"]
    return digest(stamps([path, *pictures(stage)])) if Path(path).is_file() else ""
