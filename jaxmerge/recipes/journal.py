"""The journal of an unfinished output: what is finished already, and the lock that keeps others out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from jaxmerge.recipes.errors import PlanError

Head = Mapping[str, Any]


class Journal:
    """A file of JSON lines beside the parts of an unfinished output.

    The first line says what is being made; each further line names a tensor or a source file that
    is finished, and its sha256, or holds how a source is aligned. Lines are only appended. A line
    that a crash cut short, or that promises bytes which the disk has lost, is found by its hash and
    done again; nothing has to wait for the disk. While it is open no other process can open it: the
    lock ends with the process.

    Args:
        path: the journal's file.
        head: what is being made. A journal that says otherwise is begun anew.

    Attributes:
        tensors: sha256 (hex) of each finished tensor.
        sources: sha256 (hex) of each source file by path, size and time of change.
        alignments: what was found for each source that is aligned, by its index.
        resumed: whether an earlier run of the same merge had begun the journal.
        fresh: whether there was no journal at all.

    Raises:
        PlanError: another process has it open.
    """

    def __init__(self, path: Path, head: Head) -> None:
        self.path = path
        self.tensors: dict[str, str] = {}
        self.sources: dict[tuple[str, int, int], str] = {}
        self.alignments: dict[int, dict[str, Any]] = {}
        self._fd = _lock(path, os.O_CREAT)
        first, lines, size = _read(self._fd)
        self.fresh = first is None
        self.resumed = first == dict(head)
        if self.resumed:
            # What follows the last whole line is a line that was cut short.
            os.ftruncate(self._fd, size)
            for line in lines:
                self._take(line)
        else:
            os.ftruncate(self._fd, 0)
            self._append(head)

    def finish_tensor(self, name: str, digest: str) -> None:
        """Records that a tensor is in its file."""
        self.tensors[name] = digest
        self._append({"tensor": name, "sha256": digest})

    def finish_source(self, stamp: tuple[str, int, int], digest: str) -> None:
        """Records the hash of a source's file."""
        self.sources[stamp] = digest
        self._append({"source": stamp, "sha256": digest})

    def finish_alignment(self, source: int, found: dict[str, Any]) -> None:
        """Records how a source is aligned."""
        self.alignments[source] = found
        self._append({"aligned": source, "found": found})

    def take(self, other: Path) -> None:
        """Takes over what another process of the same merge has recorded in its own journal."""
        fd = os.open(other, os.O_RDONLY)
        try:
            for line in _read(fd)[1]:
                self._take(line)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Lets go of the lock; the journal stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Removes the journal: the output is whole, or given up."""
        self.path.unlink(missing_ok=True)
        self.close()

    def moved(self, path: Path) -> None:
        """Says that the journal's folder was renamed."""
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, line: Mapping[str, Any]) -> None:
        if "tensor" in line:
            self.tensors[line["tensor"]] = line["sha256"]
        elif "source" in line:
            file, size, changed = line["source"]
            self.sources[file, size, changed] = line["sha256"]
        elif "aligned" in line:
            self.alignments[line["aligned"]] = line["found"]

    def _append(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(dict(line), ensure_ascii=False) + "\n").encode()
        while data:
            data = data[os.write(self._fd, data) :]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps others from opening a journal that exists; what it says does not matter.

    Raises:
        PlanError: another process has it open.
    """
    fd = _lock(path, 0)
    try:
        yield
    finally:
        os.close(fd)


def head_of(path: Path) -> dict[str, Any] | None:
    """Returns what a journal says is being made; None where there is none or it says nothing yet."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return {}
    try:
        return _read(fd, most=1)[0]
    finally:
        os.close(fd)


def _lock(path: Path, flags: int) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have removed the file in the meantime.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise PlanError(
                [f"{path.parent}: another run is writing there ({path.name})"]
            ) from None
        except FileNotFoundError:
            pass
        os.close(fd)


def _read(fd: int, most: int | None = None) -> tuple[dict[str, Any] | None, list[Any], int]:
    """Returns the first line, the further ones, and the bytes that they take."""
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        lines: list[dict[str, Any]] = []
        size = 0
        for text in file:
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break
            lines.append(line)
            size += len(text)
            if len(lines) == most:
                break
    return (lines[0] if lines else None), lines[1:], size
