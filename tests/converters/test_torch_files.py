"""PyTorch files: exact round trips, nested state dicts, ties, hostile and broken files."""

import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from jaxmerge.converters import (
    CheckpointError,
    dtypes,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

# Torch itself cannot load these from files in the format before 1.6.
NEW_DTYPES = ("float8", "uint16", "uint32", "uint64")


def random_bits(dtype, shape, seed=0):
    numpy_dtype = dtypes.storage_dtype(dtype)
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * numpy_dtype.itemsize)
    values = np.frombuffer(raw, np.uint8)
    return (values & 1 if dtype == "bool" else values).view(numpy_dtype).reshape(shape)


def state_dict(seed=0):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return state


def training_file(state):
    """What training scripts write; torch is asked for an optimiser state of tensors too."""
    moments = {index: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)} for index in range(3)}
    return {
        "model": {"state_dict": state, "model_args": {"width": 3, "names": ["a", None]}},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
        "scheduler": {"last_epoch": 3},
        "epoch": 3,
    }


def rewrite_archive(source, target, change):
    """Copies a zip entry by entry; `change` maps (name, data) to what zipfile shall write."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            name, data, method = change(entry.filename, old.read(entry))
            new.writestr(name, data, compress_type=method)


class Hostile:
    """Unpickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, shape, legacy):
    path = tmp_path / "m.pth"
    names = [name for name in dtypes.names() if not (legacy and name.startswith(NEW_DTYPES))]
    tensors = {name: random_bits(name, shape) for name in names}
    save_checkpoint(path, tensors)
    if legacy:
        loaded = torch.load(path, weights_only=True)
        torch.save(loaded, path, _use_new_zipfile_serialization=False)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.key, checkpoint.metadata) == ("torch", None, {})
        assert list(checkpoint.tensors) == list(tensors)
        for name, array in tensors.items():
            info, found = checkpoint.tensors[name], checkpoint.read(name)
            assert (info.shape, info.dtype, info.nbytes) == (shape, name, array.nbytes)
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
            assert found.tobytes() == array.tobytes()


def test_torch_loads_what_is_written(tmp_path):
    path = tmp_path / "m.pt"
    values = {"f": np.float32([[1, 2]]), "b": dtypes.storage_dtype("bfloat16").type(1.5), "i": [3]}
    save_checkpoint(path, {name: np.asarray(value) for name, value in values.items()})
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["f"], torch.tensor([[1.0, 2.0]]))
    assert torch.equal(loaded["b"], torch.tensor(1.5, dtype=torch.bfloat16))
    assert torch.equal(loaded["i"], torch.tensor([3]))


