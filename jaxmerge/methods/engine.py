"""Runs a leaf method over a whole tree: once and eagerly, or as a state from which candidates are made.

Both ways are lists of batches. `merge_once` makes one batch per leaf and runs jitted leaf functions that equal shapes
share; `init` stacks leaves of equal shape into one batch, so that a program around `apply` does not grow with depth.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods import draws, hyperparameters
from jaxmerge.methods.extras import Gathered, Side, gather, gram_axes, gram_matrix
from jaxmerge.methods.inputs import check_count, dtype_of, flatten_all, is_mergeable
from jaxmerge.methods.leaf import Chunk, LeafMethod
from jaxmerge.methods.measuring import Prepared, measure, prepare
from jaxmerge.methods.per_task import PerTask
from jaxmerge.tree import Layout, TensorLayout, name_words, unflatten

Transform = tuple[tuple[int, ...] | None, tuple[int, ...] | None]


class Merged(NamedTuple):
    """Merged leaves by path and, for methods with per-task results, the masks by path and the models' factors."""

    leaves: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    factors: jax.Array | None


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
      depths: float32 [tensors], how deep each tensor lies in its model.
      extras: by name, an array per model (or one that all share), like `models`.
      starts: int32 scalars, where each member begins on the leading axis. As data rather than constants they let XLA
        compile one slice for all members of a batch, which decides how long a program around `apply` compiles.
      members: the leaves, in order; a leaf that holds stacked layers stands for several tensors.
      inputs: the tensors' input axes.
      stacked: whether the arrays have the leading axis.
    """

    models: tuple[jax.Array, ...]
    base: jax.Array | None
    names: jax.Array | np.ndarray
    depths: jax.Array | np.ndarray
    extras: dict[str, tuple[jax.Array, ...]]
    starts: tuple[Any, ...]
    members: tuple[Member, ...] = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})
    stacked: bool = field(metadata={"static": True})

    @property
    def tensor_names(self) -> list[str]:
        return [name for member in self.members for name in member.layout.names]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.models[0].shape[1:] if self.stacked else self.models[0].shape

    @property
    def tensor_size(self) -> int:
        return math.prod(self.tensor_shape)

    def chunk(self, seed: jax.Array | None) -> Chunk:
        """The whole batch as a leaf function sees it, with a leading axis where it is stacked."""
        many = (len(self.tensor_names),) if self.stacked else ()
        offset: Any = np.zeros(many, np.uint32)
        size: Any = np.full(many, self.tensor_size, np.uint32)
        depth: Any = self.depths if self.stacked else self.depths[0]
        return Chunk(
            self.models,
            self.base,
            seed,
            offset,
            depth,
            self.extras,
            size,
            inputs=self.inputs,
        )


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
    leaf: LeafMethod,
    models: Sequence[Any],
    base: Any,
    *,
    layout: Layout | None,
    extras: Mapping[str, Any] | None,
    dtype: Any,
) -> MergeState:
    """Groups the leaves and prepares every measure that no hyperparameter touches."""
    state = _load(leaf, models, base, layout, extras, dtype, group=True)
    return replace(state, prepared=prepare(leaf, state.batches))


def apply(
    leaf: LeafMethod, state: MergeState, hyperparams: Mapping[str, Any], key: jax.Array | None
) -> Any:
    """Makes one candidate from a state."""
    models = len(state.batches[0].models) if state.batches else 1
    values = hyperparameters.check(leaf.hyperparams, hyperparams, models, leaf.name)
    words = _words(leaf, key)
    merged = _merged(leaf, state.batches, values, words, state.prepared)
    return _assemble(leaf, state, merged, models)


def merge_once(
    leaf: LeafMethod,
    models: Sequence[Any],
    base: Any,
    hyperparams: Mapping[str, Any],
    key: jax.Array | None,
    *,
    layout: Layout | None,
    extras: Mapping[str, Any] | None,
    dtype: Any,
) -> Any:
    """Merges without keeping a state; leaf by leaf, unless it is being traced."""
    check_count(leaf, len(models), base is not None)
    words = _words(leaf, key)
    sources = len(models) + (leaf.base == "source" and base is not None)
    values = hyperparameters.check(leaf.hyperparams, hyperparams, sources, leaf.name)
    given = (models, base, dict(extras or {}))
    tracers = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given))
    # A leaf that is only computed entry by entry compiles as fast as its slice out of a batch would, and runs faster.
    together = tracers and (bool(leaf.measures) or leaf.random or leaf.cuts != "elements")
    state = _load(leaf, models, base, layout, extras, dtype, group=together)
    if tracers or any(one.scope == "model" for one in leaf.measures):
        merged = _merged(leaf, state.batches, values, words, None)
        return _assemble(leaf, state, merged, sources)
    total = _total(state.batches)
    merged = Merged({}, {}, None)
    for batch in state.batches:
        one = _merged(leaf, (batch,), values, words, None, total)
        merged = Merged(merged.leaves | one.leaves, merged.masks | one.masks, one.factors)
    return _assemble(leaf, state, merged, sources)


def _load(
    leaf: LeafMethod,
    models: Sequence[Any],
    base: Any,
    layout: Layout | None,
    extras: Mapping[str, Any] | None,
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
    shapes = {
        path: tuple(np.shape(array)) for path, array in reference.items() if is_mergeable(array)
    }
    gathered = gather(leaf.extras, extras, len(flat), shapes, leaf.name)
    depths = layout.depths(reference)
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
        inputs, present = _inputs(leaf, gathered, member, one)
        alike = (
            one,
            tensor.transform,
            dtypes,
            str(dtype_of(array)),
            member.dtype,
            inputs,
            present,
        )
        groups.setdefault(alike if group else path, []).append(member)
    use_base = flat_base is not None and leaf.base != "unused"
    batches = tuple(
        _batch(leaf, members, flat, flat_base if use_base else None, gathered, depths)
        for members in groups.values()
    )
    return MergeState(batches, (), carried, tuple(reference), definition)


def _inputs(
    leaf: LeafMethod, gathered: Gathered, member: Member, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """A tensor's input axes, and the names of the extras that hold something for it."""
    present = []
    axes = gram_axes(None, member.path, member.layout, shape)
    for name, trees in gathered.items():
        if member.path not in trees[0]:
            continue
        present.append(name)
        spec = leaf.extras[name]
        if spec.kind == "gram" and spec.side == "inputs":
            found = {
                gram_axes(tree[member.path], member.path, member.layout, shape) for tree in trees
            }
            if len(found) > 1:
                raise ValueError(f"the Gram matrices of {member.path!r} run over different axes")
            (axes,) = found
    return axes, tuple(present)


