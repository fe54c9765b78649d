"""A call's arguments, sorted: tensors to columns, and what is no tensor to JSON, and back.

The JSON of a row has an entry per argument: `{"all": value}`, or `{"each": value}` where it is this
sample's entry of a list. In a value, `{"tuple": [...]}` and `{"mapping": {...}}` are containers,
and `{"tensor": name}` stands for a tensor that a column holds (`call_columns`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppcl.errors import UserError
from ppcl.transformer.call_columns import Held, inside, outermost


@dataclass
class Samples:
    """An argument's tensors, one per sample, and how they are part of it (`CallColumn`)."""

    tensors: list[Tensor]
    held: Held = Held.STACKED
    batch_dim: int = 0


@dataclass
class Arguments:
    """A call's arguments, sorted.

    Attributes:
        cut: argument -> its samples' tensors.
        whole: argument -> a tensor that all samples share.
        other: per sample, JSON of what is no tensor, with the places of nested tensors.
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
    """Sorts a call's arguments into those of each sample and those that all share.

    A tensor whose batch dimension is as long as the batch is cut into samples unless the family
    calls it shared; a list as long as the batch is cut as well, be it of tensors; tensors in
    tuples, lists and mappings are taken out of them; None and `return_dict` are dropped.

    Raises:
        UserError: an argument holds something else than tensors, texts and numbers.
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
    """JSON that keeps tuples apart from lists; tensors go to `keep`, by their place.

    Raises:
        UserError: there is something else than tensors, texts and numbers.
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
    """The arguments of a batch.

    Args:
        other: the samples' JSON.
        tensors: argument -> its tensors, joined.
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
    """The value again; its tensors are taken out of `tensors`."""
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
    """What of a row's JSON the other rows of its batch must have too."""
    return {name: value if "all" in value else "each" for name, value in other.items()}


def check(encoded: dict, held: Collection[str]) -> None:
    """ValueError and the like unless it is JSON of `split`, with tensors that are held."""

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
