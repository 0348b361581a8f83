"""Loading PyTorch files without running what they say."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from types import ModuleType
from typing import Any, NamedTuple

from jaxmerge.converters.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
# The directory and the pickle are read and parsed whole; those of the largest real files have some tens of megabytes.
_LARGEST_DIRECTORY = 100_000_000
_LARGEST_PICKLE = 256_000_000
_END, _END_64 = b"PK\x05\x06", b"PK\x06\x06"


class Loaded(NamedTuple):
    """A loaded PyTorch file.

    Attributes:
      structure: what was pickled, tensors on the CPU.
      mapped: the tensors' storages are clean, private mappings of the file.
    """

    structure: Any
    mapped: bool


def load(torch: ModuleType, path: str) -> Loaded:
    """Loads a PyTorch file with `weights_only=True`, mapped into memory where the format allows.

    Zip archives (the format since torch 1.6) are mapped, so that only what is used is read; older
    files are read whole.

    Args:
      torch: the module.
      path: the file.

    Returns:
      The structure.

    Raises:
      CheckpointError: the file is missing, broken, a compressed archive (a possible zip bomb), a
        TorchScript model, or holds more than tensors and plain containers.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot open: {error.strerror}") from None
    is_zip = start.startswith(_ZIP_MAGIC)
    mapped = is_zip and _check_archive(path)
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start[8:9] == b"{":
        raise CheckpointError(
            f"{path}: this is a safetensors file: give it a name that ends in .safetensors"
        )
    if start.startswith(b"version "):
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer: the weights were not downloaded (`git lfs pull`)"
        )
    try:
        with warnings.catch_warnings():
            # Notes on the pickle's protocol: the loader refuses what it does not know anyway.
            warnings.simplefilter("ignore")
            structure = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from None
    except MemoryError:
        raise CheckpointError(f"{path}: the file asks for more memory than there is") from None
    except Exception as error:
        # The legacy reader fails in many ways on what is no PyTorch file at all.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path}: truncated, corrupt or not a PyTorch file: {type(error).__name__}: "
            f"{reason[0][:200]}"
        ) from None
    return Loaded(structure, mapped)


def _check_archive(path: str) -> bool:
    """Checks an archive before torch reads it; returns whether its storages can be mapped."""
    size = os.path.getsize(path)
    directory = _directory_size(path, size)
    if directory > _LARGEST_DIRECTORY:
        raise CheckpointError(
            f"{path}: expected an archive with a directory of at most {_LARGEST_DIRECTORY} bytes, found "
            f"one of {directory}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            order = next((e for e in entries if e.filename.endswith("/byteorder")), None)
            byte_order = b"little" if order is None or order.file_size > 8 else archive.read(order)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt archive: {error}") from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            f"{path}: a TorchScript model, which holds code; save its weights with "
            "torch.save(torch.jit.load(path).state_dict(), ...)"
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{path}: entry {entry.filename!r}: expected it stored as it is, found it "
                f"compressed from {entry.file_size} to {entry.compress_size} bytes, which "
                "torch.save never does"
            )
        if entry.filename.endswith("/data.pkl") and entry.file_size > _LARGEST_PICKLE:
            raise CheckpointError(
                f"{path}: expected a pickle of at most {_LARGEST_PICKLE} bytes beside the tensors, found "
                f"one of {entry.file_size}"
            )
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise CheckpointError(
            f"{path}: expected entries of at most {size} bytes together, found {total}: the "
            "archive overlaps itself"
        )
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise CheckpointError(f"{path}: a zip archive that torch.save did not write")
    return byte_order == b"little"


def _directory_size(path: str, size: int) -> int:
    """The size of an archive's directory, as its last record says; 0 where there is none."""
    tail = min(size, 22 + (1 << 16) + 20)
    with open(path, "rb") as file:
        file.seek(size - tail)
        data = file.read(tail)
        at = data.rfind(_END)
        if at < 0 or at + 22 > len(data):
            return 0
        found = int.from_bytes(data[at + 12 : at + 16], "little")
        if found < 0xFFFF_FFFF or at < 20:
            return found
        # The 64-bit record, which a locator before the last one points to.
        file.seek(min(int.from_bytes(data[at - 12 : at - 4], "little"), size))
        record = file.read(56)
    return int.from_bytes(record[40:48], "little") if record.startswith(_END_64) else 0


def _refusal(message: str) -> str:
    found = re.search(r"(?:GLOBAL|class|instruct\w*|Unsupported \w+)\s+([\w.]+)", message)
    what = f" It names {found[1]}." if found and "." in found[1] else ""
    return (
        f"PyTorch's weights_only loader refused this pickle.{what} It asks for more than tensors "
        "and plain containers, which could run any code on this machine. If you trust where it "
        "comes from, load it in PyTorch yourself and save the bare state dict: "
        "torch.save(model.state_dict(), ...)"
    )
