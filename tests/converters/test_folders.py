"""Checkpoint folders: shards, indexes, hub caches, and names that lead outside."""

import json
import os

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint

TENSORS = {f"layer.{i}": np.full((2, 3), i, np.float32) for i in range(5)}


def two_shards(folder, first="a.safetensors", second="b.safetensors", **changes):
    """Writes a folder of two shards by hand, with changes to its weight_map."""
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / first, {"x": np.zeros(2)})
    save_checkpoint(folder / second, {"y": np.ones(3)})
    write_index(folder, {"x": first, "y": second, **changes})
    return folder


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_and_their_index_come_back(tmp_path):
    out = tmp_path / "out"
    save_checkpoint(out, TENSORS, shard_size=50, metadata={"format": "pt"})
    assert sorted(os.listdir(out)) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 120}
    assert index["weight_map"]["layer.2"] == "model-00002-of-00003.safetensors"
    with open_checkpoint(out) as checkpoint:
        assert list(checkpoint.tensors) == list(TENSORS)
        assert checkpoint.metadata == {"format": "pt"}
        assert [os.path.basename(file) for file in checkpoint.files] == sorted(os.listdir(out))[:3]
    np.testing.assert_equal(load_checkpoint(out), TENSORS)
    np.testing.assert_equal(load_checkpoint(out / "model.safetensors.index.json"), TENSORS)


def test_a_tensor_larger_than_the_shard_size_gets_a_shard_of_its_own(tmp_path):
    tensors = {"a": np.ones(1), "big": np.ones(100), "b": np.ones(1), "c": np.ones(1)}
    save_checkpoint(tmp_path, tensors, shard_size=16)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert [weight_map[name][6:11] for name in tensors] == ["00001", "00002", "00003", "00003"]


def test_what_fits_one_shard_is_one_file(tmp_path):
    save_checkpoint(tmp_path, TENSORS, shard_size=10**9)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_ties_reach_across_shards(tmp_path):
    w = np.ones(4)
    save_checkpoint(tmp_path, {"embed": w, "mid": np.ones(4), "head": w}, shard_size=32)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.ties == [("embed", "head")]
        assert checkpoint.metadata == {}
    found = load_checkpoint(tmp_path)
    assert found["embed"] is found["head"]
    with open_checkpoint(tmp_path / "model-00001-of-00003.safetensors") as alone:
        assert alone.ties == []


@pytest.mark.parametrize("names", [["model.safetensors"], ["other.safetensors"], ["a.safetensors"]])
def test_a_folder_with_one_file_is_that_file(tmp_path, names):
    for name in names:
        save_checkpoint(tmp_path / name, TENSORS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "._model.safetensors").write_bytes(b"left by another system")
    np.testing.assert_equal(load_checkpoint(tmp_path), TENSORS)


def test_several_files_without_index_are_taken_together(tmp_path):
    save_checkpoint(tmp_path / "vision.safetensors", {"v": np.ones(1)})
    save_checkpoint(tmp_path / "text.safetensors", {"t": np.ones(1)})
    assert list(load_checkpoint(tmp_path)) == ["t", "v"]
    save_checkpoint(tmp_path / "extra.safetensors", {"v": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"'v' stands in two files: .*extra.*vision"):
        load_checkpoint(tmp_path)


def test_a_set_of_shards_with_gaps_and_no_index_is_refused(tmp_path):
    save_checkpoint(tmp_path, TENSORS, shard_size=50)
    os.unlink(tmp_path / "model.safetensors.index.json")
    np.testing.assert_equal(load_checkpoint(tmp_path), TENSORS)
    os.unlink(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"expected 3 shards model-\*-of-00003, found 2"):
        load_checkpoint(tmp_path)


def test_a_hub_cache_of_links_works(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    source = two_shards(tmp_path / "source")
    for number, name in enumerate(sorted(os.listdir(source))):
        os.rename(source / name, blobs / f"{number:064x}")
        os.symlink(f"../../blobs/{number:064x}", snapshot / name)
    assert sorted(load_checkpoint(snapshot)) == ["x", "y"]
    assert list(load_checkpoint(blobs / f"{0:064x}")) == ["x"]


def test_an_index_may_name_files_in_folders_below(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "below").mkdir()
    os.rename(tmp_path / "b.safetensors", tmp_path / "below" / "b.safetensors")
    write_index(tmp_path, {"x": "a.safetensors", "y": "below/b.safetensors"})
    assert list(load_checkpoint(tmp_path)) == ["x", "y"]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../b.safetensors",
        "below/../../b.safetensors",
        "..",
        "C:\\b.safetensors",
        "c:b.safetensors",
        "..\\b.safetensors",
        "\\\\host\\b.safetensors",
        "./b.safetensors",
        "b.safetensors\0",
        "",
    ],
)
def test_an_index_that_leads_outside_its_folder_is_refused(tmp_path, name):
    save_checkpoint(tmp_path / "b.safetensors", {"y": np.ones(3)})
    folder = two_shards(tmp_path / "model", y=name)
    with pytest.raises(CheckpointError, match=r"'y': expected a file in the index's own folder"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path):
    two_shards(tmp_path, y="c.safetensors")
    with pytest.raises(CheckpointError, match=r"'y': shard 'c.safetensors' is missing"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    two_shards(tmp_path, z="b.safetensors")
    with pytest.raises(CheckpointError, match=r"lists tensor 'z' in .*b.safetensors, which do"):
        open_checkpoint(tmp_path)


def test_a_tensor_listed_in_the_wrong_shard_is_named(tmp_path):
    two_shards(tmp_path, x="b.safetensors", y="a.safetensors")
    with pytest.raises(CheckpointError, match=r"lists tensor 'x' in .*b.safetensors, found it in"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    two_shards(tmp_path)
    save_checkpoint(tmp_path / "b.safetensors", {"x": np.zeros(2), "y": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"'x' stands in two files"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_read_all_the_same(tmp_path):
    two_shards(tmp_path)
    save_checkpoint(tmp_path / "b.safetensors", {"y": np.ones(3), "unlisted": np.ones(1)})
    assert sorted(load_checkpoint(tmp_path)) == ["unlisted", "x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "expected an index with a weight_map"),
        ("{}", "expected an index with a weight_map"),
        ('{"weight_map": {}}', "expected an index with a weight_map"),
        ('{"weight_map": {"x": 3}}', "'x': expected a file name, found 3"),
    ],
)
def test_a_broken_index_is_named(tmp_path, text, message):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_of_several_indexes_the_usual_one_wins(tmp_path):
    two_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "other.safetensors.index.json").write_text(index.read_text())
    assert list(load_checkpoint(tmp_path)) == ["x", "y"]
    os.rename(index, tmp_path / "third.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"several indexes.*other.*third"):
        open_checkpoint(tmp_path)


def test_a_path_without_checkpoint_says_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint: expected model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.partial").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"unfinished files: model.safetensors.partial"):
        open_checkpoint(tmp_path)
    os.unlink(tmp_path / "model.safetensors.partial")
    (tmp_path / "best.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found best.pth: name the file itself"):
        open_checkpoint(tmp_path)
    os.symlink("gone", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot open"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="target does not exist"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="not a checkpoint: expected"):
        open_checkpoint(tmp_path / "notes.txt")


def test_failed_opening_closes_the_shards(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)
    assert len(os.listdir("/dev/fd")) == before
