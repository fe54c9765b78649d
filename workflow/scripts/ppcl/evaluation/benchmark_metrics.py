"""Metrics of benchmarks, from the files in which their scorers left scores."""

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ppcl.benchmarks import benchmark, plans, registry
from ppcl.benchmarks.benchmark import Measured, Scores
from ppcl.errors import UserError
from ppcl.evaluation import metrics
from ppcl.evaluation.metrics import TEACHER, Estimate, Estimates
from ppcl.settings import EvaluateSettings

log = logging.getLogger(__name__)


def rows(folder: Path, options: EvaluateSettings, models: Collection[str], seed: int) -> list[dict]:
    """Rows of metrics.parquet of all benchmarks, of the models that were scored. Says of the others
    what is missing, and how it is made.

    Args:
        folder: evaluation/benchmarks of a run, with a folder for each of `options.benchmarks`.
        models: the run's, of which rows are wanted: a variant that it has no more may have left
            pictures and scores.
        seed: of the bootstrap.

    Raises:
        UserError: a file with scores is half written, or of other pictures; pictures are gone.
    """
    made = []
    for chosen in options.benchmarks:
        by_model: dict[str, Scores] = {}
        place = folder / chosen.label
        names = tuple(sorted(models))
        manifests = [place / f"{name}.json" for name in names if (place / f"{name}.json").is_file()]
        for path in sorted(manifests, key=lambda path: (path.stem != TEACHER, path.stem)):
            plan, files, sides = benchmark.read_manifest(path)
            scored = registry.score_files(place, chosen.name, plan.part, plan.model)
            if problem := _missing(scored, path, files):
                command = plans.command(plan, chosen.prompts, str(place / "scores"), sides)
                log.warning("%s: %s %s; to score:\n%s", chosen.label, plan.model, problem, command)
                continue
            known = registry.BENCHMARKS[chosen.name]
            by_model[plan.model] = known.scores(dataclasses.replace(plan, others=names), scored)
        made += _rows(chosen.label, by_model, options.bootstrap, seed)
    return made


def _missing(scored: list[Path], manifest: Path, files: list[str]) -> str:
    """Why there are no scores that count; empty if there are."""
    if not scored:
        return "has no scores yet"
    try:
        pictures = [os.stat(manifest.with_name("pictures") / name).st_mtime for name in files]
    except OSError as error:
        raise UserError(
            f"{error.filename}: this picture is gone; remove {manifest}, which lists it, and rerun "
            "to have it made again"
        ) from error
    if min(path.stat().st_mtime for path in scored) < max(pictures):
        return "has scores that are older than its pictures, which are left out"
    return ""


def _rows(label: str, by_model: Mapping[str, Scores], resamples: int, seed: int) -> list[dict]:
    """Rows of one benchmark; the teacher first, if it was scored."""
    estimates: Estimates = {TEACHER: {}}
    higher: dict[str, bool] = {}
    for model, scores in by_model.items():
        for name, mine in scores.items():
            metric = f"{label}/{name}" if name else label
            higher[metric] = higher[f"{metric}_difference"] = mine.higher_is_better
            of = estimates.setdefault(model, {})
            of[metric] = _estimate(mine, resamples, seed)
            theirs = by_model.get(TEACHER, {}).get(name)
            if model != TEACHER and theirs is not None:
                difference = _difference(mine, theirs, resamples, seed)
                if difference is not None:
                    of[f"{metric}_difference"] = difference
    made = metrics.rows(estimates)
    for row in made:
        row["higher_is_better"] = higher[row["metric"]]
    return made


def _estimate(measured: Measured, resamples: int, seed: int) -> Estimate:
    """A metric and its interval over prompts; without scores of prompts, it has no interval."""
    if not len(measured.scores):
        return Estimate(float(measured.total or 0.0), samples=1)
    weighted, weights = measured.shares * measured.scores, measured.shares
    made = metrics.ratio(weighted, weights, measured.prompts, resamples, seed)
    if measured.total is None or not made.value:
        return made
    scale = _scale(measured)  # as VBench has some of its metrics in percent
    return Estimate(measured.total, made.low * scale, made.high * scale, made.samples)


def _difference(mine: Measured, theirs: Measured, resamples: int, seed: int) -> Estimate | None:
    """Of the pictures of the same prompts and seeds, where both were scored."""
    if not len(mine.scores):
        fall = float(mine.total or 0.0) - float(theirs.total or 0.0)
        return Estimate(fall, samples=1) if not len(theirs.scores) else None
    tables = []
    for each in (mine, theirs):
        columns = {"prompt": each.prompts, "picture": each.pictures}
        tables.append(pd.DataFrame(columns | {"score": each.scores, "weight": each.shares}))
    both = tables[0].merge(tables[1], on=["prompt", "picture"], suffixes=("", "_of_teacher"))
    if both.empty:
        return None
    falls = both["weight"] * (both["score"] - both["score_of_teacher"])
    made = metrics.ratio(falls, both["weight"], both["prompt"], resamples, seed)
    if mine.total is None or theirs.total is None:
        return made
    fall, scale = mine.total - theirs.total, _scale(mine)
    low, high = (fall + scale * (each - made.value) for each in (made.low, made.high))
    return Estimate(fall, low, high, made.samples)


def _scale(measured: Measured) -> float:
    """By what a total is larger than the mean of its scores, as one in percent; 1 of zero."""
    mean = float(np.average(measured.scores, weights=measured.shares))
    return (measured.total or 0.0) / mean if mean else 1.0
