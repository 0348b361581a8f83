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
_SIGNLESS = np.uint32(0x7FFFFFFF)
_NAN = np.uint32(0x7F800001)
"""The key of NaN in float32."""

_SAMPLE = 1 << 15
"""The most entries that are sampled."""
_PER_SAMPLE = 32
"""A smaller array is sampled less: so many entries stand for one, which balances the sample against the bracket."""
_SAMPLED_FROM = 1 << 14
_DEVIATIONS = 5.0
"""Half of the bracket's width, in standard deviations of the sample's quantile."""

_Result = TypeVar("_Result")
_Bracket = tuple[int, int]


class HostSelection(NamedTuple):
    """The key of the smallest kept value, and the last kept index at it in each array (or -1)."""

    threshold: int
    cuts: list[int]


class HostRows(NamedTuple):
    """Per row the key of the smallest kept value and the last kept index at it: uint32 and int32 [rows]."""

    thresholds: np.ndarray
    cuts: np.ndarray


class Split(NamedTuple):
    """How many values lie above a bracket, at its upper end and at its lower end, and the keys of those inside."""

    above: int
    at_high: int
    inside: np.ndarray
    at_low: int


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


def select_on_host(arrays: Sequence[ArrayLike], counts: Sequence[int]) -> list[HostSelection]:
    """Selects the k largest values of all arrays, for each of several k in one pass.

    Ties go to earlier arrays, then lower indices.

    Args:
        arrays: Nonnegative float32, bfloat16 or float16 arrays of any shape. If their types
            differ, keys are those of float32.
        counts: Each from 1 to the number of entries.
    """
    values = [np.asarray(array) for array in arrays]
    with ThreadPoolExecutor(_threads()) as pool:
        keys = _Keys(values, common_dtype([v.dtype for v in values]), pool)
        everything = (-1, keys.limit)
        sampled = keys.size >= _SAMPLED_FROM
        brackets = _sampled_brackets(keys, counts) if sampled else [everything] * len(counts)
        selections = []
        for k, found in zip(counts, _within(keys, counts, brackets), strict=True):
            if found is None:
                (found,) = _within(keys, [k], [everything])
            assert found is not None, "the widest bracket holds every key"
            selections.append(HostSelection(found.threshold, _cuts(keys, found)))
        return selections


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


def select_rows_on_host(values: np.ndarray, counts: np.ndarray) -> HostRows:
    """Selects in each row of a [rows, entries] array its own number of largest values, for rows of a core's cache.

    Args:
        values: Nonnegative float32, bfloat16 or float16.
        counts: uint32 [rows]. Limited to 0..entries.
    """
    unsigned, width, infinity = key_format(values.dtype)
    keys: np.ndarray = np.minimum(
        np.ascontiguousarray(values).view(unsigned) & unsigned((1 << width) - 1),
        unsigned(infinity + 1),
    )
    rows, entries = keys.shape
    thresholds = np.full(rows, (1 << width) - 1, np.uint32)
    cuts = np.full(rows, -1, np.int32)
    kept = np.minimum(counts, entries).astype(np.int64)
    for k in np.unique(kept[kept > 0]):
        mine = np.flatnonzero(kept == k)
        those = keys[mine]
        least = np.partition(those, entries - k, axis=1)[:, entries - k, None]
        equal = those == least
        remaining = k - np.count_nonzero(those > least, axis=1)
        # As many entries lie before the last one that is kept as have fewer than `remaining` equal ones up to them.
        before = np.cumsum(equal, axis=1, dtype=np.int32) < remaining[:, None]
        thresholds[mine] = least[:, 0]
        cuts[mine] = np.count_nonzero(before, axis=1)
    return HostRows(thresholds, cuts)


def keys_on_host(values: np.ndarray) -> np.ndarray:
    """`key_bits` of float32 values, flat, by NumPy."""
    keys = values.reshape(-1).view(np.uint32) & _SIGNLESS
    # Comparing is several times faster than limiting, which is hardly ever needed.
    return np.minimum(keys, _NAN) if _number(keys >= _NAN) else keys


