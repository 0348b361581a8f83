"""Writing safetensors checkpoints tensor by tensor, in any order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from jaxmerge.converters import byte_io, dtypes, folder, safetensors_file
from jaxmerge.converters import ties as tying
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.partial_file import SUFFIX as PARTIAL_SUFFIX
from jaxmerge.converters.partial_file import PartialFile, publish_all
from jaxmerge.converters.tensor_info import TensorInfo

# Read back at once where a tensor's hash is checked.
_BLOCK = 1 << 24


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
      finished: makes the writer resumable: name -> sha256 (hex) of what an earlier writer finished
        of the same checkpoint. Tensors whose bytes have kept their hash need not be written again.
        `abort` then leaves the partial files for the next writer.
      share: `(index, count)`: of several processes that write one checkpoint, this one holds only
        every `count`-th file. The first one closes last: it puts all files in place.

    Attributes:
      tensors: name -> info, of the whole checkpoint.
      finished: name -> sha256 (hex) of the tensors of this share that are complete; of a resumable
        writer only.

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
        finished: Mapping[str, str] | None = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._groups = shards(self.path, infos, shard_size)
        self.tensors = {info.name: info for group in self._groups.values() for info in group}
        self._ties = tying.check_ties(ties, self.tensors, self.path)
        self._index, count = share or (0, 1)
        self._own = set(list(self._groups)[self._index :: count])
        self._resumable = finished is not None
        self._layouts = self._laid_out(metadata or {})
        self._lock = threading.Lock()
        self._written = {name: _Written() for name in self.tensors}
        self._files: dict[str, PartialFile] = {}
        self._open = True
        self._made_folder: str | None = None
        self.finished: dict[str, str] = {}
        self._create()
        self._keep(finished or {})

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the whole checkpoint, in order, by their final names."""
        return tuple(self._groups)

    @property
    def pending(self) -> list[str]:
        """The tensors of this share that are not complete, in the order of the files."""
        return [
            info.name
            for file in self._groups
            if file in self._own
            for info in self._groups[file]
            if not self._is_complete(info.name)
        ]

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

    def write_flat(self, name: str, start: int, values: Any) -> str | None:
        """Writes a range of one tensor's elements in C order, for tensors too large to hold.

        Args:
          name: one of the names announced.
          start: the first element.
          values: a 1-D NumPy or JAX array of the announced dtype.

        Returns:
          The sha256 (hex) of the tensor's bytes, if this range completes it and the writer is
          resumable; else None.

        Raises:
          CheckpointError: as for `write`, or a range outside the tensor.
        """
        info = self._info(name)
        values = np.asarray(values)
        size = _size(info)
        if values.ndim != 1 or not 0 <= start <= start + values.size <= size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: expected 1-D values within 0:{size}; found shape "
                f"{list(values.shape)} at {start}"
            )
        return self._put(info, start, values)

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Puts the files in place; without every tensor written it aborts instead.

        Args:
          metadata: in place of those given before, if what they say has become known only now; they
            must take as many bytes.

        Raises:
          CheckpointError: tensors are missing, or the disk is full.
        """
        if not self._open:
            return
        missing = self.pending
        if missing:
            self.abort()
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(self.tensors)} tensors were not written: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        self._open = False
        try:
            if self._index:
                for file in self._files.values():
                    file.sync()
                    file.close()
                return
            self._complete(metadata)
            publish_all(list(self._files.values()), keep=self._resumable)
        except OSError as error:
            self._remove()
            raise self._refused(error) from error

    def abort(self) -> None:
        """Removes everything that was written; after `close` it does nothing.

        A resumable writer leaves its partial files.
        """
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

    def _laid_out(self, metadata: Mapping[str, str]) -> dict[str, safetensors_file.Layout]:
        entries = tying.record(metadata, self._ties)
        return {
            file: safetensors_file.layout(group, entries, file)
            for file, group in self._groups.items()
        }

    def _create(self) -> None:
        own = {file: layout for file, layout in self._layouts.items() if file in self._own}
        try:
            self._make_folder(list(self._layouts))
            needed = sum(layout.size for layout in own.values())
            if self._resumable:
                needed -= sum(_allocated(file + PARTIAL_SUFFIX) for file in own)
            free = shutil.disk_usage(os.path.dirname(next(iter(self._groups))) or ".").free
            if needed > free:
                raise CheckpointError(
                    f"{self.path}: expected {needed} bytes of free disk, found {free}"
                )
            for file, layout in own.items():
                self._files[file] = PartialFile(file, keep=self._resumable)
                self._files[file].resize(layout.size)
                self._files[file].write_at(layout.head, 0)
        except OSError as error:
            self.abort()
            raise self._refused(error) from error
        except BaseException:
            self.abort()
            raise

    def _keep(self, finished: Mapping[str, str]) -> None:
        """Takes over the tensors whose bytes are still what an earlier writer finished."""
        names = [name for name in self.pending if name in finished]
        with ThreadPoolExecutor() as threads:
            for name, found in zip(names, threads.map(self._read_back, names), strict=True):
                if found == finished[name]:
                    self.finished[name] = found
                    self._written[name].claim(0, _size(self.tensors[name]))
                    self._written[name].stored = _size(self.tensors[name])

    def _read_back(self, name: str) -> str:
        """Returns the sha256 of a tensor's bytes on the disk."""
        info, digest = self.tensors[name], hashlib.sha256()
        offset = self._layouts[info.file].offsets[name]
        buffer = memoryview(bytearray(min(_BLOCK, info.nbytes)))
        for start in range(0, info.nbytes, _BLOCK):
            block = buffer[: info.nbytes - start]
            self._files[info.file].read_into(block, offset + start)
            digest.update(block)
        return digest.hexdigest()

    def _complete(self, metadata: Mapping[str, str] | None) -> None:
        """Brings in the files of other shares, the last metadata and the index."""
        layouts = self._layouts if metadata is None else self._laid_out(metadata)
        files: dict[str, PartialFile] = {}
        for file, layout in layouts.items():
            if len(layout.head) != len(self._layouts[file].head):
                raise CheckpointError(f"{file}: the metadata take more or fewer bytes than before")
            files[file] = self._files.get(file) or PartialFile(file, keep=True)
            if metadata is not None:
                files[file].write_at(layout.head, 0)
        self._files = files
        if len(files) > 1:
            index = os.path.join(self.path, folder.SAFETENSORS_NAME + folder.INDEX_SUFFIX)
            files[index] = PartialFile(index)
            files[index].write_at(self._listing(), 0)

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

    def _listing(self) -> bytes:
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

    def _put(self, info: TensorInfo, start: int, values: np.ndarray) -> str | None:
        where = f"{self.path}: tensor {info.name!r}"
        if values.dtype.name != info.dtype:
            raise CheckpointError(f"{where}: expected {info.dtype}, found {values.dtype}")
        stop = start + values.size
        written = self._written[info.name]
        with self._lock:
            if not written.claim(start, stop):
                raise CheckpointError(f"{where}: elements {start}:{stop} were written before")
        dtype = dtypes.storage_dtype(info.dtype)
        native = byte_io.as_bytes(np.ascontiguousarray(values, dtype))
        try:
            self._files[info.file].write_at(
                native, self._layouts[info.file].offsets[info.name] + start * dtype.itemsize
            )
        except OSError as error:
            raise self._refused(error, where) from error
        with self._lock:
            written.stored += values.size
            if not self._resumable:
                return None
            if start == written.hashed:
                written.digest.update(native)
                written.hashed = stop
            if not self._is_complete(info.name):
                return None
        # Parts that came out of order are hashed once all of them are there.
        in_order = written.hashed == written.stored
        digest = written.digest.hexdigest() if in_order else self._read_back(info.name)
        self.finished[info.name] = digest
        return digest

    def _is_complete(self, name: str) -> bool:
        written = self._written[name]
        return bool(written.claimed) and written.stored == _size(self.tensors[name])

    def _refused(self, error: OSError, where: str | None = None) -> CheckpointError:
        return CheckpointError(f"{where or self.path}: cannot write: {error.strerror or error}")

    def _remove(self) -> None:
        if self._resumable:
            for file in self._files.values():
                file.close()
            return
        for file in self._files.values():
            file.discard()
        if self._made_folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._made_folder)


@dataclass
class _Written:
    """What has come of one tensor.

    Attributes:
      claimed: element ranges that are written or being written, in order and joined.
      stored: how many elements are in the file.
      digest: sha256 of the first `hashed` elements.
    """

    claimed: list[tuple[int, int]] = field(default_factory=list)
    stored: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0

    def claim(self, start: int, stop: int) -> bool:
        """Takes a range, or returns False where a part of it is taken."""
        if any(start < end and begin < stop for begin, end in self.claimed):
            return False
        if start == stop and self.claimed:
            return False
        joined: list[tuple[int, int]] = []
        for begin, end in sorted([*self.claimed, (start, stop)]):
            if joined and joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        self.claimed = joined
        return True


def _size(info: TensorInfo) -> int:
    return info.nbytes // dtypes.storage_dtype(info.dtype).itemsize


def _allocated(file: str) -> int:
    """Returns the bytes that a file takes on the disk: 0 if there is none."""
    try:
        return os.stat(file).st_blocks * 512
    except OSError:
        return 0


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
