"""Files that others made: each is read, or ends in one error with its name."""

import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.storage import untrusted


def packed(header, data: bytes = b"") -> bytes:
    """A safetensors file of a header, given as an object or as its text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(read, path) -> str:
    with pytest.raises(UserError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


def test_a_header_tells_of_every_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    held = {"b": tensor([2], 4, 12), "a": tensor([], 0, 4), "none": tensor([0, 3], 4, 4)}
    held["half"] = tensor([3], 12, 18, "BF16")
    held["quarter"] = tensor([4], 18, 20, "F4")
    path.write_bytes(packed(held | {"__metadata__": {"format": "pt"}}, bytes(20)))
    assert untrusted.safetensors_header(path) == held
    path.write_bytes(packed(json.dumps(held) + "   ", bytes(20)))
    assert untrusted.safetensors_header(path) == held


@pytest.mark.parametrize(
    "header",
    [
        [],
        7,
        "[" * 100_000 + "]" * 100_000,
        '{"a": ' * 2_000 + "1" + "}" * 2_000,
        "{",
        {"a": None},
        {"a": {}},
        {"a": {"data_offsets": [0, 8]}},
        {"a": tensor([2], 0, "8")},
        {"a": tensor([2], False, 8)},
        {"a": tensor([2], -8, 8)},
        {"a": tensor([2], 8, 0)},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e400]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, %s]}}' % ("9" * 5_000),
        {"a": tensor([10**30] * 4, 0, 8)},
        {"a": tensor([2**62] * 50_000, 0, 8)},
        {"a": tensor("ab", 0, 8)},
        {"a": tensor([True, 2], 0, 8)},
        {"a": tensor([3], 0, 8)},
        {"a": tensor([2], 0, 8, "F33")},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": tensor([1], 4, 8)},
        {"a": tensor([1], 0, 4)},
        {"a": tensor([1], 0, 4), "b": tensor([2], 0, 8)},
        {"a": tensor([2], 0, 8), "b": tensor([1], 4, 8)},
        {"a": tensor([2], 0, 8), "__metadata__": {"format": 7}},
        {"a": tensor([2], 0, 8), "__metadata__": []},
        '{"a": %s, "a": %s}' % ((json.dumps(tensor([2], 0, 8)),) * 2),
        '{"\\u0000\\n": {}}',
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_broken_header_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(header, bytes(8)))
    refused(untrusted.safetensors_header, path)


def test_a_header_must_end_within_its_file_and_the_formats_limit(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"", b"\0" * 7, struct.pack("<Q", 2**64 - 1), packed({"a": 1})[:-1]):
        path.write_bytes(content)
        assert "truncated" in refused(untrusted.safetensors_header, path)
    path.write_bytes(struct.pack("<Q", untrusted.HEADER_LIMIT + 1))
    os.truncate(path, 8 << 30)  # takes no room
    assert "larger than 100 MB" in refused(untrusted.safetensors_header, path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_accepted_the_format_accepts_too(tmp_path_factory, data):
    """Single bytes of a good file are changed, or the file is cut."""
    from safetensors import SafetensorError, safe_open

    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    whole = packed({"a": tensor([2], 0, 8), "b": tensor([1, 1], 8, 10, "F16")}, bytes(10))
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed[: data.draw(st.integers(len(whole) - 2, len(whole)))])
    try:
        ours = untrusted.safetensors_header(path).keys()
    except UserError:
        return
    try:
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == ours
    except SafetensorError as error:
        pytest.fail(f"accepted, but {error}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "one object"),
        (b"5", "one object"),
        (b"null", "one object"),
        (b"", "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "one object"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "at most 64"),
    ],
)
def test_a_file_that_is_not_an_object_is_refused(tmp_path, content, expected):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert expected in refused(untrusted.json_object, path)


def test_a_file_too_large_to_be_json_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"{}")
    assert untrusted.json_object(path) == {}
    os.truncate(path, 8 << 30)
    assert "larger than 32 MiB" in refused(untrusted.json_object, path)


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        for read in (untrusted.json_object, untrusted.safetensors_header):
            assert "not a regular file" in refused(read, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        untrusted.json_object(tmp_path / "gone")