def split_on_host(values: np.ndarray, low: int, high: int) -> Split:
    """Counts float32 values whose keys are above a bracket or at its ends, and gathers those inside.

    Args:
        values: Of any shape. Several threads may each split one array.
        low: The key at the lower end, or -1.
        high: The key at the upper end, or 2**31.
    """
    flat = values.reshape(-1).view(np.uint32)
    above = from_high = from_low = 0
    inside: list[np.ndarray] = []
    for start in range(0, flat.size, _BLOCK):
        keys = keys_on_host(flat[start : start + _BLOCK])
        above += _number(keys > np.uint32(high))
        from_high += (ends := _number(keys >= np.uint32(high)))
        from_low += (beyond := keys.size if low < 0 else _number(keys >= np.uint32(low)))
        if beyond > ends:
            # Taken by index: several times faster than by mask where there are many.
            within = (keys - np.uint32(low + 1)) < np.uint32(high - low - 1)
            inside.append(keys[np.flatnonzero(within)])
    gathered = np.concatenate(inside) if inside else np.zeros(0, np.uint32)
    return Split(above, from_high - above, gathered, from_low - from_high - gathered.size)


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
        """Keys at random positions, one in each of as many equal stretches."""
        # The generator is fixed: the sample decides the time that is needed, not the result.
        count = min(_SAMPLE, self.size // _PER_SAMPLE)
        stretch = self.size / count
        offsets = np.random.default_rng(0).random(count) * stretch
        positions = (np.arange(count) * stretch + offsets).astype(np.int64)
        starts = np.cumsum([0, *(array.size for array in self.flat)])
        borders = np.searchsorted(positions, starts)
        parts = [
            self.clamp(self.of(array[positions[borders[i] : borders[i + 1]] - starts[i]]))
            for i, array in enumerate(self.flat)
            if borders[i] < borders[i + 1]
        ]
        return np.concatenate(parts)


def _sampled_brackets(keys: _Keys, counts: Sequence[int]) -> list[_Bracket]:
    """Keys (low, high) that each threshold very probably lies between, ends included."""
    sample = keys.sample()
    places = []
    for k in counts:
        share = k / keys.size
        margin = _DEVIATIONS * (share * (1 - share) * sample.size) ** 0.5 + _DEVIATIONS
        position = (1 - share) * sample.size
        places.append((int(position - margin), int(position + margin)))
    ends = sorted({end for place in places for end in place if 0 <= end < sample.size})
    ranked = np.partition(sample, ends) if ends else sample
    return [
        (
            int(ranked[low]) if low >= 0 else -1,
            int(ranked[high]) if high < sample.size else keys.limit,
        )
        for low, high in places
    ]


def _within(
    keys: _Keys, counts: Sequence[int], brackets: Sequence[_Bracket]
) -> list[_Found | None]:
    """Finds each threshold that lies in its bracket [low, high], in one pass over the data."""

    def split(block: np.ndarray, low: int, high: int) -> tuple[int, np.ndarray]:
        # No key lies between NaN and the limit.
        span = keys.unsigned(0 if low >= keys.nan else max(high - low - 1, 0))
        # One unsigned comparison: what is below the first key inside wraps to a large number.
        inside = block[block - keys.unsigned(low + 1) < span]
        return _number(block >= keys.unsigned(high)), keys.clamp(inside)

    splits = keys.over_blocks(lambda block: [split(block, *bracket) for bracket in brackets])
    return [
        _threshold(keys, k, *bracket, [parts[i] for parts in splits])
        for i, (k, bracket) in enumerate(zip(counts, brackets, strict=True))
    ]


def _threshold(
    keys: _Keys, k: int, low: int, high: int, splits: Sequence[tuple[int, np.ndarray]]
) -> _Found | None:
    """The threshold, from each block's number of keys above the bracket and its keys inside."""
    at_least = sum(part for part, _ in splits)
    inside = np.concatenate([part for _, part in splits])
    if at_least < k <= at_least + inside.size:
        position = inside.size - (k - at_least)
        threshold = np.partition(inside, position)[position]
        above = at_least + _number(inside > threshold)
        return _Found(int(threshold), k - above, [_number(part == threshold) for _, part in splits])
    end = keys.unsigned(high if k <= at_least else max(low, 0))
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
