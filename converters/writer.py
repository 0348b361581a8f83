"""Writing safetensors checkpoints tensor by tensor, in any order."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from jaxmerge.converters import byte_io, dtypes, folder, safetensors_file
from jaxmerge.converters import ties as tying
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.partial_file import PartialFile, publish_all
from jaxmerge.converters.tensor_info import TensorInfo


class CheckpointWriter:
    """Writes a safetensors file, or a folder of shards, whose tensors are all known in advance.

    The headers are written first; then each tensor goes to its place as it comes, from any thread.
    All files stand beside their final names (`.partial`) until `close` finds every tensor written.
    As a context manager it closes at the end and aborts on an error.

    Args:
      path: a file that ends in `.safetensors`, or a folder (made if need be).
      infos: the tensors to come; `file` and `nbytes` are worked out anew.
      metadata: text entries; each shard gets them. transformers wants {"format": "pt"} among them.
      shard_size: for a folder, the most bytes of tensors in one file; a larger tensor gets a file
        of its own. None, or a limit that all tensors fit in: one `model.safetensors`.
      ties: groups of names that are one tensor. Each name is still to be written; the group is
        recorded, and loading ties the names again.

    Raises:
      CheckpointError: names that repeat, dtypes that the format lacks, a full disk, or a folder
        that has weights which this checkpoint would not replace.

    Example:
      >>> import os, tempfile
      >>> from jaxmerge.converters import load_checkpoint
      >>> path = os.path.join(tempfile.mkdtemp(), "merged.safetensors")
      >>> with CheckpointWriter(path, [TensorInfo.of("w", (2,), "float32")]) as writer:
      ...     writer.write("w", np.array([1, 2], np.float32))
      >>> load_checkpoint(path)["w"]
      array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        infos: Iterable[TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        shard_size: int | None = None,
        ties: Sequence[Sequence[str]] = (),
    ) -> None:
        self.path = os.fspath(path)
        groups = shards(self.path, infos, shard_size)
        self.tensors = {info.name: info for group in groups.values() for info in group}
        entries = tying.record(metadata or {}, tying.check_ties(ties, self.tensors, self.path))
        layouts = {
            file: safetensors_file.layout(group, entries, file) for file, group in groups.items()
        }
        self._offsets: dict[str, int] = {}
        for layout in layouts.values():
            self._offsets.update(layout.offsets)
        self._lock = threading.Lock()
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in self.tensors}
        self._files: dict[str, PartialFile] = {}
        self._open = True
        self._made_folder: str | None = None
        self._create(layouts)

    def write(self, name: str, array: Any) -> None:
        """Writes one tensor.

        Args:
          name: one of the names announced.
          array: a NumPy or JAX array of the announced shape and dtype.

        Raises:
          CheckpointError: unknown name, other shape or dtype, written before, or a full disk.
        """
        info = self._info(name)
        values = np.asarray(array)
        if values.shape != info.shape:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: expected shape {list(info.shape)}, found "
                f"{list(values.shape)}"
            )
        self._put(info, 0, values)

    def write_flat(self, name: str, start: int, values: Any) -> None:
        """Writes a range of one tensor's elements in C order, for tensors too large to hold.

        Args:
          name: one of the names announced.
          start: the first element.
          values: a 1-D NumPy or JAX array of the announced dtype.

        Raises:
          CheckpointError: as for `write`, or a range outside the tensor.
        """
        info = self._info(name)
        values = np.asarray(values)
        size = info.nbytes // dtypes.storage_dtype(info.dtype).itemsize
        if values.ndim != 1 or not 0 <= start <= start + values.size <= size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: expected 1-D values within 0:{size}; found shape "
                f"{list(values.shape)} at {start}"
            )
        self._put(info, start, values)

    def close(self) -> None:
        """Puts the files in place; without every tensor written it removes them instead.

        Raises:
          CheckpointError: tensors are missing, or the disk is full.
        """
        if not self._open:
            return
        missing = [name for name in self.tensors if not self._is_complete(name)]
        if missing:
            self.abort()
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(self.tensors)} tensors were not written: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        self._open = False
        try:
            publish_all(list(self._files.values()))
        except OSError as error:
            self._remove()
            raise self._refused(error) from error

    def abort(self) -> None:
        """Removes everything that was written; after `close` it does nothing."""
        if self._open:
            self._open = False
            self._remove()

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

    def _create(self, layouts: Mapping[str, safetensors_file.Layout]) -> None:
        try:
            self._make_folder(list(layouts))
            needed = sum(layout.size for layout in layouts.values())
            free = shutil.disk_usage(os.path.dirname(next(iter(layouts))) or ".").free
            if needed > free:
                raise CheckpointError(
                    f"{self.path}: expected {needed} bytes of free disk, found {free}"
                )
            for file, layout in layouts.items():
                self._files[file] = PartialFile(file)
                self._files[file].resize(layout.size)
                self._files[file].write_at(layout.head, 0)
            if len(layouts) > 1:
                index = os.path.join(self.path, folder.SAFETENSORS_NAME + folder.INDEX_SUFFIX)
                self._files[index] = PartialFile(index)
                self._files[index].write_at(self._index(), 0)
        except OSError as error:
            self.abort()
            raise self._refused(error) from error
        except BaseException:
            self.abort()
            raise

    def _make_folder(self, files: list[str]) -> None:
        if self.path.endswith(folder.SAFETENSORS_SUFFIX):
            return
        if not os.path.isdir(self.path):
            os.makedirs(self.path)
            self._made_folder = self.path
        # One file replaces one file at once; anything else would leave a mixture behind.
        replaced = {os.path.basename(file) for file in files} if len(files) == 1 else set()
        left = [name for name in folder.weight_files(self.path) if name not in replaced]
        if left:
            raise CheckpointError(
                f"{self.path}: the folder already has weights: {', '.join(left[:5])}"
                f"{', ...' if len(left) > 5 else ''}; remove them or choose another folder"
            )

    def _index(self) -> bytes:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self.tensors.values())},
            "weight_map": {
                name: os.path.basename(info.file) for name, info in self.tensors.items()
            },
        }
        return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()

    def _info(self, name: str) -> TensorInfo:
        if not self._open:
            raise CheckpointError(f"{self.path}: tensor {name!r}: the writer is closed")
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} was announced.{nearest(name, self.tensors)}"
            ) from None

    def _put(self, info: TensorInfo, start: int, values: np.ndarray) -> None:
        where = f"{self.path}: tensor {info.name!r}"
        if values.dtype.name != info.dtype:
            raise CheckpointError(f"{where}: expected {info.dtype}, found {values.dtype}")
        stop = start + values.size
        with self._lock:
            ranges = self._ranges[info.name]
            if any(start < other_stop and other_start < stop for other_start, other_stop in ranges):
                raise CheckpointError(f"{where}: elements {start}:{stop} were written before")
            ranges.append((start, stop))
        dtype = dtypes.storage_dtype(info.dtype)
        native = np.ascontiguousarray(values, dtype)
        try:
            self._files[info.file].write_at(
                byte_io.as_bytes(native), self._offsets[info.name] + start * dtype.itemsize
            )
        except OSError as error:
            raise self._refused(error, where) from error

    def _is_complete(self, name: str) -> bool:
        info = self.tensors[name]
        written = sum(stop - start for start, stop in self._ranges[name])
        size = info.nbytes // dtypes.storage_dtype(info.dtype).itemsize
        return written == size and bool(self._ranges[name])

    def _refused(self, error: OSError, where: str | None = None) -> CheckpointError:
        return CheckpointError(f"{where or self.path}: cannot write: {error.strerror or error}")

    def _remove(self) -> None:
        for file in self._files.values():
            file.discard()
        if self._made_folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._made_folder)


