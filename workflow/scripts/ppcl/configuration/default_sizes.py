"""The size of picture or video that a stock pipeline makes if its call asks for none. No torch."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.storage import untrusted
from ppcl.teacher import hub, signatures

LARGEST = 1 << 20  # channels, or pixels of a side; what a config holds beyond it is damage


class _Part:
    """A component of a pipeline, as far as its config tells."""

    def __init__(self, shape: Mapping):
        self._shape = shape

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            return self
        try:
            return self._shape[name]
        except KeyError:
            raise AttributeError(name) from None


def default_sizes(pipeline: str, folder: Path) -> dict[str, int]:
    """Default height and width in pixels, and num_frames, of a call of a stock pipeline.

    From statements such as `height = height or <expression>` in its source, and the configs of its
    components. Sizes that these do not tell are left out.

    Args:
        pipeline: name of the class.
        folder: of the pipeline.

    Raises:
        UserError: the config of a component is not a JSON object.
    """
    source = signatures.source(pipeline)
    if source is None:
        return {}
    functions = {node.name: node for node in source.body if isinstance(node, ast.FunctionDef)}
    configs = {name: folder / name / "config.json" for name in hub.parts(folder)}
    here = {name: _Part(component_config(path)) for name, path in configs.items() if path.exists()}
    itself = type("Pipeline", (), {})()
    vars(itself).update(here)
    names = {"self": itself, "len": len, "getattr": getattr, "hasattr": hasattr, "int": int}
    for node in ast.walk(functions.get("__init__", source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            value = _worked_out(node.value, names)
            if value is not None:
                setattr(itself, node.targets[0].attr, value)
    sizes: dict[str, int] = {}
    for node in ast.walk(functions.get("__call__", source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.BoolOp):
            continue
        name = ast.unparse(node.targets[0])
        first, *others = node.value.values
        if name in ("height", "width", "num_frames") and ast.unparse(first) == name:
            value = _worked_out(others[-1], names)
            if isinstance(value, int) and 0 < value <= LARGEST:
                sizes.setdefault(name, value)
    return sizes


def _worked_out(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression in diffusers' source; None if it needs more than `names`."""
    plain = (ast.Lambda, ast.Await, ast.Yield, ast.NamedExpr)
    if any(isinstance(inner, plain) for inner in ast.walk(node)):
        return None
    called = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    if not called <= names.keys():
        return None
    try:
        return eval(  # noqa: S307  (the installed library's own text, which runs anyway)
            compile(ast.Expression(node), "<diffusers>", "eval"), {"__builtins__": {}}, names
        )
    except Exception:
        return None


def component_config(path: Path) -> dict:
    """The config of a component. Raises UserError if it is missing or is not a JSON object."""
    try:
        return untrusted.json_object(path)
    except FileNotFoundError as error:
        raise UserError(f"--teacher: {path} is not there; restore it") from error
