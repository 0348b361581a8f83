"""Safetensors files: exact round trips, agreement with the reference package, broken files."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.converters import (
    CheckpointError,
    dtypes,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)

ARRAYS = st.builds(
    lambda dtype, shape, seed: random_bits(dtype, tuple(shape), seed),
    st.sampled_from(dtypes.names()),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 2**32 - 1),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bit pattern, NaNs with payload too; booleans only as 0 and 1."""
    numpy_dtype = dtypes.storage_dtype(dtype)
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * numpy_dtype.itemsize)
    values = np.frombuffer(raw, np.uint8)
    if dtype == "bool":
        values = values & 1
    return values.view(numpy_dtype).reshape(shape)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, dtype: str = "U8", shape: object = None) -> dict[str, object]:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(NAMES, ARRAYS, max_size=5),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("aé\n"), max_size=3),
)
def test_any_tensors_and_metadata_come_back_bit_for_bit(tensors, metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.safetensors")
        save_checkpoint(path, tensors, metadata=metadata, ties=())
        assert_same_bits(load_checkpoint(path), tensors)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.metadata == metadata
            assert (checkpoint.format, checkpoint.key, checkpoint.ties) == ("safetensors", None, [])


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text("abc._é", min_size=1, max_size=9), ARRAYS, max_size=5))
def test_the_reference_package_accepts_what_is_written(tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.safetensors")
        save_checkpoint(path, tensors, metadata={"format": "pt"}, ties=())
        found = dict(safetensors.deserialize(Path(path).read_bytes()))
        assert set(found) == set(tensors)
        for name, array in tensors.items():
            assert found[name]["dtype"] == dtypes.to_code(array.dtype)
            assert tuple(found[name]["shape"]) == array.shape
            assert bytes(found[name]["data"]) == array.tobytes()


def test_files_of_the_reference_package_are_read(tmp_path):
    names = ["float64", "float32", "float16", "int64", "uint8", "bool", "complex64", "bfloat16"]
    tensors = {name: random_bits(name, (3, 2), 7) for name in names}
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "np"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"format": "np"}
    found = load_checkpoint(path)
    assert_same_bits({name: found[name] for name in tensors}, tensors)


@pytest.mark.torch
def test_every_dtype_agrees_with_safetensors_torch(tmp_path):
    pytest.importorskip("torch")
    import safetensors.torch

    tensors = {name: random_bits(name, (2, 5), 3) for name in dtypes.names()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_checkpoint(ours, tensors)
    safetensors.torch.save_file(safetensors.torch.load_file(ours), theirs)
    found = load_checkpoint(theirs)
    assert_same_bits({name: found[name] for name in tensors}, tensors)


def test_jax_arrays_any_layout_and_byte_order_are_written(tmp_path):
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "m.safetensors"
    save_checkpoint(
        path,
        {
            "jax": jnp.arange(3, dtype=jnp.bfloat16),
            "float8": jnp.ones((2, 2), jnp.float8_e4m3fn),
            "transposed": matrix.T,
            "strided": matrix[::2, 1::2],
            "swapped": matrix.astype(">f4"),
            "scalar": np.float64(3.5),
        },
    )
    found = load_checkpoint(path)
    assert found["jax"].dtype == ml_dtypes.bfloat16
    assert found["float8"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(found["transposed"], matrix.T)
    np.testing.assert_array_equal(found["strided"], matrix[::2, 1::2])
    np.testing.assert_array_equal(found["swapped"], matrix)
    assert found["scalar"].shape == ()


def test_each_tensor_is_aligned_to_its_item_size(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"a": np.ones(3, np.int8), "b": np.ones(1), "c": np.ones(1, np.int16)})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert list(header) == ["a", "b", "c"]
    assert (8 + length) % 8 == 0
    assert [header[name]["data_offsets"][0] for name in "abc"] == [10, 0, 8]
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.disk_order() == ["b", "c", "a"]


def test_reading_gives_a_new_writable_array_each_time(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"w": np.ones(3)})
    with open_checkpoint(path) as checkpoint:
        first = checkpoint.read("w")
        first[:] = 7
        np.testing.assert_array_equal(checkpoint.read("w"), np.ones(3))


def test_a_range_of_elements_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"pad": np.ones(1), "w": np.arange(12, dtype=np.int16).reshape(3, 4)})
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_flat("w", 5, 8), [5, 6, 7])
        assert checkpoint.read_flat("w", 12, 12).shape == (0,)
        with pytest.raises(CheckpointError, match=r"'w': expected a range within 0:12; found 5:13"):
            checkpoint.read_flat("w", 5, 13)


