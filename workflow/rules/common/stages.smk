# Which stages a run has, by its config, and the files that they hand on: for inputs, empty where the
# run does without.

from ppcl.ablation import methods
from ppcl.benchmarks import registry
from ppcl.publishing import teacher_card as teacher_cards
from ppcl.storage import schemas, texts
from ppcl.teacher import hub, prompts, teacher_identity

# Stages that train students, in their order.
TRAINING = ("distill", "narrow", "subsets")


def variants():
    """Names of all variants."""
    return [variant["name"] for variant in config["variants"]]


def pruned():
    """Names of the variants that are pruned to a budget."""
    return [variant["name"] for variant in config["variants"] if "of" not in variant]


def quantised():
    """Names of the variants that are others, quantised, and of these."""
    return {each["name"]: each["of"] for each in config["variants"] if "of" in each}


def finetuned():
    """Names of the variants that are fine-tuned."""
    return [variant["name"] for variant in config["variants"] if variant["finetune_steps"]]


def of_variant(name, key):
    """What the config says of a variant by one of its keys; None if it says nothing."""
    (value,) = [each.get(key) for each in config["variants"] if each["name"] == name]
    return value


def data_of(wildcards):
    """The name in encode/ of a variant's own pictures, in a list; empty if it has none."""
    data = of_variant(wildcards.variant, "finetune_data") or config["finetune"]["data"]
    weighed = config["finetune"]["weights"]["pictures"]
    return [digest(data)[:12]] if data and weighed else []


def encoded(wildcards):
    """For inputs: a variant's own pictures, encoded."""
    return [result(f"encode/{name}.parquet") for name in data_of(wildcards)]


def data_sets():
    """Names in encode/ of all pictures that are trained on -> the folder or table."""
    own = [variant.get("finetune_data") for variant in config["variants"]]
    return {digest(data)[:12]: data for data in [config["finetune"]["data"], *own] if data}


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


def staged():
    """Whether distilled blocks become narrow in a training of their own."""
    return settings().staged


def training():
    """The stages, by their folders, that train students, in their order."""
    wanted = [trains(), staged(), trains() and config["subsets"]["steps"]]
    return [stage for stage, on in zip(TRAINING, wanted) if on]


def teacher_files():
    """Weights and configs of a local teacher; a newer file reruns what loads the teacher."""
    paths = map(str, teacher_identity.files(settings().teacher))
    return [path for path in paths if not set("{}") & set(path)]  # they would be wildcards


@functools.cache  # of a config that is complete: several rules ask, and a file may be long
def pictures(stage):
    """Pictures that a stage's prompts name: a changed one reruns it."""
    if not Path(config[stage]["prompts"]).is_file():
        return []  # which preflight reports
    return prompts.pictures(prompts.read(config[stage]["prompts"], f"{stage}.prompts"))


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


def sizes():
    """Bytes of the teacher's parts, if a budget is one of bytes."""
    wanted = settings().limited_bytes
    return [result("record/sizes.parquet")] if wanted else []


def start():
    """The students before any training, if depth is pruned."""
    return [result("prune/students.safetensors")] if depth() else []


def selection():
    """What each student stands for, if depth is pruned."""
    return [result("prune/selection.json")] if depth() else []


def taught(stage, name):
    """An artifact of a stage that trains students, if it is one of this run."""
    return [result(f"{stage}/{name}")] if stage in training() else []


def distill_shards(ending):
    """For what joins shards: a function that finds one file of each, in order of depth."""

    def files(wildcards):
        table = checkpoints.assign_shards.get().output.shards
        count = len(texts.read_sealed(table)["jobs"])
        return [result(f"distill/shards/{shard}{ending}") for shard in range(count)]

    return files


def model_files():
    """For inputs: the files that stages make models from, by the names of MODELS."""
    return {
        "maps": widths("maps.safetensors"),
        "conditioning": conditioning(),
        "start": start(),
        **{stage: taught(stage, "students.safetensors") for stage in TRAINING},
    }