def _batch(
    leaf: LeafMethod,
    members: list[Member],
    flat: list[dict[str, Any]],
    flat_base: dict[str, Any] | None,
    gathered: Gathered,
    depths: Mapping[str, tuple[float, ...]],
) -> Batch:
    stacked = len(members) > 1 or members[0].layout.stacked
    one = members[0].shape[1:] if members[0].layout.stacked else members[0].shape
    inputs, present = _inputs(leaf, gathered, members[0], one)
    trees = flat if flat_base is None else [*flat, flat_base]
    like = [name for name in present if leaf.extras[name].kind == "like"]
    beside = [tree for name in like for tree in gathered[name]]
    leaves = [[_array(leaves[m.path]) for m in members] for leaves in [*trees, *beside]]
    kinds = tuple((m.layout.transform, m.layout.stacked) for m in members)
    as_it_stands = not stacked and kinds[0][0] == (None, None)
    joined = [leaf for (leaf,) in leaves] if as_it_stands else _join(kinds, stacked, leaves)
    joined, rest = joined[: len(trees)], joined[len(trees) :]
    extras = {name: tuple(rest.pop(0) for _ in gathered[name]) for name in like}
    for name in present:
        if name not in extras:
            side = leaf.extras[name].side
            extras[name] = tuple(
                _join_grams(members, stacked, tree, side) for tree in gathered[name]
            )
    models = joined if flat_base is None else joined[:-1]
    names = np.array([name_words(name) for m in members for name in m.layout.names], np.uint32)
    lengths = [len(m.layout.names) for m in members]
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    return Batch(
        tuple(models),
        None if flat_base is None else joined[-1],
        names,
        np.array([depth for m in members for depth in depths[m.path]], np.float32),
        {name: extras.get(name, ()) for name in leaf.extras},
        _as_data(starts, joined[0]),
        tuple(members),
        inputs,
        stacked,
    )


def _array(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _join_grams(
    members: list[Member], stacked: bool, grams: Mapping[str, Any], side: Side
) -> jax.Array:
    matrices = []
    for member in members:
        layered = member.layout.stacked
        shape = member.shape[1:] if layered else member.shape
        gram = grams[member.path]
        matrix = gram_matrix(gram, member.layout, shape)
        axes = gram_axes(gram, member.path, member.layout, shape, side)
        tensor = member.layout.checkpoint_shape(shape)
        size = math.prod(tensor[axis] for axis in axes)
        expected = (*member.shape[: int(layered)], size, size)
        if matrix.shape != expected:
            raise ValueError(
                f"the Gram matrix of {member.path!r} should have shape {list(expected)}, "
                f"found {list(matrix.shape)}"
            )
        matrices.append(matrix if layered or not stacked else matrix[None])
    return matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices)


