"""The safetensors reader and writer, against the reference package and against damage."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tiny_hf

from lemur_jax.convert import safetensors
from lemur_jax.convert.disk import DiskFile
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.stored import whole

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "half": np.array([1.5, -0.0, np.inf, 65504], np.float16),
    "brain": np.array([[1.5, -3e38], [np.nan, 0]], ml_dtypes.bfloat16),
    "scalar": np.array(3.25, np.float64),
    "nothing": np.zeros((0, 5), np.float32),
    "whole": np.array([-1, 2**62], np.int64),
    "truth": np.array([True, False, True]),
}


def put(directory, arrays, max_shard_bytes):
    planned = [safetensors.Planned(n, a.shape, a.dtype) for n, a in arrays.items()]
    files, index = safetensors.layout(directory, planned, max_shard_bytes)
    if index is not None:
        (directory / safetensors.INDEX).write_text(index)
    for file in files:
        file.path.write_bytes(file.header)
        os.truncate(file.path, file.size)
        opened = DiskFile(file.path)
        for tensor in reversed(file.tensors):  # any order
            tensor.write(opened, whole(tensor.shape), arrays[tensor.name])
        opened.close()


def test_reads_what_the_package_writes(tmp_path):
    """Red when `_entry` gives `data_start + start + 1` or maps BF16 to float16."""
    package = pytest.importorskip("safetensors.numpy", reason="the reference writer (extra: test)")
    path = tmp_path / "a.safetensors"
    package.save_file(ARRAYS, path)
    header = safetensors.read_header(path)
    assert set(header) == set(ARRAYS)
    for name, array in ARRAYS.items():
        found = header[name].read()
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("max_shard_bytes", [1, 40, 10**9])
def test_the_package_reads_what_we_write(tmp_path, max_shard_bytes):
    """Red when `_shard_file` forgets the 8 length bytes or a shard is cut one tensor too late."""
    package = pytest.importorskip("safetensors.numpy", reason="the reference reader (extra: test)")
    put(tmp_path, ARRAYS, max_shard_bytes)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        part = package.load_file(path)
        assert sum(a.nbytes for a in part.values()) <= max_shard_bytes or len(part) == 1
        found |= part
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in ARRAYS.items()}
    assert {n: a.dtype for n, a in found.items()} == {n: a.dtype for n, a in ARRAYS.items()}
    index = tmp_path / "model.safetensors.index.json"
    if max_shard_bytes == 10**9:
        assert not index.exists() and (tmp_path / "model.safetensors").exists()
    else:
        content = json.loads(index.read_text())
        assert set(content["weight_map"]) == set(ARRAYS)
        assert content["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
        for name, file in content["weight_map"].items():
            assert name in safetensors.read_header(tmp_path / file)


def test_writer_says_format_pt(tmp_path):
    """Red when the metadata is left out: old transformers refuse such a file."""
    put(tmp_path, {"a": np.zeros(2)}, 100)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 8)}, b"1234", ["truncated", "expected", "found"]),
        ({"a": entry(0, 8)}, b"12345678x", ["1 too many"]),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, ["'b'", "overlaps", "'a'"]),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20, ["'b'", "hole after", "'a'"]),
        ({"a": entry(0, 12)}, b"x" * 12, ["'a'", "8 bytes", "span 12"]),
        ({"a": entry(0, 8, dtype="F33")}, b"x" * 8, ["'a'", "'F33'", "known: F64, F32"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8, ["'a'", "malformed"]),
        ({"a": entry(0, 8, shape=(-2,))}, b"x" * 8, ["'a'", "malformed", "-2"]),
        ({"a": entry(-8, 0)}, b"x" * 8, ["'a'", "malformed"]),
        (b'{"a": [1, ', b"", ["header is not valid JSON"]),
        (b"[1, 2]", b"", ["header is a list"]),
        (b'{"a":{"x":1},"a":{"x":2}}', b"", ["'a' appears twice"]),
        (b"\xff\xfe{}", b"", ["not valid JSON"]),
    ],
)
def test_damage_is_named(tmp_path, header, data, words):
    """Red when the check that each case is named after is deleted."""
    path = tmp_path / "bad.safetensors"
    tiny_hf.write_raw(path, header, data)
    with pytest.raises(ConversionError) as caught:
        safetensors.read_header(path)
    for word in (*words, str(path)):
        assert word in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 8, 20])
def test_truncated_in_the_header(tmp_path, size):
    """Red when the header length is not compared with the file size."""
    path = tmp_path / "bad.safetensors"
    tiny_hf.write_file(path, {"a": np.zeros(3, np.float32)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConversionError, match=rf"truncated.*the file has {size}"):
        safetensors.read_header(path)


def test_an_absurd_header_length_is_not_allocated(tmp_path):
    """Red when the length is read without looking at the file size first."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConversionError, match=str(2**62 + 8)):
        safetensors.read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    """Red when `_pread` trusts the header and returns uninitialised memory."""
    path = tmp_path / "bad.safetensors"
    tiny_hf.write_file(path, {"a": np.zeros(100, np.float32)})
    tensor = safetensors.read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConversionError, match="truncated: a needs byte 507, the file ends at 503"):
        tensor.read()