def test_an_unknown_tensor_is_named_with_the_nearest(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"fc1.weight": np.ones(3)})
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(CheckpointError, match=r"'fc1.wieght'.*Nearest: 'fc1.weight'"):
            checkpoint.read("fc1.wieght")
        checkpoint.close()
        checkpoint.close()
        with pytest.raises(CheckpointError, match="closed"):
            checkpoint.read("fc1.weight")


def test_a_file_cut_short_after_opening_is_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"w": np.ones(100)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match=r"'w': expected 800 bytes, found 792"):
            checkpoint.read("w")


# Ties ------------------------------------------------------------------------------------------


def test_tied_tensors_come_back_as_one_array(tmp_path):
    path = tmp_path / "m.safetensors"
    w = np.arange(6, dtype=np.float32)
    tensors = {"embed": w, "b": w.copy(), "head": w, "part": w[:3]}
    save_checkpoint(path, tensors, metadata={"format": "pt", "note": "x"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.ties == [("embed", "head")]
        assert checkpoint.metadata == {"format": "pt", "note": "x"}
        assert list(checkpoint.tensors) == list(tensors)
    found = load_checkpoint(path)
    assert found["embed"] is found["head"]
    assert found["embed"] is not found["b"]
    assert set(safetensors.numpy.load_file(path)) == set(tensors)


def test_ties_without_metadata_leave_a_format_for_transformers(tmp_path):
    path = tmp_path / "m.safetensors"
    w = np.ones(2)
    save_checkpoint(path, {"a": w, "b": w})
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["format"] == "pt"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {}


def test_equal_tensors_are_tied_only_where_that_is_recorded(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {"a": np.ones(2), "b": np.ones(2), "empty": np.ones(0), "void": np.ones(0)}
    save_checkpoint(path, tensors)
    found = load_checkpoint(path)
    assert found["a"] is not found["b"]
    save_checkpoint(path, tensors, ties=[("a", "b")])
    found = load_checkpoint(path)
    assert found["a"] is found["b"]


def test_a_record_of_ties_that_the_values_contradict_is_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"a": np.zeros(2), "b": np.ones(2)}, ties=[("a", "b")])
    with pytest.raises(CheckpointError, match=r"'b' is recorded as tied to 'a' but holds other"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ([("a", "nope")], "'nope' is not in"),
        ([("a", "short")], r"'short' is tied to 'a': expected float64\[2\], found float64\[1\]"),
        ([("a", "b"), ("b", "a")], "'b' is tied twice"),
    ],
)
def test_impossible_ties_are_refused(tmp_path, ties, message):
    tensors = {"a": np.ones(2), "b": np.ones(2), "short": np.ones(1)}
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "m.safetensors", tensors, ties=ties)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("record", ["no json", "[]", '{"groups": [[1]], "alone": true}'])
def test_a_broken_record_of_ties_is_named(tmp_path, record):
    header = {"__metadata__": {"jaxmerge.ties": record}, "a": entry(0, 1)}
    with pytest.raises(CheckpointError, match=r"metadata entry 'jaxmerge.ties'"):
        open_checkpoint(write_raw(tmp_path / "m.safetensors", header, b"\0"))


# Broken and hostile files ----------------------------------------------------------------------

