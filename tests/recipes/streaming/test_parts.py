"""What a streamed merge is made of: cuts, the order of work done ahead, amounts of memory."""

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.recipes.streaming import memory
from jaxmerge.recipes.streaming.cuts import LARGEST, cuts_of
from jaxmerge.recipes.streaming.memory import Shares, parse_limit
from jaxmerge.recipes.streaming.pipeline import each, in_order


@settings(deadline=None)
@given(
    st.sampled_from(["elements", "rows", "never"]),
    st.lists(st.integers(1, 3000), min_size=0, max_size=3),
    st.integers(1, 20),
)
def test_cuts_cover_a_tensor_in_few_lengths(how: str, shape: list[int], arrays: int) -> None:
    cuts = cuts_of(how, tuple(shape), arrays)  # type: ignore[arg-type]
    size = math.prod(shape)
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
    assert cuts[-1].stop == size
    assert all(math.prod(cut.shape) == cut.stop - cut.start for cut in cuts)
    if how == "elements":
        assert all(cut.shape[0].bit_count() == 1 for cut in cuts)
    if how == "rows" and len(shape) > 1:
        assert all(cut.shape[1:] == tuple(shape[1:]) for cut in cuts)
        assert all(cut.shape[0].bit_count() == 1 for cut in cuts)
    if how == "never":
        assert [cut.shape for cut in cuts] == [tuple(shape)]


def test_cuts_are_smaller_where_more_arrays_are_read() -> None:
    sizes = {arrays: cuts_of("elements", (1 << 20,), arrays)[0].stop for arrays in (1, 4, 5, 8, 9)}
    assert sizes == {1: LARGEST, 4: LARGEST, 5: LARGEST // 2, 8: LARGEST // 2, 9: LARGEST // 4}


def test_results_come_in_order_whatever_ends_first() -> None:
    def produce(item: int) -> Iterator[tuple[int, int]]:
        for step in range(3):
            time.sleep(0.001 * (5 - item % 5))
            yield item, step

    found = list(in_order(range(20), produce, held=lambda _: 1, room=3, lanes=3, ahead=2))
    assert found == [(item, step) for item in range(20) for step in range(3)]


def test_no_more_is_held_than_there_is_room_for() -> None:
    held, most, lock = 0, 0, threading.Lock()

    def produce(item: int) -> Iterator[int]:
        nonlocal held, most
        with lock:
            held += item
            most = max(most, held)
        time.sleep(0.002)
        yield item
        with lock:
            held -= item

    items = [1, 3, 2, 2, 4, 1, 1, 3, 4]
    assert list(in_order(items, produce, held=int, room=4, lanes=4)) == items
    assert 1 < most <= 4
    # What is larger than the room is worked on alone.
    assert list(in_order([9, 1], produce, held=int, room=4, lanes=4)) == [9, 1]


def test_an_error_is_raised_in_its_place_and_ends_the_threads() -> None:
    def produce(item: int) -> Iterator[int]:
        if item == 3:
            raise ValueError("three")
        yield item

    before = threading.active_count()
    results = in_order(range(9), produce, held=lambda _: 1, room=2, lanes=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert threading.active_count() == before


def test_an_error_of_the_items_themselves_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(in_order(items(), lambda item: iter([item]), held=int, room=1, lanes=2))


def test_a_pool_works_ahead_but_not_further() -> None:
    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        results = each(pool, lambda item: begun.append(item) or item, range(10), 2)  # type: ignore[func-returns-value]
        assert next(results) == 0
        time.sleep(0.01)
        assert len(begun) <= 3
        assert list(results) == list(range(1, 10))


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("512MB", 512 * 10**6), (" 64 MiB", 64 << 20)]
)
def test_limits_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_limit(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "0%", "120%", "", "1 GB 2"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        parse_limit(text)


def test_a_percentage_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 600)
    monkeypatch.setattr(memory, "resident_memory", lambda: 400)
    assert parse_limit("50%") == 500
    assert memory.default_limit() == 750


def test_less_memory_means_fewer_threads_and_nothing_kept() -> None:
    assert memory.shares(0, [], []) == Shares(1, 0)
    roomy = memory.shares(8 << 30, [], [])
    assert roomy.threads >= 1
    assert roomy.kept > 100 << 20
