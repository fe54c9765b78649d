"""Reads the prompts files that benchmarks publish, each of which is a user's own copy.

All readers take the file, the config's key for messages and the benchmark's part, and give the
prompts in the file's order. They raise UserError for a file that is missing, damaged, of another
kind, or that would make a file name which a disk or the scorer can't have.
"""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ppcl.benchmarks import benchmark
from ppcl.benchmarks.benchmark import Prompt
from ppcl.errors import UserError
from ppcl.teacher import prompts
from ppcl.teacher.prompts import shown

NOT_SCORED = "the scorer fails on it"
NAME_BYTES = 240  # of a file's name; disks take 255, and a number and an ending are added


def geneval(path: Path, key: str, part: str) -> list[Prompt]:
    """evaluation_metadata.jsonl: a line per prompt, whose object the scorer reads again."""
    made = []
    for number, (place, row) in enumerate(prompts.objects(path, key)):
        where = f"{key}: {path}: {place}"
        include = row.get("include")
        if not isinstance(include, list) or not all(isinstance(each, dict) for each in include):
            raise UserError(
                f"{where}: has no list 'include' of what should be seen; name GenEval's "
                "evaluation_metadata.jsonl"
            )
        text, tag = _text(row, "prompt", where), _text(row, "tag", where)
        made.append(Prompt(f"{number:05d}", text, tag, json.dumps(row)))
    return _checked(made, path, key)


def dpg_bench(path: Path, key: str, part: str) -> list[Prompt]:
    """dpg_bench.csv: a row per question, several per prompt. Its scorer passes over the first row,
    and fails on that row's prompt if a later question depends on the first one (`NOT_SCORED`);
    takes rows of one prompt that are apart for two prompts; and cuts a name at its first dot."""
    made: dict[str, str] = {}
    previous, questions, needed = "", set(), set()
    columns = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
    for place, row in _table(path, key, columns):
        where = f"{key}: {path}: {place}"
        item, text = _text(row, "item_id", where), _text(row, "text", where)
        if "." in item:
            raise UserError(
                f"{where}: the item_id {shown(item)} has a dot, at which DPG-Bench's scorer would "
                "cut it; rename it"
            )
        if item != previous and item in made:
            raise UserError(
                f"{where}: rows of {shown(item)} are apart, and DPG-Bench's scorer would count the "
                "last ones alone; put them together"
            )
        if made.setdefault(item, text) != text:
            raise UserError(f"{where}: {shown(item)} has two texts; remove one")
        if len(made) == 1 and previous:  # of the first prompt, but not its first question
            questions.add(row["proposition_id"].strip())
            needed |= {one.strip() for one in row["dependency"].split(",")} - {"0"}
        previous = item
    prompts_made = [Prompt(item, text) for item, text in made.items()]
    if prompts_made and (not questions or needed - questions):
        prompts_made[0] = Prompt(prompts_made[0].key, prompts_made[0].text, source=NOT_SCORED)
    return _checked(prompts_made, path, key)


def longtext_bench(path: Path, key: str, part: str) -> list[Prompt]:
    """text_prompts.jsonl, text_prompts_zh.jsonl: a line per prompt; files are named after its
    prompt_id. The scorer compares with its own copy's `text`."""
    made = []
    for place, row in prompts.objects(path, key):
        where, number = f"{key}: {path}: {place}", row.get("prompt_id")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(
                f"{where}: 'prompt_id' is {shown(number)}, and has to be a number; copy it anew"
            )
        group = row.get("category")
        made.append(Prompt(str(number), _text(row, "prompt", where), str(group or "")))
    return _checked(made, path, key)


# Category of OneIG-Bench.csv -> the folder of its pictures.
ONEIG = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}


def oneig(path: Path, key: str, part: str) -> list[Prompt]:
    """OneIG-Bench.csv, OneIG-Bench-ZH.csv: a row per prompt, with ids that begin anew in each
    category."""
    column, made = "prompt_en" if part == "EN" else "prompt_cn", []
    for place, row in _table(path, key, ("category", "id", column)):
        where = f"{key}: {path}: {place}"
        category, number = _text(row, "category", where), _text(row, "id", where)
        if category not in ONEIG:
            raise UserError(
                f"{where}: the category {shown(category)} is none of {', '.join(ONEIG)}; copy the "
                "file anew"
            )
        if not re.fullmatch("[0-9]{3}", number):
            raise UserError(
                f"{where}: the id {shown(number)} has to have three digits, by which OneIG's "
                "scorers tell pictures; copy the file anew"
            )
        group = ONEIG[category]
        made.append(Prompt(f"{group}_{number}", _text(row, column, where), group))
    return _checked(made, path, key)


