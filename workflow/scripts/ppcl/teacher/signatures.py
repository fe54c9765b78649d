"""The arguments of diffusers' pipelines, read from diffusers' source text. Imports neither torch
nor diffusers, so that Snakefiles can import it."""

import ast
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# In defaults such as 1024**2.
_OPERATORS = {ast.Mult: operator.mul, ast.Pow: operator.pow}
_OPTIONAL = "_optional_components"  # of a pipeline class


@dataclass(frozen=True)
class Parameter:
    """One argument of a pipeline's call.

    Attributes:
        required: it has no default.
        default: a literal, or a constant of the pipeline's module; None if it is anything else.
        annotation: its type as the source has it, such as `str | list[str]`; empty if it has none.
    """

    name: str
    required: bool
    default: Any = None
    annotation: str = ""


@dataclass(frozen=True)
class Signature:
    """The signature of a pipeline's `__call__`, or of another function.

    Attributes:
        parameters: name -> parameter, in order, without self.
        open: whether it takes other keywords too (**kwargs).
    """

    parameters: dict[str, Parameter]
    open: bool = False


@cache
def of(name: str, file: Path | None = None) -> Signature | None:
    """The signature of a pipeline class of diffusers; None if diffusers has no such class (the
    pipeline has code of its own), or is not installed.

    Args:
        name: of the class, as model_index.json has it.
        file: see `_lineage`.
    """
    signatures = (_method(made, "__call__", place) for made, place in _lineage(name, file))
    return next((signature for signature in signatures if signature), None)


@cache
def of_init(name: str) -> Signature | None:
    """The signature of the `__init__` of a class of diffusers; None if there is no such class."""
    signatures = (_method(made, "__init__", place) for made, place in _lineage(name))
    return next((signature for signature in signatures if signature), None)


def of_class(made: type) -> Signature:
    """The signature of a pipeline class, which may have code of its own."""
    if made.__module__.startswith("diffusers.") and (known := of(made.__name__)):
        return known
    every = [*inspect.signature(made.__call__).parameters.values()][1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = {
        given.name: Parameter(
            given.name,
            given.default is given.empty,
            None if given.default is given.empty else given.default,
            "" if given.annotation is given.empty else inspect.formatannotation(given.annotation),
        )
        for given in every
        if given.kind not in variable
    }
    return Signature(parameters, any(given.kind is given.VAR_KEYWORD for given in every))


def source(name: str) -> ast.ClassDef | None:
    """The source of a class of diffusers; None when `of` gives None."""
    return next((made for made, _ in _lineage(name)), None)


def components(name: str) -> tuple[str, ...]:
    """Names, as in model_index.json, of the components that a pipeline class of diffusers can't be
    made without; empty when `of` gives None."""
    optional: list[str] = []
    for made, _ in _lineage(name):
        for node in made.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == _OPTIONAL:
                optional += ast.literal_eval(node.value)
    init = of_init(name) or Signature({})
    return tuple(k for k, p in init.parameters.items() if p.required and k not in optional)


def _lineage(name: str, file: Path | None = None) -> Iterator[tuple[ast.ClassDef, Path]]:
    """A class and its base classes, as far as diffusers defines them, with their files.

    Args:
        file: the module that defines or imports the class; None: diffusers' own `__init__`.
    """
    if file is None:
        spec = find_spec("diffusers")
        if spec is None or not spec.submodule_search_locations:
            return
        file = Path(spec.submodule_search_locations[0]) / "__init__.py"
    definition = _definition(name, file)
    if definition is not None:
        yield definition
        for base in definition[0].bases:
            if isinstance(base, ast.Name):
                yield from _lineage(base.id, definition[1])


def _method(made: ast.ClassDef, name: str, file: Path) -> Signature | None:
    for node in made.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _signature(node, file)
    return None


def _definition(name: str, file: Path) -> tuple[ast.ClassDef, Path] | None:
    """A class and the file that defines it; imports are followed from `file`."""
    for node in _nodes(file):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, file
    for node in _nodes(file):
        if not isinstance(node, ast.ImportFrom) or not node.level or "dummy" in str(node.module):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                # One dot is the module's own folder, each further one the folder above it.
                folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                inner = (folder.with_suffix(".py"), folder / "__init__.py")
                places = (_definition(alias.name, path) for path in inner if path.is_file())
                if definition := next((place for place in places if place), None):
                    return definition
    return None


@cache
def _nodes(file: Path) -> list[ast.AST]:
    """The classes, imports and assignments at the top of a module, also those under if and try."""
    wanted: list[ast.AST] = []
    waiting: list[ast.AST] = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.ClassDef, ast.ImportFrom, ast.Assign)):
            wanted.append(node)
        elif isinstance(node, (ast.If, ast.Try)):
            waiting += [*node.body, *node.orelse]
            waiting += [
                inner for handler in getattr(node, "handlers", ()) for inner in handler.body
            ]
    return wanted


def _signature(function: ast.FunctionDef, file: Path) -> Signature:
    given = function.args
    placed = [*given.posonlyargs, *given.args][1:]
    first = len(placed) - len(given.defaults)
    defaults = [None] * first + list(given.defaults)
    every = [*zip(placed, defaults, strict=True)]
    every += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    parameters = {
        argument.arg: Parameter(
            argument.arg,
            default is None,
            _value(default, file),
            ast.unparse(argument.annotation) if argument.annotation else "",
        )
        for argument, default in every
    }
    return Signature(parameters, given.kwarg is not None)


def _value(default: ast.expr | None, file: Path) -> Any:
    if isinstance(default, ast.Name):
        for node in _nodes(file):
            if isinstance(node, ast.Assign) and default.id in map(ast.unparse, node.targets):
                return _value(node.value, file)
    if isinstance(default, ast.BinOp) and type(default.op) in _OPERATORS:
        left, right = _value(default.left, file), _value(default.right, file)
        known = left is not None and right is not None
        return _OPERATORS[type(default.op)](left, right) if known else None
    try:
        return ast.literal_eval(default) if default is not None else None
    except ValueError:
        return None
