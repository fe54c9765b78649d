"""diffusers' conversion of other programs' files, run backwards.

`from_single_file` turns a file with the names of a model's authors into a model of diffusers: it
renames tensors, cuts some along their rows (queries, keys and values of one matrix), and swaps
halves of others (shift and scale). No table of the way back is kept here. The converter itself is
run on tensors of numbered rows under the authors' names, as far as the registry tells them; where
a number comes out tells which row of which tensor goes there, and so the way back. It is used only
if every row of the model comes out once: then reading gives the model to the bit.

How many rows a tensor has is not known beforehand. A first run, on empty tensors that remember
their names, tells what is made of each; it has as many rows as those have together.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.transformer.original_files import SAME, OriginalFiles

Shape = tuple[int, ...]
Names = Mapping[str, Tensor]
Converter = Callable[[dict[str, Tensor]], Names]

_MANY = 720_720 * 64  # rows of a tensor that is cut before its size is known, into any few parts


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop`, exclusive, of a tensor of diffusers."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Original:
    """A tensor of the authors' file: its shape, and the rows that it is made of, in order."""

    shape: Shape
    parts: tuple[Rows, ...]


def names_of(files: OriginalFiles, shapes: Iterable[str]) -> list[str]:
    """All names that the authors' file of such a model may have.

    Args:
        shapes: names of the model's own tensors, which tell the numbers of blocks.
    """
    own = list(shapes)
    if files.names == SAME:
        return own
    names: dict[str, None] = {}
    for template in files.names:
        for name in _alternatives(template):
            lists = re.findall(r"<(.+?)>", name)
            if not lists:
                names[name] = None
            for number in range(_length(lists[0], own) if lists else 0):
                names[name.replace(f"<{lists[0]}>", str(number))] = None
    return list(names)


def _alternatives(template: str) -> list[str]:
    """A template without braces, once for each of what they enclose."""
    inner = re.search(r"\{([^{}]*)\}", template)
    if inner is None:
        return [template]
    before, after = template[: inner.start()], template[inner.end() :]
    return [name for one in inner[1].split(",") for name in _alternatives(f"{before}{one}{after}")]


def _length(blocks: str, names: Iterable[str]) -> int:
    """Number of blocks of a list, by the highest number in the names of its tensors."""
    number = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    return 1 + max((int(hit[1]) for hit in map(number.match, names) if hit), default=-1)


def backwards(
    files: OriginalFiles, convert: Converter, shapes: Mapping[str, Shape]
) -> dict[str, Original]:
    """The authors' file of a model: its tensors' names, and what each is made of.

    Args:
        files: what the registry knows of the model's class.
        convert: diffusers' converter of the class; gets its own dict, which it may empty.
        shapes: name -> shape of the model's tensors.

    Raises:
        UserError: diffusers would read no such model from a file; says why.
    """
    names = names_of(files, shapes)
    read = _unchanged if set(names) == set(shapes) else convert  # as from_single_file does
    made = _sources(names, read, shapes)
    return _inverted(made, read, shapes)


def _unchanged(named: dict[str, Tensor]) -> Names:
    return named


# ---- which tensor becomes which


class _Named(Tensor):
    """An empty vector that remembers the names of what it was made from."""

    names: frozenset[str]

    @classmethod
    def of(cls, rows: int, names: Iterable[str]) -> "_Named":
        vector = torch.empty(max(rows, 0), device="meta").as_subclass(cls)
        vector.names = frozenset(names)
        return vector

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = [*itertools.chain.from_iterable(map(_vectors, args))]
        names = frozenset[str]().union(*(vector.names for vector in made))
        if func in (torch.split, Tensor.split) and not isinstance(args[1], int):
            return tuple(cls.of(rows, names) for rows in args[1])  # whatever they add up to
        result = super().__torch_function__(func, types, args, kwargs or {})
        for vector in _vectors(result):
            vector.names = names
        return result


def _vectors(value: Any) -> list[_Named]:
    """Those that a value is, or holds."""
    if isinstance(value, (list, tuple)):
        return [vector for each in value for vector in _vectors(each)]
    return [value] if isinstance(value, _Named) else []


