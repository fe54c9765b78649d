"""Bad inputs for everything that reads: bytes, texts, and well-sealed files of the wrong content.

A target is called with bytes; it either reads them as what they are or raises UserError. Everything
else is a bug: another exception, a hang, or damage that passes.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import yaml
from hypothesis import strategies as st

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.extraction import token_table
from ppcl.pruning import selection_file
from ppcl.storage import schemas, tables, tensors, texts
from ppcl.teacher import prompts
from ppcl.transformer import call_tables, calls

# ---- readers, by the name of the file that they read


def read_tokens(path: Path) -> None:
    reader = token_table.TokenReader(path)
    for stream in reader.streams:
        first = reader.heldout(stream)
        for boundary in range(reader._first[stream], reader.boundaries):
            assert len(reader.values(boundary, stream)) == len(first)
    tables.read(path)


def read_calls(path: Path) -> None:
    reader = calls.Reader(path)
    for bucket in reader.buckets:
        batch = reader.batch(bucket[:2])
        assert len(batch) == len(bucket[:2])


READERS = {
    "calls.parquet": read_calls,
    "tokens.parquet": read_tokens,
    "intervals.parquet": lambda path: tables.read(path, schemas.INTERVALS),
    "start.safetensors": tensors.read,
    "selection.json": selection_file.read,
    "prompts.csv": prompts.read,
    "prompts.txt": prompts.read,
    "prompts.jsonl": prompts.read,
    "config.yaml": config.load,
}
SEALED = [name for name in READERS if name.endswith((".parquet", ".safetensors", ".json"))]


def refused(name: str, path: Path) -> bool:
    """Whether the reader of this file refuses it, which must be by a UserError of one line."""
    try:
        READERS[name](path)
    except UserError as error:
        assert path.name in str(error) and str(error).strip()
        return True
    return False


# ---- damage


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """What a disk, a copy or an editor may leave of a file: never the content itself."""
    size = len(content)
    place = st.integers(0, size - 1)

    def changed(pairs) -> bytes:
        edited = bytearray(content)
        for at, value in pairs:
            edited[at] = value
        return bytes(edited)

    def zeroed(pair) -> bytes:
        start, end = pair[0], min(sum(pair), size)
        return content[:start] + bytes(end - start) + content[end:]

    return st.one_of(
        place.map(lambda end: content[:end]),
        place.map(lambda start: content[start:] if start else b""),
        st.tuples(place, st.binary(min_size=1, max_size=20)).map(
            lambda pair: content[: pair[0]] + pair[1] + content[pair[0] :]
        ),
        st.tuples(place, st.integers(1, 200)).map(
            lambda pair: content[: pair[0]] + content[pair[0] + pair[1] :]
        ),
        st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8).map(changed),
        st.tuples(place, st.integers(1, 4096)).map(zeroed),
        st.binary(max_size=200),
        st.binary(min_size=1, max_size=200).map(lambda more: content + more),
    ).filter(lambda left: left != content)


# ---- wrong content in whole files

_NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
_TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=8,
)


def mutated(value, keys=()):
    """JSON like `value`, with some parts replaced or removed, or added under one of `keys`."""

    @st.composite
    def draw(pick):
        edited = json.loads(json.dumps(value))
        for _ in range(pick(st.integers(1, 3))):
            where, parent, key = edited, None, None
            while isinstance(where, (dict, list)) and where and pick(st.integers(0, 3)):
                parent = where
                choices = sorted(where) if isinstance(where, dict) else range(len(where))
                key = pick(st.sampled_from(choices))
                where = where[key]
            if parent is None:
                continue
            if pick(st.integers(0, 3)) == 0:
                del parent[key]
            elif isinstance(parent, dict) and pick(st.integers(0, 4)) == 0:
                parent[pick(st.text(max_size=8) | st.sampled_from(["", *keys]))] = pick(JSON)
            else:
                parent[key] = pick(JSON)
        return edited

    return draw()


def column(kind: str, rows: int, number: int) -> pa.Array:
    """Any column, some of them odd."""
    made = {
        "int32": lambda: pa.array(np.full(rows, number, np.int32)),
        "int64": lambda: pa.array(np.full(rows, number, np.int64)),
        "float64": lambda: pa.array(np.full(rows, float(number))),
        "bool": lambda: pa.array(np.arange(rows) % 2 == 0),
        "string": lambda: pa.array(["image" if number else "{}"] * rows),
        "tensor": lambda: tensor_column(rows, abs(number) % 3 + 1),
        "nulls": lambda: pa.nulls(rows, pa.int32()),
    }
    return made[kind]()


def tensor_column(rows: int, width: int) -> pa.Array:
    values = pa.array(np.ones(rows * width, np.float32))
    storage = pa.FixedSizeListArray.from_arrays(values, width)
    kind = pa.fixed_shape_tensor(pa.float32(), [width])
    return pa.ExtensionArray.from_storage(kind, storage)


@st.composite
def odd_tables(pick, schema: pa.Schema, further: tuple[str, ...]):
    """A table that has some columns of a schema, of its types or of others."""
    rows = pick(st.integers(0, 3))
    kinds = ("int32", "int64", "float64", "bool", "string", "tensor", "nulls")
    of_type = {
        pa.int32(): "int32",
        pa.int64(): "int64",
        pa.float64(): "float64",
        pa.bool_(): "bool",
        pa.string(): "string",
    }
    columns = {}
    for field in schema:
        choice = pick(st.integers(0, 15))
        right = of_type.get(field.type, "tensor")
        kind = right if choice > 1 else pick(st.sampled_from(kinds))
        if choice:
            columns[field.name] = column(kind, rows, pick(st.integers(-2, 3)))
    for name in further:
        if pick(st.booleans()):
            columns[name] = column(pick(st.sampled_from(kinds)), rows, pick(st.integers(0, 3)))
    if "arguments" in columns and pick(st.booleans()):
        texts_ = [json.dumps(pick(JSON | ARGUMENTS)) for _ in range(rows)]
        columns["arguments"] = pa.array(texts_, pa.string())
    return pa.table(columns) if columns else pa.table({"a": pa.array([1])})


ARGUMENTS = st.dictionaries(
    st.sampled_from(["img_shapes", "guidance", "output"]),
    st.dictionaries(
        st.sampled_from(["all", "each", "tensor"]),
        JSON | st.just({"tensor": "nowhere"}) | st.just({"tuple": 3}) | st.just({"mapping": [1]}),
        max_size=2,
    ),
    max_size=3,
)
FURTHER = {
    "calls.parquet": (
        "output/2/float32",
        "=x/2/float32",
        "output/2/bogus",
        "output",
        "a/b/c/d",
        "x/2x/float32",
    ),
    "tokens.parquet": ("extra",),
    "intervals.parquet": ("extra",),
}
TABLES = {
    "calls.parquet": schemas.CALLS,
    "tokens.parquet": schemas.tokens(2),
    "intervals.parquet": schemas.INTERVALS,
}


def write_table(path: Path, table: pa.Table, provenance: dict) -> None:
    """Writes any table, sealed, as one row group per row or as one."""
    schema = pa.schema(
        [pa.field(f.name, f.type, metadata={b"nan": b"allowed"}) for f in table.schema]
    )
    with tables.writer(path, schema, provenance) as out:
        for row in range(len(table)) if provenance.get("split") else ():
            out.write(table.slice(row, 1))
        if len(table) and not provenance.get("split"):
            out.write(table)


WIDTHS = st.fixed_dictionaries(
    {},
    optional={
        "widths": JSON.map(json.dumps) | st.just('{"image": 2}') | st.just("{"),
        "split": st.just("yes"),
    },
)


def write_config(path: Path, value) -> None:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")


@st.composite
def odd_tensors(pick):
    """Tensors and metadata that are no students."""
    shapes = st.lists(st.integers(0, 3), max_size=3)
    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
    kinds = st.sampled_from([torch.float32, torch.int64, torch.bfloat16, torch.bool])
    return {
        name: torch.zeros(pick(shapes), dtype=pick(kinds))
        for name in pick(st.lists(names, max_size=4, unique=True))
        if name != "__metadata__"
    }


def example(folder: Path) -> dict[str, bytes]:
    """A whole file of every kind."""
    interval = pd.DataFrame(
        [(0, 1, 1, 0.9, True, "cheapest", "", "trend", 0.1, 0.0)], columns=schemas.INTERVALS.names
    )
    arguments = {
        "x": torch.ones(3, 2),
        "scale": 1.0,
        "shapes": [[(1, 2)]] * 3,
        "pair": (1, torch.ones(2)),
    }
    rows = {
        "sample": [0, 1, 2],
        "prompt_index": [0, 1, 2],
        "prompt": ["a", "b", "c"],
        "seed": [0, 1, 2],
        "kind": ["pipeline"] * 3,
        "step": [0] * 3,
        "branch": [0] * 3,
        "timestep": [1.0] * 3,
        "sigma": [0.5] * 3,
        "heldout": [False, True, False],
    }
    made = call_tables.to_tables(arguments, torch.ones(3, 2), rows)
    call_tables.write(folder / "calls.parquet", [t.schema for t in made], made, {})
    sample = {
        "value": np.ones((3, 4, 2), np.float32),
        **{name: np.zeros(4, int) for name in ("prompt", "step", "token")},
        "timestep": np.zeros(4),
        "heldout": np.zeros(4, bool),
    }
    token_table.write_sample(folder / "tokens.parquet", {"image": sample}, {})
    tables.write(folder / "intervals.parquet", interval, schemas.INTERVALS, {})
    tensors.write(folder / "start.safetensors", {"00-01/w": torch.ones(3)}, {"seed": "0"})
    texts.write_sealed(folder / "selection.json", SELECTION)
    (folder / "prompts.csv").write_text('prompt,digit\n"a, b",3\nc,4\n')
    (folder / "prompts.txt").write_text("a red 1\na blue 2\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "digit": 3}\n{"prompt": "b"}\n')
    write_config(folder / "config.yaml", CONFIG)
    return {name: (folder / name).read_bytes() for name in READERS}


PART = {"first": 0, "last": 1, "linear_ffn": ["text"], "text": "own", "source": None}
UNIT = {
    "name": "00-01",
    "removed_blocks": 1,
    "saved_parameters": 5,
    "required": False,
    "saved_seconds": None,
    "new_blocks": [PART],
}
SELECTION = {"transformer_parameters": 100, "blocks": 5}
SELECTION |= {"units": [UNIT], "distilled": [UNIT], "closed": [UNIT]}
CONFIG = config.complete({"variants": [{"name": "p", "budget": 0.5}]}, "example")