def shards(
    path: str, infos: Iterable[TensorInfo], shard_size: int | None
) -> dict[str, list[TensorInfo]]:
    """Distributes tensors over the files of a safetensors checkpoint, in order.

    Args:
      path: a file that ends in `.safetensors`, or a folder.
      infos: the tensors.
      shard_size: the most bytes of tensors in one file, None for no limit.

    Returns:
      File -> the infos of its tensors, with `file` set. Never empty.

    Raises:
      CheckpointError: names that repeat, or a `shard_size` that is not positive or that comes
        with a single file.

    Example:
      >>> two = [TensorInfo.of("a", (4,), "int8"), TensorInfo.of("b", (4,), "int8")]
      >>> list(shards("out", two, 4))
      ['out/model-00001-of-00002.safetensors', 'out/model-00002-of-00002.safetensors']
    """
    if shard_size is not None and shard_size < 1:
        raise CheckpointError(f"{path}: expected a positive shard_size, found {shard_size}")
    groups: list[list[TensorInfo]] = [[]]
    names: set[str] = set()
    size = 0
    for info in infos:
        if info.name in names:
            raise CheckpointError(f"{path}: tensor {info.name!r} is announced twice")
        names.add(info.name)
        info = TensorInfo.of(info.name, info.shape, info.dtype)
        if shard_size is not None and groups[-1] and size + info.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.nbytes
    if path.endswith(folder.SAFETENSORS_SUFFIX):
        if shard_size is not None:
            raise CheckpointError(
                f"{path}: shard_size needs a folder to write into, found a file name"
            )
        files = [path]
    elif len(groups) == 1:
        files = [os.path.join(path, folder.SAFETENSORS_NAME)]
    else:
        files = [
            os.path.join(path, f"model-{number:05}-of-{len(groups):05}.safetensors")
            for number in range(1, len(groups) + 1)
        ]
    return {
        file: [info._replace(file=file) for info in group]
        for file, group in zip(files, groups, strict=True)
    }
