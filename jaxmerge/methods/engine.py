"""Runs a leaf method over a whole tree: once and eagerly, or as a state from which candidates are made.

Both ways are lists of batches. `merge_once` makes one batch per leaf and runs jitted leaf functions that equal shapes
share; `init` stacks leaves of equal shape into one batch, so that a program around `apply` does not grow with depth.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods import draws, hyperparameters
from jaxmerge.methods.inputs import check_count, dtype_of, flatten_all, is_mergeable
from jaxmerge.methods.leaf import Chunk, LeafMethod
from jaxmerge.methods.measuring import Prepared, measure, prepare
from jaxmerge.tree import Layout, TensorLayout, name_words, unflatten

Transform = tuple[tuple[int, ...] | None, tuple[int, ...] | None]


class Member(NamedTuple):
    """One leaf of a batch (static)."""

    path: str
    layout: TensorLayout
    shape: tuple[int, ...]
    dtype: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Leaves of equal shape and dtype, in the checkpoint's element order.

    Attributes:
      models: per model an array [tensors, ...], or [...] where `stacked` is False (one tensor).
      base: the same for the base, or None.
      names: uint32 [tensors, 2], the hashes of the tensors' names.
      starts: int32 scalars, where each member begins on the leading axis. As data rather than constants they let XLA
        compile one slice for all members of a batch, which decides how long a program around `apply` compiles.
      members: the leaves, in order; a leaf that holds stacked layers stands for several tensors.
      stacked: whether the arrays have the leading axis.
    """

    models: tuple[jax.Array, ...]
    base: jax.Array | None
    names: jax.Array
    starts: tuple[jax.Array, ...]
    members: tuple[Member, ...] = field(metadata={"static": True})
    stacked: bool = field(metadata={"static": True})

    @property
    def tensor_names(self) -> list[str]:
        return [name for member in self.members for name in member.layout.names]

    @property
    def tensor_size(self) -> int:
        shape = self.models[0].shape[1:] if self.stacked else self.models[0].shape
        return int(np.prod(shape, dtype=np.int64))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MergeState:
    """What `init` returns: task vectors' parts, order statistics and norms, ready for any number of candidates.

    Attributes:
      batches: the mergeable leaves, grouped.
      prepared: per batch, what the measures prepared.
      carried: leaves that are not merged (integers, booleans, empty tensors) by path: the base's or the first model's.
      order: all paths in the tree's order (static).
      definition: the tree's definition (static).
    """

    batches: tuple[Batch, ...]
    prepared: tuple[Prepared, ...]
    carried: dict[str, Any]
    order: tuple[str, ...] = field(metadata={"static": True})
    definition: Any = field(metadata={"static": True})


def init(
    leaf: LeafMethod, models: Sequence[Any], base: Any, *, layout: Layout | None, dtype: Any
) -> MergeState:
    """Groups the leaves and prepares every measure that no hyperparameter touches."""
    state = _load(leaf, models, base, layout, dtype, group=True)
    return replace(state, prepared=prepare(leaf, state.batches))


def apply(
    leaf: LeafMethod, state: MergeState, hyperparams: Mapping[str, Any], key: jax.Array | None
) -> Any:
    """Makes one candidate from a state."""
    models = len(state.batches[0].models) if state.batches else 1
    values = hyperparameters.check(leaf.hyperparams, hyperparams, models, leaf.name)
    words = _words(leaf, key)
    merged = _merged(leaf, state.batches, values, words, state.prepared)
    return _assemble(state, merged)


def merge_once(
    leaf: LeafMethod,
    models: Sequence[Any],
    base: Any,
    hyperparams: Mapping[str, Any],
    key: jax.Array | None,
    *,
    layout: Layout | None,
    dtype: Any,
) -> Any:
    """Merges without keeping a state; leaf by leaf, unless it is being traced."""
    check_count(leaf, len(models), base is not None)
    words = _words(leaf, key)
    sources = len(models) + (leaf.base == "source" and base is not None)
    values = hyperparameters.check(leaf.hyperparams, hyperparams, sources, leaf.name)
    tracers = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((models, base)))
    state = _load(leaf, models, base, layout, dtype, group=tracers)
    if tracers or any(one.scope == "model" for one in leaf.measures):
        return _assemble(state, _merged(leaf, state.batches, values, words, None))
    total = _total(state.batches)
    merged = {}
    for batch in state.batches:
        merged.update(_merged(leaf, (batch,), values, words, None, total))
    return _assemble(state, merged)


