"""The language of calls' tensor columns: names are parsed and made by one class, without loss."""

import math

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.transformer import call_tables
from ppcl.transformer.call_columns import CallColumn, Held, inside, outermost
from support import tiny

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.uint8]
PARTS = st.text(st.characters(codec="utf-8", exclude_characters="/@\0"), min_size=1, max_size=6)
ARGUMENTS = st.lists(PARTS, min_size=1, max_size=3).map(".".join)


@st.composite
def columns(pick):
    """Any column that there can be."""
    argument = pick(ARGUMENTS.filter(lambda name: name[0] not in "=*"))
    shape = tuple(pick(st.lists(st.integers(1, 10**6), max_size=4)))
    held = pick(st.sampled_from(Held))
    dim = pick(st.integers(0, 12)) if held is Held.STACKED else 0
    return CallColumn(argument, shape, pick(st.sampled_from(DTYPES)), held, dim)


@given(columns())
def test_every_column_is_that_of_its_name(column):
    assert CallColumn.parse(column.name) == column


@given(st.text("=*@/x.a0123float", max_size=16) | st.sampled_from(["", "=x/2/float32"]))
def test_a_name_is_refused_or_is_that_of_its_column(name):
    try:
        column = CallColumn.parse(name)
    except ValueError:
        return
    assert column.name == name


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("hidden_states/16x4/bfloat16", CallColumn("hidden_states", (16, 4), torch.bfloat16)),
        ("timestep//float32", CallColumn("timestep", (), torch.float32)),
        ("=x/4x8/int16", CallColumn("x", (4, 8), torch.int16, Held.SHARED)),
        ("*x/7x32/float32", CallColumn("x", (7, 32), torch.float32, Held.LISTED)),
        ("x@1/2x5/bool", CallColumn("x", (2, 5), torch.bool, batch_dim=1)),
        ("=a.0/3/uint8", CallColumn(inside("a", 0), (3,), torch.uint8, Held.SHARED)),
    ],
)
def test_names_that_files_have(name, column):
    assert CallColumn.parse(name) == column and column.name == name
    assert outermost(column.argument) == column.argument.split(".")[0]
    column.check(pa.field(name, column.arrow_type))
    with pytest.raises(ValueError, match=f"column '.*' is {pa.int64()}"):
        column.check(pa.field(name, pa.int64()))


@pytest.mark.parametrize(
    "name",
    ["", "x", "x/2", "/2/float32", "x/2/int8", "x/2x/float32", "x/02/float32", "x/0/float32"]
    + ["x@0/2/float32", "=x@1/2/float32", "*x@1/2/float32", "==x/2/float32", "x/2/float32/"]
    + ["x/2/zeros", "x/2/Float32", "a/b/2/float32", "x@/2/float32", "x/2/float32\n"],
)
def test_what_is_no_column(name):
    with pytest.raises(ValueError, match=r"column '|can't have a batch dimension 1"):
        CallColumn.parse(name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"argument": "a/b"}, "can't be the name"),
        ({"argument": "=a"}, "can't be the name"),
        ({"argument": ""}, "can't be the name"),
        ({"dtype": torch.complex64}, "of torch.complex64, which can't be recorded"),
        ({"shape": (2, 0)}, r"of shape \[2, 0\], which holds nothing"),
        ({"batch_dim": -1}, "can't have a batch dimension -1"),
        ({"held": Held.LISTED, "batch_dim": 1}, "can't have a batch dimension 1"),
    ],
)
def test_a_column_without_a_name_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        CallColumn(**{"argument": "a", "shape": (2,), "dtype": torch.float32} | wrong)


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 3))
def test_tensors_come_back_to_the_bit(dtype, shape, rows):
    content = torch.arange(rows * math.prod(shape)).reshape(rows, *shape)
    tensor = content.to(dtype)
    column = CallColumn("x", tuple(shape), dtype)
    array = column.to_arrow(tensor)
    assert array.type == column.arrow_type and len(array) == rows
    back = column.to_torch(array)
    assert back.dtype == dtype and torch.equal(back, tensor)


def test_a_batch_is_put_together_as_the_column_says():
    one, other = torch.arange(6).view(2, 3), torch.arange(6, 12).view(2, 3)

    def joined(**more):
        return CallColumn("x", (2, 3), torch.int64, **more).joined([one, other])

    assert torch.equal(joined(), torch.stack([one, other]))
    assert joined(batch_dim=1).shape == (2, 2, 3)
    assert torch.equal(joined(batch_dim=2)[..., 1], other)
    assert joined(held=Held.SHARED) is one
    assert joined(held=Held.LISTED) == [one, other]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.complex64)}, "'x' is of torch.complex64"),
        ({"x": torch.ones(2, 0)}, r"'x' is of shape \[0\], which holds nothing"),
        ({"more": {"a/b": torch.ones(2, 3)}}, "'more.a/b' can't be the name"),
    ],
)
def test_a_tensor_that_no_column_can_hold_is_refused(arguments, says):
    with pytest.raises(UserError, match=f"can't be recorded yet: {says}"):
        call_tables.to_tables(arguments, torch.ones(2, 1), tiny.places(2))
