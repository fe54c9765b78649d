"""The typed sections against the schema, and what a program that was given a part of them reads."""

import dataclasses
import types
import typing
from typing import get_args, get_origin, get_type_hints

import pytest

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.settings import DistillSettings, LoraSettings, Section, Settings, TeacherSettings, Variant

# Attributes that are no keys of the config, by class.
OWN = {
    "Settings": {"given"},
    "TeacherSettings": {"fingerprint"},
    "LoraSettings": {"fingerprint"},
    "DistillSettings": {"linear_weight"},
    "FinetuneSettings": {"steps"},  # each variant's own
}
# Keys that are called otherwise as attributes: each section has a method `of`.
ATTRIBUTES = {"of": "parent"}
# Values of the schema that are decided before a section is made, or that a config can't give.
OTHER_VALUES = {("cost", "auto"), ("segmentation", "auto"), ("mode", "chain")}
OTHER_VALUES |= {
    (key, type(None)) for key in ("of", "quantise", "finetune_data")
}  # of a variant without
SCALARS = {"integer": {int}, "number": {float}, "string": {str}, "boolean": {bool}}
SCALARS |= {"null": {type(None)}}


def kinds_allowed(node: dict) -> set:
    """Scalar types and constants that a schema allows at a key."""
    if "enum" in node:
        return set(node["enum"])
    if "const" in node:
        # 0 where a number is allowed as well is one.
        return {node["const"]} if isinstance(node["const"], str) else {type(node["const"])}
    if "anyOf" in node:
        return set().union(*map(kinds_allowed, node["anyOf"]))
    several = node["type"] if isinstance(node["type"], list) else [node["type"]]
    return set().union(*(SCALARS[name] for name in several))


def kinds_typed(hint) -> set:
    """The same of an annotation."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        return set().union(*map(kinds_typed, get_args(hint)))
    return set(get_args(hint)) if get_origin(hint) is typing.Literal else {hint}


def sections(kind=Settings, node=None):
    """Every section with its part of the schema."""
    node = node or config.schema()
    yield kind, node["properties"]
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            yield from sections(hint, node["properties"][name])


SECTIONS = {
    kind.__name__: (kind, node)
    for kind, node in [
        *sections(),
        (Variant, config.schema()["properties"]["variants"]["items"]["properties"]),
        (
            LoraSettings,
            config.schema()["properties"]["teacher"]["properties"]["loras"]["items"]["properties"],
        ),
    ]
}


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_and_schema_have_the_same_keys(name):
    kind, node = SECTIONS[name]
    attributes = {ATTRIBUTES.get(key, key) for key in node} | OWN.get(name, set())
    assert {each.name for each in dataclasses.fields(kind)} == attributes


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_and_schema_have_the_same_types(name):
    kind, node = SECTIONS[name]
    hints = get_type_hints(kind)
    for key, allowed in node.items():
        if "properties" in allowed or key in ("pipeline", "budget", "scheduler"):
            continue
        if allowed.get("type") == "array":
            assert get_origin(hints[key]) is tuple, key
            continue
        different = kinds_allowed(allowed) ^ kinds_typed(hints[ATTRIBUTES.get(key, key)])
        assert different <= {value for where, value in OTHER_VALUES if where == key}, key


def test_teachers_have_the_schemas_defaults():
    node = config.schema()["properties"]["teacher"]["properties"]
    plain = {key: value["default"] for key, value in node.items() if key != "path"}
    plain |= {"path": "x", "fingerprint": None, "loras": ()}
    assert vars(TeacherSettings.of({"path": "x"})) == plain
    node = node["loras"]["items"]["properties"]
    plain = {key: value["default"] for key, value in node.items() if key != "path"}
    assert vars(LoraSettings.of({"path": "x"})) == {"path": "x", "fingerprint": None} | plain


def test_a_config_as_sections():
    settings = Settings.of(config.complete({"width": {"linear_weight": 0.25}}, "test"))
    assert settings.distill.linear_weight == settings.width.linear_weight == 0.25
    assert settings.distill.betas == (0.9, 0.95) and isinstance(settings.variants[0], Variant)
    assert settings.variants[1].budget == {"fraction": 0.5}
    assert settings.narrowing.steps == settings.width.steps != settings.distill.steps
    assert settings.narrowing.replace(steps=settings.distill.steps) == settings.distill
    assert settings.finetune.for_variant(settings.variants[0]).steps == 400
    assert settings.trains and settings.closed and settings.compares and not settings.staged


def test_sections_do_not_change():
    settings = Settings.of(config.complete({}, "test"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.distill.steps = 3
    changed = settings.distill.replace(steps=3)
    assert changed.steps == 3 != settings.distill.steps
    whole = settings.replace(distill=changed, subsets={"steps": 5})
    assert (whole.distill, whole.subsets.steps, whole.width) == (changed, 5, settings.width)
    assert whole.given == settings.given and whole.variants == settings.variants


@pytest.mark.parametrize("key", ["subsets", "seed"])
def test_what_a_program_was_not_given_is_an_error(key):
    settings = config.load('{"distill": {"steps": 3}}')
    assert settings.distill.steps == 3
    with pytest.raises(UserError, match=f"config key '{key}' was not given"):
        getattr(settings, key)
    with pytest.raises(UserError, match="'linear_weight' was not given"):
        settings.distill.linear_weight  # noqa: B018


def test_misspelled_keys_are_errors():
    with pytest.raises(TypeError, match="no key 'step'"):
        DistillSettings.of({"step": 3})
    with pytest.raises(AttributeError, match="no key 'step'"):
        DistillSettings.of({"steps": 3}).step  # noqa: B018