def _load(
    leaf: LeafMethod,
    models: Sequence[Any],
    base: Any,
    layout: Layout | None,
    dtype: Any,
    *,
    group: bool,
) -> MergeState:
    models = list(models)
    check_count(leaf, len(models), base is not None)
    flat, flat_base, definition = flatten_all(models, base)
    layout = Layout() if layout is None else layout
    reference = flat[0] if flat_base is None else flat_base
    unknown = [path for path in layout if path not in reference]
    if unknown:
        raise ValueError(f"the layout describes {unknown[0]!r}, which the models lack")
    if leaf.base == "source" and flat_base is not None:
        flat, flat_base = [flat_base, *flat], None
    carried: dict[str, Any] = {}
    groups: dict[Any, list[Member]] = {}
    for path, array in reference.items():
        if not is_mergeable(array):
            floating = jnp.issubdtype(dtype_of(array), jnp.floating)
            carried[path] = jnp.asarray(array, dtype) if floating and dtype else array
            continue
        tensor = layout.of(path)
        shape = tuple(np.shape(array))
        tensor.check(path, shape)
        member = Member(path, tensor, shape, np.dtype(dtype or _storage(dtype_of(array))))
        one = shape[1:] if tensor.stacked else shape
        dtypes = tuple(str(dtype_of(leaves[path])) for leaves in flat)
        alike = (one, tensor.transform, dtypes, str(dtype_of(array)), member.dtype)
        groups.setdefault(alike if group else path, []).append(member)
    use_base = flat_base is not None and leaf.base != "unused"
    batches = tuple(
        _batch(members, flat, flat_base if use_base else None) for members in groups.values()
    )
    return MergeState(batches, (), carried, tuple(reference), definition)


def _batch(
    members: list[Member], flat: list[dict[str, Any]], flat_base: dict[str, Any] | None
) -> Batch:
    stacked = len(members) > 1 or members[0].layout.stacked
    trees = flat if flat_base is None else [*flat, flat_base]
    leaves = [[jnp.asarray(leaves[m.path]) for m in members] for leaves in trees]
    kinds = tuple((m.layout.transform, m.layout.stacked) for m in members)
    as_it_stands = not stacked and kinds[0][0] == (None, None)
    joined = [leaf for (leaf,) in leaves] if as_it_stands else _join(kinds, stacked, leaves)
    models = joined if flat_base is None else joined[:-1]
    names = np.array([name_words(name) for m in members for name in m.layout.names], np.uint32)
    lengths = [len(m.layout.names) for m in members]
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    return Batch(
        tuple(models),
        None if flat_base is None else joined[-1],
        jnp.asarray(names),
        _as_data(starts, joined[0]),
        tuple(members),
        stacked,
    )


