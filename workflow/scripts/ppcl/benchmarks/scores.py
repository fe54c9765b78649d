"""The scores that scorers leave, a function for each: they take the plan and the files, and refuse
a file that is half written, or of other pictures, with its name."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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
    return made | score_files.by_group(plan, taken, right)


def dpg_bench(plan: Plan, files: Sequence[Path]) -> Scores:
    """A line per grid, with the score of each picture in it and their mean; then the totals, in
    percent. Those of categories count the last picture of each grid alone, and have no scores by
    prompt."""
    path = files[-1]
    lines = score_files.text(path).split("\n")
    start = next((n for n, line in enumerate(lines) if line.startswith("Model: ")), None)
    totals = re.findall(r"^DPG-Bench score: (\S+)$", "\n".join(lines), re.M)
    if start is None or not totals:
        raise refused(path, "is half written, or not of DPG-Bench: it ends without a score")
    if len(totals) > 1:
        raise refused(path, f"has the scores of {len(totals)} runs")
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
    given = score_files.number(totals[0], path, "the last line")
    score_files.agree(path, "the DPG-Bench score", given, float(np.mean(means)), 1e-6)
    pictures = np.tile(np.arange(plan.count), len(means))
    made = {"": Measured(np.array(scores), np.array(prompts), pictures)}
    categories = "\n".join(lines[start:]).partition("L1 category scores:\n")[2]
    for name, value in re.findall(r"^\t(.+): (\S+)$", categories.partition("L2 ")[0], re.M):
        total = score_files.number(value, path, f"the category {name}")
        made[score_files.metric(name, path)] = Measured(total=total)
    return made


def longtext_bench(plan: Plan, files: Sequence[Path]) -> Scores:
    """A JSON object per picture, with the words of the text and those that were read of them. The
    score is the share of all words (summary_scores.py), in Chinese of all characters."""
    path = files[-1]
    collected, taken = Collected(plan, layouts.numbered(plan), path), []
    shares, words = [], []
    for place, row in score_files.json_lines(path):
        taken.append(collected.file(row.get("image"), place, row.get("prompt")))
        if "gt_word_count" not in row:
            raise refused(path, f"{place} has no gt_word_count, which summary_scores.py adds")
        words.append(score_files.number(row["gt_word_count"], path, place))
        read = score_files.number(row.get("match_word_count"), path, place)
        if not 0 <= read <= words[-1] or not words[-1]:
            raise refused(path, f"{place} says that {read:g} of {words[-1]:g} words were read")
        shares.append(read / words[-1])
    collected.finish()
    weights = np.array(words)
    made = {"": score_files.measured(taken, shares, weights=weights)}
    return made | score_files.by_group(plan, taken, shares, weights)


def oneig(plan: Plan, files: Sequence[Path]) -> Scores:
    """Two tables per dimension, each with the time in its name: <dimension>_score has the model's
    totals in a row, <dimension>_prompt_score its scores of prompts in a column. A grid that is all
    black has none. Of texts, the total is made of three others."""
    parts = {path: re.fullmatch(rf"(.+_score)_{plan.part}_.+\.csv", path.name) for path in files}
    newest = score_files.newest(files, {path: part[1] for path, part in parts.items() if part})
    tables = {part[1]: path for path in newest if (part := parts[path])}
    numbers = {prompt.key: number for number, prompt in enumerate(plan.prompts)}
    made: Scores = {}
    for dimension, about in ONEIG.items():
        path, of_prompts = (tables.get(f"{dimension}{kind}_score") for kind in ("", "_prompt"))
        if path is None or of_prompts is None:
            continue
        totals = score_files.table(path).get(plan.model)
        columns = score_files.columns(of_prompts)
        if totals is None or plan.model not in columns:
            raise refused(path if totals is None else of_prompts, f"is not of {plan.model}")
        rows: dict[int, list[float]] = {}
        for key, cell in columns[plan.model].items():
            name = f"{about.group}_{key}" if about.group else key
            values = score_files.numbers(cell, of_prompts, key)
            if values is None:
                continue
            if name not in numbers or len(values) != len(about.metrics):
                raise refused(of_prompts, f"the row {key} is of no prompt of {plan.label}")
            rows[numbers[name]] = values
        named = {f"{about.group}_{key}" if about.group else key for key in columns[plan.model]}
        groups = {name.partition("_")[0] for name in named}
        for prompt in plan.prompts:
            if prompt.group in groups and prompt.key not in named:
                raise refused(of_prompts, f"is half written: it has no row of {prompt.key}")
        if not rows:  # none of its prompts is in the prompts file
            continue
        for at, (metric, column) in enumerate(about.metrics.items()):
            given = score_files.number(totals.get(column), path, column)
            scores = np.array([values[at] for values in rows.values()])
            made[metric] = Measured(
                scores,
                np.array(list(rows)),
                np.zeros(len(rows), int),
                total=given,
                higher_is_better=metric != "text/edit_distance",
            )
        if about.total:
            given = score_files.number(totals.get(about.total), path, about.total)
            made[dimension] = Measured(total=given)
    if not made:
        raise refused(files[-1], f"tells no scores of {plan.model}, nor do the tables beside it")
    return made


@dataclass(frozen=True)
class OneigDimension:
    """A dimension of OneIG.

    Attributes:
        metrics: name here -> column of the totals, in the order in which scores of prompts have
            them.
        group: class of its prompts, if rows do not name it.
        total: a further column, which is made of the others.
    """

    metrics: dict[str, str]
    group: str = ""
    total: str = ""


ONEIG = {
    "alignment": OneigDimension({"alignment": "alignment"}),
    "diversity": OneigDimension({"diversity": "total average"}),
    "style": OneigDimension({"style": "style"}, "anime"),
    "reasoning": OneigDimension({"reasoning": "reasoning"}, "reasoning"),
    "text": OneigDimension(
        {"text/edit_distance": "ED", "text/completion": "CR", "text/words": "WAC"},
        "text",
        "text score",
    ),
}


def t2i_compbench(plan: Plan, files: Sequence[Path]) -> Scores:
    """A list with an object per picture, by its number; the score is their mean."""
    path, value = files[-1], score_files.json_value(files[-1])
    expected = layouts.t2i_compbench(plan)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise refused(path, "is no list of scores")
    scores: dict[int, float] = {}
    for place, row in enumerate(value):
        number = row.get("question_id")
        if not isinstance(number, int) or not 0 <= number < len(expected) or number in scores:
            raise refused(path, f"entry {place} is of picture {str(number)[:60]}, not of another")
        scores[number] = score_files.number(row.get("answer"), path, f"entry {place}")
    if len(scores) != len(expected):
        raise refused(path, f"is of {len(scores)} pictures, and {len(expected)} were made")
    taken = [expected[number] for number in scores]
    return {"": score_files.measured(taken, scores.values())}


def hpsv2(plan: Plan, files: Sequence[Path]) -> Scores:
    """What the scorer printed: a line with model, style, mean and deviation, two digits each. It
    tells no scores of prompts (evalscope does)."""
    path = files[-1]
    line = rf"^{re.escape(plan.model)} {re.escape(plan.part)} +(\S+) *\t"
    printed = re.findall(line, score_files.text(path), re.M)
    if len(printed) != 1:
        raise refused(path, f"has {len(printed)} lines '{plan.model} {plan.part}', and needs one")
    return {"": Measured(total=score_files.number(printed[0], path, plan.part))}


# On which VBench passes over some videos: those without the object, or that are no videos to it.
_MAY_MISS = ("color", "temporal_flickering")


def vbench(plan: Plan, files: Sequence[Path]) -> Scores:
    """Dimension -> its total, and a list with an object per video. Each dimension counts from the
    newest file that has it; their totals over dimensions are made by VBench's own leaderboard."""
    made: Scores = {}
    for path in sorted(files, key=lambda path: path.name):
        value = score_files.json_value(path)
        if not isinstance(value, dict) or not value:
            raise refused(path, "is no object of dimensions")
        for dimension, entry in value.items():
            if (
                not isinstance(entry, list)
                or len(entry) != 2
                or not isinstance(entry[1], list)
                or not all(isinstance(row, dict) for row in entry[1])
            ):
                raise refused(path, f"{dimension[:60]!r} has not a total and a list of videos")
            total = score_files.number(entry[0], path, dimension)
            collected, taken, scores = Collected(plan, layouts.vbench(plan), path), [], []
            for number, row in enumerate(entry[1]):
                place = f"{dimension}, video {number}"
                taken.append(collected.file(row.get("video_path"), place))
                scores.append(score_files.number(row.get("video_results"), path, place))
            others = {n for n, p in enumerate(plan.prompts) if dimension not in p.source.split()}
            collected.finish(range(len(plan.prompts)) if dimension in _MAY_MISS else others)
            if not taken:
                raise refused(path, f"{dimension} has no scores of videos")
            name = score_files.metric(dimension, path)
            made[name] = score_files.measured(taken, scores, total=total)
    return made


def evalscope(plan: Plan, files: Sequence[Path]) -> Scores:
    """reviews/: a JSON object per picture, with all metrics; reports/: what each of them means.
    A metric that failed has the score 0 there, and the error beside it."""
    reports: dict[tuple[Path, str], tuple[bool, float]] = {}
    made: Scores = {}
    for path in (file for file in files if file.parts[-3] == "reports"):
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
    for path in (file for file in files if file.parts[-3] == "reviews"):
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
            metric = score_files.metric(name.replace(":", "_"), path)
            made[metric] = score_files.measured(taken, scores, higher_is_better=higher)
            groups = score_files.by_group(plan, taken, scores, higher_is_better=higher)
            made |= {f"{metric}/{group}": of_group for group, of_group in groups.items()}
    return made
