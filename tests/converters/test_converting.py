"""Conversion between formats: every bit arrives, side files go along, nothing half-made remains."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.converters import (
    CheckpointError,
    convert,
    converting,
    dtypes,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
    save_orbax,
)

RNG = np.random.default_rng(0)
SHARED = RNG.normal(size=(7, 5)).astype(np.float32)
TENSORS = {
    "embed.weight": SHARED,
    "norm.weight": RNG.normal(size=5).astype(ml_dtypes.bfloat16),
    "steps": np.array(2**40),
    "nothing": np.zeros((0, 3), np.float32),
    "head.weight": SHARED,
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test take several."""
    monkeypatch.setattr(converting, "_CHUNK", 64)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_checkpoint(folder, TENSORS, metadata={"format": "pt", "by": "me"})
    (folder / "config.json").write_text('{"torch_dtype": "float32", "hidden_size": 5}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a b")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    return folder


def check_same(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == list(TENSORS)
        assert checkpoint.ties == [("embed.weight", "head.weight")]
        for name, tensor in TENSORS.items():
            found = checkpoint.read(name)
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            assert found.tobytes() == tensor.tobytes()


def test_shards_go_along_with_the_other_files(model: Path, tmp_path: Path) -> None:
    reports = []
    made = convert(
        model, tmp_path / "out", shard_size=150, progress=lambda *one: reports.append(one)
    )
    check_same(tmp_path / "out")
    assert (made.path, made.tensors, made.left_out) == (tmp_path / "out", 5, {})
    assert made.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert reports[-1] == (made.nbytes, made.nbytes)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer",
    ]
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a b"
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.metadata == {"format": "pt", "by": "me"}


def test_a_folder_within_the_source_is_not_copied_into_itself(model: Path) -> None:
    convert(model, model / "half", dtype="float16")
    assert sorted(os.listdir(model / "half")) == ["config.json", "model.safetensors", "tokenizer"]


@pytest.mark.torch
def test_pytorch_files_hold_the_same_bits_and_come_back(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    convert(model, tmp_path / "m.pt")
    check_same(tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "back.safetensors")
    check_same(tmp_path / "back.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written_without_it(tmp_path: Path, mmap: bool) -> None:
    torch = pytest.importorskip("torch")
    values = {
        name: RNG.integers(0, 2, 24).astype(np.uint8).astype(dtypes.storage_dtype(name))
        for name in dtypes.names()
        if hasattr(torch, name)
    }
    values = {name: value.reshape(2, 3, 4) for name, value in values.items()}
    values["tied"] = values["float32"]
    save_checkpoint(tmp_path / "m.safetensors", values)
    convert(tmp_path / "m.safetensors", tmp_path / "m.pth")
    loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mmap)
    assert list(loaded) == list(values)
    assert loaded["tied"].data_ptr() == loaded["float32"].data_ptr()
    for name, tensor in loaded.items():
        assert str(tensor.dtype) == f"torch.{values[name].dtype.name}"
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == values[name].tobytes()


def test_a_dtype_is_for_floats_and_stands_in_the_config(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "half", dtype="float16")
    found = load_checkpoint(tmp_path / "half")
    assert found["steps"] == TENSORS["steps"]
    for name in ("embed.weight", "norm.weight"):
        np.testing.assert_array_equal(found[name], TENSORS[name].astype(np.float16))
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == {"torch_dtype": "float16", "hidden_size": 5}


@pytest.mark.parametrize("wanted", ["float32", "float64", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_casts_are_those_of_numpy(tmp_path: Path, stored: str, wanted: str) -> None:
    values = np.array([0.0, -0.0, 1 / 3, -1e-40, 7e4, np.inf, np.nan, -2.5], np.float32)
    with np.errstate(over="ignore"):
        values = values.astype(dtypes.storage_dtype(stored))
    save_checkpoint(tmp_path / "m.safetensors", {"w": values})
    convert(tmp_path / "m.safetensors", tmp_path / "n.safetensors", dtype=wanted)
    found = load_checkpoint(tmp_path / "n.safetensors")["w"]
    with np.errstate(over="ignore"):
        expected = values.astype(dtypes.storage_dtype(wanted))
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))


def test_values_that_a_dtype_cannot_hold_are_counted(tmp_path: Path) -> None:
    values = np.array([1e5, 1.0, np.inf, -1e30], np.float32)
    save_checkpoint(tmp_path / "m.safetensors", {"w": values, "v": values[:2]})
    made = convert(tmp_path / "m.safetensors", tmp_path / "n.safetensors", dtype="float16")
    assert made.overflowed == {"w": 2, "v": 1}


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.pt"])
def test_a_failure_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    before = sorted(os.listdir(tmp_path))

    def failing(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / target, progress=failing)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("m.gguf", {}, "GGUF is read, not written"),
        ("there", {}, r"the folder is not empty \(keep\)"),
        ("there.safetensors", {}, "exists already"),
        ("out.pt", {"shard_size": 10}, "a shard size needs a folder"),
        ("out", {"shard_size": 0}, "expected a positive shard_size, found 0"),
        ("out", {"dtype": "int8"}, "expected a floating-point dtype, found int8"),
        ("out", {"dtype": "float7"}, "expected a dtype out of .*; found float7"),
        ("out", {"key": "model"}, "safetensors files are flat"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, target: str, options: dict, message: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "keep").write_text("mine")
    (tmp_path / "there.safetensors").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        convert(model, tmp_path / target, **options)
    assert sorted(os.listdir(tmp_path)) == before


def test_quantised_weights_are_copied_but_not_cast(tmp_path: Path) -> None:
    quantised = {"w.qweight": np.zeros((2, 2), np.int32), "w.scales": np.ones(2, np.float16)}
    save_checkpoint(tmp_path / "q.safetensors", quantised)
    convert(tmp_path / "q.safetensors", tmp_path / "copy.safetensors")
    assert list(load_checkpoint(tmp_path / "copy.safetensors")) == list(quantised)
    with pytest.raises(CheckpointError, match="quantised"):
        convert(tmp_path / "q.safetensors", tmp_path / "n.safetensors", dtype="float32")


# By way of Flax --------------------------------------------------------------------------------


def test_a_model_goes_to_orbax_and_comes_back(tmp_path: Path) -> None:
    tensors = {
        "fc1.weight": RNG.normal(size=(3, 4)).astype(np.float32),
        "fc1.bias": np.ones(3, np.float32),
    }
    save_checkpoint(tmp_path / "m.safetensors", tensors)
    made = convert(tmp_path / "m.safetensors", tmp_path / "m.orbax")
    assert (made.tensors, made.nbytes) == (2, 60)
    convert(tmp_path / "m.orbax", tmp_path / "back")
    np.testing.assert_equal(load_checkpoint(tmp_path / "back"), tensors)
    with pytest.raises(CheckpointError, match="an orbax checkpoint"):
        open_checkpoint(tmp_path / "m.orbax")
    convert(tmp_path / "m.orbax", tmp_path / "half.safetensors", dtype="bfloat16")
    assert load_checkpoint(tmp_path / "half.safetensors")["fc1.bias"].dtype.name == "bfloat16"
    with pytest.raises(CheckpointError, match="chunks of its own, not shards"):
        convert(tmp_path / "m.safetensors", tmp_path / "n.orbax", shard_size=10)


def test_a_tree_of_no_known_family_gets_its_paths_as_names(tmp_path: Path) -> None:
    save_orbax(tmp_path / "tree", {"a": {"b": np.ones((2, 3), np.float32)}})
    convert(tmp_path / "tree", tmp_path / "out.safetensors")
    np.testing.assert_equal(
        load_checkpoint(tmp_path / "out.safetensors"), {"a/b": np.ones((2, 3), np.float32)}
    )
