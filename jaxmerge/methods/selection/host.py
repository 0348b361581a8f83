"""The selection on the host: NumPy over blocks in threads, for concrete arrays.

A sample of the keys brackets the threshold. One pass over the data counts what lies above the
bracket and gathers the few percent strictly inside it, in which the threshold is then found. The
ends of the bracket are counted, never gathered, so that equal values, however many, cost nothing.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxmerge.methods.selection.keys import common_dtype, key_format

_BLOCK = 1 << 16
_SAMPLE = 1 << 15
_DEVIATIONS = 5.0
"""Half of the bracket's width, in standard deviations of the sample's quantile."""

_Result = TypeVar("_Result")


class HostSelection(NamedTuple):
    """The key of the smallest kept value, and the last kept index at it in each array (or -1)."""

    threshold: int
    cuts: list[int]


class _Block(NamedTuple):
    array: int
    start: int
    values: np.ndarray


class _Found(NamedTuple):
    threshold: int
    kept_equal: int
    equal: list[int]


def is_on_host(values: ArrayLike) -> bool:
    """Whether the values are at hand: a NumPy array, or a concrete array on one CPU device."""
    if isinstance(values, jax.core.Tracer) or not isinstance(values, jax.Array):
        return isinstance(values, np.ndarray | np.generic)
    devices = values.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def select_on_host(arrays: Sequence[ArrayLike], k: int) -> HostSelection:
    """Selects the k largest values of all arrays; ties go to earlier arrays, then lower indices.

    Args:
        arrays: Nonnegative float32, bfloat16 or float16 arrays of any shape. If their types
            differ, keys are those of float32.
        k: From 1 to the number of entries.
    """
    values = [np.asarray(array) for array in arrays]
    with ThreadPoolExecutor(_threads()) as pool:
        keys = _Keys(values, common_dtype([v.dtype for v in values]), pool)
        bracket = _sampled_bracket(keys, k) if keys.size > 4 * _SAMPLE else (-1, keys.limit)
        found = _within(keys, k, *bracket) or _within(keys, k, -1, keys.limit)
    assert found is not None, "the widest bracket holds every key"
    return HostSelection(found.threshold, _cuts(keys, found))


def order_on_host(values: ArrayLike) -> np.ndarray:
    """The int32 permutation that sorts the values in descending order, equal ones by index."""
    array = np.asarray(values).reshape(-1)
    unsigned, width, infinity = key_format(array.dtype)
    keys: np.ndarray = np.minimum(
        array.view(unsigned) & unsigned((1 << width) - 1), unsigned(infinity + 1)
    )
    # Key and index in one 64-bit number: a plain sort of those is faster than any argsort.
    packed = (unsigned(infinity + 1) - keys).astype(np.uint64) << np.uint64(32)
    packed |= np.arange(array.size, dtype=np.uint64)
    packed.sort()
    return packed.astype(np.uint32).view(np.int32)


def ranks_on_host(values: np.ndarray) -> np.ndarray:
    """float32 ranks within rows [..., entries >= 2], 0 for the smallest to 1; of equal values the lower index above."""
    entries = values.shape[-1]
    rows = values.astype(np.float32, copy=False).reshape(-1, entries)
    ranks = np.empty(rows.shape, np.float32)
    descending = np.arange(entries - 1, -1, -1, dtype=np.float32) / np.float32(entries - 1)
    index = np.arange(entries, dtype=np.uint64)
    step = max(1, _BLOCK // (2 * entries))

    def rank(start: int) -> None:
        # The complement of the bits sorts from the largest; as in `order_on_host`.
        packed = (~(rows[start : start + step].view(np.uint32) & np.uint32(0x7FFFFFFF))).astype(
            np.uint64
        )
        packed <<= np.uint64(32)
        packed |= index
        packed.sort(axis=1)
        places = packed.astype(np.uint32).view(np.int32)
        if entries < 128:
            np.put_along_axis(ranks[start : start + step], places, descending[None], 1)
            return
        for row, place in zip(ranks[start : start + step], places, strict=True):
            row[place] = descending

    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(rank, range(0, len(rows), step)):
            pass
    return ranks.reshape(values.shape)


class _Keys:
    """Arrays as one sequence of keys, cut into blocks that fit a core's cache."""

    def __init__(
        self, arrays: Sequence[np.ndarray], dtype: np.dtype, pool: ThreadPoolExecutor
    ) -> None:
        self.flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
        self.unsigned, width, infinity = key_format(dtype)
        self.dtype = dtype
        self.pool = pool
        self.limit = 1 << width
        self.nan = self.unsigned(infinity + 1)
        self.size = sum(array.size for array in self.flat)
        self.blocks = [
            _Block(i, start, array[start : start + _BLOCK])
            for i, array in enumerate(self.flat)
            for start in range(0, array.size, _BLOCK)
        ]

    def of(self, values: np.ndarray) -> np.ndarray:
        """Keys, except that a NaN may have any key from `nan` on: `clamp` settles it."""
        bits: np.ndarray = values.astype(self.dtype, copy=False).view(self.unsigned)
        return bits & self.unsigned(self.limit - 1)

    def clamp(self, keys: np.ndarray) -> np.ndarray:
        return np.minimum(keys, self.nan)

    def equal(self, keys: np.ndarray, key: np.unsignedinteger) -> np.ndarray:
        return keys >= key if key == self.nan else keys == key

    def over_blocks(self, function: Callable[[np.ndarray], _Result]) -> list[_Result]:
        def run(blocks: Sequence[_Block]) -> list[_Result]:
            return [function(self.of(block.values)) for block in blocks]

        # Several parts per thread, because a core may be shared with other work.
        share = max(1, -(-len(self.blocks) // (4 * _threads())))
        if share == 1:
            return run(self.blocks)
        parts = [self.blocks[i : i + share] for i in range(0, len(self.blocks), share)]
        return [result for part in self.pool.map(run, parts) for result in part]

    def sample(self) -> np.ndarray:
        """Keys at random positions, ascending."""
        # The generator is fixed: the sample decides the time that is needed, not the result.
        positions = np.sort(np.random.default_rng(0).integers(0, self.size, _SAMPLE))
        starts = np.cumsum([0, *(array.size for array in self.flat)])
        borders = np.searchsorted(positions, starts)
        parts = [
            self.clamp(self.of(array[positions[borders[i] : borders[i + 1]] - starts[i]]))
            for i, array in enumerate(self.flat)
            if borders[i] < borders[i + 1]
        ]
        return np.sort(np.concatenate(parts))


def _sampled_bracket(keys: _Keys, k: int) -> tuple[int, int]:
    """Keys (low, high) that the threshold very probably lies between, ends included."""
    sample = keys.sample()
    share = k / keys.size
    margin = _DEVIATIONS * (share * (1 - share) * _SAMPLE) ** 0.5 + _DEVIATIONS
    position = (1 - share) * _SAMPLE
    low, high = int(position - margin), int(position + margin)
    return (
        int(sample[low]) if low >= 0 else -1,
        int(sample[high]) if high < _SAMPLE else keys.limit,
    )


def _within(keys: _Keys, k: int, low: int, high: int) -> _Found | None:
    """Finds the threshold if it lies in [low, high]."""
    # No key lies between NaN and the limit.
    span = keys.unsigned(0 if low >= keys.nan else max(high - low - 1, 0))
    first, upper = keys.unsigned(low + 1), keys.unsigned(high)

    def split(block: np.ndarray) -> tuple[int, np.ndarray]:
        # One unsigned comparison: what is below `first` wraps to a large number.
        return _number(block >= upper), keys.clamp(block[block - first < span])

    splits = keys.over_blocks(split)
    at_least = sum(part for part, _ in splits)
    inside = np.concatenate([part for _, part in splits])
    if at_least < k <= at_least + inside.size:
        position = inside.size - (k - at_least)
        threshold = np.partition(inside, position)[position]
        above = at_least + _number(inside > threshold)
        return _Found(int(threshold), k - above, [_number(part == threshold) for _, part in splits])
    end = upper if k <= at_least else keys.unsigned(max(low, 0))
    equal = keys.over_blocks(lambda block: _number(keys.equal(block, end)))
    above = at_least - sum(equal) if k <= at_least else at_least + inside.size
    if above < k <= above + sum(equal):
        return _Found(int(end), k - above, equal)
    return None


def _cuts(keys: _Keys, found: _Found) -> list[int]:
    """For each array the index of its last kept entry at the threshold, -1 if there is none."""
    last: dict[int, tuple[_Block, int]] = {}
    remaining = found.kept_equal
    for block, number in zip(keys.blocks, found.equal, strict=True):
        if number and remaining:
            last[block.array] = (block, min(remaining, number))
            remaining -= min(remaining, number)
    cuts = [-1] * len(keys.flat)
    threshold = keys.unsigned(found.threshold)
    for array, (block, nth) in last.items():
        equal = np.flatnonzero(keys.equal(keys.of(block.values), threshold))
        cuts[array] = block.start + int(equal[nth - 1])
    return cuts


def _number(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)
