"""The schema in words: the table of all keys, and what is wrong with a value."""

import difflib
import json
import re
from collections.abc import Iterator
from typing import cast

import jsonschema
import yaml


def table(rules: dict) -> str:
    """The table of config/README.md: one markdown row per key of the schema `rules`."""
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, node in leaves(rules):
        # As YAML, so that a reader can copy it: JSON's 1e-06 would be text there.
        default = "none" if node.get("optional") else "required"
        if "default" in node:
            default = yaml.safe_dump(node["default"], default_flow_style=True, width=10**6)
            default = f"`{default.splitlines()[0]}`"
        cells = (f"`{key}`", allowed(node), default, node["description"].strip())
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    """Every key of a schema that holds no others, dotted, and what the schema says of it."""
    for name, child in node["properties"].items():
        key = f"{prefix}{name}"
        if "properties" in child:
            yield from leaves(child, f"{key}.")
        else:
            yield key, child
            if "properties" in child.get("items", {}):
                yield from leaves(child["items"], f"{key}[].")


def explained(problem: jsonschema.ValidationError, rules: dict) -> str:
    """What is wrong with a config, by its dotted key, with what is allowed there."""
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem.path).lstrip(".")
    if problem.validator == "additionalProperties":
        schema, given = cast(dict, problem.schema), cast(dict, problem.instance)
        known = list(schema["properties"])
        unknown = next(name for name in given if name not in known)
        close = difflib.get_close_matches(unknown, known, n=1)
        if close:
            hint = f"did you mean '{close[0]}'?"
        else:
            elsewhere = [k for k, _ in leaves(rules) if k.split(".")[-1] == unknown]
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
        written := re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", problem.instance)
    ):
        whole, rest, sign, exponent = written.groups()
        number = f"{whole}{rest or '.0'}e{sign or '+'}{exponent}"
        hint = f"; YAML reads {problem.instance} as text, write {number}"
    elif isinstance(problem.instance, str) and not _stays_text(problem.instance):
        hint = "; this is text: drop the quotes (--config makes all nested values text, a file not)"
    elif problem.instance is False and "no" in node.get("enum", ()):
        hint = '; YAML reads a bare no as false, write "no" in quotes'
    elif isinstance(problem.instance, str) and "enum" in node:
        close = difflib.get_close_matches(problem.instance, map(str, node["enum"]), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"'{key}' is {json.dumps(problem.instance)}; allowed: {allowed(node)}{hint}"


def _stays_text(value: str) -> bool:
    """Whether YAML reads a text, written without quotes, as a text."""
    try:
        return isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:
        return True


def allowed(node: dict) -> str:
    """What the schema allows at one key, in words."""
    if "anyOf" in node:
        return " or ".join(allowed(option) for option in node["anyOf"])
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return "one of " + ", ".join(f"`{json.dumps(v).strip(chr(34))}`" for v in node["enum"])
    kind = node.get("type", "anything")
    words = " or ".join(kind) if isinstance(kind, list) else kind
    if "properties" in node and node.get("minProperties") == 1:
        options = [f"`{name}` ({allowed(child)})" for name, child in node["properties"].items()]
        words = f"a mapping with any of {', '.join(options)}"
    if "items" in node:
        exact = node.get("minItems") == node.get("maxItems")
        length = node["minItems"] if exact else f"{node['minItems']} or more"
        words = f"list of {length}: {allowed(node['items'])}"
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
