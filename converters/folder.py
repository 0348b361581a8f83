"""Which files a checkpoint path stands for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxmerge.converters.errors import CheckpointError

SAFETENSORS_SUFFIX = ".safetensors"
GGUF_SUFFIX = ".gguf"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".tar", ".ckpt")
SAFETENSORS_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_ORBAX_MARK = "_CHECKPOINT_METADATA"
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)$")
# Far above any index (DeepSeek-V3 with 90,000 tensors has 9 MB), far below memory.
_LARGEST_INDEX = 256_000_000
_MOST_PARTS = 9_999


class Location(NamedTuple):
    """The files behind a checkpoint path.

    Attributes:
      format: "safetensors", "torch" or "gguf".
      files: the files, in the order of their shards.
      weight_map: what the index says, name -> file; None without an index.
    """

    format: str
    files: tuple[str, ...]
    weight_map: dict[str, str] | None = None


def locate(path: str) -> Location:
    """Finds the files of a checkpoint.

    A folder is searched in this order: `model.safetensors`; `model.safetensors.index.json` or the
    only other `*.safetensors.index.json`; all `*.safetensors`; `pytorch_model.bin`;
    `pytorch_model.bin.index.json`; the only GGUF file. Of a GGUF file that was split, any part stands for all.

    Args:
      path: a file, an index file or a folder.

    Returns:
      Where the checkpoint is. No tensor file has been opened, but each exists.

    Raises:
      CheckpointError: there is nothing there, a shard is missing, or an index is broken or names a
        file outside its folder.
    """
    if os.path.isdir(path):
        found = _in_folder(path)
        for file in found.files:
            _check_regular(file)
        return found
    if not os.path.exists(path):
        what = "the link's target does not exist" if os.path.islink(path) else "no such file"
        raise CheckpointError(f"{path}: {what}")
    _check_regular(path)
    if path.endswith(SAFETENSORS_SUFFIX):
        return Location("safetensors", (path,))
    if path.endswith(TORCH_SUFFIXES):
        return Location("torch", (path,))
    if path.endswith(GGUF_SUFFIX):
        return Location("gguf", _parts(path))
    if path.endswith(INDEX_SUFFIX):
        form = "safetensors" if SAFETENSORS_SUFFIX in os.path.basename(path) else "torch"
        return _from_index(path, form)
    return Location(_sniffed(path), (path,))


def weight_files(folder: str) -> list[str]:
    """Returns the names of the files in a folder that a reader could take for its weights.

    Args:
      folder: an existing folder.

    Returns:
      Sorted names of safetensors files, `pytorch_model*.bin` and their indexes.
    """
    return sorted(
        name
        for name in os.listdir(folder)
        if not name.startswith(".")
        and (
            name.endswith((SAFETENSORS_SUFFIX, SAFETENSORS_SUFFIX + INDEX_SUFFIX))
            or (name.startswith("pytorch_model") and name.endswith((".bin", ".bin" + INDEX_SUFFIX)))
        )
    )


def is_inside(name: str) -> bool:
    """Says whether a name taken from an index stays within the index's folder.

    Only the name is judged: the files of a hub cache are links that lead outside, and rightly so.

    Args:
      name: a file name as an index gives it.

    Returns:
      False for absolute names, drive letters, backslashes, `..`, and names that are no file.

    Example:
      >>> is_inside("model-00001-of-00002.safetensors"), is_inside("../model.safetensors")
      (True, False)
    """
    if "\\" in name or "\0" in name or re.match(r"^[A-Za-z]:", name):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _check_regular(path: str) -> None:
    """Opening a pipe would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path}: expected a file, found a folder, a pipe or a device")


def _in_folder(folder: str) -> Location:
    names = weight_files(folder)
    if SAFETENSORS_NAME in names:
        return Location("safetensors", (os.path.join(folder, SAFETENSORS_NAME),))
    index = _only_index(folder, names, SAFETENSORS_SUFFIX + INDEX_SUFFIX, SAFETENSORS_NAME)
    if index is not None:
        return _from_index(os.path.join(folder, index), "safetensors")
    loose = [name for name in names if name.endswith(SAFETENSORS_SUFFIX)]
    if loose:
        _check_complete(folder, loose)
        return Location("safetensors", tuple(os.path.join(folder, name) for name in loose))
    if TORCH_NAME in names:
        return Location("torch", (os.path.join(folder, TORCH_NAME),))
    index = _only_index(folder, names, ".bin" + INDEX_SUFFIX, TORCH_NAME)
    if index is not None:
        return _from_index(os.path.join(folder, index), "torch")
    sets = sorted({_parts(os.path.join(folder, name)) for name in _gguf_names(folder)})
    if len(sets) > 1:
        some = ", ".join(os.path.basename(parts[0]) for parts in sets)
        raise CheckpointError(f"{folder}: several GGUF files, name one of them: {some}")
    if sets:
        return Location("gguf", sets[0])
    raise CheckpointError(f"{folder}: {_nothing_found(folder)}")


