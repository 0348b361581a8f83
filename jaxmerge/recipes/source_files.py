"""The sources' files: whether they are still what was planned, and their hashes, taken while the merge reads."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.plan import Plan

Stamp = tuple[str, int, int]
_BLOCK = 1 << 22


def check_unchanged(plan: Plan) -> None:
    """Checks that the sources' files have the sizes and times of change that the plan has seen.

    Raises:
        PlanError: with every file that has changed or cannot be read any more.
    """
    problems = []
    lost: OSError | None = None
    stamps = [stamp for source in plan.sources for stamp in source.files]
    if plan.alignment is not None:
        stamps += plan.alignment.files
    for file, size, changed in stamps:
        try:
            stat = os.stat(file)
        except OSError as error:
            lost = error
            problems.append(f"{file}: cannot be read any more ({error.strerror})")
            continue
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            problems.append(f"{file}: has changed since the plan was made; plan again")
    if problems:
        raise PlanError(problems) from lost


class SourceHashes:
    """sha256 of files, computed in a thread for each source that keeps in step with a merge.

    A file's hash needs its bytes in order, and a merge reads them in pieces of its own. So the files
    are read once more, each as far as the merge has come: what it has just read is still in the
    system's cache, and the disk is not read twice.

    Args:
        sources: for each source its files: path, size in bytes and time of change (ns).
        known: hashes that an earlier run has taken, by the same.
        step: called from a thread with a file and its hash.

    Raises:
        PlanError: from `finish`: a file has changed or cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Stamp]],
        known: Mapping[Stamp, str],
        step: Callable[[Stamp, str], None],
    ) -> None:
        stamps = list(dict.fromkeys(stamp for files in sources for stamp in files))
        self._found = {stamp: known[stamp] for stamp in stamps if stamp in known}
        pending = [[stamp for stamp in files if stamp not in known] for files in sources]
        self._step = step
        self._share = 0.0
        self._stop = False
        self._error: Exception | None = None
        self._moved = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=(files,), daemon=True)
            for files in pending
            if files
        ]

    def advance(self, share: float) -> None:
        """Says which share of its bytes, from 0 to 1, the merge has read."""
        with self._moved:
            self._share = share
            self._moved.notify_all()

    def finish(self) -> dict[str, str]:
        """Waits for the last byte; returns the hash of each file by its path."""
        self.advance(1.0)
        self._join()
        if self._error is not None:
            raise self._error
        return {file: digest for (file, _, _), digest in self._found.items()}

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._moved:
            self._stop = True
            self._moved.notify_all()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self, files: Sequence[Stamp]) -> None:
        reading = _Reading(files)
        buffer = memoryview(bytearray(_BLOCK))
        try:
            while not reading.done and self._wait_until(reading.share):
                for stamp, digest in reading.read(buffer):
                    self._found[stamp] = digest
                    self._step(stamp, digest)
        except Exception as error:
            self._error = error
        finally:
            reading.close()

    def _wait_until(self, share: float) -> bool:
        """Waits until the merge has read more than a share; False: it has ended."""
        with self._moved:
            self._moved.wait_for(lambda: self._stop or self._share > share or self._share >= 1)
            return not self._stop


class _Reading:
    """A source's files on the way through their hashes, one after the other."""

    def __init__(self, stamps: Sequence[Stamp]) -> None:
        self._stamps = list(stamps)
        self._total = sum(size for _, size, _ in stamps)
        self._read = self._at = 0
        self._fd = -1
        self._digest = hashlib.sha256()

    @property
    def done(self) -> bool:
        return not self._stamps

    @property
    def share(self) -> float:
        return self._read / self._total if self._total else 0.0

    def read(self, buffer: memoryview) -> Iterator[tuple[Stamp, str]]:
        """Reads a block; yields the file that it completes, if any, with its hash."""
        file, size, _ = stamp = self._stamps[0]
        if self._fd < 0:
            self._fd, self._at, self._digest = _opened(file), 0, hashlib.sha256()
        block = buffer[: size - self._at]
        got = os.preadv(self._fd, [block], self._at)
        if got == 0 and block:
            raise PlanError([f"{file}: was cut short while it was read"])
        self._digest.update(block[:got])
        self._at += got
        self._read += got
        if self._at == size:
            self.close()
            self._stamps.pop(0)
            yield stamp, self._digest.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _opened(file: str) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise PlanError([f"{file}: cannot be read any more ({error.strerror})"]) from error
