# What jobs may take: cores, GPUs, memory, time.

from ppcl.pruning.quantisation import METHODS
from ppcl.runtime import cores, gpus
from ppcl.storage import texts
from ppcl.teacher import hub, weights

# Snakemake lowers it to --cores. Clusters set their own by profile.
THREADS = cores.MOST


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


def method_of(name):
    """How a variant is quantised (`quantisation.Method`); None if it is not."""
    return METHODS.get(of_variant(name, "quantise"))


def gpu_to_quantise(wildcards):
    """For resources, of a job that writes one variant: a GPU for a method that runs there alone."""
    method = method_of(wildcards.variant)
    return 1 if method and method.cuda else 0


# Folders of a run that are made without any pipeline of a variant.
BEFORE_MODELS = {"activations", "distill", "finetune", "forecast", "intervals", "latency", "probes"}
BEFORE_MODELS |= {"record", "sensitivity", "similarity", "subsets", "variants", "width"}


def asked_for():
    """Names of the variants whose pipelines the command line may have made: of named files below
    this run's folder, those that they say; else all."""
    paths = [Path(os.path.normpath(word)).parts for word in sys.argv[1:]]
    run = Path(result("")).parts
    below = [path[len(run) :] for path in paths if path[: len(run)] == run and path != run]
    names = {path[1] for path in below if path[0] == "models" and len(path) > 1}
    of_files = all(path[0] in BEFORE_MODELS or path[0] == "models" and path[1:] for path in below)
    return names & set(variants()) if below and of_files and not targets() else set(variants())


def refuse_without_cuda():
    """Ends Snakemake where a variant is quantised by what runs on CUDA alone, and there is none; not
    for targets, such as `forecast` or the files of earlier stages, that do not make it."""
    others = {"forecast", "train_teacher", "ablation", "interval_plots"}
    if not workflow.is_main_process or targets() & others:
        return
    for name in sorted(asked_for()):
        method = method_of(name)
        if method and method.cuda and on_cpu():
            refuse(
                f"variants: '{name}' is quantised by {method.package}, which diffusers runs on CUDA "
                "alone, and jobs compute on the CPU here (device, or for want of a GPU); set its "
                "quantise to int8, leave the variant out, or run it where there is a GPU"
            )


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
        needs = texts.read_sealed(path)
    except UserError as error:
        refuse(f"{error}, with the target forecast; without it limits are fixed")
    of = digest(configuration.subset(config, *FORECAST_KEYS))
    if workflow.is_main_process and needs.get("config", of) != of:
        logger.warning(
            f"{path} is of another config; for limits of this one run the target forecast"
        )
    return needs


def minutes(stage, otherwise):
    """For resources: the time limit of a stage. Shards have their own, once there are some."""

    def runtime(wildcards):
        shard = f"{stage}/{wildcards.get('shard')}"
        return (FORECAST.get(shard) or FORECAST.get(stage) or {}).get("runtime", otherwise)

    return runtime


def megabytes(stage, program, teacher=True):
    """For resources: MB of main memory of a stage's program, with what it loads.

    Of one that loads the teacher, it is the greater of what the teacher's files say and what the
    forecast does: the former know the whole pipeline, the latter what is trained, and a teacher that is
    still on the Hub.
    """

    def mem_mb(wildcards):
        shard = f"{stage}/{wildcards.get('shard')}"
        needs = FORECAST.get(shard) or FORECAST.get(stage) or {}
        return max(memory(program) if teacher else 0, program + needs.get("mem_mb", 0))

    return mem_mb


def limits(stage, mem_mb, runtime, launched=False):
    """For resources of a stage that loads the teacher: GPUs, memory of its program in MB, and minutes
    where there is no forecast. launched: also what it is started with, in several processes."""
    wanted = {"processes": config["processes"], "device": config["device"]} if launched else {}
    needs = {"mem_mb": megabytes(stage, mem_mb), "runtime": minutes(stage, runtime)}
    return {"gpu": gpu, **needs, **wanted}