def test_reading_copies_and_may_take_a_range(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.arange(6.0).reshape(2, 3)}, path)
    with open_checkpoint(path) as checkpoint:
        checkpoint.read("w")[:] = 9
        np.testing.assert_array_equal(checkpoint.read("w"), [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(checkpoint.read_flat("w", 2, 5), [2, 3, 4])
        checkpoint.close()
        with pytest.raises(CheckpointError, match="'w': the checkpoint is closed"):
            checkpoint.read("w")


def test_any_layout_and_parameters_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(base.clone()),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    torch.save(tensors, tmp_path / "m.pt")
    found = load_checkpoint(tmp_path / "m.pt")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.detach().resolve_conj().numpy())
        assert found[name].flags.c_contiguous


def test_tied_tensors_stay_tied_both_ways(tmp_path):
    w = torch.arange(6.0)
    torch.save({"a": w, "part": w[:3], "b": w, "shape": w.view(2, 3)}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.ties == [("a", "b")]
    found = load_checkpoint(tmp_path / "m.pt")
    assert found["a"] is found["b"]
    assert not np.shares_memory(found["a"], found["part"])
    save_checkpoint(tmp_path / "again.pt", found)
    loaded = torch.load(tmp_path / "again.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert loaded["a"].data_ptr() != loaded["part"].data_ptr()
    save_checkpoint(tmp_path / "m.safetensors", found)
    found = load_checkpoint(tmp_path / "m.safetensors")
    assert found["a"] is found["b"]


# State dicts inside ----------------------------------------------------------------------------


def test_the_state_dict_of_a_training_file_is_found(tmp_path):
    state = state_dict()
    torch.save(training_file(state), tmp_path / "m.pth.tar")
    with open_checkpoint(tmp_path / "m.pth.tar") as checkpoint:
        assert checkpoint.key == "model.state_dict"
        assert list(checkpoint.tensors) == list(state)
        assert checkpoint.tensors["1.num_batches_tracked"].dtype == "int64"
    found = load_checkpoint(tmp_path / "m.pth.tar", key="model.state_dict")
    np.testing.assert_array_equal(found["0.weight"], state["0.weight"].numpy())


def test_a_wrong_key_lists_the_right_ones(tmp_path):
    torch.save(training_file(state_dict()), tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError,
        match=r"no key 'model.state'; candidate keys: model.state_d"
        r"ict \(7 tensors\). Nearest: 'model.state_dict'",
    ):
        open_checkpoint(tmp_path / "m.pt", key="model.state")


def test_entries_that_are_no_tensors_are_reported(tmp_path):
    extra = {"w": torch.ones(2), "_extra_state": {"scale": torch.ones(1)}, "version": 3, "x": None}
    torch.save(extra, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
        assert checkpoint.skipped == {"_extra_state": "dict", "version": "int", "x": "NoneType"}


def test_a_merged_training_file_keeps_everything_else(tmp_path):
    source, out = tmp_path / "m.pth.tar", tmp_path / "merged.pth.tar"
    state = state_dict()
    state["_extra_state"] = {"calls": 5}
    torch.save(training_file(state), source)
    with open_checkpoint(source) as checkpoint:
        key = checkpoint.key
        merged = {name: checkpoint.read(name) + 1 for name in checkpoint.tensors}
    save_checkpoint(out, merged, template=(source, key))
    found, expected = (torch.load(path, weights_only=True) for path in (out, source))
    new = found["model"].pop("state_dict")
    old = expected["model"].pop("state_dict")
    assert isinstance(new, OrderedDict)
    assert list(new) == list(old)
    assert new.pop("_extra_state") == old.pop("_extra_state") == {"calls": 5}
    assert new._metadata == old._metadata
    assert all(torch.equal(new[name], old[name] + 1) for name in old)
    moments = [content["optimizer"].pop("state") for content in (found, expected)]
    assert found == expected
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in range(3))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module.load_state_dict(new, strict=True)


def test_a_template_may_be_overwritten_and_may_change_names(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(2), "b": torch.nn.Parameter(torch.ones(2)), "note": 1}, path)
    save_checkpoint(path, {"b": np.zeros(3), "new": np.ones(1)}, template=(path, None))
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["b", "note", "new"]
    assert isinstance(loaded["b"], torch.nn.Parameter)
    assert loaded["b"].shape == (3,)
    with pytest.raises(CheckpointError, match="found a folder"):
        save_checkpoint(path, {"b": np.zeros(3)}, template=(tmp_path, None))


# Folders ---------------------------------------------------------------------------------------


def test_folders_of_pytorch_files_are_read(tmp_path):
    save_checkpoint(tmp_path / "one", {"w": np.ones(2)}, format="torch")
    assert os.listdir(tmp_path / "one") == ["pytorch_model.bin"]
    assert list(load_checkpoint(tmp_path / "one")) == ["w"]
    shards = tmp_path / "shards"
    shards.mkdir()
    weight_map = {}
    for number, name in enumerate("xy", start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: torch.full((2,), float(number))}, shards / file)
        weight_map[name] = file
    index = shards / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_equal(
        load_checkpoint(shards), {"x": np.float32([1, 1]), "y": np.float32([2, 2])}
    )
    with pytest.raises(CheckpointError, match="already has weights"):
        save_checkpoint(shards, {"w": np.ones(2)}, format="torch")
    index.write_text(json.dumps({"weight_map": {**weight_map, "z": weight_map["x"]}}))
    with pytest.raises(CheckpointError, match="lists tensor 'z'"):
        load_checkpoint(shards)
    torch.save({"x": torch.ones(2)}, shards / weight_map["y"])
    with pytest.raises(CheckpointError, match="'x' stands in two files"):
        load_checkpoint(shards)


def test_safetensors_win_over_pytorch_files_in_a_folder(tmp_path):
    save_checkpoint(tmp_path, {"torch": np.ones(2)}, format="torch")
    save_checkpoint(tmp_path / "other.safetensors", {"safe": np.ones(2)})
    assert list(load_checkpoint(tmp_path)) == ["safe"]


def test_a_blob_without_suffix_is_recognised(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    os.rename(tmp_path / "m.pt", tmp_path / "0123abcd")
    assert list(load_checkpoint(tmp_path / "0123abcd")) == ["w"]


# Hostile and broken files ----------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / "m.pth", tmp_path / "executed"
    content = {"w": torch.ones(1), "x": Hostile(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=r"weights_only loader refused .*\bmkdir\. .*any code"
    ):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="weights_only loader refused"):
        save_checkpoint(tmp_path / "out.pth", {"w": np.ones(1)}, template=(path, None))
    assert not trace.exists()
    assert os.listdir(tmp_path) == ["m.pth"]


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "m.bin", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"x": Hostile(trace)}))
    with pytest.raises(CheckpointError, match=r"m\.bin"):
        open_checkpoint(path)
    assert not trace.exists()


