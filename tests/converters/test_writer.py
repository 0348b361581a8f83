"""The streaming writer: any order, and all or nothing."""

import hashlib
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxmerge.converters import (
    CheckpointError,
    CheckpointWriter,
    TensorInfo,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from jaxmerge.converters.partial_file import PartialFile

INFOS = [
    TensorInfo.of("a", (2, 2), "float32"),
    TensorInfo.of("b", (), "int64"),
    TensorInfo.of("c", (0, 5), "bool"),
    TensorInfo.of("d", (6,), "bfloat16"),
]


def values(info: TensorInfo) -> np.ndarray:
    return (
        np.arange(int(np.prod(info.shape)))
        .reshape(info.shape)
        .astype(np.asarray(0).dtype if info.dtype == "int64" else info.dtype)
    )


@pytest.mark.parametrize("shard_size", [None, 10])
def test_tensors_come_in_any_order(tmp_path, shard_size):
    with CheckpointWriter(tmp_path, INFOS, metadata={"k": "v"}, shard_size=shard_size) as writer:
        for info in reversed(INFOS):
            writer.write(info.name, values(info))
        assert all(name.endswith(".partial") for name in os.listdir(tmp_path))
    assert not any(name.endswith(".partial") for name in os.listdir(tmp_path))
    np.testing.assert_equal(load_checkpoint(tmp_path), {i.name: values(i) for i in INFOS})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"k": "v"}


def test_the_order_of_writing_does_not_change_a_byte(tmp_path):
    for name, infos in (("x.safetensors", INFOS), ("y.safetensors", INFOS[::-1])):
        with CheckpointWriter(tmp_path / name, INFOS) as writer:
            for info in infos:
                writer.write(info.name, values(info))
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_large_tensor_is_written_in_parts_from_several_threads(tmp_path):
    whole = np.arange(1000, dtype=np.float32).reshape(10, 100)
    path = tmp_path / "m.safetensors"
    with CheckpointWriter(path, [TensorInfo.of("w", (10, 100), "float32")]) as writer:
        threads = [
            threading.Thread(
                target=writer.write_flat, args=("w", start, whole.reshape(-1)[start : start + 125])
            )
            for start in range(0, 1000, 125)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(load_checkpoint(path)["w"], whole)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: w.write("aa", np.ones(1)), r"no tensor 'aa' was announced.*Nearest: 'a'"),
        (
            lambda w: w.write("a", np.ones(4, np.float32)),
            r"'a': expected shape \[2, 2\], found \[4",
        ),
        (lambda w: w.write("a", np.ones((2, 2))), r"'a': expected float32, found float64"),
        (lambda w: w.write("d", np.ones(6, np.uint16)), r"'d': expected bfloat16, found uint16"),
        (lambda w: [w.write("b", np.int64(1)) for _ in range(2)], r"'b'.*were written before"),
        (
            lambda w: w.write_flat("a", 3, np.ones(2, np.float32)),
            r"'a': expected 1-D values within",
        ),
        (
            lambda w: w.write_flat("a", -1, np.ones(2, np.float32)),
            r"'a': expected 1-D values withi",
        ),
        (
            lambda w: [w.write_flat("a", i, np.ones(2, np.float32)) for i in (0, 1)],
            r"'a': elements 1:3 were written before",
        ),
    ],
)
def test_a_write_that_was_not_announced_leaves_nothing(tmp_path, write, message):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=message), CheckpointWriter(out, INFOS) as writer:
        write(writer)
    assert not out.exists()


def test_missing_tensors_are_listed_and_leave_nothing(tmp_path):
    writer = CheckpointWriter(tmp_path / "m.safetensors", INFOS)
    writer.write("a", values(INFOS[0]))
    writer.write_flat("d", 0, values(INFOS[3])[:5])
    with pytest.raises(CheckpointError, match=r"3 of 4 tensors were not written: b, c, d"):
        writer.close()
    assert os.listdir(tmp_path) == []
    writer.close()
    with pytest.raises(CheckpointError, match="closed"):
        writer.write("b", values(INFOS[1]))


