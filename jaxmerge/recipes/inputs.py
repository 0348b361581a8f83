"""What a merge sees of a source: a tensor's elements, its rows mapped, its adapters added, its units in order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxmerge.converters import Checkpoint, CheckpointError, non_finite
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.recipes.adapters import applied

if TYPE_CHECKING:
    from jaxmerge.align.orders import Order
    from jaxmerge.recipes.plan import Plan, PlannedInput

Checkpoints = Sequence[Checkpoint] | Mapping[int, Checkpoint]

# Rows that are read at once where a table is read row by row.
_BLOCK = 8 << 20
# Reading over a gap this wide takes no longer than a second read.
_GAP = 64 << 10


@dataclass(frozen=True, eq=False)
class RowMap:
    """A table of rows put together from rows of other tables.

    Attributes:
        tables: where rows are taken from, with no row maps of their own.
        table: int32 `[n]`: for each row an index into `tables`, or -1 for a row of zeros.
        row: int32 `[n]`: the row there.
        averages: rows that are the mean of several rows instead: row -> its (table, row) pairs.
        padding: how many rows follow that are the mean of the n rows.
    """

    tables: tuple[PlannedInput, ...]
    table: np.ndarray
    row: np.ndarray
    averages: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    padding: int = 0
    # The mean is wanted once for every range that has padding in it.
    _mean: list[np.ndarray] = field(default_factory=list, repr=False)


def read(
    checkpoints: Checkpoints,
    plan: Plan,
    wanted: PlannedInput,
    start: int = 0,
    stop: int | None = None,
) -> np.ndarray:
    """Reads a range of one input's elements, in the order of its shape as the merge sees it.

    Args:
        checkpoints: the plan's sources, open, by their index.
        plan: the plan.
        wanted: the input.
        start: first element.
        stop: one past the last element; None: to the end.

    Returns:
        A new array `[stop - start]` of the input's dtype.

    Raises:
        CheckpointError: a value read is NaN or infinite, or a file was cut short.
    """
    size = math.prod(wanted.shape)
    stop = size if stop is None else stop
    order = plan.orders.get(wanted.source, {}).get(wanted.name)
    if wanted.rows is None and not wanted.adapters and order is None:
        return _checked(
            plan, wanted, checkpoints[wanted.source].read_flat(wanted.name, start, stop)
        )
    width = math.prod(wanted.shape[1:])
    first, last = start // width, -(-stop // width)
    if order is not None:
        rows = _ordered_rows(checkpoints, plan, wanted, order, first, last)
    elif wanted.rows is None:
        rows = _table_rows(checkpoints, plan, wanted, slice(first, last))
    else:
        rows = _mapped_rows(checkpoints, plan, wanted, first, last)
    values = rows.reshape(-1)[start - first * width : stop - first * width]
    return values.astype(storage_dtype(wanted.dtype), copy=False)


def read_whole(checkpoints: Checkpoints, plan: Plan, wanted: PlannedInput) -> np.ndarray:
    """Reads one input.

    Args:
        checkpoints: the plan's sources, open, by their index.
        plan: the plan.
        wanted: the input.

    Returns:
        A new array of the input's shape and dtype.

    Raises:
        CheckpointError: as for `read`.
    """
    return read(checkpoints, plan, wanted).reshape(wanted.shape)


def _table_rows(
    checkpoints: Checkpoints, plan: Plan, table: PlannedInput, rows: slice
) -> np.ndarray:
    """Reads successive rows of a table, adapters added."""
    width = math.prod(table.shape[1:])
    flat = checkpoints[table.source].read_flat(table.name, rows.start * width, rows.stop * width)
    values = _checked(plan, table, flat).reshape(-1, *table.shape[1:])
    return applied(checkpoints, table.adapters, values, rows)


def _ordered_rows(
    checkpoints: Checkpoints,
    plan: Plan,
    wanted: PlannedInput,
    order: Order,
    first: int,
    last: int,
) -> np.ndarray:
    """Reads successive rows of an aligned model's tensor: its rows, and what is in them, in another order."""
    rows, *within = order
    if rows is None:
        values = _table_rows(checkpoints, plan, wanted, slice(first, last))
    else:
        values = np.empty((last - first, *wanted.shape[1:]), storage_dtype(wanted.dtype))
        _gather(checkpoints, plan, wanted, rows[first:last], values, np.arange(last - first))
    for axis, index in enumerate(within, start=1):
        if index is not None:
            values = np.take(values, index, axis)
    return values


