"""Every figure of a run: in which group and file it goes, from which tables, when, how it is drawn.

Rules make their inputs and outputs of these entries, and plot.py draws by them. An entry's function
imports its drawing code only when it is called: matplotlib takes long, and rules do without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppcl.figures.run_tables import RunTables
from ppcl.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppcl.figures import seams

GROUPS = {  # name, folder below plots/, and argument of plot.py -> what it shows
    "intervals": "the search for intervals: what went, and why",
    "training": "loss curves, of what was trained",
    "quality": "what the variants are, what they reach, and at which cost",
    "ablation": "the method against its alternatives",
}


@dataclass(frozen=True)
class Entry:
    """A figure.

    Attributes:
        group: of GROUPS.
        name: of its files, without .svg and .png, and of its caption, workflow/report/<name>.rst.
        title: what the report calls it.
        tables: names, of run_tables.TABLES, without which there is no figure. The provenance of
            the first one goes into the files.
        draw: makes it; the settings that it sees hold no more than `keys`.
        shown: whether a run with this config has it.
        keys: of the config, that drawing depends on.
    """

    group: str
    name: str
    title: str
    tables: tuple[str, ...]
    draw: Callable[[RunTables], Figure]
    shown: Callable[[Settings], bool] = lambda settings: True
    keys: tuple[str, ...] = ()


def _kinds(run: RunTables) -> list[seams.Run]:
    """Runs of like blocks, for axes that number blocks."""
    from ppcl.figures import seams

    return seams.runs(run.table("block_facts"))


def _search(run: RunTables) -> Figure:
    from ppcl.figures.interval_search import interval_search

    stream = run.settings.similarity.streams
    return interval_search(run.table("cka"), run.intervals, stream, _kinds(run))


def _heatmap(run: RunTables) -> Figure:
    from ppcl.figures.block_measures import block_similarity

    return block_similarity(run.table("blocks"), run.intervals, _kinds(run))


def _probes(run: RunTables) -> Figure:
    from ppcl.figures.block_measures import probe_quality

    return probe_quality(run.table("probes"), run.intervals, _kinds(run))


def _width(run: RunTables) -> Figure:
    from ppcl.figures.linear_maps import linear_map_costs

    blocks = run.depth("candidates")
    return linear_map_costs(run.table("candidates"), run.intervals, blocks, _kinds(run))


def _modulation(run: RunTables) -> Figure:
    from ppcl.figures.modulation import modulation_costs

    return modulation_costs(run.table("candidates"), run.depth("candidates"), _kinds(run))


def _width_of_variants(run: RunTables) -> Figure:
    from ppcl.figures.linear_maps import linear_map_costs
    from ppcl.figures.variant_composition import taken_by_smallest

    taken = taken_by_smallest(run.table("measured"), run.table("units"))
    return linear_map_costs(taken, run.intervals, run.depth("units"), _kinds(run))


def _modulation_of_variants(run: RunTables) -> Figure:
    from ppcl.figures.modulation import modulation_costs
    from ppcl.figures.variant_composition import taken_by_smallest

    taken = taken_by_smallest(run.table("measured"), run.table("units"))
    return modulation_costs(taken, run.depth("units"), _kinds(run))


def _distill(run: RunTables) -> Figure:
    from ppcl.figures.training_curves import student_losses

    return student_losses(run.table("distill_log"), run.settings.distill.loss)


def _subsets(run: RunTables) -> Figure:
    from ppcl.figures.training_curves import velocity_errors

    title = "Random subsets of students against the teacher's output"
    return velocity_errors({"subsets": run.table("subsets_log")}, ["subsets"], title)


def _finetune(run: RunTables) -> Figure:
    from ppcl.figures.training_curves import velocity_errors

    title = "Fine-tuning of the assembled variants against the teacher's output"
    return velocity_errors(run.of_variants("finetune_logs"), run.variants, title)


def _sets(run: RunTables) -> Figure:
    from ppcl.figures.variant_composition import variant_composition

    blocks = run.depth("units")
    return variant_composition(run.table("units"), run.variants, blocks, _kinds(run))


def _pareto(run: RunTables) -> Figure:
    from ppcl.figures.quality import budget_errors

    tuned = [variant.name for variant in run.settings.variants if variant.finetune_steps]
    return budget_errors(run.table("points"), run.table("metrics"), tuned)


def _tradeoff(run: RunTables) -> Figure:
    from ppcl.figures.quality import quality_against_cost

    return quality_against_cost(run.table("metrics"))


def _benchmarks(run: RunTables) -> Figure:
    from ppcl.figures.benchmark_scores import benchmark_scores

    return benchmark_scores(run.table("metrics"))


def _images(run: RunTables) -> Figure:
    from ppcl.figures.sample_images import PROMPTS, sample_images

    return sample_images(run.first_prompts("images", PROMPTS), run.table("metrics"))


def _ablation(run: RunTables) -> Figure:
    from ppcl.figures.method_comparison import method_comparison

    return method_comparison(run.table("results"))


def _low_rank(run: RunTables) -> Figure:
    from ppcl.figures.method_comparison import low_rank_comparison

    return low_rank_comparison(run.table("results"))


def _schedules(run: RunTables) -> Figure:
    from ppcl.figures.schedule_comparison import schedule_comparison

    return schedule_comparison(run.table("results"))


def _calibration(run: RunTables) -> Figure:
    from ppcl.figures.price_calibration import price_calibration

    return price_calibration(run.table("calibration"))


def _searched(settings: Settings) -> bool:
    return settings.intervals.enabled


def _compared(settings: Settings) -> bool:
    return settings.compares


def _trained(settings: Settings) -> bool:
    return settings.trains


# Verdicts on closed forms come from a search for intervals. Without one, the group `quality` shows
# what the smallest variant took of them.
FIGURES = (
    Entry(
        "intervals",
        "search",
        "Search for intervals",
        ("cka", "intervals", "block_facts"),
        _search,
        _searched,
        keys=("similarity.streams",),
    ),
    Entry(
        "intervals",
        "heatmap",
        "CKA between blocks",
        ("blocks", "block_facts"),
        _heatmap,
        _compared,
    ),
    Entry(
        "intervals",
        "probes",
        "Probe error along depth",
        ("probes", "block_facts"),
        _probes,
        _compared,
    ),
    Entry(
        "intervals",
        "width",
        "Linear FFNs and text runs",
        ("candidates", "block_facts"),
        _width,
        lambda settings: settings.width.enabled and settings.intervals.enabled,
    ),
    Entry(
        "intervals",
        "modulation",
        "Low-rank modulation",
        ("candidates", "block_facts"),
        _modulation,
        lambda settings: settings.modulation.enabled and settings.intervals.enabled,
    ),
    Entry(
        "training",
        "distill",
        "Distillation",
        ("distill_log",),
        _distill,
        _trained,
        keys=("distill.loss",),
    ),
    Entry(
        "training",
        "subsets",
        "Any-subset distillation",
        ("subsets_log",),
        _subsets,
        lambda settings: settings.trains and settings.subsets.steps > 0,
    ),
    Entry(
        "training",
        "finetune",
        "Fine-tuning",
        ("finetune_logs",),
        _finetune,
        lambda settings: any(variant.finetune_steps for variant in settings.variants),
        keys=("variants",),
    ),
    Entry(
        "quality",
        "sets",
        "What each variant is made of",
        ("units", "block_facts"),
        _sets,
        keys=("variants",),
    ),
    Entry(
        "quality",
        "width",
        "Linear FFNs and text runs",
        ("units", "measured", "block_facts"),
        _width_of_variants,
        lambda settings: settings.width.enabled and not settings.intervals.enabled,
    ),
    Entry(
        "quality",
        "modulation",
        "Low-rank modulation",
        ("units", "measured", "block_facts"),
        _modulation_of_variants,
        lambda settings: settings.modulation.enabled and not settings.intervals.enabled,
    ),
    Entry(
        "quality",
        "pareto",
        "Every budget by itself",
        ("points", "metrics"),
        _pareto,
        keys=("variants",),
    ),
    Entry("quality", "tradeoff", "Quality against size and latency", ("metrics",), _tradeoff),
    Entry(
        "quality",
        "benchmarks",
        "Scores of benchmarks",
        ("metrics",),
        _benchmarks,
        lambda settings: bool(settings.evaluate.benchmarks),
    ),
    Entry("quality", "images", "Images", ("images", "metrics"), _images),
    Entry("ablation", "ablation", "The method against its alternatives", ("results",), _ablation),
    Entry("ablation", "low_rank", "The same with low-rank modulations", ("results",), _low_rank),
    Entry(
        "ablation", "schedules", "Schedules of training, at every budget", ("results",), _schedules
    ),
    Entry(
        "ablation",
        "calibration",
        "Prices against errors after training",
        ("calibration",),
        _calibration,
    ),
)


def of_group(group: str) -> list[Entry]:
    """The figures of a group, in the order of the report."""
    return [entry for entry in FIGURES if entry.group == group]
