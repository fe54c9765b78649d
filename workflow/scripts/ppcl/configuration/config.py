"""The workflow's configuration: schema, defaults, validation and its documentation table.

Reads neither torch nor diffusers, so that Snakefiles can import it.
"""

import copy
import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ppcl.configuration import renamed, schema_words, strict_yaml, variant_checks
from ppcl.errors import UserError
from ppcl.settings import Settings, Variant
from ppcl.teacher import hub
from ppcl.teacher.prompts import once

SCHEMA_PATH = Path(__file__).resolve().parents[3] / "schemas" / "config.schema.yaml"
LONGEST = 100_000
# Keys of `intervals` that may be `auto` -> the value with closed forms, and the value for depth
# pruning alone: those that did best in the ablation (docs/ablation).
AUTO = {"cost": ("velocity", "influence"), "segmentation": ("trend", "optimal")}
# Names in results/ that no run can have, in small letters.
TAKEN = {"readme.md": "a file of the workflow", "teacher": "the folder of the target train_teacher"}


@functools.cache
def schema() -> dict:
    """The JSON schema of the configuration."""
    # The loader in C, if there is one: every job and every start of Snakemake reads the schema.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(SCHEMA_PATH.read_text(encoding="utf-8"), loader)


def load(source: str) -> Settings:
    """The validated configuration from a YAML or JSON file, or from an inline JSON object.

    A file is completed with the default of every key. An inline object (it starts with "{") is
    completed only below the top-level keys that it holds: see `settings.Section`.

    Raises UserError naming the file and the dotted key, with what is allowed there.
    """
    source = str(source)
    inline = source.lstrip().startswith("{")
    if inline:
        name = "--config"
        try:
            config = json.loads(source, object_pairs_hook=lambda pairs: once(pairs, name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--config: the inline object is not JSON ({error})") from error
    else:
        name, config = source, strict_yaml.read(source, schema())
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise UserError(f"{name}: must hold keys and values, not a {type(config).__name__}")
    completed = complete(config, name)
    return Settings.of({key: completed[key] for key in config} if inline else completed)


def refuse_surprises(files: Iterable[str | Path]) -> None:
    """Reads again what Snakemake has read, which silently takes the last of two equal keys.

    Raises UserError as `strict_yaml.read` does.
    """
    for file in files:
        strict_yaml.read(file, schema())


def complete(config: dict, source: str) -> dict:
    """A copy of `config` with every default filled in, validated against the schema.

    Paths of files and folders that exist are spelled in one way, since stages run again when the
    text of a value changes.

    `source` names the config in messages. Raises UserError for the first invalid key.
    """
    rules = schema()
    # Snakemake hands over ordered dicts and its own scalars; JSON types are what the schema knows.
    try:
        plain = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: holds a value that is no text, number, list or mapping ({error}); put "
            "dates in quotes, and use finite numbers"
        ) from error
    # Programs get their keys as one argument, for which the kernel takes 128 KiB at most.
    if len(shlex.quote(json.dumps(plain))) > LONGEST:
        raise UserError(
            f"{source}: is longer than a command line may be ({LONGEST} characters as JSON); "
            "shorten its longest text or list"
        )
    renamed.refuse(plain, source)
    filled = _decided(_fill(plain, rules))
    validator = _Validator(rules)
    problems = sorted(validator.iter_errors(filled), key=lambda e: list(map(str, e.path)))
    if problems:
        # An unknown key often explains the other problems, so it comes first.
        problems.sort(key=lambda e: e.validator != "additionalProperties")
        raise UserError(f"{source}: {schema_words.explained(problems[0], rules)}")
    for name, value in filled.get("pipeline", {}).items():
        texts = value if isinstance(value, list) else [value]
        if re.fullmatch(strict_yaml.PROMPT_KEY, name) and value is not None:
            if not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{source}: 'pipeline.{name}' is {json.dumps(value)}, and has to be a text: "
                    "quote it"
                )
    variant_checks.check(filled.get("variants", []), plain.get("variants", []), source)
    low, high = filled["modulation"]["guidance"]
    if low > high:
        raise UserError(
            f"{source}: modulation.guidance: [{low:g}, {high:g}] has to be [low, high]; swap them"
        )
    if filled["run"].lower() in TAKEN:  # there are disks on which Teacher is teacher
        raise UserError(
            f"{source}: run: results/{filled['run']} is {TAKEN[filled['run'].lower()]}; choose "
            "another name"
        )
    _places(filled)
    return filled