def _sources(
    names: list[str], read: Converter, shapes: Mapping[str, Shape]
) -> dict[str, list[str]]:
    """Authors' name -> names of the model's tensors that are made of it; those alone that this
    model has."""
    known = set(names)
    while True:
        read_as = _read({name: _Named.of(_MANY, [name]) for name in names}, read, known)
        made: dict[str, list[str]] = {name: [] for name in names}
        for target, vector in read_as.items():
            sources: frozenset[str] = getattr(vector, "names", frozenset())
            if len(sources) > 1 and target in shapes:
                raise UserError(f"{target!r} is made of several tensors: {sorted(sources)}")
            for source in sources:
                made[source].append(target)
        kept = [name for name in names if any(target in shapes for target in made[name])]
        if len(kept) == len(names):
            break
        names = kept
    missing = shapes.keys() - itertools.chain.from_iterable(made.values())
    if missing:
        raise UserError(
            f"no file with the authors' names gives its tensor {min(missing)!r}, one of "
            f"{len(missing)} such: diffusers has no way to read it"
        )
    return made


def _read(named: dict[str, Tensor], read: Converter, known: set[str]) -> Names:
    """What a converter makes; UserError where it stops."""
    given = set(named)
    try:
        return read(dict(named))
    except KeyError as error:
        (asked,) = error.args
        if asked in known and asked not in given:
            why = f"diffusers drops {asked!r} when it reads such a file, so nobody can write it"
        else:
            why = f"diffusers asks such a file for {asked!r}, and this model has nothing of it"
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        why = f"diffusers reads such a file of other sizes alone ({str(error).splitlines()[0]})"
    raise UserError(why)


# ---- which row becomes which


def _inverted(
    made: Mapping[str, list[str]], read: Converter, shapes: Mapping[str, Shape]
) -> dict[str, Original]:
    """As `backwards`, from what is made of each tensor."""
    sizes = {name: _joined(name, targets, shapes) for name, targets in made.items()}
    named, first = {}, {}
    count = 0
    for name, shape in sizes.items():
        first[name], rows = count, _rows(shape)
        numbers = torch.arange(count, count + rows)
        named[name] = numbers.view(*shape[:1], *[1] * (len(shape) - 1))
        count += rows
    read_as = _read(named, read, set(made))
    place = torch.full((count,), -1)  # of a row of the file: its number among the model's
    starts, at = [], 0
    for target, shape in shapes.items():
        numbers = read_as[target].reshape(-1)
        if len(numbers) != _rows(shape) or read_as[target].ndim != len(shape):
            raise UserError(
                f"diffusers reads {target!r} from such a file with {len(numbers)} rows, and this "
                f"model has {_rows(shape)}: it reads files of other sizes alone"
            )
        place[numbers] = torch.arange(at, at + len(numbers))
        starts.append(at)
        at += len(numbers)
    if at != count or bool((place < 0).any()):
        raise UserError("diffusers reads some rows of such a file twice, or not at all")
    runs = _Runs(list(shapes), torch.tensor(starts))
    return {
        name: Original(shape, runs.of(place[first[name] : first[name] + _rows(shape)]))
        for name, shape in sizes.items()
    }


def _joined(name: str, targets: list[str], shapes: Mapping[str, Shape]) -> Shape:
    """Shape of a tensor of which others are made."""
    own = [shapes[target] for target in targets if target in shapes]
    if len(own) < len(targets) or len({shape[1:] for shape in own}) > 1:
        raise UserError(f"what diffusers makes of {name!r} is not what this model has: {targets}")
    return (sum(map(_rows, own)), *own[0][1:]) if own[0] else ()


def _rows(shape: Shape) -> int:
    return shape[0] if shape else 1


@dataclass(frozen=True)
class _Runs:
    """The model's tensors, one after the other: their names, and the number of each one's first
    row."""

    names: list[str]
    starts: Tensor

    def of(self, places: Tensor) -> tuple[Rows, ...]:
        """Numbers of rows, as runs of rows that follow each other in one tensor."""
        breaks = (places.diff() != 1) | torch.isin(places[1:], self.starts)
        begins = torch.cat([torch.tensor([0]), breaks.nonzero().flatten() + 1])
        ends = torch.cat([begins[1:], torch.tensor([len(places)])])
        holders = torch.searchsorted(self.starts, places[begins], right=True) - 1
        return tuple(
            Rows(self.names[holder], row, row + end - begin)
            for holder, row, begin, end in zip(
                holders.tolist(),
                (places[begins] - self.starts[holders]).tolist(),
                begins.tolist(),
                ends.tolist(),
                strict=True,
            )
        )
