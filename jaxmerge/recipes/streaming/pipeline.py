"""Work done ahead by threads, given out in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_DONE = object()
# How long a thread that has to wait goes without looking whether all is over.
_PATIENCE = 0.1


def in_order(
    items: Iterable[Item],
    produce: Callable[[Item], Iterator[Result]],
    *,
    held: Callable[[Item], int],
    room: int,
    lanes: int,
    ahead: int = 4,
) -> Iterator[Result]:
    """Gives what `produce` yields for each item, in the items' order, while threads work on the next ones.

    Args:
      items: taken one by one.
      produce: called in one of the threads.
      held: the bytes that an item holds while it is worked on; an item larger than the room is worked on alone.
      room: how many bytes may be held at once.
      lanes: the number of threads, and so of items in work.
      ahead: how many results of each item may wait to be taken.

    Yields:
      The results. What an item raises is raised in its place.
    """
    source, order, stopped = iter(items), queue.SimpleQueue[Any](), threading.Event()
    turn, space = threading.Lock(), _Room(room, stopped)

    def work() -> None:
        while True:
            # Items are taken, and get their room, in order: the first in work can always end.
            with turn:
                if stopped.is_set():
                    return
                try:
                    item = next(source, _DONE)
                except BaseException as error:
                    order.put(_Failed(error))
                    return
                if item is _DONE:
                    order.put(_DONE)
                    return
                size = held(item)  # type: ignore[arg-type]
                space.take(size)
                out: queue.Queue[Any] = queue.Queue(ahead)
                order.put(out)
            try:
                for result in produce(item):  # type: ignore[arg-type]
                    if not _put(out, result, stopped):
                        return
                _put(out, _DONE, stopped)
            except BaseException as error:
                _put(out, _Failed(error), stopped)
                return
            finally:
                space.give(size)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    try:
        while (out := _raised(order.get())) is not _DONE:
            while (result := _raised(out.get())) is not _DONE:
                yield result
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def each(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Gives `function` of each item in order, computed by a pool at most `ahead` items early."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Room:
    """Bytes that several threads share."""

    def __init__(self, size: int, stopped: threading.Event) -> None:
        self._free = self._size = size
        self._stopped = stopped
        self._changed = threading.Condition()

    def take(self, wanted: int) -> None:
        wanted = min(wanted, self._size)
        with self._changed:
            while self._free < wanted and not self._stopped.is_set():
                self._changed.wait(_PATIENCE)
            self._free -= wanted

    def give(self, taken: int) -> None:
        with self._changed:
            self._free += min(taken, self._size)
            self._changed.notify_all()


def _put(out: queue.Queue[Any], result: Any, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            out.put(result, timeout=_PATIENCE)
            return True
        except queue.Full:
            continue
    return False


def _raised(result: Any) -> Any:
    if isinstance(result, _Failed):
        raise result.error
    return result