def _mapped_rows(
    checkpoints: Checkpoints, plan: Plan, wanted: PlannedInput, first: int, last: int
) -> np.ndarray:
    assert wanted.rows is not None
    mapped: RowMap = plan.row_maps[wanted.rows]
    count = len(mapped.table)
    dtype = storage_dtype(wanted.dtype)
    values = np.zeros((last - first, *wanted.shape[1:]), dtype)
    chosen = mapped.table[first : min(last, count)]
    for index, table in enumerate(mapped.tables):
        places = np.flatnonzero(chosen == index)
        _gather(checkpoints, plan, table, mapped.row[first + places], values, places)
    averaged = [place for place in mapped.averages if first <= place < last]
    if averaged:
        mean = _averages(checkpoints, plan, mapped, averaged, wanted.shape[1:])
        values[np.array(averaged) - first] = mean.astype(dtype)
    if last > count:
        if not mapped._mean:
            mapped._mean.append(_mean(checkpoints, plan, wanted, count))
        values[max(count - first, 0) :] = mapped._mean[0].astype(dtype)
    return values


def _averages(
    checkpoints: Checkpoints,
    plan: Plan,
    mapped: RowMap,
    places: Sequence[int],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Returns the means of several rows each, in float32; the n-th rows of all are read together."""
    pairs = [mapped.averages[place] for place in places]
    total = np.zeros((len(places), *shape), np.float32)
    for n in range(max(map(len, pairs))):
        part = np.zeros_like(total)
        for index, table in enumerate(mapped.tables):
            chosen = [i for i, one in enumerate(pairs) if n < len(one) and one[n][0] == index]
            rows = np.array([pairs[i][n][1] for i in chosen], np.int32)
            _gather(checkpoints, plan, table, rows, part, np.array(chosen, np.int64))
        total += part
    counts = np.array([len(one) for one in pairs], np.float32)
    return total / counts.reshape(-1, *(1,) * len(shape))


def _gather(
    checkpoints: Checkpoints,
    plan: Plan,
    table: PlannedInput,
    rows: np.ndarray,
    into: np.ndarray,
    places: np.ndarray,
) -> None:
    """Copies `rows` of a table to `places`, reading each stretch of the file once."""
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    for stretch in _stretches(
        rows, math.prod(table.shape[1:]) * storage_dtype(table.dtype).itemsize
    ):
        start, stop = int(rows[stretch.start]), int(rows[stretch.stop - 1]) + 1
        read = _table_rows(checkpoints, plan, table, slice(start, stop))
        into[places[stretch]] = read[rows[stretch] - start].astype(into.dtype, copy=False)


def _stretches(rows: np.ndarray, row_bytes: int) -> Iterator[slice]:
    """Cuts sorted rows where a gap is wide, and where a stretch would be long."""
    if not len(rows):
        return
    gap, longest = max(_GAP // row_bytes, 1), max(_BLOCK // row_bytes, 1)
    begin = 0
    for cut in [*(np.flatnonzero(np.diff(rows) > gap) + 1), len(rows)]:
        while begin < cut:
            end = begin + int(np.searchsorted(rows[begin:cut], rows[begin] + longest))
            yield slice(begin, end)
            begin = end


def _mean(checkpoints: Checkpoints, plan: Plan, wanted: PlannedInput, count: int) -> np.ndarray:
    """Returns the mean of the first `count` rows, in float64, block by block."""
    width = math.prod(wanted.shape[1:])
    block = max(_BLOCK // (width * 4), 1)
    total = np.zeros(wanted.shape[1:], np.float64)
    for first in range(0, count, block):
        rows = _mapped_rows(checkpoints, plan, wanted, first, min(first + block, count))
        total += rows.sum(axis=0, dtype=np.float64)
    return total / count


def _checked(plan: Plan, given: PlannedInput, values: np.ndarray) -> np.ndarray:
    bad = non_finite(values)
    if bad:
        raise CheckpointError(
            f"{plan.sources[given.source].name}: tensor {given.name!r} holds {bad} value(s) that are "
            "NaN or infinite; merging would spread them. Repair or replace the checkpoint"
        )
    return values
