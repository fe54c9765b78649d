"""Splits a call's arguments into tensors, for columns, and JSON for all else, and joins them again.

The JSON of a row has an entry per argument: `{"all": value}` if all samples share the value, or
`{"each": value}` if the argument is a list with an entry per sample, and this is the row's. In a
value, `{"tuple": [...]}` and `{"mapping": {...}}` are containers, and `{"tensor": name}` stands for
a tensor that a column holds (`call_columns`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppcl.errors import UserError
from ppcl.transformer.call_columns import Held, inside, outermost


@dataclass
class Samples:
    """An argument as one tensor per sample, and how these form the argument (`CallColumn`)."""

    tensors: list[Tensor]
    held: Held = Held.STACKED
    batch_dim: int = 0


@dataclass
class Arguments:
    """A call's arguments, split. Tensors inside tuples, lists and mappings have dotted names, as
    `call_columns.inside` makes them.

    Attributes:
        cut: argument -> its samples' tensors.
        whole: argument -> a tensor that all samples share.
        other: per sample, the JSON of all else, with `{"tensor": name}` in place of nested tensors.
    """

    cut: dict[str, Samples]
    whole: dict[str, Tensor]
    other: list[dict]


def split(
    arguments: dict[str, Any],
    batch: int,
    shared: tuple[str, ...] = (),
    batch_dims: Mapping[str, int] | None = None,
) -> Arguments:
    """Splits a call's arguments into those of each sample and those that all samples share.

    A tensor whose batch dimension is as long as the batch is cut into samples, and so is a list as
    long as the batch, unless the family calls the argument shared. Tensors are taken out of tuples,
    lists and mappings. Arguments that are None, and `return_dict`, are dropped.

    Args:
        batch: number of samples.
        shared: arguments without a batch dimension (`Family.shared`).
        batch_dims: argument -> its batch dimension, if not the first (`Family.batch_dims`).

    Raises:
        UserError: an argument holds anything but tensors, texts, numbers, booleans and None.
    """
    parts = Arguments({}, {}, [{} for _ in range(batch)])
    dims = batch_dims or {}

    def keep(path: str, tensor: Tensor) -> None:
        root, tensor = outermost(path), tensor.detach().cpu()
        dim = dims.get(root, 0)
        if root not in shared and tensor.ndim > dim and tensor.shape[dim] == batch:
            # A copy for each: a view would be stored with the whole.
            parts.cut[path] = Samples(list(tensor.movedim(dim, 0)), batch_dim=dim)
        else:
            parts.whole[path] = tensor

    for name, value in arguments.items():
        if value is None or name == "return_dict":
            continue
        listed = isinstance(value, list) and len(value) == batch and name not in shared
        if isinstance(value, Tensor):
            keep(name, value)
        elif listed and all(isinstance(item, Tensor) for item in value):
            parts.cut[name] = Samples([item.detach().cpu() for item in value], Held.LISTED)
        elif listed:
            for row, item in zip(parts.other, value, strict=True):
                row[name] = {"each": encode(item, name, None)}
        else:
            encoded = encode(value, name, keep)
            for row in parts.other:
                row[name] = {"all": encoded}
    return parts


def encode(value: Any, path: str, keep: Callable[[str, Tensor], None] | None) -> Any:
    """A value as JSON in which tuples and lists differ.

    Args:
        path: name of the argument, or of the place inside it (`call_columns.inside`).
        keep: is called with the path and value of every tensor inside; None: tensors are refused.

    Raises:
        UserError: the value holds anything but tensors, texts, numbers, booleans and None.
    """
    if isinstance(value, Tensor) and keep is not None:
        keep(path, value)
        return {"tensor": path}
    if isinstance(value, (list, tuple)):
        items = [encode(v, inside(path, i), keep) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"mapping": {k: encode(v, inside(path, k), keep) for k, v in value.items()}}
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    raise UserError(
        f"the pipeline passes a value of type {type(value).__name__} inside the transformer "
        f"argument '{outermost(path)}'; such calls can't be recorded yet"
    )


def joined(other: list[dict], tensors: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a batch, by name; undoes `split`.

    Args:
        other: the JSON of each sample.
        tensors: argument, or place inside it -> the batch's tensor (`CallColumn.joined`).
    """
    left = dict(tensors)
    arguments: dict[str, Any] = {}
    for name, value in other[0].items():
        if "all" in value:
            arguments[name] = decode(value["all"], left)
        else:
            arguments[name] = [decode(row[name]["each"], {}) for row in other]
    return arguments | left


def decode(value: Any, tensors: dict[str, Any]) -> Any:
    """The value that `encode` made this of; its tensors are popped from `tensors`."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors.pop(value["tensor"])
        if "tuple" in value:
            return tuple(decode(v, tensors) for v in value["tuple"])
        return {k: decode(v, tensors) for k, v in value["mapping"].items()}
    return value


def batched_by(other: dict) -> dict:
    """The part of a row's JSON that must be equal in all rows of a batch."""
    return {name: value if "all" in value else "each" for name, value in other.items()}


def check(encoded: dict, held: Collection[str]) -> None:
    """Checks the JSON of a row.

    Args:
        held: names of the tensors that the row's columns hold.

    Raises:
        ValueError, TypeError, AttributeError: `split` can't have made it, or it names a tensor that
            is not held.
    """

    def check_value(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                check_value(item)
        elif isinstance(value, dict):
            ((kind, content),) = value.items()
            if (
                kind == "tensor"
                and content not in held
                or kind not in ("tensor", "tuple", "mapping")
            ):
                raise ValueError(f"arguments hold {value}")
            if kind != "tensor":
                for item in dict.values(content) if kind == "mapping" else list(content):
                    check_value(item)

    for value in encoded.values():
        ((kind, content),) = value.items()
        if kind not in ("all", "each"):
            raise ValueError(f"arguments hold {value}")
        check_value(content)