def _as_data(starts: np.ndarray, array: jax.Array) -> tuple[Any, ...]:
    """Numbers that a compiler cannot fold, see `Batch.starts`."""
    if not isinstance(array, jax.core.Tracer) or len(starts) == 1:
        return tuple(starts)
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
) -> Merged:
    """Measures, then applies."""
    if not batches:
        return Merged({}, {}, None)
    total = _total(batches) if total is None else total
    sources = len(batches[0].models)
    chunks = [batch.chunk(_seed(batch, words)) for batch in batches]
    leaf_values = []
    for batch in batches:
        sizes = {
            **leaf.sizes(batch.tensor_shape, batch.inputs, sources),
            "tensor": batch.tensor_size,
            "model": total,
        }
        tensors = [(m.path, m.layout) for m in batch.members]
        given, per_tensor = hyperparameters.for_tensors(
            leaf.hyperparams, values, tensors, sizes, sources
        )
        if per_tensor and not batch.stacked:
            given, per_tensor = jax.tree.map(lambda x: x[0], given), False
        leaf_values.append((given, per_tensor))
    found = measure(leaf, batches, chunks, leaf_values, prepared)
    merged = Merged({}, {}, None)
    for batch, chunk, (given, per_tensor), seen in zip(
        batches, chunks, leaf_values, found, strict=True
    ):
        shapes = tuple((m.layout.transform, m.shape, m.layout.stacked) for m in batch.members)
        parts, masks, factors = _apply_batch(
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
        paths = [member.path for member in batch.members]
        merged.leaves.update(zip(paths, parts, strict=True))
        if masks is not None:
            merged.masks.update(zip(paths, masks, strict=True))
            # What a model's factor measures is the whole model: every batch says the same.
            merged = merged._replace(factors=factors)
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
) -> tuple[list[jax.Array], list[jax.Array] | None, jax.Array | None]:
    """The merged leaves; with per-task results also the masks [models, ...] and the factors."""

    def run(chunk: Chunk, values: Any, found: Any) -> tuple[jax.Array, Any]:
        extra = None if leaf.per_task is None else leaf.per_task(chunk, values, found)
        return leaf.apply(chunk, values, found).astype(dtype), extra

    over = jax.vmap(run, in_axes=(0, 0 if per_tensor else None, 0))
    if not stacked:
        results = [_restored(shapes[0], *run(chunk, values, found), whole=True)]
    elif len(shapes) > 1 and math.prod(chunk.shape[1:]) >= LARGE and not leaf.random:
        # Sliced before it is computed: a large result is then written once, where it belongs.
        results = []
        for shape, start in zip(shapes, starts, strict=True):
            mine, seen = _share(shape, start, (chunk, found))
            given = _share(shape, start, values) if per_tensor else values
            results.append(_restored(shape, *(over if shape[2] else run)(mine, given, seen)))
    else:
        # Sliced after: what is small compiles once for all.
        whole = over(chunk, values, found)
        results = [
            _restored(shape, *_share(shape, start, whole))
            for shape, start in zip(shapes, starts, strict=True)
        ]
    leaves, masks, factors = zip(*results, strict=True)
    return list(leaves), None if leaf.per_task is None else list(masks), factors[0]


LARGE = 1 << 18
"""Tensors of so many elements are computed one by one: compiling each costs less than writing its result twice. Not
so with random draws, whose programs are long."""


def _share(shape: tuple[Transform, tuple[int, ...], bool], start: Any, stacked: Any) -> Any:
    """One leaf's part of arrays with a leading axis over the batch; without the axis where it is one tensor."""
    _, leaf_shape, layered = shape
    length = leaf_shape[0] if layered else 1
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), stacked)
    return part if layered else jax.tree.map(lambda x: x[0], part)


def _restored(
    shape: tuple[Transform, tuple[int, ...], bool],
    merged: jax.Array,
    extra: Any,
    *,
    whole: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Brings one leaf, and its masks, from the checkpoint's form into its own."""
    transform, leaf_shape, layered = shape
    one = functools.partial(_from_checkpoint, transform, leaf_shape[1:] if layered else leaf_shape)
    restore = jax.vmap(one) if layered else one
    if extra is None:
        return restore(merged), None, None
    masks, factors = extra
    together = jnp.stack if whole else _together
    return restore(merged), together(list(map(restore, masks))), factors[0] if layered else factors


def _together(masks: list[jax.Array]) -> jax.Array:
    """[models, ...]: a stack, each part written into its place. A concatenation of slices would compute all parts in
    one loop that branches on every element."""
    together = jnp.zeros((len(masks), *masks[0].shape), bool)
    for i, mask in enumerate(masks):
        together = jax.lax.dynamic_update_index_in_dim(together, mask, i, 0)
    return together


def _from_checkpoint(transform: Transform, shape: tuple[int, ...], tensor: jax.Array) -> jax.Array:
    return TensorLayout(("",), *transform).from_checkpoint(tensor, shape)


def _seed(batch: Batch, words: jax.Array | None) -> jax.Array | None:
    if words is None:
        return None
    seed = draws.seeds(len(batch.models), words, batch.names)
    return seed if batch.stacked else seed[0]


def _assemble(leaf: LeafMethod, state: MergeState, merged: Merged, models: int) -> Any:
    leaves = {**state.carried, **merged.leaves}
    params = unflatten(state.definition, [leaves[path] for path in state.order])
    if leaf.per_task is None:
        return params
    # A leaf that is carried over is everybody's.
    masks = [
        merged.masks[path]
        if path in merged.masks
        else jnp.ones((models, *np.shape(leaves[path])), bool)
        for path in state.order
    ]
    factors = jnp.ones(models) if merged.factors is None else merged.factors
    return params, PerTask(unflatten(state.definition, masks), factors)


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
