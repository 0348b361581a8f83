"""The GGUF format: typed metadata, a table of tensors, raw blocks.

The header is read here, not by the `gguf` package, so that every lie of a broken or hostile file is an error that names
it before anything is allocated for it; the package knows the types' block sizes and how to dequantise them.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.converters.errors import CheckpointError

MAGIC = b"GGUF"
# As for safetensors: the header (tokenizers stand in it) is read and parsed whole.
LARGEST_HEADER = 100_000_000
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 8
_MOST_BYTES = 2**63 - 1
_DEEPEST = 4
_BLOCK = 1 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class GgufTensor(NamedTuple):
    """What the header says about one tensor.

    Attributes:
      name: its name in the file, such as "blk.0.attn_q.weight".
      shape: its dimensions, slowest first (the file has them the other way round).
      type: the name of its storage type, "F32", "Q4_1" and so on.
      block: elements in one block of the type; a row is a whole number of blocks.
      block_bytes: bytes of one block.
      offset: where in the file its first byte is.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    block: int
    block_bytes: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) // self.block * self.block_bytes


class GgufHeader(NamedTuple):
    """What the header of one GGUF file says.

    Attributes:
      fields: the metadata: text, numbers, booleans; NumPy arrays of numbers, lists of text.
      tensors: in the header's order.
    """

    fields: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def import_gguf(path: str) -> ModuleType:
    """Imports gguf, the only place where that happens.

    Args:
      path: the file that needs it, for the message.

    Returns:
      The module.

    Raises:
      CheckpointError: gguf is not installed; the message names the extra.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{path}: GGUF files need gguf, which is not installed: pip install 'jaxmerge[gguf]'"
        ) from None
    return gguf


def read_header(fd: int, path: str) -> GgufHeader:
    """Reads and checks the header of a GGUF file.

    Args:
      fd: the open file.
      path: its path, for messages.

    Returns:
      The header.

    Raises:
      CheckpointError: the file is truncated, corrupt, not a GGUF file, or of a version or byte order that is not
        supported; or gguf is not installed.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    cursor = _Cursor(fd, path, status.st_size)
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise CheckpointError(
            f"{path}: expected a GGUF file that starts with {MAGIC!r}, found {magic!r}"
        )
    version = cursor.number(4, "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big") in _VERSIONS
        raise CheckpointError(
            f"{path}: expected GGUF version {' or '.join(map(str, _VERSIONS))}, found "
            + ("a file of the other byte order" if swapped else str(version))
        )
    tensor_count = cursor.number(8, "the number of tensors")
    field_count = cursor.number(8, "the number of metadata entries")
    # An entry takes at least a key's length, a type and a value; a tensor its name's length, sizes, type and offset.
    cursor.expect(13 * field_count, f"{field_count} metadata entries")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string("a metadata key")
        if key in fields:
            raise CheckpointError(f"{path}: the header names metadata {key!r} twice")
        fields[key] = cursor.value(cursor.number(4, f"the type of {key!r}"), key)
    cursor.expect(24 * tensor_count, f"{tensor_count} tensors")
    entries = [_entry(cursor, path) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: expected a power of two as alignment, found {alignment!r:.80}"
        )
    data = -(-cursor.offset // alignment) * alignment
    sizes = _block_sizes(path) if entries else {}
    tensors = tuple(_tensor(entry, sizes, data, alignment, path) for entry in entries)
    _check_ranges(tensors, path, status.st_size)
    return GgufHeader(fields, tensors)


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Cursor:
    """Reads a header from the front, never past its end, and never more of it than is asked for and there."""

    def __init__(self, fd: int, path: str, size: int) -> None:
        self.offset = 0
        self._fd, self._path, self._size = fd, path, size
        self._buffer, self._start = b"", 0

    def expect(self, count: int, what: str) -> None:
        """Raises an error unless the file has `count` more bytes and a header may have them."""
        left = self._size - self.offset
        if count > left:
            raise CheckpointError(
                f"{self._path}: truncated or corrupt: expected {what} at byte {self.offset}, at least {count} bytes, "
                f"found {left} to the file's end"
            )
        if self.offset + count > LARGEST_HEADER:
            raise CheckpointError(
                f"{self._path}: expected a header of at most {LARGEST_HEADER} bytes, found more: {what} at byte "
                f"{self.offset} takes {count}"
            )

    def take(self, count: int, what: str) -> bytes:
        self.expect(count, what)
        begin = self.offset - self._start
        if begin + count > len(self._buffer):
            self._start, begin = self.offset, 0
            self._buffer = os.pread(self._fd, max(count, _BLOCK), self.offset)
        if begin + count > len(self._buffer):
            raise CheckpointError(f"{self._path}: the file was cut short while it was read")
        self.offset += count
        return self._buffer[begin : begin + count]

    def number(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def string(self, what: str) -> str:
        length = self.number(8, f"the length of {what}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self._path}: {what} at byte {self.offset} is not valid UTF-8"
            ) from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(f"the text of {key!r}")
        if kind in _NUMBERS:
            dtype = _NUMBERS[kind]
            return np.frombuffer(self.take(dtype.itemsize, f"the value of {key!r}"), dtype)[
                0
            ].item()
        if kind != _ARRAY or depth == _DEEPEST:
            raise CheckpointError(f"{self._path}: metadata {key!r}: no such type of value: {kind}")
        inner = self.number(4, f"the type of {key!r}'s items")
        count = self.number(8, f"the length of {key!r}")
        if inner in _NUMBERS:
            dtype = _NUMBERS[inner]
            data = self.take(count * dtype.itemsize, f"the {count} items of {key!r}")
            return np.frombuffer(data, dtype)
        self.expect(8 * count, f"the {count} items of {key!r}")
        return [self.value(inner, key, depth + 1) for _ in range(count)]


def _entry(cursor: _Cursor, path: str) -> _Entry:
    name = cursor.string("a tensor's name")
    count = cursor.number(4, f"the number of dimensions of {name!r}")
    if count > _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected at most {_MOST_DIMENSIONS} dimensions, found {count}"
        )
    sizes = [cursor.number(8, f"the shape of {name!r}") for _ in range(count)]
    kind = cursor.number(4, f"the type of {name!r}")
    return _Entry(name, tuple(reversed(sizes)), kind, cursor.number(8, f"the offset of {name!r}"))


def _block_sizes(path: str) -> Mapping[int, tuple[str, int, int]]:
    """Returns type number -> (name, elements in a block, bytes of a block)."""
    gguf = import_gguf(path)
    return {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _tensor(
    entry: _Entry,
    sizes: Mapping[int, tuple[str, int, int]],
    data: int,
    alignment: int,
    path: str,
) -> GgufTensor:
    where = f"{path}: tensor {entry.name!r}"
    if entry.type not in sizes:
        raise CheckpointError(
            f"{where}: no such storage type: {entry.type}; a newer gguf may know it"
        )
    name, block, block_bytes = sizes[entry.type]
    if math.prod(max(size, 1) for size in entry.shape) * 8 > _MOST_BYTES:
        raise CheckpointError(f"{where}: {name} of shape {list(entry.shape)} is no possible array")
    if (entry.shape[-1] if entry.shape else 1) % block:
        raise CheckpointError(
            f"{where}: expected rows of whole blocks of {block} elements ({name}), found shape {list(entry.shape)}"
        )
    if entry.offset % alignment:
        raise CheckpointError(
            f"{where}: expected an offset that {alignment} divides, found {entry.offset}"
        )
    return GgufTensor(entry.name, entry.shape, name, block, block_bytes, data + entry.offset)


def _check_ranges(tensors: tuple[GgufTensor, ...], path: str, size: int) -> None:
    end, before = 0, ""
    names: set[str] = set()
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        where = f"{path}: tensor {tensor.name!r}"
        if tensor.name in names:
            raise CheckpointError(f"{where}: the header names it twice")
        names.add(tensor.name)
        stop = tensor.offset + tensor.nbytes
        if stop > size:
            raise CheckpointError(
                f"{where}: expected its bytes {tensor.offset}:{stop} within the {size} bytes of the file, which is "
                "truncated or corrupt"
            )
        if tensor.offset < end:
            raise CheckpointError(
                f"{where}: its bytes {tensor.offset}:{stop} overlap those of {before!r}, which end at {end}"
            )
        end, before = max(end, stop), tensor.name
