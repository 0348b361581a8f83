"""Takes a leaf method's measures over batches of tensors: directly, or by look-up in what `prepare` kept."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.leaf import Chunk, LeafMethod, Local, OfSelected, Select, Sums
from jaxmerge.methods.selection import (
    Selection,
    key_bits,
    order,
    select,
    select_counts,
    select_over,
    select_over_stacked,
)
from jaxmerge.methods.selection.host import is_on_host

Prepared = dict[str, Any]
BatchValues = tuple[Mapping[str, Any], bool]  # the values, and whether they have a leading axis


class Batch(Protocol):
    """What is read of `engine.Batch`."""

    @property
    def models(self) -> tuple[jax.Array, ...]: ...
    @property
    def base(self) -> jax.Array | None: ...
    @property
    def stacked(self) -> bool: ...
    @property
    def tensor_names(self) -> list[str]: ...
    @property
    def tensor_size(self) -> int: ...
    def chunk(self, seed: jax.Array | None) -> Chunk: ...


def prepare(leaf: LeafMethod, batches: Sequence[Batch]) -> tuple[Prepared, ...]:
    """Does what no hyperparameter touches: sums that need no values, what is local, and the sorting orders.

    An order costs one argsort and 4 bytes per element and model; a candidate then looks its thresholds up.
    """
    prepared: tuple[Prepared, ...] = tuple({} for _ in batches)
    for one in leaf.measures:
        if isinstance(one, Sums):
            chunks = [batch.chunk(None) for batch in batches]
            if one.selected is not None:
                for batch, chunk, kept in zip(batches, chunks, prepared, strict=True):
                    (order,) = kept[one.selected.by]
                    kept[one.name] = _stretches(one.selected, batch.stacked, chunk, order)
                continue
            if one.needs_values:
                continue
            nothing: list[BatchValues] = [({}, False)] * len(batches)
            results = _sums(one, batches, chunks, nothing, [{} for _ in batches])
        elif isinstance(one, Local):
            results = [
                local_values(one, batch.stacked, batch.chunk(None), found_by(one, kept))
                for batch, kept in zip(batches, prepared, strict=True)
            ]
        elif one.scope == "tensor":
            results = [
                _tensor_order(one, batch, found_by(one, kept))
                for batch, kept in zip(batches, prepared, strict=True)
            ]
        else:
            known = [found_by(one, kept) for kept in prepared]
            results = [_model_order(one, batches, known)] * len(batches)
        for kept, result in zip(prepared, results, strict=True):
            kept[one.name] = result
    return prepared


def measure(
    leaf: LeafMethod,
    batches: Sequence[Batch],
    chunks: Sequence[Chunk],
    values: Sequence[BatchValues],
    prepared: Sequence[Prepared] | None,
) -> list[dict[str, Any]]:
    """Takes all measures in order.

    Returns:
      Per batch, results by measure name; with a leading axis over the batch's tensors where the batch is stacked.
    """
    found: list[dict[str, Any]] = [{} for _ in batches]
    for one in leaf.measures:
        results: Sequence[Any]
        if isinstance(one, Sums):
            if prepared is not None and one.selected is not None:
                results = _sums_of_selected(leaf, one, batches, chunks, values, found, prepared)
            elif prepared is not None and not one.needs_values:
                results = [kept[one.name] for kept in prepared]
            else:
                results = _sums(one, batches, chunks, values, found)
        elif isinstance(one, Local):
            if prepared is not None:
                results = [kept[one.name] for kept in prepared]
            else:
                results = [
                    local_values(one, batch.stacked, chunk, found_by(one, seen))
                    for batch, chunk, seen in zip(batches, chunks, found, strict=True)
                ]
        elif one.scope == "tensor":
            counts = [_counts(one, *item) for item in zip(batches, values, found, strict=True)]
            if prepared is not None:
                orders = [kept[one.name] for kept in prepared]
                results = [
                    _look_up(one, batch.stacked, chunk, found_by(one, seen), *item)
                    for batch, chunk, seen, *item in zip(
                        batches, chunks, found, counts, orders, strict=True
                    )
                ]
            else:
                results = [
                    _select_tensor(one, batch, chunk, found_by(one, seen), ks)
                    for batch, chunk, seen, ks in zip(batches, chunks, found, counts, strict=True)
                ]
        else:
            known = [found_by(one, seen) for seen in found]
            if prepared is not None:
                orders = [kept[one.name] for kept in prepared]
                results = _look_up_model(one, batches, chunks, known, values, orders)
            else:
                results = _select_model(one, batches, chunks, known, values)
        for seen, result in zip(found, results, strict=True):
            seen[one.name] = result
    return found


# Sums ---------------------------------------------------------------------------------------------------------------


def _sums(
    one: Sums,
    batches: Sequence[Batch],
    chunks: Sequence[Chunk],
    values: Sequence[BatchValues],
    found: Sequence[Mapping[str, Any]],
) -> list[Any]:
    items = list(zip(batches, chunks, values, found, strict=True))
    if one.scope == "tensor":
        return [
            _whole_tensor(one, batch.stacked, per_tensor, chunk, given, seen)
            for batch, chunk, (given, per_tensor), seen in items
        ]
    statistics = [
        statistics_of(one, batch.stacked, per_tensor, chunk, given, seen)
        for batch, chunk, (given, per_tensor), seen in items
    ]
    within, across = (jnp.sum, jnp.add) if one.reduce == "sum" else (jnp.max, jnp.maximum)
    summed = [
        jax.tree.map(lambda x: within(x, axis=0), sums) if batch.stacked else sums
        for batch, sums in zip(batches, statistics, strict=True)
    ]
    total = functools.reduce(lambda a, b: jax.tree.map(across, a, b), summed)
    results = []
    for batch, (given, per_tensor), seen in zip(batches, values, found, strict=True):
        whole = _spread(total, len(batch.tensor_names)) if batch.stacked else total
        results.append(finished(one, batch.stacked, per_tensor, whole, given, seen))
    return results


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _whole_tensor(
    one: Sums, stacked: bool, per_tensor: bool, chunk: Chunk, values: Any, found: Any
) -> Any:
    sums = statistics_of(one, stacked, per_tensor, chunk, values, found)
    return finished(one, stacked, per_tensor, sums, values, found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def statistics_of(
    one: Sums, stacked: bool, per_tensor: bool, chunk: Chunk, values: Any, found: Any
) -> Any:
    """The statistics of a chunk; `stacked` and `per_tensor` say what has a leading axis over tensors."""
    if not stacked:
        return one.statistics(chunk, values, found)
    return jax.vmap(one.statistics, in_axes=(0, 0 if per_tensor else None, 0))(chunk, values, found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def finished(one: Sums, stacked: bool, per_tensor: bool, sums: Any, values: Any, found: Any) -> Any:
    """What the statistics of all chunks come to."""
    if not stacked:
        return one.finish(sums, values, found)
    return jax.vmap(one.finish, in_axes=(0, 0 if per_tensor else None, 0))(sums, values, found)


# Sums over what is selected, by look-up -----------------------------------------------------------------------------

_STRETCH = 1024


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stretches(selected: OfSelected, stacked: bool, chunk: Chunk, order: jax.Array) -> jax.Array:
    """[models, stretches]: sums of the terms over stretches of entries that follow each other in the order."""

    def single(chunk: Chunk, order: jax.Array) -> jax.Array:
        length = min(_STRETCH, order.size)
        terms = jnp.stack([term.reshape(-1)[order] for term in selected.terms(chunk)])
        padded = jnp.pad(terms, ((0, 0), (0, -order.size % length)))
        return jnp.sum(padded.reshape(len(terms), -1, length), axis=-1)

    return (jax.vmap(single) if stacked else single)(chunk, order)


def _sums_of_selected(
    leaf: LeafMethod,
    one: Sums,
    batches: Sequence[Batch],
    chunks: Sequence[Chunk],
    values: Sequence[BatchValues],
    found: Sequence[Mapping[str, Any]],
    prepared: Sequence[Prepared],
) -> list[Any]:
    assert one.selected is not None
    by = one.selected.by
    (select,) = (m for m in leaf.measures if isinstance(m, Select) and m.name == by)
    results = []
    for batch, chunk, (given, per_tensor), seen, kept in zip(
        batches, chunks, values, found, prepared, strict=True
    ):
        ((count,),) = _counts(select, batch, (given, per_tensor), seen)
        (order,) = kept[by]
        sums = _first_terms(one.selected, batch.stacked, chunk, order, kept[one.name], count)
        results.append(finished(one, batch.stacked, per_tensor, sums, given, seen))
    return results


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_terms(
    selected: OfSelected,
    stacked: bool,
    chunk: Chunk,
    order: jax.Array,
    stretches: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """[models]: the sums of the terms over the first entries of the order, so many as are counted."""

    def single(chunk: Chunk, order: jax.Array, stretches: jax.Array, count: jax.Array) -> jax.Array:
        length, count = min(_STRETCH, order.size), count.astype(jnp.int32)
        whole = count // length
        among = jnp.arange(stretches.shape[1]) < whole
        start = jnp.minimum(whole * length, order.size - length)
        places = jax.lax.dynamic_slice_in_dim(order, start, length)
        rank = start + jnp.arange(length)
        last = (rank >= whole * length) & (rank < count)
        terms = jnp.stack(selected.terms(_elements(chunk, places)))
        return jnp.sum(jnp.where(among[None], stretches, 0), axis=1) + jnp.sum(
            jnp.where(last[None], terms, 0), axis=1
        )

    return (jax.vmap(single) if stacked else single)(chunk, order, stretches, count)


# What a chunk says of itself ----------------------------------------------------------------------------------------


def local_values(one: Local, stacked: bool, chunk: Chunk, seen: Any) -> Any:
    """What a chunk says of itself; `seen` is `found_by(one, found)`."""
    if not one.on_host or not all(map(is_on_host, jax.tree.leaves((chunk, seen)))):
        return _local_compiled(one, stacked, chunk, seen)
    if not stacked:
        return _values_of(one, chunk, seen)
    at_hand = jax.tree.map(np.asarray, (chunk, seen))
    results = [
        _values_of(one, *jax.tree.map(lambda x, i=i: x[i], at_hand))
        for i in range(chunk.models[0].shape[0])
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _local_compiled(one: Local, stacked: bool, chunk: Chunk, seen: Any) -> Any:
    single = functools.partial(_values_of, one)
    return jax.vmap(single)(chunk, seen) if stacked else single(chunk, seen)


# Order statistics, directly -----------------------------------------------------------------------------------------


def _select_tensor(one: Select, batch: Batch, chunk: Chunk, local: Any, counts: Any) -> Any:
    magnitudes = ranked_values(one, batch.stacked, chunk, local)
    if not batch.stacked:
        return [tuple(select_counts(size, ks)) for size, ks in zip(magnitudes, counts, strict=True)]
    if not all(map(is_on_host, jax.tree.leaves((magnitudes, counts)))):
        return _select_batch(magnitudes, counts)
    result = []
    for size, ks in zip(magnitudes, counts, strict=True):
        rows, each = np.asarray(size), np.stack(ks, axis=-1)
        found = [select_counts(row, list(k)) for row, k in zip(rows, each, strict=True)]
        result.append(tuple(map(_stacked, zip(*found, strict=True))))
    return result


@jax.jit
def _select_batch(magnitudes: list[jax.Array], counts: list[tuple[jax.Array, ...]]) -> Any:
    """One kernel for all models, counts and tensors."""
    sizes = jnp.concatenate([x for x, ks in zip(magnitudes, counts, strict=True) for _ in ks])
    wanted = jnp.concatenate([k for ks in counts for k in ks])
    selections = jax.vmap(select)(sizes, wanted)
    tensors, result, start = magnitudes[0].shape[0], [], 0
    for ks in counts:
        mine = []
        for _ in ks:
            mine.append(jax.tree.map(lambda x, a=start: x[a : a + tensors], selections))
            start += tensors
        result.append(tuple(mine))
    return result


def _select_model(
    one: Select,
    batches: Sequence[Batch],
    chunks: Sequence[Chunk],
    known: Sequence[Any],
    values: Sequence[BatchValues],
) -> list[Any]:
    """Selections over the whole model: ties go to the tensor whose name sorts first, then to the lower index."""
    magnitudes = [
        ranked_values(one, batch.stacked, chunk, local)
        for batch, chunk, local in zip(batches, chunks, known, strict=True)
    ]
    counts = _model_counts(one, batches, values)
    result: list[list[Any]] = [[] for _ in batches]
    for i, ks in enumerate(counts):
        sizes = [found[i] for found in magnitudes]
        at_hand = all(map(is_on_host, jax.tree.leaves((sizes, ks))))
        over = _over_tensors if at_hand else _over_stacks
        chosen = [over(batches, sizes, k) for k in ks]
        for b in range(len(batches)):
            result[b].append(tuple(selections[b] for selections in chosen))
    return result


def _over_tensors(batches: Sequence[Batch], sizes: list[jax.Array], k: Any) -> list[Selection]:
    """On the host, tensor by tensor."""
    places = _places(batches)
    found = dict(zip(places, select_over(_by_name(batches, sizes), k), strict=True))
    return [
        _stacked([found[b, t] for t in range(len(batch.tensor_names))])
        if batch.stacked
        else found[b, None]
        for b, batch in enumerate(batches)
    ]


def _over_stacks(batches: Sequence[Batch], sizes: list[jax.Array], k: Any) -> list[Selection]:
    """Compiled, batch by batch, so that the program does not grow with depth."""
    names = [name for batch in batches for name in batch.tensor_names]
    position = np.argsort(np.argsort(names)).tolist()
    groups = [
        size if batch.stacked else size[None] for batch, size in zip(batches, sizes, strict=True)
    ]
    return [
        selection if batch.stacked else jax.tree.map(lambda x: x[0], selection)
        for batch, selection in zip(
            batches, select_over_stacked(groups, tuple(position), k), strict=True
        )
    ]


def _stacked(selections: Sequence[Selection]) -> Selection:
    return jax.tree.map(lambda *x: jnp.stack(x), *selections)


def _by_name(batches: Sequence[Batch], arrays: Sequence[jax.Array]) -> list[Any]:
    """All tensors one by one in the order of their names, as NumPy arrays where they are at hand."""
    at_hand = [np.asarray(array) if is_on_host(array) else array for array in arrays]
    return [at_hand[b] if t is None else at_hand[b][t] for b, t in _places(batches)]


def _places(batches: Sequence[Batch]) -> list[tuple[int, int | None]]:
    """All tensors as (batch, index in the batch) in the order of their names."""
    places = [
        (name, b, t if batch.stacked else None)
        for b, batch in enumerate(batches)
        for t, name in enumerate(batch.tensor_names)
    ]
    return [(b, t) for _, b, t in sorted(places, key=lambda place: place[0])]


# Order statistics, by look-up ---------------------------------------------------------------------------------------


def _tensor_order(one: Select, batch: Batch, local: Any) -> list[jax.Array]:
    magnitudes = ranked_values(one, batch.stacked, batch.chunk(None), local)
    if not batch.stacked:
        return [order(size) for size in magnitudes]
    if not all(map(is_on_host, magnitudes)):
        return [jax.vmap(order)(size) for size in magnitudes]
    return [jnp.asarray(np.stack([order(row) for row in np.asarray(size)])) for size in magnitudes]


def _model_order(one: Select, batches: Sequence[Batch], known: Sequence[Any]) -> list[jax.Array]:
    """Per model, the order of all its values; tensors one after the other in the order of their names."""
    magnitudes = [
        ranked_values(one, batch.stacked, batch.chunk(None), local)
        for batch, local in zip(batches, known, strict=True)
    ]
    orders = []
    for i in range(len(batches[0].models)):
        sizes = _by_name(batches, [found[i] for found in magnitudes])
        namespace = np if all(map(is_on_host, sizes)) else jnp
        orders.append(order(namespace.concatenate([namespace.ravel(size) for size in sizes])))
    return orders


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look_up(one: Select, stacked: bool, chunk: Chunk, local: Any, counts: Any, orders: Any) -> Any:
    def single(chunk: Chunk, local: Any, counts: Any, orders: Any) -> Any:
        return [
            tuple(_at_rank(one, chunk, local, i, ranked, k) for k in ks)
            for i, (ranked, ks) in enumerate(zip(orders, counts, strict=True))
        ]

    return (jax.vmap(single) if stacked else single)(chunk, local, counts, orders)


def _at_rank(
    one: Select, chunk: Chunk, local: Any, model: int, ranked: jax.Array, k: jax.Array
) -> Selection:
    place = ranked[jnp.clip(k.astype(jnp.int32) - 1, 0, ranked.size - 1)].astype(jnp.int32)
    threshold = key_bits(_value_at(one, chunk, local, model, place))
    return Selection(jnp.where(k > 0, threshold, _NOTHING), jnp.where(k > 0, place, jnp.int32(-1)))


def _look_up_model(
    one: Select,
    batches: Sequence[Batch],
    chunks: Sequence[Chunk],
    known: Sequence[Any],
    values: Sequence[BatchValues],
    orders: Sequence[list[jax.Array]],
) -> list[Any]:
    return _look_up_all(
        one,
        tuple(batch.stacked for batch in batches),
        list(chunks),
        list(known),
        _starts(batches),
        _model_counts(one, batches, values),
        orders[0],
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look_up_all(
    one: Select,
    stacked: tuple[bool, ...],
    chunks: list[Chunk],
    known: list[Any],
    starts: list[jax.Array],
    counts: list[tuple[jax.Array, ...]],
    orders: list[jax.Array],
) -> list[list[tuple[Selection, ...]]]:
    """Per batch and model a tuple of selections, one per count."""
    by_model = [
        [_at_model_rank(one, stacked, chunks, known, starts, i, ranked, k) for k in ks]
        for i, (ks, ranked) in enumerate(zip(counts, orders, strict=True))
    ]
    return [
        [tuple(selections[b] for selections in chosen) for chosen in by_model]
        for b in range(len(chunks))
    ]


def _at_model_rank(
    one: Select,
    stacked: tuple[bool, ...],
    chunks: list[Chunk],
    known: list[Any],
    starts: list[jax.Array],
    model: int,
    ranked: jax.Array,
    k: jax.Array,
) -> list[Selection]:
    last = ranked[jnp.maximum(k, 1) - 1].astype(jnp.uint32)
    keys = [
        _key_at(one, many, model, chunk, local, last, start)
        for many, chunk, local, start in zip(stacked, chunks, known, starts, strict=True)
    ]
    threshold = jnp.where(k > 0, functools.reduce(jnp.maximum, keys), _NOTHING)
    selections = []
    for many, chunk, start in zip(stacked, chunks, starts, strict=True):
        # Tensors before the last kept entry keep all their ties, tensors after it none.
        inside = jnp.minimum(last - jnp.minimum(start, last), chunk.size - np.uint32(1))
        cut = jnp.where((last >= start) & (k > 0), inside.astype(jnp.int32), -1)
        selection = Selection(jnp.broadcast_to(threshold, cut.shape), cut)
        selections.append(selection if many else jax.tree.map(lambda x: x[0], selection))
    return selections


def _key_at(
    one: Select,
    stacked: bool,
    model: int,
    chunk: Chunk,
    local: Any,
    last: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """The key of the entry at the model-wide place `last` where it lies in this batch, else 0."""

    def single(chunk: Chunk, local: Any, start: jax.Array) -> jax.Array:
        inside = (last >= start) & (last - start < chunk.size)
        place = jnp.where(inside, last - start, 0).astype(jnp.int32)
        return jnp.where(inside, key_bits(_value_at(one, chunk, local, model, place)), 0)

    if stacked:
        return jnp.max(jax.vmap(single)(chunk, local, start))
    return single(chunk, local, start[0])


def _starts(batches: Sequence[Batch]) -> list[jax.Array]:
    """Per batch, where each of its tensors begins in the concatenation by name, uint32 [tensors]."""
    starts = [np.zeros(len(batch.tensor_names), np.uint32) for batch in batches]
    position = 0
    for b, t in _places(batches):
        starts[b][t or 0] = position
        position += batches[b].tensor_size
    return [jnp.asarray(start) for start in starts]


# What both use ------------------------------------------------------------------------------------------------------

# A key above every other: nothing is kept by value.
_NOTHING = np.uint32(2**32 - 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ranked_values(one: Select, stacked: bool, chunk: Chunk, local: Any) -> list[jax.Array]:
    """Per ranking, the values of a chunk that are ranked; `local` is `found_by(one, found)`."""
    single = functools.partial(_values_of, one)
    return jax.vmap(single)(chunk, local) if stacked else single(chunk, local)


def _values_of(one: Select | Local, chunk: Chunk, seen: Any) -> Any:
    return one.values(chunk) if one.of is None else one.values(chunk, seen)


def found_by(one: Select | Local, found: Mapping[str, Any]) -> Any:
    """What the measure found that this one is `of`."""
    return None if one.of is None else found[one.of]


def _counts(one: Select, batch: Batch, values: BatchValues, found: Mapping[str, Any]) -> Any:
    """Per model a tuple of counts, with a leading axis where the batch is stacked."""
    given, per_tensor = values
    if one.reads_found:
        return _counts_found(one, batch.stacked, per_tensor, batch.tensor_size, given, found)
    if per_tensor:
        return jax.vmap(lambda v: one.counts(v, batch.tensor_size))(given)
    counts = one.counts(given, batch.tensor_size)
    return _spread(counts, len(batch.tensor_names)) if batch.stacked else counts


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _counts_found(
    one: Select, stacked: bool, per_tensor: bool, size: int, values: Any, found: Any
) -> Any:
    def single(values: Any, found: Any) -> Any:
        return one.counts(values, size, found)

    if not stacked:
        return single(values, found)
    return jax.vmap(single, in_axes=(0 if per_tensor else None, 0))(values, found)


def _model_counts(
    one: Select, batches: Sequence[Batch], values: Sequence[BatchValues]
) -> list[tuple[jax.Array, ...]]:
    given, per_tensor = values[0]
    total = sum(batch.tensor_size * len(batch.tensor_names) for batch in batches)
    if any(each for _, each in values):
        given = jax.tree.map(lambda x: x[0], given) if per_tensor else given
    return one.counts(given, total)


def _spread(tree: Any, length: int) -> Any:
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (length, *jnp.shape(x))), tree
    )


def _value_at(one: Select, chunk: Chunk, local: Any, model: int, place: jax.Array) -> jax.Array:
    if one.of is not None:
        return _pick(place, _values_of(one, chunk, local)[model])
    return one.values(_elements(chunk, place))[model]


def _elements(chunk: Chunk, place: jax.Array) -> Chunk:
    """A chunk of the elements at one flat index or several."""
    pick = functools.partial(_pick, place)
    base = None if chunk.base is None else pick(chunk.base)
    models = tuple(map(pick, chunk.models))
    return replace(
        chunk, models=models, base=base, seed=None, offset=place.astype(jnp.uint32), extras={}
    )


def _pick(place: jax.Array, array: jax.Array) -> jax.Array:
    return array[jnp.unravel_index(place, array.shape)] if array.ndim else array
