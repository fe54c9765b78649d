"""Every stage of one tiny run, in order: what it reads, what it writes, and how it is started."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ppcl.ablation import methods
from support import tiny

HOW = {"batch_size": 2, "lr": 0.003, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 2}


@dataclass(frozen=True)
class Stage:
    """A program, with an artifact's path in the run's folder per option.

    Attributes:
        state: whether it has a folder to resume from.
        more: further options.
        group: what of a program's several parts it is.
        configured: whether it takes the config.
    """

    program: str
    reads: dict[str, str]
    writes: dict[str, str]
    state: bool = False
    more: dict[str, str] = field(default_factory=dict)
    group: tuple[str, ...] = ()
    configured: bool = True

    def options(self, settings: dict, folder: Path) -> list[str]:
        """The command line of the program."""
        paths = self.paths(folder)
        if "data" in paths:  # pictures lie where the config says, like prompts
            paths["data"] = settings["finetune"]["data"]
        given = tiny.options(settings, paths)
        return [*self.group, *given[0 if self.configured else 2 :]]

    def paths(self, folder: Path) -> dict[str, object]:
        """All options with the paths in a run's folder."""
        options = {k: folder / v for k, v in (self.reads | self.writes).items()}
        if self.state:
            options["state"] = folder / "state" / self.program
        return options | {k: v.format(folder=folder) for k, v in self.more.items()}


CALLS = {"calls": "calls.parquet"}
BLOCK_FACTS = {"block_facts": "block-facts.parquet"}
SIZES = {"sizes": "sizes.parquet"}
SEARCHED = CALLS | {
    "tokens": "tokens.parquet",
    "conditioning": "conditioning.safetensors",
    "probes": "probes.safetensors",
    "cka": "cka.parquet",
    "sensitivity": "sensitivity.parquet",
    "width": "width.parquet",
    "latency": "latency.parquet",
}
CALIBRATED = {
    name: path
    for name, path in SEARCHED.items()
    if name not in ("tokens", "conditioning", "latency")
}
SELECTION = CALLS | {"selection": "selection.json"}
STUDENTS = ("distill", "narrow", "subsets")
MODELS = CALLS | {"maps": "maps.safetensors", "conditioning": "conditioning.safetensors"}
MODELS |= {"start": "start.safetensors", **{stage: f"{stage}.safetensors" for stage in STUDENTS}}
PRICES = {"selection": "selection.json", "width": "width.parquet", "latency": "latency.parquet"}
PRICES |= SIZES
PRICES |= {f"{stage}_unit_costs": f"{stage}-unit_costs.parquet" for stage in STUDENTS}
CHOSEN = MODELS | {"sets": "sets.json"}
TUNED = CHOSEN | {"refits": "refits.safetensors"}
OWN = {"encoded": "encoded.parquet"}  # the user's own pictures


def _taught(program: str, start: str) -> Stage:
    made = {
        "output": f"{program}.safetensors",
        "log_table": f"{program}-log.parquet",
        "unit_costs": f"{program}-unit_costs.parquet",
    }
    return Stage(program, SELECTION | {"students": f"{start}.safetensors"}, made, state=True)


