"""The workflow's configuration: schema, defaults, validation and its documentation table.

Reads neither torch nor diffusers, so that Snakefiles can import it.
"""

import copy
import difflib
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

from ppcl.configuration import strict_yaml
from ppcl.errors import UserError
from ppcl.settings import Settings, Variant
from ppcl.teacher import hub
from ppcl.teacher.prompts import once

SCHEMA_PATH = Path(__file__).resolve().parents[3] / "schemas" / "config.schema.yaml"
LONGEST = 100_000
# Keys of intervals that may be left to us -> what with closed forms, and what for depth alone, did
# best in the ablation (docs/ablation).
AUTO = {"cost": ("velocity", "influence"), "segmentation": ("trend", "optimal")}
# Names in results/ that no run can have, in small letters.
TAKEN = {"readme.md": "a file of the workflow", "teacher": "the folder of the target train_teacher"}


@functools.cache
def schema() -> dict:
    """The JSON schema of the configuration."""
    # In C where there is: every job, and every start of Snakemake, reads it first.
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
    """Reads config files that somebody else has read before, who lets the last of two keys win.

    Raises UserError as `strict_yaml.read` does.
    """
    for file in files:
        strict_yaml.read(file, schema())


def complete(config: dict, source: str) -> dict:
    """A copy of `config` with every default filled in, validated against the schema.

    Files and folders that exist get one spelling: stages run again when a text changes.

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
    # Programs get their keys on the command line, and the kernel takes 128 KiB for it.
    if len(shlex.quote(json.dumps(plain))) > LONGEST:
        raise UserError(
            f"{source}: is longer than a command line may be ({LONGEST} characters as JSON); "
            "shorten its longest text or list"
        )
    filled = _decided(_fill(plain, rules))
    validator = _Validator(rules)
    problems = sorted(validator.iter_errors(filled), key=lambda e: list(map(str, e.path)))
    if problems:
        # An unknown key often explains the other problems, so it comes first.
        problems.sort(key=lambda e: e.validator != "additionalProperties")
        raise UserError(f"{source}: {_explain(problems[0], rules)}")
    for name, value in filled.get("pipeline", {}).items():
        texts = value if isinstance(value, list) else [value]
        if re.fullmatch(strict_yaml.PROMPT_KEY, name) and value is not None:
            if not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{source}: 'pipeline.{name}' is {json.dumps(value)}, and has to be a text: "
                    "quote it"
                )
    names = [variant["name"] for variant in filled.get("variants", [])]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{source}: variants: the name '{name}' is used twice; rename one")
    for variant in filled.get("variants", []):
        if variant["finetune_steps"] and not variant["train"]:
            raise UserError(
                f"{source}: variants: '{variant['name']}' has train: false, so nothing of it is "
                f"trained, but finetune_steps is {variant['finetune_steps']}; set that to 0, or "
                "leave train out"
            )
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
    for section, key in (
        ("record", "prompts"),
        ("evaluate", "prompts"),
        ("plan", "transformer_config"),
    ):
        if path := filled[section][key]:
            filled[section][key] = _spelled(os.path.expanduser(path), _in_real_folder)


def _in_real_folder(path: str) -> str:
    """Of a file that is a link, its own place: what it names, such as pictures, lies beside it."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _spelled(path: str, full: Callable[[str], str]) -> str:
    """The full path, or the relative one if it leads down from here, for whole folders get moved.

    As it is if there is no such file (a name on the Hub looks like a relative path), or if the full
    one could not stand in a config.
    """
    if not os.path.exists(path) or set("{}") & set(found := full(path)):
        return path
    here = os.path.realpath(os.curdir)
    return os.path.relpath(found, here) if f"{found}/".startswith(f"{here}/") else found


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
    """The variants without what is done with them later: what the choice of sets depends on."""
    return [{key: v[key] for key in ("name", "budget", "train")} for v in variants]


def tightest(variants: Sequence[Variant]) -> list[dict]:
    """The smallest limit of each kind, as one variant each: what the selection depends on. Those of
    variants that trained students may be in; of all, if there are none such."""
    least: dict[str, float] = {}
    for variant in [v for v in variants if v.train] or variants:
        for kind, value in variant.budget.items():
            least[kind] = min(value, least.get(kind, value))
    shared = {"train": any(v.train for v in variants)}
    return [
        {"name": f"smallest-{kind}", "budget": {kind: least[kind]}, **shared}
        for kind in sorted(least)
    ]