def _as_data(starts: np.ndarray, array: jax.Array) -> tuple[jax.Array, ...]:
    """Numbers that a compiler cannot fold, see `Batch.starts`."""
    if not isinstance(array, jax.core.Tracer) or len(starts) == 1:
        return tuple(jnp.asarray(start) for start in starts)
    # Inside a trace they come out of a branch whose condition, a bit that is set being zero, hangs
    # on data: 216 slices then compile as a few, in 0.4 s rather than 5.
    first = jax.lax.stop_gradient(array)[(0,) * array.ndim]
    bits = jax.lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32)
    return tuple(
        jax.lax.cond(
            (bits | 1) & 1 == 0,
            lambda: [jnp.int32(start + 1) for start in starts],
            lambda: [jnp.int32(start) for start in starts],
        )
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _join(
    kinds: tuple[tuple[Transform, bool], ...], stacked: bool, trees: list[list[jax.Array]]
) -> list[jax.Array]:
    """Per tree one array in the checkpoint's order, [tensors, ...] where stacked."""

    def ordered(transform: Transform, layered: bool, leaf: jax.Array) -> jax.Array:
        one = TensorLayout(("",), *transform).to_checkpoint
        if layered:
            return jax.vmap(one)(leaf)
        return one(leaf)[None] if stacked else one(leaf)

    joined = []
    for leaves in trees:
        parts = [ordered(*kind, leaf) for kind, leaf in zip(kinds, leaves, strict=True)]
        joined.append(parts[0] if len(parts) == 1 else jnp.concatenate(parts))
    return joined


def _merged(
    leaf: LeafMethod,
    batches: tuple[Batch, ...],
    values: Mapping[str, Any],
    words: jax.Array | None,
    prepared: tuple[Prepared, ...] | None,
    total: int | None = None,
) -> dict[str, jax.Array]:
    """Measures, then applies; the merged leaves by path."""
    if not batches:
        return {}
    total = _total(batches) if total is None else total
    sources = len(batches[0].models)
    chunks = [_chunk(batch, words) for batch in batches]
    leaf_values = []
    for batch in batches:
        sizes = {"tensor": batch.tensor_size, "model": total}
        tensors = [(m.path, m.layout) for m in batch.members]
        given, per_tensor = hyperparameters.for_tensors(
            leaf.hyperparams, values, tensors, sizes, sources
        )
        if per_tensor and not batch.stacked:
            given, per_tensor = jax.tree.map(lambda x: x[0], given), False
        leaf_values.append((given, per_tensor))
    found = measure(leaf, batches, chunks, leaf_values, prepared)
    merged: dict[str, jax.Array] = {}
    for batch, chunk, (given, per_tensor), seen in zip(
        batches, chunks, leaf_values, found, strict=True
    ):
        shapes = tuple((m.layout.transform, m.shape, m.layout.stacked) for m in batch.members)
        parts = _apply_batch(
            leaf,
            shapes,
            batch.members[0].dtype,
            batch.stacked,
            per_tensor,
            batch.starts,
            chunk,
            given,
            seen,
        )
        merged.update(zip((m.path for m in batch.members), parts, strict=True))
    return merged


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _apply_batch(
    leaf: LeafMethod,
    shapes: tuple[tuple[Transform, tuple[int, ...], bool], ...],
    dtype: Any,
    stacked: bool,
    per_tensor: bool,
    starts: tuple[jax.Array, ...],
    chunk: Chunk,
    values: Mapping[str, Any],
    found: Mapping[str, Any],
) -> list[jax.Array]:
    if not stacked:
        merged = leaf.apply(chunk, values, found).astype(dtype)
        transform, shape, _ = shapes[0]
        return [_from_checkpoint(transform, shape, merged)]
    axes = (0, 0 if per_tensor else None, 0)
    merged = jax.vmap(leaf.apply, in_axes=axes)(chunk, values, found).astype(dtype)
    parts = []
    for (transform, shape, layered), start in zip(shapes, starts, strict=True):
        length = shape[0] if layered else 1
        part = jax.lax.dynamic_slice_in_dim(merged, start, length)
        one = functools.partial(_from_checkpoint, transform, shape[1:] if layered else shape)
        parts.append(jax.vmap(one)(part) if layered else one(part[0]))
    return parts


def _from_checkpoint(transform: Transform, shape: tuple[int, ...], tensor: jax.Array) -> jax.Array:
    return TensorLayout(("",), *transform).from_checkpoint(tensor, shape)


def _chunk(batch: Batch, words: jax.Array | None) -> Chunk:
    seed = None
    if words is not None:
        seed = _seeds(len(batch.models), words, batch.names)
        seed = seed if batch.stacked else seed[0]
    offset = jnp.zeros(len(batch.tensor_names) if batch.stacked else (), jnp.uint32)
    return Chunk(batch.models, batch.base, seed, offset, batch.tensor_size)


@functools.partial(jax.jit, static_argnums=0)
def _seeds(models: int, words: jax.Array, names: jax.Array) -> jax.Array:
    return jax.vmap(lambda name: draws.tensor_seeds(words, name, models))(names)


def _assemble(state: MergeState, merged: Mapping[str, Any]) -> Any:
    leaves = [merged[path] if path in merged else state.carried[path] for path in state.order]
    return unflatten(state.definition, leaves)


def _words(leaf: LeafMethod, key: jax.Array | None) -> jax.Array | None:
    if not leaf.random:
        return None
    if key is None:
        raise ValueError(f"{leaf.name} is random and needs key=, for example jax.random.key(0)")
    return draws.key_words(key)


def _total(batches: Sequence[Batch]) -> int:
    return sum(batch.tensor_size * len(batch.tensor_names) for batch in batches)


def _storage(dtype: Any) -> Any:
    # float64 that JAX would silently hold as float32 comes back as what it is held as.
    return jax.dtypes.canonicalize_dtype(dtype)