def _only_index(folder: str, names: list[str], suffix: str, usual: str) -> str | None:
    found = [name for name in names if name.endswith(suffix)]
    if usual + INDEX_SUFFIX in found:
        return usual + INDEX_SUFFIX
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several indexes, name one of them: {', '.join(found)}")
    return found[0] if found else None


def _gguf_names(folder: str) -> list[str]:
    return [
        name
        for name in os.listdir(folder)
        if name.endswith(GGUF_SUFFIX) and not name.startswith(".")
    ]


def _parts(path: str) -> tuple[str, ...]:
    """All parts of a split GGUF file, of which one is named; a file that was not split alone."""
    folder, name = os.path.split(path)
    match = _SHARD.match(name)
    if match is None or not 0 < int(match["number"]) <= int(match["count"]) <= _MOST_PARTS:
        return (path,)
    width = len(match["number"])
    parts = [
        os.path.join(folder, f"{match['stem']}-{number:0{width}}-of-{match['count']}{GGUF_SUFFIX}")
        for number in range(1, int(match["count"]) + 1)
    ]
    missing = next((part for part in parts if not os.path.exists(part)), None)
    if missing is not None:
        raise CheckpointError(f"{path}: part {os.path.basename(missing)} is missing")
    return tuple(parts)


def _nothing_found(folder: str) -> str:
    others = sorted(
        name
        for name in os.listdir(folder)
        if name.endswith((*TORCH_SUFFIXES, ".partial")) and not name.startswith(".")
    )
    if os.path.exists(os.path.join(folder, _ORBAX_MARK)):
        return "an orbax checkpoint: `jaxmerge convert` reads it, and converters.load_orbax"
    message = f"no checkpoint: expected {SAFETENSORS_NAME}, an index with shards, or {TORCH_NAME}"
    if any(name.endswith(".partial") for name in others):
        return f"{message}; found unfinished files: {', '.join(others)}"
    if others:
        return f"{message}; found {', '.join(others)}: name the file itself"
    return message


def _check_complete(folder: str, names: list[str]) -> None:
    """Shards without an index still say how many they are: a set with gaps is not a model."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        match = _SHARD.match(name)
        if match:
            numbers.setdefault((match["stem"], match["count"]), set()).add(int(match["number"]))
    for (stem, count), found in numbers.items():
        missing = int(count) - len(found)
        if missing:
            raise CheckpointError(
                f"{folder}: expected {int(count)} shards {stem}-*-of-{count}, found {len(found)}"
            )


def _from_index(path: str, form: str) -> Location:
    folder = os.path.dirname(path)
    weight_map = _weight_map(path)
    files: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if name in files:
            continue
        if not is_inside(name):
            raise CheckpointError(
                f"{path}: tensor {tensor!r}: expected a file in the index's own folder, found "
                f"{name!r}"
            )
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            raise CheckpointError(f"{path}: tensor {tensor!r}: shard {name!r} is missing")
        files[name] = file
    return Location(
        form,
        tuple(files[name] for name in sorted(files)),
        {tensor: files[name] for tensor, name in weight_map.items()},
    )


def _weight_map(path: str) -> Mapping[str, str]:
    if os.path.getsize(path) > _LARGEST_INDEX:
        raise CheckpointError(f"{path}: too large to be an index: {os.path.getsize(path)} bytes")
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the index is not valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an index with a weight_map of tensors to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: tensor {tensor!r}: expected a file name, found {name}")
    return weight_map


def _sniffed(path: str) -> str:
    """A file without a known suffix, such as a blob of a hub cache, says itself what it is."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"GGUF"):
        return "gguf"
    raise CheckpointError(
        f"{path}: not a checkpoint: expected a safetensors file, a GGUF file or a PyTorch file "
        f"({', '.join(TORCH_SUFFIXES)})"
    )
