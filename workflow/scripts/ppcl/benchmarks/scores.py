"""The scores that scorers leave, a function for each: they take the plan and the files, and refuse
a file that is half written, or of other pictures, with its name."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppcl.benchmarks import layouts, score_files
from ppcl.benchmarks.benchmark import Measured, Plan, Scores
from ppcl.benchmarks.prompt_files import NOT_SCORED
from ppcl.benchmarks.score_files import Collected, refused


def geneval(plan: Plan, files: Sequence[Path]) -> Scores:
    """A JSON object per picture. The score is the mean over tags of the share of correct pictures
    (summary_scores.py)."""
    path = files[-1]
    collected, taken, right = Collected(plan, layouts.geneval(plan), path), [], []
    for place, row in score_files.json_lines(path):
        taken.append(collected.file(row.get("filename"), place, row.get("prompt")))
        if not isinstance(row.get("correct"), bool):
            raise refused(path, f"{place} does not say whether the picture is correct")
        if row.get("tag") != plan.prompts[taken[-1].prompt].group:
            raise refused(path, f"{place} has another tag than the prompts file")
        right.append(float(row["correct"]))
    collected.finish()
    tags = [plan.prompts[file.prompt].group for file in taken]
    counts = Counter(tags)
    weights = np.array([1 / counts[tag] for tag in tags])
    made = {"": score_files.measured(taken, right, weights=weights)}
    for tag in dict.fromkeys(tags):
        of = [number for number, each in enumerate(tags) if each == tag]
        made[tag] = score_files.measured([taken[n] for n in of], [right[n] for n in of])
    return made


def dpg_bench(plan: Plan, files: Sequence[Path]) -> Scores:
    """A line per grid, with the score of each picture in it and their mean; then the totals, in
    percent. Those of categories count the last picture of each grid alone, and have no scores by
    prompt."""
    path = files[-1]
    lines = score_files.text(path).split("\n")
    start = next((n for n, line in enumerate(lines) if line.startswith("Model: ")), None)
    total = re.search(r"^DPG-Bench score: (\S+)$", "\n".join(lines), re.M)
    if start is None or total is None:
        raise refused(path, "is half written, or not of DPG-Bench: it ends without a score")
    collected = Collected(plan, layouts.grids(plan), path)
    scores, prompts, means = [], [], []
    for number, line in enumerate(lines[:start], start=1):
        place, (name, *cells) = f"line {number}", line.rsplit(", ", plan.count + 1)
        values = [score_files.number(cell, path, place) for cell in cells]
        if len(values) != plan.count + 1:
            raise refused(
                path,
                f"{place} has not the scores of {plan.count} pictures and their mean (--pic-num)",
            )
        file = collected.file(name, place)
        score_files.agree(
            path, f"the mean in {place}", values[-1], float(np.mean(values[:-1])), 1e-6
        )
        scores += [100 * value for value in values[:-1]]
        prompts += [file.prompt] * plan.count
        means.append(100 * values[-1])
    collected.finish([n for n, p in enumerate(plan.prompts) if p.source == NOT_SCORED])
    given = score_files.number(total[1], path, "the last line")
    score_files.agree(path, "the DPG-Bench score", given, float(np.mean(means)), 1e-6)
    pictures = np.tile(np.arange(plan.count), len(means))
    made = {"": Measured(np.array(scores), np.array(prompts), pictures)}
    categories = "\n".join(lines[start:]).partition("L1 category scores:\n")[2]
    for name, value in re.findall(r"^\t(.+): (\S+)$", categories.partition("L2 ")[0], re.M):
        made[name] = Measured(total=score_files.number(value, path, f"the category {name}"))
    return made


def evalscope(plan: Plan, files: Sequence[Path]) -> Scores:
    """reviews/: a JSON object per picture, with all metrics; reports/: what each of them means.
    A metric that failed has the score 0 there, and the error beside it."""
    reports: dict[tuple[Path, str], tuple[bool, float]] = {}
    made: Scores = {}
    for path in (file for file in files if "reports" in file.parts):
        report = score_files.json_value(path)
        for each in report.get("metrics", []) if isinstance(report, dict) else []:
            try:
                identity, semantics = each["identity"], each["semantics"]
                if identity["dimensions"] != {"scope": "overall"}:
                    continue
                higher = semantics["direction"] != "lower_is_better"
                total = score_files.number(each["score"], path, f"{identity['name']}")
                reports[path.parents[2], str(identity["name"])] = higher, total
            except (KeyError, TypeError, AttributeError) as error:
                raise refused(path, f"is no report of evalscope 1.x ({error!r})") from error
    for path in (file for file in files if "reviews" in file.parts):
        collected, taken = Collected(plan, layouts.numbered(plan), path), []
        values: dict[str, list[float]] = {}
        for place, row in score_files.json_lines(path):
            try:
                score, about = row["sample_score"]["score"], row["sample_score"]["sample_metadata"]
                taken.append(collected.file(about["image_path"], place, about["prompt"]))
                for name, value in score["value"].items():
                    failed = (score.get("metadata") or {}).get(name)
                    if failed is not None:
                        raise refused(path, f"{place}: {name} was not measured ({failed})")
                    values.setdefault(name, []).append(score_files.number(value, path, place))
            except (KeyError, TypeError, AttributeError) as error:
                raise refused(path, f"{place} is no review of evalscope 1.x ({error!r})") from error
        collected.finish()
        for name, scores in values.items():
            if len(scores) != len(taken):
                raise refused(path, f"{name} is there for {len(scores)} of {len(taken)} pictures")
            base = name.partition(":")[0]  # of a part, such as colours, of a metric
            if (path.parents[2], base) not in reports:
                raise refused(path, f"has no report beside it that says what {base} is")
            higher, total = reports[path.parents[2], base]
            if name == base:
                score_files.agree(path, f"the mean of {name}", total, float(np.mean(scores)), 1e-3)
            metric = name.replace(":", "_")
            made[metric] = score_files.measured(taken, scores, higher_is_better=higher)
            for group in dict.fromkeys(plan.prompts[file.prompt].group for file in taken):
                of = [n for n, file in enumerate(taken) if plan.prompts[file.prompt].group == group]
                if group:
                    made[f"{metric}/{group}"] = score_files.measured(
                        [taken[n] for n in of], [scores[n] for n in of], higher_is_better=higher
                    )
    return made