BROKEN_HEADERS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, r"'b'.*2:6 overlap those of 'a'"),
    "hole": ({"a": entry(0, 2), "b": entry(4, 6)}, r"'b'.*bytes at 2, after 'a'; found 4"),
    "unnamed tail": ({"a": entry(0, 4)}, r"expected 4 bytes of data, found 6"),
    "out of range": ({"a": entry(0, 7)}, r"'a'.*within the 6 bytes of data, found 0:7"),
    "wrong size": ({"a": entry(0, 6, "F32")}, r"'a': float32\[6\] takes 24 bytes, found.*6 bytes"),
    "reversed": ({"a": entry(6, 0, shape=[6])}, r"'a': expected data_offsets"),
    "three offsets": ({"a": {**entry(0, 6), "data_offsets": [0, 3, 6]}}, r"'a': expected data_off"),
    "negative offset": ({"a": {**entry(0, 6), "data_offsets": [-6, 0]}}, r"'a': expected data_off"),
    "negative shape": ({"a": entry(0, 6, shape=[-2, -3])}, r"'a': expected a shape of whole"),
    "float shape": ({"a": entry(0, 6, shape=[6.0])}, r"'a': expected a shape of whole"),
    "true shape": ({"a": entry(0, 6, shape=[True, 6])}, r"'a': expected a shape of whole"),
    "huge shape": ({"a": entry(0, 6, shape=[2**62, 2**62])}, r"'a': uint8 of shape .* no possible"),
    "giant shape": ({"a": entry(0, 6, shape=[10**4000] * 2)}, r"'a': expected a shape of whole"),
    "empty but huge": ({"a": entry(0, 0, shape=[0, 2**62, 4])}, r"'a': uint8 of shape .* no poss"),
    "dimensions": (
        {"a": entry(0, 6, shape=[1] * 80 + [6])},
        r"'a': expected at most 64 dimensions",
    ),
    "shape text": ({"a": entry(0, 6, shape="6")}, r"'a': expected a shape of whole"),
    "unknown dtype": ({"a": entry(0, 6, "F33")}, r"'a': expected a dtype out of .* found 'F33'"),
    "no dtype": ({"a": entry(0, 6, 3)}, r"'a': expected a dtype out of"),
    "packed dtype": ({"a": entry(0, 6, "F4")}, r"'a': dtype 'F4' packs several values.*quantised"),
    "field missing": ({"a": {"dtype": "U8", "shape": [6]}}, r"'a': expected the fields"),
    "field unknown": ({"a": {**entry(0, 6), "x": 1}}, r"'a': expected the fields"),
    "entry not object": ({"a": 6}, r"'a': expected the fields .* found int"),
    "metadata not text": ({"__metadata__": {"n": 1}, "a": entry(0, 6)}, r"metadata entry 'n'"),
    "metadata list": ({"__metadata__": ["n"], "a": entry(0, 6)}, r"expected a mapping of text"),
    "surrogate": (
        b'{"\\ud800": {"dtype":"U8","shape":[6],"data_offsets":[0,6]}}',
        r"not valid Uni",
    ),
    "duplicate": (
        b'{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},'
        b'"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}',
        r"names 'a' twice",
    ),
    "list": (b'["a"]', r"starts with '\{'"),
    "no json": (b'{"a"', r"not valid JSON"),
    "NaN": (b'{"a": NaN}', r"not valid JSON: NaN"),
    "not utf-8": (b'{"\xff": 1}', r"not valid JSON"),
    "deep": (b'{"a":' + b"[" * 200_000, r"not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_broken_header_is_named(tmp_path, case):
    header, message = BROKEN_HEADERS[case]
    path = write_raw(tmp_path / "m.safetensors", header, bytes(6))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 7])
def test_an_impossible_header_length_is_refused_before_anything_is_allocated(tmp_path, length):
    path = write_raw(tmp_path / "m.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=rf"header length {length} is impossible"):
        open_checkpoint(path)


def test_a_header_over_the_limit_is_refused_in_a_large_file(tmp_path):
    path = write_raw(tmp_path / "m.safetensors", b"{}", length=100_000_001)
    os.truncate(path, 200_000_000)
    with pytest.raises(CheckpointError, match=r"expected at most 100000000"):
        open_checkpoint(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 60, -8, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"w": np.ones(4)})
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(CheckpointError, match=r"truncated|impossible"):
        open_checkpoint(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_header_gives_an_error_or_correct_infos(data):
    """No other exception."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        save_checkpoint(path, {"a": np.ones(4, np.float32), "b": np.ones(2, np.int8)})
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 19))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)


def test_a_pytorch_file_or_lfs_pointer_under_the_wrong_name_is_recognised(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="This is a PyTorch file"):
        open_checkpoint(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(path)


# What cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.ones(1, np.complex128)}, r"'a': expected a dtype out of .* found complex128"),
        ({"a": np.array(["x"])}, r"'a': expected a dtype out of"),
        ({"a": np.array([None])}, r"'a': expected a dtype out of"),
        ({"a": np.ones(1, ml_dtypes.int4)}, r"'a': expected a dtype out of .* found int4"),
        ({"a": {"b": np.ones(1)}}, r"'a': expected a flat dict of arrays, found a nested one"),
        ({"a": [1.0]}, r"'a': expected an array, found list"),
        ({1: np.ones(1)}, r"expected names of text, found 1"),
        ({"__metadata__": np.ones(1)}, r"cannot have the name '__metadata__'"),
        ({"\ud800": np.ones(1)}, r"not valid Unicode"),
    ],
)
def test_what_safetensors_cannot_hold_is_named(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "m.safetensors", tensors)
    assert os.listdir(tmp_path) == []


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(CheckpointError, match=r"metadata entry 'n': expected text, found int"):
        save_checkpoint(tmp_path / "m.safetensors", {"a": np.ones(1)}, metadata={"n": 1})


def test_a_key_does_not_fit_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"a": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"key 'model'.*safetensors files are flat"):
        open_checkpoint(path, key="model")
