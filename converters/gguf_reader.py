"""Reading GGUF checkpoints: dequantised, in Hugging Face's layout."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, Self

import numpy as np

from jaxmerge.converters import byte_io, dtypes, gguf_config, gguf_names
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.gguf_file import GgufHeader, GgufTensor, import_gguf, read_header
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.tensor_info import TensorInfo

_PLAIN = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
}
# Elements that are dequantised at once: the package makes several arrays of their size.
_CHUNK = 1 << 20


class _Source(NamedTuple):
    tensor: GgufTensor
    file: str
    change: gguf_names.Change
    heads: int


class GgufCheckpoint(Checkpoint):
    """One GGUF file, or the parts that it was split into.

    Tensors have Hugging Face's names, and their rows its order, where the architecture has a table in
    `gguf_names`; else they are as the file has them. Quantised tensors are dequantised to float32 as they are read.

    Attributes:
      fields: the file's metadata, the tokenizer among them.
    """

    format = "gguf"

    def __init__(
        self,
        path: str,
        headers: Mapping[str, GgufHeader],
        descriptors: Mapping[str, int],
    ) -> None:
        self._gguf: ModuleType = import_gguf(path)
        self._descriptors = dict(descriptors)
        self.fields = next(iter(headers.values())).fields
        parts = self.fields.get("split.count", 1)
        if isinstance(parts, int) and parts > len(headers):
            raise CheckpointError(
                f"{path}: one of {parts} parts, found {len(headers)}: expected the others beside it, "
                "named NAME-00001-of-00002.gguf and so on"
            )
        stored: dict[str, tuple[GgufTensor, str]] = {}
        for file, header in headers.items():
            for tensor in header.tensors:
                if tensor.name in stored:
                    raise CheckpointError(
                        f"{path}: tensor {tensor.name!r} stands in two files: {stored[tensor.name][1]} and {file}"
                    )
                stored[tensor.name] = tensor, file
        architecture = self.fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(
                f"{path}: metadata 'general.architecture': expected text, found {architecture!r:.80}"
            )
        self._check_types(stored)
        self._sources: dict[str, _Source] = {}
        infos = {}
        for name, (own, change) in gguf_names.hugging_face(architecture, stored, path).items():
            source = _Source(*stored[own], change, self._heads(architecture, change, path))
            self._sources[name] = source
            infos[name] = _info(name, source, path)
        metadata = {
            key: value
            for key, value in self.fields.items()
            if key.startswith("general.") and isinstance(value, str)
        }
        frequencies = stored.get("rope_freqs.weight")
        config = gguf_config.config(
            self.fields,
            {name: info.shape for name, info in infos.items()},
            None if frequencies is None else self._values(*frequencies, 0, None),
            path,
        )
        super().__init__(path, infos, metadata=metadata, config=config)
        weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(cls, path: str, files: Sequence[str]) -> Self:
        """Opens the files and reads their headers.

        Args:
          path: what the user named.
          files: the GGUF files of the checkpoint, in order.

        Returns:
          The open checkpoint.

        Raises:
          CheckpointError: gguf is missing, a file is missing or broken, or its metadata do not describe a model.
        """
        descriptors: dict[str, int] = {}
        try:
            for file in files:
                descriptors[file] = _open(file)
            headers = {file: read_header(fd, file) for file, fd in descriptors.items()}
            return cls(path, headers, descriptors)
        except BaseException:
            for fd in descriptors.values():
                os.close(fd)
            raise

    def quantisation(self, name: str) -> str | None:
        """Returns the type that a tensor is quantised to, such as "Q4_1"; None if it is not.

        Args:
          name: a name in `tensors`.

        Raises:
          CheckpointError: no such tensor.
        """
        kind = self._sources[self.info(name).name].tensor.type
        return None if kind in _PLAIN else kind

    def close(self) -> None:
        """Closes the files; reading afterwards is an error. Closing twice is not."""
        _close_all(self._descriptors)

    def _check_types(self, stored: Mapping[str, tuple[GgufTensor, str]]) -> None:
        """Tries a block of every type: the package does not dequantise all that it knows."""
        first = {tensor.type: (tensor, file) for tensor, file in reversed(list(stored.values()))}
        for kind in first.keys() - _PLAIN.keys():
            tensor, file = first[kind]
            block = np.zeros((1, tensor.block_bytes), np.uint8)
            try:
                self._gguf.quants.dequantize(block, self._gguf.GGMLQuantizationType[kind])
            except NotImplementedError:
                raise CheckpointError(
                    f"{file}: tensor {tensor.name!r}: this version of gguf does not dequantise {kind}"
                ) from None

    def _heads(self, architecture: str, change: gguf_names.Change, path: str) -> int:
        if change not in ("query_rows", "key_rows"):
            return 1
        heads = self.fields.get(f"{architecture}.attention.head_count")
        if change == "key_rows":
            heads = self.fields.get(f"{architecture}.attention.head_count_kv", heads)
        if not isinstance(heads, int) or heads < 1:
            raise CheckpointError(
                f"{path}: metadata '{architecture}.attention.head_count': expected a number of heads, found "
                f"{heads!r:.80}"
            )
        return heads

    def _read(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        tensor, file, change, heads = self._sources[info.name]
        if start == stop:
            return np.empty(0, dtypes.storage_dtype(info.dtype))
        if change == "transposed" and len(info.shape) == 2:
            whole = self._values(tensor, file, 0, None).reshape(tensor.shape)
            return np.ascontiguousarray(whole.T).reshape(-1)[start:stop]
        if change in ("query_rows", "key_rows"):
            # Rows move within their head: the heads that hold the range, whole.
            size = math.prod(info.shape) // heads
            first = start // size
            count = -(-stop // size) - first
            found = self._values(tensor, file, first * size, (first + count) * size)
            pairs = found.reshape(count, info.shape[0] // heads // 2, 2, -1)
            flat = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
            return flat[start - first * size : stop - first * size].copy()
        values = self._values(tensor, file, start, stop)
        if change == "plus_one":
            values -= values.dtype.type(1)
        return values

    def _values(self, tensor: GgufTensor, file: str, start: int, stop: int | None) -> np.ndarray:
        """Returns elements start..stop in the file's order, dequantised, in a new array."""
        stop = math.prod(tensor.shape) if stop is None else stop
        where = f"{file}: tensor {tensor.name!r}"
        fd = self._descriptors.get(file)
        if fd is None:
            raise CheckpointError(f"{where}: the checkpoint is closed")
        if tensor.type in _PLAIN:
            array = np.empty(stop - start, dtypes.storage_dtype(_PLAIN[tensor.type]))
            byte_io.read_into(
                fd, byte_io.as_bytes(array), tensor.offset + start * array.itemsize, where
            )
            return array
        kind = self._gguf.GGMLQuantizationType[tensor.type]
        values = np.empty(stop - start, np.float32)
        step = _CHUNK // tensor.block * tensor.block
        for begin in range(start // tensor.block * tensor.block, stop, step):
            end = min(begin + step, -(-stop // tensor.block) * tensor.block)
            packed = np.empty((end - begin) // tensor.block * tensor.block_bytes, np.uint8)
            at = tensor.offset + begin // tensor.block * tensor.block_bytes
            byte_io.read_into(fd, byte_io.as_bytes(packed), at, where)
            unpacked = self._gguf.quants.dequantize(packed[None], kind)[0]
            low, high = max(begin, start), min(end, stop)
            values[low - start : high - start] = unpacked[low - begin : high - begin]
        return values


def _info(name: str, source: _Source, path: str) -> TensorInfo:
    shape = source.tensor.shape
    if source.change == "transposed" and len(shape) == 2:
        shape = shape[::-1]
    if source.change in ("query_rows", "key_rows") and (not shape or shape[0] % (2 * source.heads)):
        raise CheckpointError(
            f"{path}: tensor {source.tensor.name!r}: expected rows of {source.heads} heads of even size, found shape "
            f"{list(shape)}"
        )
    return TensorInfo.of(name, shape, _PLAIN.get(source.tensor.type, "float32"), source.file)


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _open(file: str) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot open: {error.strerror}") from None