def _places(filled: dict) -> None:
    """Gives every file and folder that a config names one spelling."""
    teacher = filled["teacher"]
    if hub.is_name(name := teacher["path"].rstrip("/")):
        inside = os.path.normpath(teacher["subfolder"] or "")
        teacher |= {"path": name, "subfolder": None if inside == "." else inside}
    else:
        folder = os.path.expanduser(teacher["path"])
        if teacher["subfolder"] and os.path.isdir(f"{folder}/{teacher['subfolder']}"):
            folder, teacher["subfolder"] = f"{folder}/{teacher['subfolder']}", None
        teacher["path"] = _spelled(folder, os.path.realpath)
    for lora in teacher["loras"]:
        lora["path"] = _spelled(os.path.expanduser(lora["path"]), _in_real_folder)
    for variant in filled["variants"]:
        if "finetune_data" in variant:
            given = os.path.expanduser(variant["finetune_data"])
            variant["finetune_data"] = _spelled(given, _in_real_folder)
    for section, key in (
        ("finetune", "data"),
        ("record", "prompts"),
        ("evaluate", "prompts"),
        ("forecast", "transformer_config"),
    ):
        if path := filled[section][key]:
            filled[section][key] = _spelled(os.path.expanduser(path), _in_real_folder)
    for benchmark in filled["evaluate"]["benchmarks"]:
        path = os.path.expanduser(benchmark["prompts"])
        benchmark["prompts"] = _spelled(path, _in_real_folder)


def _in_real_folder(path: str) -> str:
    """A path with links resolved in its folder alone: pictures that a file names lie beside it."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _spelled(path: str, full: Callable[[str], str]) -> str:
    """`full(path)`, relative to the working folder if it is inside, so that both can be moved.

    Unchanged if there is no such file (a name on the Hub looks like a relative path), or if the
    full path has braces, which the schema forbids.
    """
    if not os.path.exists(path) or set("{}") & set(spelled := full(path)):
        return path
    here = os.path.realpath(os.curdir)
    return os.path.relpath(spelled, here) if f"{spelled}/".startswith(f"{here}/") else spelled


def subset(config: dict, *keys: str) -> str:
    """JSON of the named parts of a configuration (dotted keys reach into them).

    Rules put it in their params, so that a changed value reruns exactly the rules that name it.
    """
    part: dict = {}
    for key in keys:
        source, target = config, part
        *parents, last = key.split(".")
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return json.dumps(part, sort_keys=True)


def budgets(variants: Iterable[Mapping]) -> list[dict]:
    """Name, budget and train of each variant that is no copy of another: all of it that the choice
    of sets depends on."""
    pruned = [variant for variant in variants if "of" not in variant]
    # How bytes are counted; else quantisation comes after all that is chosen.
    stored = [{k: v[k] for k in ("quantise",) if k in v and _by_bytes(v)} for v in pruned]
    kept = ("name", "budget", "train")
    return [{key: v[key] for key in kept} | s for v, s in zip(pruned, stored, strict=True)]


def _by_bytes(variant: Mapping) -> bool:
    return isinstance(variant["budget"], Mapping) and "gib" in variant["budget"]


def tightest(variants: Sequence[Variant]) -> list[dict]:
    """One variant per kind of budget, with the smallest limit of that kind: what the selection
    depends on. Only variants with `train` count, if there are any. Bytes are a kind for each way of
    quantisation."""
    least: dict[tuple[str, str], float] = {}
    variants = [variant for variant in variants if variant.parent is None]
    for variant in [v for v in variants if v.train] or variants:
        for kind, value in variant.budget.items():
            which = kind, (variant.quantise or "") if kind == "gib" else ""
            least[which] = min(value, least.get(which, value))
    train = any(v.train for v in variants)
    return [
        {
            "name": f"smallest-{kind}{quantise and f'-{quantise}'}",
            "budget": {kind: least[kind, quantise]},
            "train": train,
            **({"quantise": quantise} if quantise else {}),
        }
        for kind, quantise in sorted(least)
    ]


def _matches(_validator, pattern: str, instance: Any, _rules: dict) -> Iterator:
    """As jsonschema's, but `$` is the end of the text; Python's also matches before a newline."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _matches})


def _fill(value: Any, node: dict) -> Any:
    """`value` with the schema's defaults below it; what does not fit is left to the validator."""
    if isinstance(value, dict) and "properties" in node:
        filled = dict(value)
        for name, child in node["properties"].items():
            if name in filled:
                filled[name] = _fill(filled[name], child)
            elif "properties" in child:
                filled[name] = _fill({}, child)
            elif "default" in child:
                filled[name] = _fill(child["default"], child)
        return filled
    if isinstance(value, list) and "items" in node:
        return [_fill(item, node["items"]) for item in value]
    if node.get("type") == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)  # YAML's 4.0 and 1.0e+3 pass as integers in JSON schema, not in range()
    return value


def _decided(config: dict) -> dict:
    """A copy of the config in which values of AUTO stand for every `auto` of the intervals."""
    decided = copy.deepcopy(config)
    try:
        alone = not (decided["width"]["enabled"] or decided["modulation"]["enabled"])
        for key, (mixed, depth_alone) in AUTO.items():
            if decided["intervals"][key] == "auto":
                decided["intervals"][key] = depth_alone if alone else mixed
    except (KeyError, TypeError):  # the validator reports it
        pass
    return decided