def test_compressed_archives_are_refused_unread(tmp_path):
    """A zip bomb inflates when it is read."""
    source, bomb = tmp_path / "m.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(100_000)}, source)
    rewrite_archive(source, bomb, lambda name, data: (name, data, zipfile.ZIP_DEFLATED))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"compressed from \d+ to \d+ bytes"):
        open_checkpoint(bomb)


def test_an_archive_whose_entries_overlap_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"x" * 5000)
        archive.filelist.extend([archive.filelist[0]] * 3)
    with pytest.raises(CheckpointError, match="overlaps itself"):
        open_checkpoint(path)


def test_views_that_unfold_to_more_than_the_file_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(CheckpointError, match=r"'w': float32\[1099511627776\].*views that unfold"):
        open_checkpoint(path)


def test_a_torchscript_model_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript model"):
        open_checkpoint(path)


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"")
    with pytest.raises(CheckpointError, match=r"torch\.save did not write"):
        open_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_a_truncated_file_is_an_error(tmp_path, legacy, share):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=not legacy)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"empty|truncated|refused|Git LFS"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"junk" * 100, "truncated, corrupt or not a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x10" + bytes(7) + b'{"a":1}         ', "this is a safetensors file"),
    ],
)
def test_what_is_no_pytorch_file_is_named(tmp_path, content, message):
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_file_from_a_machine_of_the_other_byte_order_is_read(tmp_path):
    source, swapped = tmp_path / "m.pt", tmp_path / "swapped.pt"
    torch.save({"w": torch.arange(4, dtype=torch.int32)}, source)

    def swap(name, data):
        if name.endswith("/byteorder"):
            data = b"big"
        elif "/data/" in name:
            data = np.frombuffer(data, np.int32).byteswap().tobytes()
        return name, data, zipfile.ZIP_STORED

    rewrite_archive(source, swapped, swap)
    with open_checkpoint(swapped) as checkpoint:
        for _ in range(2):
            np.testing.assert_array_equal(checkpoint.read("w"), np.arange(4))


def test_tensors_that_are_no_plain_weights_are_named(tmp_path):
    path = tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own quantised tensors deprecated
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for tensor, message in [
        (quantised, r"'w': a quantised tensor \(torch.qint8\)"),
        (torch.eye(2).to_sparse(), r"'w': expected a dense tensor, found torch.sparse_coo"),
        (
            torch.empty(2, device="meta"),
            r"'w': expected a tensor with values, found one on the met",
        ),
        (torch.ones(2, dtype=torch.complex128), r"'w': expected a dtype out of .*complex128"),
    ]:
        torch.save({"w": tensor}, path)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="cannot write: PytorchStreamWriter"):
        save_checkpoint(tmp_path / "m.pt", {"w": np.ones(1)})
    assert os.listdir(tmp_path) == []
