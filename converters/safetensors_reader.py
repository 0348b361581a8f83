"""Reading safetensors checkpoints of one or several files."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from jaxmerge.converters import byte_io, dtypes, safetensors_file, ties
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.tensor_info import TensorInfo


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or the shards of one checkpoint, read by position.

    Tensors are read into new arrays and never mapped: mapped pages count as the process's own.
    """

    format = "safetensors"

    def __init__(
        self,
        path: str,
        headers: Mapping[str, safetensors_file.Header],
        descriptors: Mapping[str, int],
    ) -> None:
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        groups: dict[tuple[str, ...], None] = {}
        self._offsets: dict[str, int] = {}
        for file, header in headers.items():
            for name, info in header.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} stands in two files: {tensors[name].file} and "
                        f"{file}"
                    )
                tensors[name] = info
            self._offsets.update(header.offsets)
            own, tied = ties.recorded(header.metadata, file)
            metadata = {**own, **metadata}
            groups.update(dict.fromkeys(tuple(group) for group in tied))
        # A shard opened by itself has only some of the tied names.
        present = [[name for name in group if name in tensors] for group in groups]
        super().__init__(
            path,
            tensors,
            metadata=metadata,
            ties=ties.check_ties(present, tensors, path),
        )
        self._descriptors = dict(descriptors)
        # A checkpoint that is dropped without `close` gives its files back too.
        weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(cls, path: str, files: Sequence[str]) -> Self:
        """Opens the files and reads their headers.

        Args:
          path: what the user named: a file or a folder.
          files: the safetensors files of the checkpoint.

        Returns:
          The open checkpoint.

        Raises:
          CheckpointError: a file is missing or broken, or two files hold one name.
        """
        descriptors: dict[str, int] = {}
        try:
            for file in files:
                descriptors[file] = _open(file)
            headers = {
                file: safetensors_file.read_header(fd, file) for file, fd in descriptors.items()
            }
            return cls(path, headers, descriptors)
        except BaseException:
            for fd in descriptors.values():
                os.close(fd)
            raise

    def disk_order(self) -> list[str]:
        """Returns the names in the order in which they lie on disk: the fastest order to read."""
        rank = {file: index for index, file in enumerate(self.files)}
        return sorted(
            self.tensors, key=lambda name: (rank[self.tensors[name].file], self._offsets[name])
        )

    def close(self) -> None:
        """Closes the files; reading afterwards is an error. Closing twice is not."""
        _close_all(self._descriptors)

    def _read(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        fd = self._descriptors.get(info.file)
        if fd is None:
            raise CheckpointError(f"{self.path}: tensor {info.name!r}: the checkpoint is closed")
        array = byte_io.aligned(stop - start, dtypes.storage_dtype(info.dtype))
        byte_io.read_into(
            fd,
            byte_io.as_bytes(array),
            self._offsets[info.name] + start * array.itemsize,
            f"{info.file}: tensor {info.name!r}",
        )
        return array


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _open(file: str) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot open: {error.strerror}") from None
