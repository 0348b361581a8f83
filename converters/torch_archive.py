"""Writing PyTorch checkpoints tensor by tensor, without torch and without holding them.

A file of `torch.save` is a zip archive of stored entries: a pickle that says which tensors there are, and a file of
bytes for each. `torch.load(weights_only=True)` reads what is written here, mapped into memory too.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from jaxmerge.converters import byte_io, dtypes
from jaxmerge.converters import ties as tying
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.partial_file import PartialFile
from jaxmerge.converters.tensor_info import TensorInfo

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}
# float8_e8m0fnu came with torch 2.7; older versions say themselves that they lack it.
_UNTYPED = (
    *("uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_ALIGNMENT = 64
# Zip archives keep sizes in 32 bits unless told otherwise; a margin below.
_LARGEST_SMALL = (1 << 31) - (1 << 20)


class TorchArchiveWriter:
    """Writes a PyTorch file of a flat state dict whose tensors are all known in advance.

    Tensors are written one after the other, each from its first element to its last. The file stands beside its final
    name (`.partial`) until `close` finds every tensor written. As a context manager it closes at the end and aborts on
    an error.

    Args:
      path: the file.
      infos: the tensors to come, in the order of the state dict.
      ties: groups of names that are one tensor: only the first name of each is to be written.

    Raises:
      CheckpointError: names that repeat, a dtype that torch lacks, or the system refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        infos: Iterable[TensorInfo],
        *,
        ties: Sequence[Sequence[str]] = (),
    ) -> None:
        self.path = os.fspath(path)
        listed = list(infos)
        self.tensors = {info.name: info for info in listed}
        if len(self.tensors) != len(listed):
            twice = next(info.name for info in listed if listed.count(info) > 1)
            raise CheckpointError(f"{self.path}: tensor {twice!r} is announced twice")
        groups = tying.check_ties(ties, self.tensors, self.path)
        self._first = {name: group[0] for group in groups for name in group}
        self._keys: dict[str, str] = {}
        for name in self.tensors:
            first = self._first.setdefault(name, name)
            self._keys.setdefault(first, str(len(self._keys)))
        structure = _pickled(
            [(info, self._keys[self._first[info.name]]) for info in listed], self.path
        )
        self._written: set[str] = set()
        self._current: str | None = None
        self._at = 0
        self._entry: IO[bytes] | None = None
        try:
            self._file: PartialFile | None = PartialFile(self.path)
            self._archive = zipfile.ZipFile(self._file.path, "w")
            self._folder = os.path.basename(self.path).split(".")[0] or "archive"
            self._put("data.pkl", structure)
            self._put("byteorder", sys.byteorder.encode())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {error.strerror or error}"
            ) from error

    @property
    def pending(self) -> list[str]:
        """The tensors that are not complete, one name of each tied group, in order."""
        return [name for name in self._keys if name not in self._written]

    def write_flat(self, name: str, start: int, values: Any) -> None:
        """Writes the next range of a tensor's elements in C order.

        Args:
          name: the tensor that is being written, or the next one.
          start: the first element: where the last range ended, or 0.
          values: a 1-D array of the announced dtype.

        Raises:
          CheckpointError: not the next range, another dtype, or a full disk.
        """
        if name not in self._keys:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} was announced.{nearest(name, self._keys)}"
            )
        info, values = self.tensors[name], np.asarray(values)
        if values.dtype.name != info.dtype or values.ndim != 1:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: expected 1-D values of {info.dtype}, found "
                f"{values.dtype}{list(values.shape)}"
            )
        try:
            if self._current is None and name not in self._written and start == 0:
                self._begin(info)
            if self._entry is None or (name, start) != (self._current, self._at):
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}: expected its ranges in order and whole, found "
                    f"{start}:{start + values.size}"
                )
            self._entry.write(byte_io.as_bytes(np.ascontiguousarray(values)))
            self._at += values.size
            if self._at * values.itemsize >= info.nbytes:
                self._end()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Puts the file in place; without every tensor written it aborts instead.

        Raises:
          CheckpointError: tensors are missing, or the disk is full.
        """
        if self._file is None:
            return
        missing = self.pending
        if missing:
            self.abort()
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(self._keys)} tensors were not written: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        file, self._file = self._file, None
        try:
            self._put("version", b"3\n")
            self._archive.close()
            with file:
                pass
        except OSError as error:
            file.discard()
            raise CheckpointError(
                f"{self.path}: cannot write: {error.strerror or error}"
            ) from error

    def abort(self) -> None:
        """Removes what was written; after `close` it does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            if self._entry is not None:
                self._entry.close()
            self._archive.close()
            file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort()
        else:
            self.close()

    def _put(self, name: str, data: bytes) -> None:
        self._archive.writestr(zipfile.ZipInfo(f"{self._folder}/{name}"), data)

    def _begin(self, info: TensorInfo) -> None:
        entry = zipfile.ZipInfo(f"{self._folder}/data/{self._keys[info.name]}")
        large = info.nbytes > _LARGEST_SMALL
        entry.file_size = info.nbytes
        # A field of padding lets the bytes begin where any dtype may.
        head = 30 + len(entry.filename) + (20 if large else 0) + 4
        at = self._archive.fp.tell() + head  # type: ignore[union-attr]
        padding = -at % _ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._entry = self._archive.open(entry, "w", force_zip64=large)
        self._current, self._at = info.name, 0

    def _end(self) -> None:
        assert self._entry is not None
        assert self._current is not None
        self._entry.close()
        self._written.add(self._current)
        self._entry = self._current = None


def _pickled(tensors: Sequence[tuple[TensorInfo, str]], path: str) -> bytes:
    """The pickle of a dict of tensors, opcode by opcode: nothing of torch is needed to name its functions."""
    parts = [b"\x80\x02}("]
    for info, key in tensors:
        count = info.nbytes // dtypes.storage_dtype(info.dtype).itemsize
        if info.dtype in _STORAGES:
            function, storage, size = "_rebuild_tensor_v2", f"torch\n{_STORAGES[info.dtype]}", count
            tail = b""
        elif info.dtype in _UNTYPED:
            function, storage = "_rebuild_tensor_v3", "torch.storage\nUntypedStorage"
            size, tail = info.nbytes, f"ctorch\n{info.dtype}\n".encode()
        else:
            raise CheckpointError(f"{path}: tensor {info.name!r}: torch has no dtype {info.dtype}")
        parts += [
            _text(info.name),
            f"ctorch._utils\n{function}\n((".encode(),
            _text("storage"),
            f"c{storage}\n".encode(),
            _text(key),
            _text("cpu"),
            _whole(size),
            b"tQ",
            _whole(0),
            _sizes(info.shape),
            _sizes(_strides(info.shape)),
            b"\x89ccollections\nOrderedDict\n)R",
            tail,
            b"tR",
        ]
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _whole(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _sizes(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_whole, values)) + b"t"


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return strides[::-1][: len(shape)]
