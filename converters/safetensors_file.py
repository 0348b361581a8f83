"""The safetensors format: 8 bytes of header length, a JSON header, raw tensor bytes.

Headers are read and written here, not by the `safetensors` package, so that every lie of a broken
or hostile file is an error that names it, and tensors can be read and written one at a time.
"""

from __future__ import annotations

import collections
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxmerge.converters import dtypes
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.tensor_info import TensorInfo

# The limit of the reference implementation: a header is read and parsed whole.
LARGEST_HEADER = 100_000_000
METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
# The limits of NumPy arrays.
_MOST_DIMENSIONS = 64
_MOST_BYTES = 2**63 - 1
_ALIGNMENT = 8


class Header(NamedTuple):
    """What the header of one safetensors file says.

    Attributes:
      tensors: name -> info, in the header's order.
      offsets: name -> the file offset of the tensor's first byte.
      metadata: the `__metadata__` entries.
      size: the size of the whole file in bytes.
    """

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    metadata: dict[str, str]
    size: int


class Layout(NamedTuple):
    """Where a file that is yet to be written has everything.

    Attributes:
      head: header length and header: the file's first bytes.
      offsets: name -> the file offset of the tensor's first byte.
      size: the size of the whole file in bytes.
    """

    head: bytes
    offsets: dict[str, int]
    size: int


def read_header(fd: int, path: str) -> Header:
    """Reads and checks the header of a safetensors file.

    Nothing larger than the header is allocated, and the header's length is checked first.

    Args:
      fd: the open file.
      path: its path, for messages and for `TensorInfo.file`.

    Returns:
      The header.

    Raises:
      CheckpointError: the file is truncated, corrupt or not a safetensors file.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    size = status.st_size
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise CheckpointError(
            f"{path}: truncated: expected at least 8 bytes of header length, found {size}"
        )
    length = int.from_bytes(start, "little")
    if length > size - 8 or length > LARGEST_HEADER:
        raise CheckpointError(
            f"{path}: header length {length} is impossible: expected at most "
            f"{min(size - 8, LARGEST_HEADER)} in a file of {size} bytes.{_other_format(start)}"
        )
    text = os.pread(fd, length, 8)
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{path}: expected a JSON header that starts with '{{', found {text[:8]!r}."
            f"{_other_format(start)}"
        )
    return _checked(_parsed(text, path), path, 8 + length, size)


def layout(tensors: Iterable[TensorInfo], metadata: Mapping[str, str], path: str) -> Layout:
    """Lays out a safetensors file.

    The header keeps the order given. The bytes are ordered by descending item size, so that every
    tensor is aligned to its dtype and other readers can view it in place.

    Args:
      tensors: infos of the tensors, with different names.
      metadata: text entries for `__metadata__`; none are written for an empty mapping.
      path: the file, for messages.

    Returns:
      The layout.

    Raises:
      CheckpointError: a name, dtype or metadata entry that the format cannot hold.
    """
    infos = list(tensors)
    _check_metadata(metadata, path)
    by_size = sorted(infos, key=lambda info: -dtypes.storage_dtype(info.dtype).itemsize)
    starts: dict[str, int] = {}
    end = 0
    for info in by_size:
        starts[info.name] = end
        end += info.nbytes
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    for info in infos:
        if info.name == METADATA:
            raise CheckpointError(f"{path}: a tensor cannot have the name {METADATA!r}")
        header[info.name] = {
            "dtype": dtypes.to_code(info.dtype),
            "shape": list(info.shape),
            "data_offsets": [starts[info.name], starts[info.name] + info.nbytes],
        }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: a name or metadata entry is not valid Unicode: {error}"
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(
            f"{path}: expected a header of at most {LARGEST_HEADER} bytes, found {len(text)}: "
            "write shards or less metadata"
        )
    data = 8 + len(text)
    return Layout(
        head=len(text).to_bytes(8, "little") + text,
        offsets={name: data + start for name, start in starts.items()},
        size=data + end,
    )


def _parsed(text: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return entries

    def no_constant(value: str) -> NoReturn:
        raise ValueError(f"{value} is not JSON")

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header")
    return header


def _checked(header: dict[str, Any], path: str, data: int, size: int) -> Header:
    metadata = header.pop(METADATA, {})
    _check_metadata(metadata, path)
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        info, start = _tensor(name, entry, path)
        stop = start + info.nbytes
        if stop > size - data:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected its bytes within the {size - data} bytes of "
                f"data, found {start}:{stop}: the file is truncated or corrupt"
            )
        tensors[name] = info
        offsets[name] = data + start
        ranges.append((start, stop, name))
    _check_tiling(ranges, path, size - data)
    return Header(tensors, offsets, metadata, size)


def _tensor(name: str, entry: object, path: str) -> tuple[TensorInfo, int]:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: the name is not valid Unicode") from None
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(f"{where}: expected the fields {sorted(_FIELDS)}, found {found}")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_counts(shape):
        raise CheckpointError(f"{where}: expected a shape of whole numbers, found {shape!r:.80}")
    if len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{where}: expected at most {_MOST_DIMENSIONS} dimensions, found {len(shape)}"
        )
    if not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
        raise CheckpointError(
            f"{where}: expected data_offsets [start, stop] with start <= stop, found {span!r:.80}"
        )
    try:
        dtype = dtypes.from_code(code if isinstance(code, str) else repr(code))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if math.prod(size for size in shape if size) * dtype.itemsize > _MOST_BYTES:
        raise CheckpointError(f"{where}: {dtype.name} of shape {shape!r:.80} is no possible array")
    nbytes = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != nbytes:
        raise CheckpointError(
            f"{where}: {dtype.name}{shape} takes {nbytes} bytes, found data_offsets {span} "
            f"of {span[1] - span[0]} bytes"
        )
    return TensorInfo(name, tuple(shape), dtypes.name_of(dtype), nbytes, path), span[0]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MOST_BYTES for value in values
    )


def _check_tiling(ranges: list[tuple[int, int, str]], path: str, data_size: int) -> None:
    """The format allows neither overlaps nor holes: what no tensor names could be anything."""
    end, before = 0, "the header"
    for start, stop, name in sorted(ranges):
        if start < end:
            raise CheckpointError(
                f"{path}: tensor {name!r}: its bytes {start}:{stop} overlap those of {before!r}, "
                f"which end at {end}"
            )
        if start > end:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected its bytes at {end}, after {before!r}; found "
                f"{start}: bytes that no tensor names"
            )
        end, before = stop, name
    if end != data_size:
        raise CheckpointError(
            f"{path}: expected {end} bytes of data, found {data_size}: bytes that no tensor names"
        )


def _check_metadata(metadata: object, path: str) -> None:
    if not isinstance(metadata, Mapping):
        raise CheckpointError(f"{path}: expected a mapping of text as metadata, found {metadata!r}")
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise CheckpointError(
                f"{path}: metadata entry {name!r}: expected text, found {type(value).__name__}"
            )


def _other_format(start: bytes) -> str:
    """Says what the file is, if its first bytes are those of something well known."""
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return " This is a PyTorch file: give it a name that ends in .pt, .pth or .bin"
    if start == b"version ":
        return " This is a Git LFS pointer: the weights were not downloaded (`git lfs pull`)"
    return ""
