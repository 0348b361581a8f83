"""Files that appear under their final name only when they are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from jaxmerge.converters import byte_io

SUFFIX = ".partial"


class PartialFile:
    """A file written beside its final name; `publish` renames it, `discard` removes it.

    As a context manager it publishes at the end, or discards on an error.

    Args:
      final: the name that the file gets.
      keep: go on with the partial file that an earlier process left, if there is one.

    Attributes:
      final: the name that the file gets.
      path: the name that it has until then: `final` + ".partial".
    """

    def __init__(self, final: str, *, keep: bool = False) -> None:
        self.final = final
        self.path = final + SUFFIX
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        if not keep:
            flags |= os.O_TRUNC
        self._fd: int | None = os.open(self.path, flags, 0o666)

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        """Writes bytes at an offset; several threads may write at once.

        Args:
          data: the bytes.
          offset: where in the file.

        Raises:
          OSError: the file is closed or the system refuses, for example since the disk is full.
        """
        byte_io.write_all(self._open_fd(), memoryview(data), offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer with bytes that were written.

        Args:
          buffer: writable bytes.
          offset: where in the file.

        Raises:
          CheckpointError: the file ends early.
        """
        byte_io.read_into(self._open_fd(), buffer, offset, self.path)

    def resize(self, size: int) -> None:
        """Sets the file's size.

        Args:
          size: in bytes.
        """
        os.ftruncate(self._open_fd(), size)

    def sync(self) -> None:
        """Waits until the disk has the bytes."""
        os.fsync(self._open_fd())

    def publish(self) -> None:
        """Renames the file to its final name, which it replaces; call `sync` before."""
        self.close()
        os.replace(self.path, self.final)

    def discard(self) -> None:
        """Removes the file if it was not published; an error in that is no further error."""
        with contextlib.suppress(OSError):
            self.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def close(self) -> None:
        """Leaves the file as it is, under its partial name."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.discard()
            return
        publish_all([self])

    def _open_fd(self) -> int:
        if self._fd is None:
            raise OSError(f"{self.final}: the file is closed")
        return self._fd


def publish_all(files: Sequence[PartialFile], *, keep: bool = False) -> None:
    """Publishes complete files, in order, once the disk has the bytes of all of them.

    If one cannot be published, all are removed, those under their final names too.

    Args:
      files: one file, which may replace another; or several that replace nothing, an index after
        what it lists.
      keep: remove nothing on an error: files that could not be published stay partial.

    Raises:
      OSError: the system refuses.
    """
    published: list[PartialFile] = []
    try:
        for file in files:
            file.sync()
        for file in files:
            file.publish()
            published.append(file)
    except BaseException:
        if keep:
            for file in files:
                file.close()
            raise
        for file in files:
            file.discard()
        for file in published:
            with contextlib.suppress(OSError):
                os.unlink(file.final)
        raise
    for folder in {os.path.dirname(file.final) or "." for file in files}:
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    # Some network file systems have no fsync of folders; the files themselves are safe by then.
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
