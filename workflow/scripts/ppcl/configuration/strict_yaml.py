"""YAML and JSON as people write them: what would be read as something else is refused, by line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ppcl.errors import UserError
from ppcl.teacher.prompts import once

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "null": "nothing"}
_NUMBERS = ("int", "float")
PROMPT_KEY = r"(negative_)?prompt(_\d+)?"
"""Arguments of pipelines that are texts, or lists of them."""


def read(path: str | Path, rules: dict | None = None) -> Any:
    """What a YAML or JSON file holds; JSON is tried first, as Snakemake does.

    Args:
        rules: its JSON schema, which tells where a text is wanted.

    Raises:
        UserError: it can't be read; has a key twice, of which one would be lost; has a value that
            YAML turns into another: a date, a number in base 8 or 60, or, where a text is wanted,
            anything else.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name}: cannot read this config file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:  # NUL in the name
        raise UserError(f"{name!r}: cannot read this config file ({error})") from error
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: once(pairs, name))
    except (ValueError, RecursionError):
        pass
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for line, problem in _problems(node, rules or {}, "", set()):
            raise UserError(f"{name}: line {line}: {problem}")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Besides YAML's own: dates that do not exist, nesting without end.
        raise UserError(f"{name!r}: not valid YAML: {error}") from error


def _problems(node: yaml.Node, rules: dict, key: str, seen: set) -> Iterator[tuple[int, str]]:
    """(line, what is wrong with it) of everything below a node."""
    if (id(node), id(rules)) in seen:  # an alias, which may even hold itself
        return
    seen.add((id(node), id(rules)))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, value in node.value:
            word, line = str(name.value), name.start_mark.line + 1
            here = f"{key}.{word}".lstrip(".")
            kind = name.tag.rpartition(":")[2]
            if isinstance(name, yaml.ScalarNode) and kind in (*_KINDS, "timestamp"):
                # Other spellings of it are the same key: yes and true, 1 and 0x1.
                what = _KINDS.get(kind, "a date")
                yield line, f"the key '{here}' is {what} to YAML; put it in quotes: \"{word}\""
            if isinstance(name, yaml.ScalarNode) and word in lines:
                yield line, f"'{here}' is also in line {lines[word]}; remove one of them"
            lines[word] = line
            if kind == "merge":
                several = isinstance(value, yaml.SequenceNode)
                for merged in value.value if several else [value]:
                    yield from _problems(merged, rules, key, seen)
                continue
            yield from _problems(value, _below(rules, word, key), here, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _problems(value, rules.get("items", {}), f"{key}[{number}]", seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        if problem := _surprise(node, rules, key):
            yield node.start_mark.line + 1, problem


def _below(rules: dict, name: str, key: str) -> dict:
    """The rules of one key of a mapping."""
    if key == "pipeline" and re.fullmatch(PROMPT_KEY, name):
        return _PROMPT
    return rules.get("properties", {}).get(name, {})


_PROMPT = {"type": ["string", "null"], "items": {"type": "string"}}


def _surprise(node: yaml.ScalarNode, rules: dict, key: str) -> str | None:
    """What to say of a scalar without quotes that becomes something else than it looks like."""
    kind, raw = node.tag.rpartition(":")[2], node.value
    allowed = rules.get("type", ())
    allowed = [allowed] if isinstance(allowed, str) else list(allowed)
    wanted = "string" in allowed and kind not in ("str", *allowed) or raw in rules.get("enum", ())
    if wanted and kind in (*_KINDS, "timestamp"):
        if not raw:
            return f"'{key}' is empty, and has to be a text; write one, or leave the key out"
        what, name = _KINDS.get(kind, "a date"), key.split(".")[-1]
        return f"'{key}' is {raw}, which YAML reads as {what}; quote it: {name}: \"{raw}\""
    if kind == "timestamp":
        return f"'{key}' is {raw}, which YAML reads as a date; quote it"
    if kind in _NUMBERS and (":" in raw or re.fullmatch(r"[+-]?0[0-9_]+", raw)):
        number = yaml.safe_load(raw)
        return f"'{key}' is {raw}, which YAML reads as {number}; write that, or quote it"
    return None
