"""Exact trimming: keep the k entries of largest value, without sorting.

Exactly k entries are kept, however many are equal: at the smallest kept value, those of lower flat
index. The number k may be traced. The result is a `Selection`, two scalars that `keep` turns into
a mask; the routes below give the same one:

- `select`, `select_over`: the front doors, for one tensor and for all tensors of a model together.
- `select_compiled`: one compiled kernel, for use inside `jit` and `vmap` and on accelerators.
- `order`: sort once, then the k-th place gives the selection of any k.
- `select_in_passes`: over chunks of values that are never in memory together.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxmerge.methods.counting import count
from jaxmerge.methods.selection.host import is_on_host, select_on_host, select_rows_on_host
from jaxmerge.methods.selection.kernel import Route, by_platform, kth_largest, nth_equal
from jaxmerge.methods.selection.keys import (
    Selection,
    alike,
    checked_size,
    checked_total,
    clipped_count,
    common_dtype,
    entries,
    keep,
    key_bits,
    key_format,
    keys_as,
    narrowed_to,
    nothing,
    regrouping,
)
from jaxmerge.methods.selection.order import order
from jaxmerge.methods.selection.stream import select_in_passes, share

__all__ = [
    "Selection",
    "count",
    "keep",
    "key_bits",
    "order",
    "select",
    "select_compiled",
    "select_counts",
    "select_in_passes",
    "select_over",
    "select_over_stacked",
    "select_rows_on_host",
    "share",
]


def select(values: Array | np.ndarray, k: ArrayLike) -> Selection:
    """Selects the k largest values by the fastest route there is.

    Concrete values on one CPU device are selected by NumPy on the host, several times faster than
    any compiled kernel; everything else by `select_compiled`.

    Args:
        values: Nonnegative float32, bfloat16 or float16 array of any shape. Signs are ignored, NaN
            counts as larger than infinity.
        k: Integer scalar, may be traced. Limited to 0..size.

    Returns:
        The selection, for `keep`.

    Raises:
        TypeError: If the values have another type.
        ValueError: If the tensor has 2**31 entries or more.

    Example:
        >>> values = jnp.array([0.5, 2.0, 0.5, 1.0])
        >>> keep(values, select(values, 3)).tolist()
        [True, True, False, True]
    """
    return select_counts(values, [k])[0]


def select_counts(values: Array | np.ndarray, counts: Sequence[ArrayLike]) -> list[Selection]:
    """Selects the k largest values for each of several k; on the host in one pass over the values.

    Args:
        values: As for `select`.
        counts: Integer scalars, may be traced. Limited to 0..size.

    Returns:
        A selection for each count.

    Example:
        >>> values = jnp.array([0.5, 2.0, 0.5, 1.0])
        >>> [keep(values, found).tolist() for found in select_counts(values, [1, 3])]
        [[False, True, False, False], [True, True, False, True]]
    """
    if any(isinstance(k, jax.core.Tracer) for k in counts) or not is_on_host(values):
        return [select_compiled(values, k) for k in counts]
    size = checked_size(values.shape)
    ks = [int(clipped_count(k, size)) for k in counts]
    wanted = sorted({k for k in ks if k > 0})
    found = dict(zip(wanted, _select_on_host([values], wanted), strict=True)) if wanted else {}
    return [found[k][0] if k else nothing(values.dtype) for k in ks]


def select_compiled(
    values: Array | np.ndarray, k: ArrayLike, *, route: Route | None = None
) -> Selection:
    """Selects the k largest values by one compiled kernel.

    A radix descent over the bits of the values: linear time for any input, no sort, no callback.
    Works under `jit` and `vmap` (over values, counts or both), on sharded arrays and under
    `jax.export` for any platform. No gradient flows through it.

    Args:
        values: As for `select`.
        k: As for `select`.
        route: How entries are counted, for measurements: "histogram", "blocks" or "bisection" (see
            `jaxmerge.methods.selection.kernel`); by default what suits the platform.

    Returns:
        The selection, for `keep`.

    Example:
        >>> values = jnp.array([[0.5, 2.0], [0.5, 1.0]])
        >>> selections = jax.vmap(select_compiled)(values, jnp.array([1, 2]))
        >>> jax.vmap(keep)(values, selections).tolist()
        [[False, True], [True, True]]
    """
    size = checked_size(values.shape)
    k = clipped_count(k, size)
    if size == 0:
        return nothing(values.dtype)
    return _select_compiled([jnp.asarray(values)], k, route)[0]


def select_over(values: Sequence[Array | np.ndarray], k: ArrayLike) -> list[Selection]:
    """Selects the k largest values of several tensors together.

    Ties at the smallest kept value go to earlier tensors, then to lower indices. Compiled, tensors
    of equal shape and type are stacked (one copy), so that compilation does not grow with depth.

    Args:
        values: Nonnegative float32, bfloat16 or float16 arrays of any shapes; types may differ.
        k: Integer scalar, may be traced. Limited to 0..the number of entries.

    Returns:
        A selection for each tensor.

    Raises:
        TypeError: If values have another type.
        ValueError: If all tensors together have 2**32 entries or more, or one has 2**31.

    Example:
        >>> values = [jnp.array([0.5, 2.0]), jnp.array([0.5, 1.0])]
        >>> [keep(v, s).tolist() for v, s in zip(values, select_over(values, 3))]
        [[True, True], [False, True]]
    """
    total = checked_total([v.shape for v in values])
    k = clipped_count(k, total)
    filled = [i for i, v in enumerate(values) if v.size]
    parts = [values[i] for i in filled]
    concrete = isinstance(k, np.ndarray)
    if not parts or (concrete and k == 0):
        return [nothing(v.dtype) for v in values]
    if concrete and all(is_on_host(part) for part in parts):
        (found,) = _select_on_host(parts, [int(k)])
    else:
        found = _select_compiled([jnp.asarray(part) for part in parts], k, None)
    selected = dict(zip(filled, found, strict=True))
    return [selected.get(i) or nothing(v.dtype) for i, v in enumerate(values)]


def _select_on_host(
    values: Sequence[Array | np.ndarray], counts: Sequence[int]
) -> list[list[Selection]]:
    """Per count a selection of each tensor."""
    dtype = common_dtype([v.dtype for v in values])
    chosen = []
    for found in select_on_host(values, counts):
        thresholds = narrowed_to(np.uint32(found.threshold), dtype, values)
        chosen.append(
            [
                Selection(thresholds[v.dtype.name], np.int32(cut))
                for v, cut in zip(values, found.cuts, strict=True)
            ]
        )
    return chosen


def select_over_stacked(
    groups: Sequence[Array], position: tuple[int, ...], k: ArrayLike
) -> list[Selection]:
    """Selects the k largest values of several stacks of tensors together, in one compiled kernel.

    Args:
        groups: float32 [tensors, ...] arrays; axis 0 of each runs over tensors of one shape.
        position: Static; where each tensor, group after group, stands in the order of ties.
        k: Integer scalar, may be traced. Limited to 0..the number of entries.

    Returns:
        For each group a selection of [tensors] thresholds and cuts.

    Example:
        >>> group = jnp.array([[0.5, 2.0], [0.5, 1.0]])
        >>> [selection] = select_over_stacked([group], (1, 0), 3)
        >>> jax.vmap(keep)(group, selection).tolist()
        [[False, True], [True, True]]
    """
    k = clipped_count(k, checked_total([group.shape for group in groups]))
    threshold, cuts = _select_groups(list(groups), k, position, None)
    lengths = [len(group) for group in groups]
    return [
        Selection(jnp.broadcast_to(threshold, cut.shape), cut)
        for cut in jnp.split(cuts, np.cumsum(lengths)[:-1])
    ]


def _select_compiled(
    values: list[Array], k: Array | np.ndarray, route: Route | None
) -> list[Selection]:
    threshold, cuts = _select_alike(values, k, route)
    thresholds = narrowed_to(threshold, common_dtype([v.dtype for v in values]), values)
    return [
        Selection(thresholds[v.dtype.name], cut)
        for v, cut in zip(values, entries(cuts), strict=True)
    ]


# Two results, not two for each tensor: each result of a program is compiled on its own.
@functools.partial(jax.jit, static_argnames="route")
def _select_alike(values: list[Array], k: Array, route: Route | None) -> tuple[Array, Array]:
    places = alike(values)
    groups = [jnp.stack([values[i] for i in same]) for same in places]
    grouped, ranks = regrouping(places)
    threshold, cuts = _select_groups(groups, k, tuple(grouped.tolist()), route)
    return threshold, cuts[ranks]


@functools.partial(jax.jit, static_argnames=("position", "route"))
def _select_groups(
    groups: list[Array], k: Array, position: tuple[int, ...], route: Route | None
) -> tuple[Array, Array]:
    """The threshold, and the cut of each tensor, group after group."""
    dtype = common_dtype([group.dtype for group in groups])
    position_of = np.asarray(position)

    def kernel(groups: list[Array], k: Array, *, route: Route) -> tuple[Array, Array]:
        keys_of = keys_as(dtype)
        threshold, kept = kth_largest(groups, keys_of, k, key_format(dtype).width, route)

        def cut(values: Array, m: Array) -> Array:
            return nth_equal(values, keys_of, threshold, m, route)

        if len(position) == 1:
            return threshold, cut(groups[0][0], kept)[None]
        equal = [
            jnp.sum(keys_of(group) == threshold, tuple(range(1, group.ndim)), dtype=jnp.uint32)
            for group in groups
        ]
        in_order = jnp.concatenate(equal)[np.argsort(position_of)]
        kept_each = share(in_order, kept)[position_of]
        ends = np.cumsum([len(group) for group in groups])[:-1]
        cuts = [
            jax.vmap(cut)(group, part)
            for group, part in zip(groups, jnp.split(kept_each, ends), strict=True)
        ]
        return threshold, jnp.concatenate(cuts)

    if route is None:
        threshold, cuts = by_platform(kernel, groups, k)
    else:
        threshold, cuts = kernel(groups, k, route=route)
    return jnp.where(k == 0, nothing(dtype).threshold, threshold), cuts