def table() -> str:
    """The table of config/README.md: one markdown row per key, from the schema."""
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, node in _leaves(schema()):
        # As YAML, so that a reader can copy it: JSON's 1e-06 would be text there.
        default = "required"
        if "default" in node:
            default = yaml.safe_dump(node["default"], default_flow_style=True, width=10**6)
            default = f"`{default.splitlines()[0]}`"
        cells = (f"`{key}`", _allowed(node), default, node["description"].strip())
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    for name, child in node["properties"].items():
        key = f"{prefix}{name}"
        if "properties" in child:
            yield from _leaves(child, f"{key}.")
        else:
            yield key, child
            if "properties" in child.get("items", {}):
                yield from _leaves(child["items"], f"{key}[].")


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
    """The config with the search for intervals decided where it is left to us, by AUTO."""
    found = copy.deepcopy(config)
    try:
        alone = not (found["width"]["enabled"] or found["modulation"]["enabled"])
        for key, (mixed, depth_alone) in AUTO.items():
            if found["intervals"][key] == "auto":
                found["intervals"][key] = depth_alone if alone else mixed
    except (KeyError, TypeError):  # which the validator tells
        pass
    return found


def _explain(problem: jsonschema.ValidationError, rules: dict) -> str:
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem.path).lstrip(".")
    if problem.validator == "additionalProperties":
        known = list(problem.schema["properties"])
        unknown = next(name for name in problem.instance if name not in known)
        close = difflib.get_close_matches(unknown, known, n=1)
        if close:
            hint = f"did you mean '{close[0]}'?"
        else:
            elsewhere = [k for k, _ in _leaves(rules) if k.split(".")[-1] == unknown]
            hint = f"did you mean '{elsewhere[0]}'? " if elsewhere else ""
            hint += f"allowed here: {', '.join(known)}"
        return f"unknown key '{f'{key}.{unknown}'.lstrip('.')}'; {hint}"
    if problem.validator == "required":
        return f"{key}: {problem.message}; add it"
    node = rules
    for part in problem.path:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
    hint = ""
    if "string" in node.get("type", ()) and not isinstance(problem.instance, (str, dict, list)):
        hint = "; put it in quotes, or YAML does not keep it a text (--config: run='\"3\"')"
    elif isinstance(problem.instance, str) and (
        found := re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", problem.instance)
    ):
        whole, rest, sign, exponent = found.groups()
        number = f"{whole}{rest or '.0'}e{sign or '+'}{exponent}"
        hint = f"; YAML reads {problem.instance} as text, write {number}"
    elif isinstance(problem.instance, str) and not _stays_text(problem.instance):
        hint = "; this is text: drop the quotes (--config makes all nested values text, a file not)"
    elif problem.instance is False and "no" in node.get("enum", ()):
        hint = '; YAML reads a bare no as false, write "no" in quotes'
    elif isinstance(problem.instance, str) and "enum" in node:
        close = difflib.get_close_matches(problem.instance, map(str, node["enum"]), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"'{key}' is {json.dumps(problem.instance)}; allowed: {_allowed(node)}{hint}"


def _stays_text(value: str) -> bool:
    """Whether YAML reads a text, written without quotes, as a text."""
    try:
        return isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:
        return True


def _allowed(node: dict) -> str:
    """What the schema allows at one key, in words."""
    if "anyOf" in node:
        return " or ".join(_allowed(option) for option in node["anyOf"])
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return "one of " + ", ".join(f"`{json.dumps(v).strip(chr(34))}`" for v in node["enum"])
    kind = node.get("type", "anything")
    words = " or ".join(kind) if isinstance(kind, list) else kind
    if "properties" in node and node.get("minProperties") == 1:
        options = [f"`{name}` ({_allowed(child)})" for name, child in node["properties"].items()]
        words = f"a mapping with any of {', '.join(options)}"
    if "items" in node:
        exact = node.get("minItems") == node.get("maxItems")
        length = node["minItems"] if exact else f"{node['minItems']} or more"
        words = f"list of {length}: {_allowed(node['items'])}"
    limits = [
        f"{sign} {node[name]}"
        for name, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if name in node
    ]
    if "pattern" in node:
        limits.append(f"matching `{node['pattern']}`")
    if "not" in node:
        limits.append("other than " + ", ".join(f"`{v}`" for v in node["not"]["enum"]))
    return f"{words} {', '.join(limits)}".strip()
