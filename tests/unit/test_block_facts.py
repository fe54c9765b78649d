"""record/blocks.parquet says of a teacher's blocks what its transformer does."""

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.storage import schemas, tables
from ppcl.transformer import block_facts, blocks, families
from ppcl.transformer.block_facts import BlockFacts
from ppcl.transformer.family import Family
from support import tiny


@st.composite
def facts(pick):
    depth = pick(st.integers(1, 6))

    def each(values):
        return pick(st.lists(values, min_size=depth, max_size=depth))

    numbers = st.integers(0, depth - 1)
    return BlockFacts(
        each(st.sampled_from(["transformer_blocks", "single_transformer_blocks"])),
        sorted({0, *pick(st.lists(numbers))}),
        pick(st.dictionaries(numbers, st.text("why ü,'", min_size=1))),
        each(st.integers(0, 2**40)),
        pick(st.integers(0, 2**50)),
    )


@settings(deadline=None)
@given(facts())
def test_facts_come_back_from_the_file(tmp_path_factory, told):
    path = tmp_path_factory.getbasetemp() / "facts.parquet"
    block_facts.write(path, told, {"seed": "0"})
    assert block_facts.read(path) == told
    assert tables.provenance(path)["seed"] == "0"


def test_facts_are_those_of_the_transformer(monkeypatch):
    name, model = "QwenImageTransformer2DModel", tiny.transformer(3)
    reasons = {("transformer_blocks", -1): "the test says so"}
    entry = Family(families.FAMILIES[name].lists, untouchable=reasons)
    monkeypatch.setitem(families.FAMILIES, name, entry)
    told = blocks.facts(model)
    size = sum(p.numel() for p in model.transformer_blocks[0].parameters())
    whole = sum(p.numel() for p in model.parameters())
    names = ["transformer_blocks"] * 3
    assert told == BlockFacts(names, [0], {2: "the test says so"}, [size] * 3, whole)
    assert json.dumps(told.seams + told.parameters)  # plain numbers


@pytest.mark.parametrize(
    ("numbers", "provenance"),
    [
        ([], {"transformer_parameters": "9"}),
        ([0, 2], {"transformer_parameters": "9"}),
        ([0, 1], {}),
        ([0, 1], {"transformer_parameters": "many"}),
    ],
)
def test_a_table_without_the_facts_is_named(tmp_path, numbers, provenance):
    path = tmp_path / "blocks.parquet"
    table = {"block": numbers, "list": "b", "seam": False, "untouchable": "", "parameters": 1}
    tables.write(path, pd.DataFrame(table), schemas.BLOCK_FACTS, provenance)
    with pytest.raises(UserError, match=r"blocks\.parquet: holds no facts of blocks .* delete it"):
        block_facts.read(path)