def t2i_compbench(path: Path, key: str, part: str) -> list[Prompt]:
    """color_val.txt and the like: a prompt per line, after which files are named. Its scorers cut a
    name at its first underscore."""
    made = []
    for number, line in enumerate(prompts.lines(path, key), start=1):
        if not line.strip():
            continue
        if "_" in line:
            raise UserError(
                f"{key}: {path}: line {number}: {shown(line)} has an underscore, at which "
                "T2I-CompBench's scorers would cut it; write it without"
            )
        made.append(Prompt(line.strip(), line.strip()))
    return _checked(made, path, key)


def hpsv2(path: Path, key: str, part: str) -> list[Prompt]:
    """anime.json and the like: a list of prompts, by whose numbers files are named."""
    rows = _json_list(path, key)
    for number, text in enumerate(rows):
        if not _is_text(text):
            raise UserError(f"{key}: {path}: prompt {number} is {shown(text)}; copy it anew")
    return _checked([Prompt(f"{number:05d}", text) for number, text in enumerate(rows)], path, key)


def vbench(path: Path, key: str, part: str) -> list[Prompt]:
    """VBench_full_info.json: prompts, each with the dimensions that are measured on it. Some are
    there twice, with other dimensions, and some differ in capitals alone."""
    made: dict[str, set[str]] = {}
    for number, row in enumerate(_json_list(path, key)):
        where = f"{key}: {path}: entry {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object; name VBench's VBench_full_info.json")
        given = row.get("dimension")
        if not isinstance(given, list) or not all(map(_is_text, given)):
            raise UserError(f"{where} has no list 'dimension'; name VBench's VBench_full_info.json")
        made.setdefault(_text(row, "prompt_en", where), set()).update(given)
    return _checked(
        [Prompt(text, text, source=" ".join(sorted(given))) for text, given in made.items()],
        path,
        key,
        folded=False,
    )


def any_prompts(path: Path, key: str, part: str) -> list[Prompt]:
    """Any prompts file, as evaluate.prompts may be; of a table also columns `id` and `category`."""
    made = []
    for number, row in enumerate(prompts.read(path, key)):
        if "image" in row:
            raise UserError(
                f"{key}: {path} names pictures to edit, which this export has no place for; drop "
                "the column 'image'"
            )
        name = row.get("id") or f"{number:05d}"
        made.append(Prompt(name, row["prompt"], row.get("category", "")))
    return _checked(made, path, key)


def _table(path: Path, key: str, columns: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of a CSV file that has these columns; all cells are texts, as they stand."""
    import pandas as pd  # late: Snakefiles import this module, and pandas takes a second

    content = "\n".join(prompts.lines(path, key))
    try:
        table = pd.read_csv(io.StringIO(content), dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {path} can't be read as CSV ({reason}); copy it anew") from error
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(
            f"{key}: {path} has no column {', '.join(missing)}; name the benchmark's own CSV file"
        )
    return [(f"row {n}", row) for n, row in enumerate(table.to_dict("records"), start=1)]


def _json_list(path: Path, key: str) -> list[Any]:
    """What a JSON file holds, if that is a list."""
    try:
        value = json.loads("\n".join(prompts.lines(path, key)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path} is not whole JSON ({error}); copy it anew") from error
    if not isinstance(value, list):
        raise UserError(f"{key}: {path} holds no list; name the benchmark's own prompts file")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: '{name}' is {shown(value)}, and has to be a text; copy it anew")
    return value


def _checked(made: list[Prompt], path: Path, key: str, folded: bool = True) -> list[Prompt]:
    """The prompts; UserError if there are none, two have one key, or a key is no name of a file.

    folded: whether keys that differ in capitals alone count as one, as on some disks.
    """
    if not made:
        raise UserError(f"{key}: {path} is empty; name the benchmark's own prompts file")
    seen = set()
    for prompt in made:
        named = prompt.key
        unfit = re.search(r"[/\\\x00-\x1f\x7f]", named) or named.startswith(".")
        halves = any("\ud800" <= letter <= "\udfff" for letter in named + prompt.text)
        if unfit or halves or not named.strip() or len(named.encode()) > NAME_BYTES:
            raise UserError(
                f"{key}: {path}: {shown(named)} would be the name of a file, which has no slashes, "
                f"control characters or half characters, begins with no dot and has at most "
                f"{NAME_BYTES} bytes; change it, or leave that prompt out"
            )
        if prompt.group and not benchmark.names_metric(prompt.group):
            raise UserError(
                f"{key}: {path}: {shown(prompt.group)} would be the name of a metric, which "
                f"{benchmark.NAMES}; change it"
            )
        name = named.lower() if folded else named
        if name in seen:
            raise UserError(f"{key}: {path}: {shown(named)} is there twice; remove one")
        seen.add(name)
    return made