def price_files():
    """For inputs: the files with what a search for sets goes by, by the names of PRICES."""
    return {
        "selection": selection(),
        "width": widths("measured.parquet"),
        "latency": latency(),
        "sizes": sizes(),
        **{f"{stage}_unit_costs": taught(stage, "unit_costs.parquet") for stage in TRAINING},
    }


def set_of(wildcards):
    """For inputs: what one variant is made of. `choose` may run for other variants and leave this
    file as it was, so the jobs after it are decided only once `choose` is done."""
    checkpoints.choose.get()
    return result(f"variants/sets/{wildcards.variant}.json")


def models():
    """Folders of all assembled pipelines."""
    return [result(f"models/{name}") for name in variants()]


def cards():
    """Folders of all variants' model cards."""
    return [result(f"cards/{name}") for name in variants()]


def teacher_card():
    """The teacher's own model card, if it is in its folder: the variants' licence is its. That of
    a teacher on the Hub comes with the download, after jobs are planned; its commit identifies it.
    """
    teacher = settings().teacher
    path = None if hub.is_name(teacher.path) else teacher_cards.find(teacher)
    return [str(path)] if path and not set("{}") & set(str(path)) else []


def benchmarks():
    """What the config says of each benchmark, by the name of its folder."""
    return {
        options.label: given
        for options, given in zip(settings().evaluate.benchmarks, config["evaluate"]["benchmarks"])
    }


def benchmark(label):
    """What the config says of one benchmark."""
    return benchmarks()[label]


def benchmark_manifests():
    """The lists of pictures of every model for every benchmark."""
    return [
        result(f"evaluation/benchmarks/{label}/{model}.json")
        for label in benchmarks()
        for model in ("teacher", *variants())
    ]


def benchmark_scores():
    """The files with scores of benchmarks that are there."""
    return [
        str(path)
        for label, given in benchmarks().items()
        for model in ("teacher", *variants())
        for path in registry.score_files(
            Path(result(f"evaluation/benchmarks/{label}")), given["name"], given["part"], model
        )
        if not set("{}") & set(str(path))
    ]


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


def artifacts():
    """Every file of the contract: a stage whose output was deleted is remade, and what follows."""
    wanted = {
        "activations/": compared() or conditioning(),
        "probes/": compared(),
        "similarity/": compared(),
        "sensitivity/": sensitivity(),
        "encode/": False,  # made for the variants that are trained on it
        "width/candidates.parquet": candidates(),
        "width/": closed(),
        "latency/": latency(),
        "intervals/": depth(),
        "prune/": depth(),
        **{f"{stage}/": stage in training() for stage in TRAINING},
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
        for name in per_variant_names(path)
    ]


def per_variant_names(path):
    """Names of the variants that have an artifact of their own at this path."""
    if path.startswith("finetune/"):
        return finetuned()
    return pruned() if path.startswith("variants/") else variants()


def ablation_runs(names, seeds=None):
    """Tables of the first runs of some methods, as many as each has in any case."""
    return [
        result(f"ablation/runs/{name}-{number}.parquet")
        for name in names
        for number in range(seeds or methods.seeds(name, settings().ablation))
    ]


def compared_methods():
    """Names of the methods that are compared: those of ablation.methods, or all."""
    try:
        return methods.wanted(settings().ablation)
    except UserError as error:
        refuse(error)


def known_ablation_runs():
    """Tables of the runs that are made in any case."""
    return ablation_runs(compared_methods())


def more_ablation_runs(wildcards):
    """Tables of further runs, of the rivals that do best in their first ones; none if
    ablation.methods leaves out a rival."""
    if not set(methods.of_group("rival")) <= set(compared_methods()):
        return []
    best = texts.read_sealed(checkpoints.rank_rivals.get().output.best)["best"]
    return sorted({*ablation_runs(best, config["ablation"]["seeds"])} - {*known_ablation_runs()})
