"""The selection over values that are never in memory together: passes over their chunks.

A sample brackets the threshold, and a pass counts what lies above the bracket and at its ends, and gathers what lies
inside. Where that is more than can be held it is counted by bins, and a further pass looks into one of them. A sample
that misses costs passes, not exactness. Where only some of the entries that are equal to the threshold are kept, the
last one of these is looked for in the one chunk that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.methods.selection.host import Split, keys_on_host, split_on_host
from jaxmerge.methods.selection.keys import Selection, checked_size

_LIMIT = 1 << 31
"""Above every key of float32."""

_NOTHING = _LIMIT - 1
_HELD = 1 << 22
_BINS = 1 << 20
_SAMPLES = (1 << 15, 1 << 20)
_SAMPLED = 256
"""One of so many values is sampled, within the bounds of `_SAMPLES`."""

_DEVIATIONS = 5.0
"""Half of the bracket's width, in standard deviations of the sample's quantile."""

Ranked = Sequence[np.ndarray]
Look = Callable[[str, int, Ranked], Any]
Only = Callable[[str, int], bool]
At = Callable[[str, int, int], np.ndarray]


class Passes(Protocol):
    """Makes a pass over the chunks of all tensors, or over some of them.

    Calls `look` with the name of a tensor, the flat index of the chunk's first value and one float32 array for each
    ranking, perhaps in several threads; yields what it gives, for each tensor in the order of its chunks. Chunks for
    whose name and index `only` is false may be left out. With `at`, which gets a chunk's name, index and size, `look`
    gets the values at the places that it gives, alone and flat.
    """

    def __call__(
        self, look: Look, only: Only | None = None, at: At | None = None
    ) -> Iterator[Any]: ...


class _Threshold(NamedTuple):
    """The smallest kept value.

    Attributes:
        key: its key.
        kept: how many of the entries equal to it are kept.
        equal: how many there are.
        by_chunk: how many there are in each chunk, by name and index; None where that was not counted.
    """

    key: int
    kept: int
    equal: int
    by_chunk: Mapping[tuple[str, int], int] | None = None


class _Bracket(NamedTuple):
    """Keys that a threshold lies between, ends included."""

    low: int = -1
    high: int = _LIMIT


Place = tuple[int, int]
"""A ranking, and one of its selections."""


def select_in_passes(
    passes: Passes, counts: Sequence[Sequence[int]], sizes: Mapping[str, int]
) -> dict[str, list[tuple[Selection, ...]]]:
    """Selects, for each ranking, the largest values of all tensors together.

    Args:
        passes: makes a pass over nonnegative values; signs are ignored, NaN counts as larger than infinity.
        counts: For each ranking, how many values each of its selections keeps. Limited to 0..the number of values.
        sizes: The number of values by the tensors' names, in the order in which they keep equal ones.

    Returns:
        For each tensor and ranking a tuple of selections, one for each count.

    Raises:
        ValueError: If a tensor has 2**31 entries or more.

    Example:
        >>> values = {"a": np.array([0.5, 2.0], np.float32), "b": np.array([0.5, 1.0], np.float32)}
        >>> def passes(look, only=None, at=None):
        ...     return (
        ...         look(name, 0, [array if at is None else array[at(name, 0, array.size)]])
        ...         for name, array in values.items()
        ...     )
        >>> found = select_in_passes(passes, [[3]], {"a": 2, "b": 2})
        >>> [int(found[name][0][0].cut) for name in values]
        [0, -1]
    """
    total = sum(checked_size((size,)) for size in sizes.values())
    wanted = {
        (i, j): min(max(int(k), 0), total) for i, ks in enumerate(counts) for j, k in enumerate(ks)
    }
    found = _thresholds(passes, wanted, sizes)
    cuts = _cuts(passes, found, sizes)
    return {
        name: [
            tuple(
                Selection(np.uint32(found[i, j].key), np.int32(cuts[i, j][name]))
                for j in range(len(ks))
            )
            for i, ks in enumerate(counts)
        ]
        for name in sizes
    }


@jax.jit
def share(equal_counts: Array, remaining: Array) -> Array:
    """Splits the kept entries at the threshold over tensors (or chunks): earlier ones first.

    Args:
        equal_counts: uint32 [tensors], how many entries of each are equal to the threshold, in order.
        remaining: How many of those entries are kept.

    Returns:
        uint32 [tensors], how many each tensor keeps.

    Example:
        >>> share(jnp.array([2, 0, 3, 1]), 4).tolist()
        [2, 0, 2, 0]
    """
    counts = jnp.asarray(equal_counts, jnp.uint32)
    before = jnp.cumsum(counts, dtype=jnp.uint32) - counts
    remaining = jnp.asarray(remaining, jnp.uint32)
    return jnp.minimum(jnp.maximum(remaining, before) - before, counts)


def _thresholds(
    passes: Passes, wanted: Mapping[Place, int], sizes: Mapping[str, int]
) -> dict[Place, _Threshold]:
    found = {place: _Threshold(_NOTHING, 0, 0) for place, k in wanted.items() if k == 0}
    open_ = {place: k for place, k in wanted.items() if k}
    if not open_:
        return found
    brackets = _sampled_brackets(passes, open_, sizes)
    while open_:
        counted = {place: _Counted(brackets[place]) for place in open_}

        def split(
            name: str, start: int, ranked: Ranked, counted: Any = counted
        ) -> tuple[str, int, list[Split]]:
            parts = [split_on_host(ranked[i], *one.bracket) for (i, _), one in counted.items()]
            return name, start, parts

        for name, start, parts in passes(split):
            for one, part in zip(counted.values(), parts, strict=True):
                one.add((name, start), part)
        for place, one in counted.items():
            outcome = one.kth(open_[place])
            if isinstance(outcome, _Threshold):
                found[place] = outcome
                del open_[place]
            else:
                brackets[place] = outcome
    return found


class _Counted:
    """What lies above a bracket, at its ends and inside: key by key, or by bins where that is too much to hold."""

    def __init__(self, bracket: _Bracket) -> None:
        self.bracket = bracket
        self._above = self._at_high = self._at_low = 0
        # By chunk: how many lie at the upper end and at the lower one, and the keys inside.
        self._chunks: dict[tuple[str, int], tuple[int, int]] = {}
        self._inside: dict[tuple[str, int], np.ndarray] = {}
        self._held = 0
        self._bins: np.ndarray | None = None
        self._shift = max(0, (bracket.high - bracket.low - 1).bit_length() - _BINS.bit_length() + 1)

    def add(self, chunk: tuple[str, int], part: Split) -> None:
        self._above += part.above
        self._at_high += part.at_high
        self._at_low += part.at_low
        self._chunks[chunk] = part.at_high, part.at_low
        if part.inside.size:
            self._inside[chunk] = part.inside
            self._held += part.inside.size
            if self._held > _HELD:
                self._sort_in()

    def kth(self, k: int) -> _Threshold | _Bracket:
        """The threshold of the k largest, or the bracket that it lies in."""
        low, high = self.bracket
        if k <= self._above:
            return _Bracket(high, _LIMIT)
        k -= self._above
        if k <= self._at_high:
            by_chunk = {chunk: at_high for chunk, (at_high, _) in self._chunks.items()}
            return _Threshold(high, k, self._at_high, by_chunk)
        k -= self._at_high
        inside = self._held if self._bins is None else self._held + int(self._bins.sum())
        if k <= inside:
            return self._kth_by_bins(k) if self._bins is not None else self._kth_by_keys(k)
        k -= inside
        if k <= self._at_low:
            by_chunk = {chunk: at_low for chunk, (_, at_low) in self._chunks.items()}
            return _Threshold(low, k, self._at_low, by_chunk)
        return _Bracket(-1, low)

    def _kth_by_keys(self, k: int) -> _Threshold:
        keys = np.concatenate(list(self._inside.values()))
        key = np.partition(keys, keys.size - k)[keys.size - k]
        kept = k - int(np.count_nonzero(keys > key))
        by_chunk = {
            chunk: int(np.count_nonzero(part == key)) for chunk, part in self._inside.items()
        }
        return _Threshold(int(key), kept, sum(by_chunk.values()), by_chunk)

    def _kth_by_bins(self, k: int) -> _Threshold | _Bracket:
        self._sort_in()
        assert self._bins is not None
        downwards = self._bins[::-1]
        at_least = np.cumsum(downwards)
        place = int(np.searchsorted(at_least, k))
        held = int(downwards[place])
        key = self.bracket.low + 1 + (self._bins.size - 1 - place << self._shift)
        if self._shift == 0:
            return _Threshold(key, k - (int(at_least[place]) - held), held)
        return _Bracket(key - 1, key + (1 << self._shift))

    def _sort_in(self) -> None:
        first = self.bracket.low + 1
        if self._bins is None:
            self._bins = np.zeros((self.bracket.high - first - 1 >> self._shift) + 1, np.int64)
        keys = (
            np.concatenate([*self._inside.values(), np.zeros(0, np.uint32)]).astype(np.int64)
            - first
        )
        self._bins += np.bincount(keys >> self._shift, minlength=self._bins.size)
        self._inside, self._held = {}, 0


def _sampled_brackets(
    passes: Passes, wanted: Mapping[Place, int], sizes: Mapping[str, int]
) -> dict[Place, _Bracket]:
    total = sum(sizes.values())
    fewest, most = _SAMPLES
    number = min(max(total // _SAMPLED, fewest), most)
    if total < 4 * number:
        return {place: _Bracket() for place in wanted}
    # One in each of as many equal parts; the generator is fixed: the sample decides the time, not the result.
    jitter = np.random.default_rng(0).random(number)
    positions = ((np.arange(number) + jitter) * (total / number)).astype(np.int64)
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))

    def at(name: str, start: int, size: int) -> np.ndarray:
        begin = int(starts[name]) + start
        first, last = np.searchsorted(positions, [begin, begin + size])
        return positions[first:last] - begin

    def pick(name: str, start: int, ranked: Ranked) -> list[np.ndarray]:
        return [keys_on_host(values) for values in ranked]

    picked = list(passes(pick, at=at))
    samples = [np.sort(np.concatenate(parts)) for parts in zip(*picked, strict=True)]
    brackets = {}
    for (i, j), k in wanted.items():
        above = k / total * samples[i].size
        margin = _DEVIATIONS * (above * (1 - k / total)) ** 0.5 + _DEVIATIONS
        low, high = (int(samples[i].size - above + side * margin) for side in (-1, 1))
        brackets[i, j] = _Bracket(
            int(samples[i][low]) if low >= 0 else -1,
            int(samples[i][high]) if high < samples[i].size else _LIMIT,
        )
    return brackets


def _cuts(
    passes: Passes, found: Mapping[Place, _Threshold], sizes: Mapping[str, int]
) -> dict[Place, dict[str, int]]:
    """By tensor, the index of the last entry at the threshold that is kept: the last index of all where all are."""
    cuts = {
        place: {name: size - 1 if one.kept else -1 for name, size in sizes.items()}
        for place, one in found.items()
    }
    split = {place: one for place, one in found.items() if 0 < one.kept < one.equal}
    sought = {}
    for place, by_chunk in _by_chunk(passes, split).items():
        (name, start), nth = _chunk_of(by_chunk, list(sizes), split[place].kept)
        sought[place] = name, start, nth
        for later in list(sizes)[list(sizes).index(name) + 1 :]:
            cuts[place][later] = -1

    def find(name: str, start: int, ranked: Ranked) -> dict[Place, int]:
        return {
            place: start
            + int(np.flatnonzero(keys_on_host(ranked[place[0]]) == found[place].key)[nth - 1])
            for place, (chosen, begin, nth) in sought.items()
            if (chosen, begin) == (name, start)
        }

    if sought:
        chunks = {(name, start) for name, start, _ in sought.values()}
        for places in passes(find, lambda name, start: (name, start) in chunks):
            for place, index in places.items():
                cuts[place][sought[place][0]] = index
    return cuts


def _by_chunk(
    passes: Passes, split: Mapping[Place, _Threshold]
) -> dict[Place, Mapping[tuple[str, int], int]]:
    """How many entries at the threshold each chunk has, counted by one more pass where that is not known."""
    known = {place: one.by_chunk for place, one in split.items() if one.by_chunk is not None}
    rest = {place: one for place, one in split.items() if one.by_chunk is None}
    if not rest:
        return known
    counted: dict[Place, dict[tuple[str, int], int]] = {place: {} for place in rest}

    def count(name: str, start: int, ranked: Ranked) -> tuple[str, int, list[int]]:
        return (
            name,
            start,
            [
                int(np.count_nonzero(keys_on_host(ranked[i]) == one.key))
                for (i, _), one in rest.items()
            ],
        )

    for name, start, numbers in passes(count):
        for place, number in zip(rest, numbers, strict=True):
            counted[place][name, start] = number
    return {**known, **counted}


def _chunk_of(
    by_chunk: Mapping[tuple[str, int], int], names: Sequence[str], nth: int
) -> tuple[tuple[str, int], int]:
    """The chunk that holds the nth of the entries that are counted, and which one of its own that is."""
    rank = {name: place for place, name in enumerate(names)}
    for chunk in sorted(by_chunk, key=lambda chunk: (rank[chunk[0]], chunk[1])):
        if nth <= by_chunk[chunk]:
            return chunk, nth
        nth -= by_chunk[chunk]
    raise AssertionError("no more entries are kept than there are")