def test_an_exception_leaves_what_was_there_before(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"old": np.ones(3)})
    before = path.read_bytes()

    def interrupted():
        with CheckpointWriter(tmp_path, INFOS) as writer:
            writer.write("a", values(INFOS[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert path.read_bytes() == before


def test_abort_after_close_keeps_the_file(tmp_path):
    writer = CheckpointWriter(tmp_path / "m.safetensors", [])
    writer.close()
    writer.abort()
    assert load_checkpoint(tmp_path / "m.safetensors") == {}


def test_a_checkpoint_can_be_written_over_its_own_source(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"w": np.arange(5.0)})
    with open_checkpoint(path) as source:
        with CheckpointWriter(path, source.tensors.values()) as writer:
            writer.write("w", source.read("w") + 1)
        np.testing.assert_array_equal(source.read("w"), np.arange(5.0))
    np.testing.assert_array_equal(load_checkpoint(path)["w"], np.arange(5.0) + 1)


def test_a_killed_process_leaves_no_file_under_the_final_name(tmp_path):
    script = (
        "import os, signal, sys, numpy as np\n"
        "from jaxmerge.converters import CheckpointWriter, TensorInfo\n"
        "infos = [TensorInfo.of(n, (8,), 'float32') for n in 'ab']\n"
        "writer = CheckpointWriter(sys.argv[1], infos, shard_size=32)\n"
        "writer.write('a', np.ones(8, np.float32))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path)
    assert all(name.endswith(".partial") for name in os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="unfinished files"):
        open_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {"a": np.ones(8), "b": np.ones(8)}, shard_size=64)
    assert sorted(load_checkpoint(tmp_path)) == ["a", "b"]


def test_weights_that_would_not_be_replaced_are_not_mixed_with_new_ones(tmp_path):
    tensors = {"a": np.ones(8), "b": np.ones(8)}
    save_checkpoint(tmp_path, tensors, shard_size=64)
    before = sorted(os.listdir(tmp_path))
    for shard_size in (None, 64):
        with pytest.raises(CheckpointError, match=r"already has weights: model-00001-of-00002"):
            save_checkpoint(tmp_path, tensors, shard_size=shard_size)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes of free disk, found \d+"):
        CheckpointWriter(out, [TensorInfo.of("a", (2**56,), "float32")])
    assert not out.exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path / "m.safetensors", INFOS)
    monkeypatch.setattr(PartialFile, "write_at", full)
    with pytest.raises(CheckpointError, match=r"'a': cannot write: No space"), writer:
        writer.write("a", values(INFOS[0]))
    assert os.listdir(tmp_path) == []


def test_a_failure_while_publishing_leaves_nothing(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(PartialFile, "sync", broken)
    with pytest.raises(CheckpointError, match=r"cannot write: Input/output error"):
        save_checkpoint(tmp_path / "m.safetensors", {"a": np.ones(1)})
    assert os.listdir(tmp_path) == []


def test_shards_that_cannot_all_be_published_are_all_removed(tmp_path, monkeypatch):
    publish = PartialFile.publish

    def broken(self):
        if self.final.endswith("00002-of-00003.safetensors"):
            raise OSError(5, "Input/output error")
        publish(self)

    monkeypatch.setattr(PartialFile, "publish", broken)
    with pytest.raises(CheckpointError, match=r"cannot write: Input/output error"):
        save_checkpoint(tmp_path, {name: np.ones(1) for name in "abc"}, shard_size=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.safetensors", {"shard_size": 5}, "shard_size needs a folder"),
        ("out", {"shard_size": 0}, "expected a positive shard_size, found 0"),
        ("no/such/m.safetensors", {}, "cannot write: No such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, name, options, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointWriter(tmp_path / name, INFOS, **options)
    assert os.listdir(tmp_path) == []


def test_a_name_announced_twice_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'a' is announced twice"):
        CheckpointWriter(tmp_path / "m.safetensors", [INFOS[0], INFOS[0]])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.safetensors", {"format": "torch"}, "'torch' does not fit the file's name"),
        ("m.pth", {"format": "safetensors"}, "'safetensors' does not fit the file's name"),
        ("m.bin", {"format": "onnx"}, "expected format 'safetensors' or 'torch', found 'onnx'"),
        (
            "m.pt",
            {"metadata": {"a": "b"}},
            r"PyTorch files have no metadata, found entries \['a'\]",
        ),
        ("m.pt", {"shard_size": 9}, "not written in shards"),
        ("m.safetensors", {"template": ("x.pt", None)}, "a template needs a PyTorch file"),
    ],
)
def test_formats_and_options_must_fit_each_other(tmp_path, name, options, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / name, {"a": np.ones(1)}, **options)
    assert os.listdir(tmp_path) == []


# Writers that go on -------------------------------------------------------------------------------


def resumable(path, finished=None, **options):
    return CheckpointWriter(path, INFOS, shard_size=17, finished=finished or {}, **options)


def write_all(writer):
    for name in writer.pending:
        (info,) = [info for info in INFOS if info.name == name]
        writer.write_flat(name, 0, values(info).reshape(-1))


def test_a_resumable_writer_takes_over_what_has_kept_its_hash(tmp_path):
    writer = resumable(tmp_path)
    digest = writer.write_flat("a", 0, values(INFOS[0]).reshape(-1))
    assert digest == hashlib.sha256(values(INFOS[0]).tobytes()).hexdigest()
    assert writer.write_flat("d", 0, values(INFOS[3])[:4]) is None
    writer.abort()
    recorded = {**writer.finished, "b": "0" * 64}
    assert recorded.keys() == {"a", "b"}
    writer = resumable(tmp_path, recorded)
    assert writer.pending == ["b", "c", "d"]
    with pytest.raises(CheckpointError, match="'a': elements 0:4 were written before"):
        writer.write("a", values(INFOS[0]))
    write_all(writer)
    writer.close()
    np.testing.assert_equal(load_checkpoint(tmp_path), {i.name: values(i) for i in INFOS})


def test_parts_out_of_order_give_the_hash_of_the_whole(tmp_path):
    writer = resumable(tmp_path)
    assert writer.write_flat("d", 4, values(INFOS[3])[4:]) is None
    digest = writer.write_flat("d", 0, values(INFOS[3])[:4])
    assert digest == hashlib.sha256(values(INFOS[3]).tobytes()).hexdigest()
    writer.abort()


def test_metadata_may_be_known_last(tmp_path):
    writer = resumable(tmp_path, metadata={"k": "000"})
    write_all(writer)
    with pytest.raises(CheckpointError, match="more or fewer bytes"):
        writer.close({"k": "much longer than before"})
    writer = resumable(tmp_path, writer.finished, metadata={"k": "000"})
    assert writer.pending == []
    writer.close({"k": "abc"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"k": "abc"}


def test_several_writers_share_the_files_and_the_first_completes_them(tmp_path):
    writers = [resumable(tmp_path, share=(index, 2)) for index in range(2)]
    assert [writer.pending for writer in writers] == [["a", "d"], ["b", "c"]]
    for writer in reversed(writers):
        write_all(writer)
        assert not any(name.endswith(".safetensors") for name in os.listdir(tmp_path))
        writer.close()
    np.testing.assert_equal(load_checkpoint(tmp_path), {i.name: values(i) for i in INFOS})


def test_a_failure_while_publishing_leaves_the_parts_of_a_resumable_writer(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(5, "Input/output error")

    writer = resumable(tmp_path)
    write_all(writer)
    with monkeypatch.context() as patched:
        patched.setattr(PartialFile, "publish", broken)
        with pytest.raises(CheckpointError, match=r"cannot write: Input/output error"):
            writer.close()
    again = resumable(tmp_path, writer.finished)
    assert again.pending == []
    again.close()
    assert len(load_checkpoint(tmp_path)) == 4
