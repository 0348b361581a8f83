"""A catalogue of broken and hostile files: every reader refuses each, in little memory, and leaves nothing behind."""

import json
import os
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxmerge.converters import (
    CheckpointError,
    convert,
    inspect_checkpoint,
    load_checkpoint,
    load_model,
    open_checkpoint,
    save_checkpoint,
    torch_file,
)

# Whatever a file says, no reader may allocate more than this for files of a few kilobytes.
MOST_MEMORY = 20_000_000


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: object, offsets: object, dtype: object = "F32", **more: object) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}
    return json.dumps({"w": entry}).encode()


def gguf(counts: tuple[int, int] = (0, 0), rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest


SAFETENSORS = {
    "empty": (b"", "truncated"),
    "a length beyond the file": (header(b"{}", 2**62), "header length 4611686018427387904"),
    "a length of nothing": (header(b"", 0), "expected a JSON header"),
    "no JSON": (header(b"{not json"), "not valid JSON"),
    "deep JSON": (header(b'{"a":' * 50_000), "not valid JSON"),
    "a long number": (
        header(b'{"a":' + b"9" * 100_000 + b"}"),
        "not valid JSON|expected the fields",
    ),
    "bytes that are no text": (header(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "a name twice": (header(b'{"w": 1, "w": 1}'), "names 'w' twice"),
    "infinity": (header(b'{"w": Infinity}'), "not valid JSON"),
    "a huge shape": (header(tensor([2**40, 2**40], [0, 4])), "no possible array"),
    "a shape beyond the file": (header(tensor([2**40], [0, 2**42])), "truncated or corrupt"),
    "a negative shape": (header(tensor([-1], [0, 4])), "shape of whole numbers"),
    "many dimensions": (header(tensor([1] * 65, [0, 4]), data=bytes(4)), "at most 64 dimensions"),
    "offsets in reverse": (header(tensor([1], [4, 0])), "start <= stop"),
    "offsets of another size": (header(tensor([2], [0, 4]), data=bytes(4)), "takes 8 bytes"),
    "a hole": (header(tensor([1], [4, 8]), data=bytes(8)), "bytes that no tensor names"),
    "bytes left over": (header(tensor([1], [0, 4]), data=bytes(9)), "bytes that no tensor names"),
    "an unknown dtype": (header(tensor([1], [0, 4], "F31")), "expected a dtype out of"),
    "a dtype that is no text": (header(tensor([1], [0, 4], ["F32"])), "expected a dtype out of"),
    "more fields": (header(tensor([1], [0, 4], code="x")), "expected the fields"),
    "metadata of numbers": (header(b'{"__metadata__": {"a": 1}}'), "expected text, found int"),
    "a PyTorch file": (b"PK\x03\x04" + bytes(100), "This is a PyTorch file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}
GGUF = {
    "empty": (b"", "truncated"),
    "another file": (b"GGML" + bytes(100), "expected a GGUF file"),
    "many tensors": (gguf((2**60, 0)), "expected 1152921504606846976 tensors"),
    "many fields": (gguf((0, 2**60)), "expected 1152921504606846976 metadata entries"),
    "a long key": (gguf((0, 1), struct.pack("<Q", 2**40) + bytes(99)), "expected a metadata key"),
    "a long array": (
        gguf((0, 1), struct.pack("<Q1sIIQ", 1, b"k", 9, 5, 2**50) + bytes(99)),
        "items of 'k'",
    ),
    "arrays of arrays": (
        gguf((0, 1), struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 99),
        "'k': no such type of value: 9",
    ),
    "an unknown type": (
        gguf((0, 1), struct.pack("<Q1sI", 1, b"k", 77) + bytes(99)),
        "'k': no such type of value: 77",
    ),
}
INDEXES = {
    "a way out": ('{"weight_map": {"w": "../secret.safetensors"}}', "the index's own folder"),
    "an absolute path": ('{"weight_map": {"w": "/etc/passwd"}}', "the index's own folder"),
    "another system's path": ('{"weight_map": {"w": "..\\\\x.safetensors"}}', "own folder"),
    "a drive": ('{"weight_map": {"w": "C:x.safetensors"}}', "the index's own folder"),
    "no text": ('{"weight_map": {"w": 5}}', "expected a file name"),
    "no map": ('{"weight_map": ["w"]}', "expected an index with a weight_map"),
    "nothing": ('{"weight_map": {}}', "expected an index with a weight_map"),
    "deep JSON": ("[" * 100_000, "not valid JSON"),
    "a missing shard": ('{"weight_map": {"w": "no.safetensors"}}', "is missing"),
}


def refused(path: Path, message: str) -> None:
    """Every way to read the file says why it cannot, and writes nothing."""
    before = sorted(os.listdir(path.parent))
    # What the first use imports is no file's doing.
    with pytest.raises(CheckpointError, match=message):
        load_model(path)
    readers: list[Callable[[], object]] = [
        lambda: open_checkpoint(path),
        lambda: load_checkpoint(path),
        lambda: inspect_checkpoint(path, values=True),
        lambda: convert(path, path.parent / "out.safetensors"),
        lambda: convert(path, path.parent / "out"),
    ]
    tracemalloc.start()
    try:
        for reader in readers:
            with pytest.raises(CheckpointError, match=message):
                reader()
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert sorted(os.listdir(path.parent)) == before


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(tmp_path: Path, name: str) -> None:
    content, message = SAFETENSORS[name]
    (tmp_path / "m.safetensors").write_bytes(content)
    refused(tmp_path / "m.safetensors", message)


@pytest.mark.parametrize("name", GGUF)
def test_gguf(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf", reason="needs the `gguf` extra")
    content, message = GGUF[name]
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", message)


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(tmp_path: Path, name: str) -> None:
    content, message = INDEXES[name]
    save_checkpoint(tmp_path / "secret.safetensors", {"w": np.ones(2)})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    refused(tmp_path / "model", message)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.gguf", "m", "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "expected a file, found a folder, a pipe or a device")
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="found a folder, a pipe or a device"):
            open_checkpoint(tmp_path)


# PyTorch: archives and pickles; see test_torch_files.py too -------------------------------------


def archive(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in entries.items():
            made.writestr(name, content)


@pytest.mark.torch
def test_a_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bomb = {"m/data.pkl": bytes(50_000_000)}
    archive(tmp_path / "m.pt", bomb, zipfile.ZIP_DEFLATED)
    del bomb
    assert (tmp_path / "m.pt").stat().st_size < 100_000
    refused(tmp_path / "m.pt", r"compressed from 50000000 to \d+ bytes")


@pytest.mark.torch
def test_directories_and_pickles_have_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    archive(tmp_path / "m.pt", {f"m/{i}": b"" for i in range(100)})
    monkeypatch.setattr(torch_file, "_LARGEST_DIRECTORY", 1000)
    refused(tmp_path / "m.pt", r"a directory of at most 1000 bytes, found one of \d+")
    archive(tmp_path / "n.pt", {"m/data.pkl": bytes(2000)})
    monkeypatch.setattr(torch_file, "_LARGEST_PICKLE", 1000)
    refused(tmp_path / "n.pt", "a pickle of at most 1000 bytes beside the tensors, found one of 20")


@pytest.mark.torch
def test_a_directory_of_64_bits_is_measured_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    archive(tmp_path / "m.pt", {"m/data.pkl": b""})
    content = bytearray((tmp_path / "m.pt").read_bytes())
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 16] = b"\xff" * 4
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 2**40, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    (tmp_path / "m.pt").write_bytes(content[:end] + record + locator + content[end:])
    refused(tmp_path / "m.pt", "found one of 1099511627776")


@pytest.mark.torch
@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\nexec\n(S''\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"ctorch.hub\nload\n(S'x'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
    ],
)
def test_a_pickle_that_calls_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes
) -> None:
    pytest.importorskip("torch")
    calls: list[object] = []
    # Whatever happens in `os.system`, this file saw it.
    monkeypatch.setattr(os, "system", calls.append)
    archive(
        tmp_path / "m.pt",
        {"m/data.pkl": code, "m/version": b"3\n", "m/byteorder": sys.byteorder.encode()},
    )
    refused(tmp_path / "m.pt", "weights_only loader refused|truncated, corrupt")
    (tmp_path / "old.bin").write_bytes(code)
    refused(tmp_path / "old.bin", "weights_only loader refused|truncated, corrupt")
    assert calls == []


@pytest.mark.torch
def test_a_tar_archive_is_not_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "inner").write_bytes(b"x")
    with tarfile.open(tmp_path / "m.pth.tar", "w") as made:
        made.add(tmp_path / "inner", "../../escaped")
    refused(tmp_path / "m.pth.tar", r"m\.pth\.tar: ")
    assert not (tmp_path.parent.parent / "escaped").exists()
