"""The open checkpoint: what every format offers to a reader."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.tensor_info import TensorInfo


class Checkpoint(abc.ABC):
    """A checkpoint that is open for reading; a context manager that closes its files.

    `read` may be called from several threads at once, and after the files were replaced on disk
    it still reads the ones that were opened.

    Attributes:
      path: the file or folder that was opened.
      format: "safetensors", "torch" or "gguf".
      tensors: name -> `TensorInfo`, in the order of the file (shard after shard).
      metadata: the file's own text entries, exactly; of a sharded checkpoint, those of all shards,
        the first shard winning where two disagree. PyTorch files have none.
      ties: groups of names that are one tensor.
      key: where in a PyTorch file the state dict was found; None for the top level.
      skipped: entries of the state dict that are not tensors: name -> what they are.
      config: what `config.json` would say of the model, where the file itself says it (GGUF); else None.
    """

    format: str

    def __init__(
        self,
        path: str,
        tensors: Mapping[str, TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        ties: Sequence[tuple[str, ...]] = (),
        key: str | None = None,
        skipped: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata = dict(metadata or {})
        self.ties = list(ties)
        self.key = key
        self.skipped = dict(skipped or {})
        self.config = None if config is None else dict(config)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Args:
          name: a name in `tensors`.

        Returns:
          A new, writable, C-contiguous array of the stored shape and dtype.

        Raises:
          CheckpointError: no such tensor, or the file was cut short.
        """
        info = self.info(name)
        return self._read(info, 0, _size(info)).reshape(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads a range of one tensor's elements in C order, for tensors too large to hold.

        Args:
          name: a name in `tensors`.
          start: first element.
          stop: one past the last element.

        Returns:
          A new array `[stop - start]` of the stored dtype.

        Raises:
          CheckpointError: no such tensor, a range outside it, or a file cut short.
        """
        info = self.info(name)
        if not 0 <= start <= stop <= _size(info):
            raise CheckpointError(
                f"{info.file}: tensor {name!r}: expected a range within 0:{_size(info)}; "
                f"found {start}:{stop}"
            )
        return self._read(info, start, stop)

    def info(self, name: str) -> TensorInfo:
        """Returns the info of one tensor.

        Args:
          name: a name in `tensors`.

        Returns:
          Its `TensorInfo`.

        Raises:
          CheckpointError: no such tensor; the message has the nearest name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} among {len(self.tensors)}."
                f"{nearest(name, self.tensors)}"
            ) from None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold the tensors, each once, in order."""
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    def disk_order(self) -> list[str]:
        """Returns the names in the order in which they lie on disk: the fastest order to read."""
        return list(self.tensors)

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files; reading afterwards is an error. Closing twice is not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _read(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Returns elements start..stop of one tensor, flat, in a new array."""


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape)