STAGES = [
    Stage("record", {}, CALLS | BLOCK_FACTS | SIZES, state=True),
    Stage(
        "extract",
        CALLS,
        {
            "tokens": "tokens.parquet",
            "moments": "moments.safetensors",
            "conditioning": "conditioning.safetensors",
        },
        state=True,
    ),
    Stage(
        "probe",
        {"moments": "moments.safetensors", "tokens": "tokens.parquet"},
        {"probes_table": "probes.parquet", "probes": "probes.safetensors"},
    ),
    Stage(
        "similarity",
        {"tokens": "tokens.parquet", "probes": "probes.safetensors"},
        {"cka": "cka.parquet", "blocks": "blocks.parquet"},
    ),
    Stage("sensitivity", CALLS, {"table": "sensitivity.parquet"}, state=True),
    Stage(
        "width",
        CALLS | {"blocks": "blocks.parquet", "conditioning": "conditioning.safetensors"},
        {"table": "width.parquet", "maps": "maps.safetensors"},
        state=True,
    ),
    Stage(
        "intervals",
        BLOCK_FACTS
        | {"cka": "cka.parquet", "sensitivity": "sensitivity.parquet", "width": "width.parquet"}
        | SIZES,
        {"intervals": "intervals.parquet", "candidates": "candidates.parquet"},
    ),
    Stage("latency", CALLS, {"table": "latency.parquet"}),
    Stage(
        "forecast",
        CALLS | {"intervals": "intervals.parquet", "candidates": "candidates.parquet"},
        {"table": "forecast.parquet", "resources": "resources.json"},
    ),
    Stage(
        "plot",
        BLOCK_FACTS
        | {
            "cka": "cka.parquet",
            "blocks": "blocks.parquet",
            "probes": "probes.parquet",
            "intervals": "intervals.parquet",
            "candidates": "candidates.parquet",
        },
        {"output": "figures"},
        group=("intervals",),
    ),
    Stage(
        "prune",
        CALLS | {"intervals": "intervals.parquet", "candidates": "candidates.parquet"},
        {"selection": "selection.json", "students": "start.safetensors"},
    ),
    _taught("distill", "start"),
    _taught("narrow", "distill"),
    _taught("subsets", "narrow"),
    Stage(
        "choose",
        MODELS | PRICES,
        {
            "sets": "sets.json",
            "units": "units.parquet",
            "measured": "measured.parquet",
            "refitted": "refits.safetensors",
        },
        state=True,
    ),
    Stage("encode", {}, OWN, state=True, more={"data": "{folder}/own"}),
    Stage(
        "finetune",
        TUNED | OWN,
        {"output": "small.safetensors", "log_table": "small-log.parquet"},
        state=True,
        more={"variant": "small"},
    ),
    Stage(
        "assemble",
        TUNED | {"finetuned": "small.safetensors"},
        {"output": "small"},
        more={"variant": "small"},
    ),
    Stage("pareto", CHOSEN | PRICES, {"points": "points.parquet"}),
    Stage(
        "evaluate",
        CALLS | {"models": "small"},
        {"metrics": "measured-metrics.parquet", "images": "images.parquet"},
        state=True,
    ),
    Stage(
        "gather_metrics",
        {"measured": "measured-metrics.parquet"},
        {"metrics": "metrics.parquet"},
    ),
    Stage(
        "describe",
        {
            "model": "small",
            "units": "units.parquet",
            "metrics": "metrics.parquet",
            "images": "images.parquet",
        },
        {"card": "card"},
        more={"variant": "small"},
    ),
]
NAMED = {stage.program: stage for stage in STAGES}
# Of other configs and targets, after the others.
MORE = [
    Stage("assign_shards", SELECTION, {"shards": "shards.json"}),
    Stage(
        "join_shards",  # of a job that has all of the units
        {
            "selection": "selection.json",
            "students": "distill.safetensors",
            "logs": "distill-log.parquet",
            "costs": "distill-unit_costs.parquet",
        },
        {
            "output": "joined.safetensors",
            "log_table": "joined-log.parquet",
            "unit_costs": "joined-unit_costs.parquet",
        },
    ),
    Stage(
        "calibrate",
        CALIBRATED,
        {"table": "calibration.parquet"},
        state=True,
    ),
    Stage(
        "ablate",
        SEARCHED,
        {"output": "joint-0.parquet"},
        state=True,
        more={"method": methods.job("joint"), "number": "0"},
    ),
    Stage(
        "gather_ablation",
        {"runs": "joint-0.parquet"},
        {"output": "ablation.parquet"},
        group=("table",),
        configured=False,
    ),
]


def settings(teacher: Path, folder: Path) -> dict:
    """The run's config; writes the prompts that it names to the folder."""
    (folder / "record.txt").write_text("a red 1 on blue\na blue 2 on red\n")
    (folder / "own").mkdir(exist_ok=True)
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 32), colour).save(folder / f"own/{number}.png")
        (folder / f"own/{number}.txt").write_text(f"a {colour} {number} on {colour}")
    (folder / "evaluate.txt").write_text("a green 3 on red\n4 in red\n")
    return {
        "seed": 0,
        "device": "cpu",
        "processes": 1,
        "teacher": {"path": str(teacher), "dtype": "float32"},
        "pipeline": tiny.SETTINGS | {"num_inference_steps": 2},
        "record": {
            "prompts": str(folder / "record.txt"),
            "samples": 4,
            "batch_size": 1,
            "renoised_per_sample": 1,
            "heldout_fraction": 0.5,
        },
        "extract": {"rows": 8, "batch_size": 4, "sample_tokens": 8, "moment_tokens": 8}
        | {"checkpoint_every": 4},
        "modulation": {"timesteps": 6},
        "probe": {"ridge": 0.01},
        "similarity": {"bootstrap": 2},
        "sensitivity": {"rows": 3, "longest": 3},
        "intervals": {"protect_first": 1},
        "forecast": {},
        "prune": {"start": "average"},
        "width": {
            "enabled": True,
            "schedule": "staged",
            "rows": 3,
            "fit_rows": 4,
            "batch_size": 2,
            "longest": 3,
            "steps": 5,
        },
        "distill": HOW | {"steps": 5, "heldout_rows": 3, "cache_inputs": "always"},
        "subsets": HOW | {"steps": 5, "heldout_rows": 3},
        "choose": {"rows": 3, "batch_size": 2},
        "finetune": HOW | {"data": str(folder / "own")},
        "variants": [
            {
                "name": "small",
                "budget": {"fraction": 0.8, "blocks": 4, "gib": 1},
                "finetune_steps": 5,
            }
        ],
        "pareto": {"budgets": 2},
        "evaluate": {
            "prompts": str(folder / "evaluate.txt"),
            "judge": "none",
            "samples": 2,
            "batch_size": 1,
            "velocity_rows": 3,
            "bootstrap": 10,
            "latency_repeats": 1,
        },
        "ablation": {
            "removed_fraction": 0.4,
            "distill_steps": 4,
            "subsets_steps": 2,
            "finetune_steps": 1,
            "batch_size": 2,
            "velocity_rows": 4,
        },
    }
