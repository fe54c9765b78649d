"""Tables: atomic, typed, documented, and never with a value that is not a number."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ppcl import provenance
from ppcl.errors import UserError
from ppcl.storage import schemas, tables

SCHEMA = pa.schema(
    [
        schemas.column("block", pa.int32(), "block"),
        schemas.column("stream", pa.string(), "stream"),
        schemas.column("cka", pa.float64(), "similarity"),
        schemas.column("low", pa.float64(), "lower bound", nan=True),
    ]
)


def frame(**changed) -> pd.DataFrame:
    columns = {"block": [0, 1, 2], "stream": ["image"] * 3, "cka": [1.0, 0.9, 0.8], "low": 0.5}
    return pd.DataFrame({**columns, **changed})


def test_round_trip_casts_and_documents(tmp_path):
    path = tmp_path / "new" / "t.parquet"
    tables.write(path, frame(), SCHEMA, {"seed": "0"})
    table = tables.read(path, SCHEMA)
    assert table.schema.types == SCHEMA.types
    assert table.to_pandas().equals(frame().astype({"block": "int32"}))
    assert tables.provenance(path) == {"seed": "0"}
    assert pq.read_schema(path).field("cka").metadata[b"description"] == b"similarity"


def test_further_columns_are_kept_behind_the_known(tmp_path):
    path = tmp_path / "t.parquet"
    wider = pa.schema([pa.field("extra", pa.int64()), *SCHEMA])
    tables.write(path, frame(extra=1), wider, {})
    assert tables.read(path, SCHEMA).column_names == [*SCHEMA.names, "extra"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_value_that_is_not_a_number_is_refused(tmp_path, value):
    path = tmp_path / "t.parquet"
    tables.write(path, frame(), SCHEMA, {})
    before = path.read_bytes()
    with pytest.raises(UserError) as raised:
        tables.write(path, frame(cka=[1.0, value, 0.8]), SCHEMA, {})
    assert str(path) in str(raised.value) and "column 'cka', row 1" in str(raised.value)
    # The table of an earlier run stays, and nothing lies beside it.
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_missing_string_is_refused(tmp_path):
    with pytest.raises(UserError, match="column 'stream', row 2"):
        tables.write(tmp_path / "t", frame(stream=["image", "text", None]), SCHEMA, {})


def test_nan_stays_nan_where_it_is_allowed(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write(path, frame(low=[0.1, math.nan, 0.2]), SCHEMA, {})
    column = tables.read(path, SCHEMA).column("low")
    assert column.null_count == 0 and math.isnan(column[1].as_py())


@pytest.mark.parametrize("row", [0, 5])
def test_nan_in_a_tensor_names_its_row(tmp_path, row):
    schema = pa.schema([schemas.column("value", pa.fixed_shape_tensor(pa.float32(), [2, 2]), "x")])
    values = np.zeros((6, 2, 2), np.float32)
    values[row, 1, 0] = np.nan
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    with pytest.raises(UserError, match=f"column 'value', row {row} "):
        tables.write(tmp_path / "t", pa.table({"value": column}), schema, {})


def test_row_groups_and_row_numbers_over_them(tmp_path):
    path = tmp_path / "t.parquet"
    with tables.writer(path, SCHEMA, {}) as sink:
        sink.write(frame())
        sink.write(frame().head(1))
        assert not path.exists()
    assert [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(2)] == [3, 1]
    with pytest.raises(UserError, match="row 4 "), tables.writer(path, SCHEMA, {}) as sink:
        sink.write(frame())
        sink.write(frame(cka=[1.0, math.nan, 1.0]))


def test_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), tables.writer(tmp_path / "t", SCHEMA, {}) as sink:
        sink.write(frame())
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_program_error_is_no_user_error(tmp_path):
    with pytest.raises(ValueError, match="missing columns"):
        tables.write(tmp_path / "t", frame().drop(columns="cka"), SCHEMA, {})
    with pytest.raises(ValueError, match="not in schema"):
        tables.write(tmp_path / "t", frame(other=1), SCHEMA, {})


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "t.parquet"
    tables.write(path, frame(), SCHEMA, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    for read in (lambda: tables.read(path, SCHEMA), lambda: tables.provenance(path)):
        with pytest.raises(UserError) as raised:
            read()
        assert str(path) in str(raised.value) and "delete it and rerun" in str(raised.value)


def test_wrong_file(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(UserError, match="no such file"):
        tables.read(path, SCHEMA)
    pq.write_table(pa.table(frame()), path)
    with pytest.raises(UserError, match="t.parquet is not what was written; delete it and rerun"):
        tables.read(path, SCHEMA)
    other = pa.schema([pa.field("block", pa.int64()), *list(SCHEMA)[1:]])
    tables.write(path, frame(), other, {})
    with pytest.raises(UserError, match="t.parquet: column 'block' is int64, not int32"):
        tables.read(path, SCHEMA)
    tables.write(path, frame().drop(columns="stream"), SCHEMA.remove(1), {})
    with pytest.raises(UserError, match="column 'stream' is missing"):
        tables.read(path, SCHEMA)


def test_rows_are_picked_by_row_group(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    with tables.writer(path, SCHEMA, {}) as sink:
        for shift in (0, 10, 20):
            sink.write(frame().assign(block=frame()["block"] + shift))
    whole, asked = tables.read(path).to_pandas(), []
    plain = tables.File.group

    def group(self, number, columns=None):
        asked.append((number, columns))
        return plain(self, number, columns)

    monkeypatch.setattr(tables.File, "group", group)
    wanted = [*frame()["block"][1:], 20 + frame()["block"][0]]
    picked = tables.read(path, SCHEMA, where=("block", wanted)).to_pandas()
    expected = whole[whole["block"].isin(wanted)].reset_index(drop=True)
    pd.testing.assert_frame_equal(picked[expected.columns], expected)
    assert [number for number, columns in asked if columns is None] == [0, 2]
    none = tables.read(path, SCHEMA, where=("block", []))
    assert len(none) == 0 and none.column_names == SCHEMA.names


def test_every_table_of_the_contract_is_listed_and_documented():
    parquet = {path for path in schemas.ARTIFACTS if path.endswith(".parquet")}
    assert parquet == set(schemas.TABLES)
    for schema in schemas.TABLES.values():
        assert all(field.metadata[b"description"] for field in schema)


def test_stamp_is_text_and_knows_its_settings():
    stamp = provenance.stamp({"seed": 3}, tokens=5)
    assert all(isinstance(value, str) for value in stamp.values())
    assert stamp["seed"] == "3" and stamp["tokens"] == "5"
    assert stamp["settings"] == provenance.digest({"seed": 3}) != provenance.digest({"seed": 4})
    assert {"python", "torch", "diffusers", "pyarrow", "commit", "created"} <= set(stamp)


def test_code_digest_follows_imports_and_started_programs(tmp_path):
    package = tmp_path / "ppcl"
    package.mkdir()
    sources = {
        "stage.py": "import numpy\nfrom ppcl import a\nfrom ppcl.b import name",
        "ppcl/a.py": "from . import c",
        "ppcl/b.py": "START = 'd.py'",
        "ppcl/c.py": "import ppcl.a",
        "ppcl/d.py": "",
        "ppcl/unused.py": "",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    before = provenance.code_digest(tmp_path / "stage.py")
    for name, source in sources.items():
        (tmp_path / name).write_text(source + "\n# edited")
        changed = provenance.code_digest(tmp_path / "stage.py") != before
        assert changed == (name != "ppcl/unused.py"), name
        (tmp_path / name).write_text(source)


def test_floats_are_written_without_a_dictionary(tmp_path):
    """Of numbers that never come again it would be as large as the table, and slow."""
    generator, path = np.random.default_rng(0), tmp_path / "t.parquet"
    drawn = generator.standard_normal((64, 16, 16)).astype(np.float32)
    columns = {
        "value": pa.FixedShapeTensorArray.from_numpy_ndarray(drawn),
        "x/a.0": pa.FixedShapeTensorArray.from_numpy_ndarray(drawn.astype(np.float64)),
        "half": pa.FixedShapeTensorArray.from_numpy_ndarray(drawn.astype(np.float16).view("i2")),
        "text": pa.array(["the same"] * 64),
        "low": pa.array(generator.standard_normal(64)),
    }
    table = pa.table(columns)
    tables.write(path, table, table.schema, {})
    assert tables.read(path).equals(table)
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert len(chunks) == len(columns)
    with_one = {name for name, chunk in chunks.items() if chunk.has_dictionary_page}
    assert with_one == {"half.list.element", "text"}
    assert chunks["value.list.element"].total_compressed_size < 1.02 * drawn.nbytes


@pytest.mark.parametrize("names", [["block", "low"], ["low", "block"], ["low"]])
@pytest.mark.parametrize("rows", [(0,), (0, 0), (2, 0), (0, 2)])
def test_row_groups_without_rows(tmp_path, names, rows):
    """Their columns of floats have no bytes in the file."""
    path, schema = tmp_path / "t.parquet", pa.schema([SCHEMA.field(name) for name in names])
    whole = frame()[names]
    with tables.writer(path, schema, {"seed": "0"}) as sink:
        for count in rows:
            sink.write(whole[:count])
    assert len(tables.read(path, schema)) == sum(rows)
    assert tables.File(path).group(0).num_rows == rows[0]
    content = path.read_bytes()
    for changed in (content[:4] + b"x" + content[4:], content[:-12] + b"x" + content[-12:]):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="t.parquet"):
            tables.read(path, schema)
