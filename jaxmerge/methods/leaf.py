"""The leaf interface: a method is written once, for one tensor, and runs in memory, in streams and in populations.

A `LeafMethod` is an elementwise `apply` and, before it, an ordered tuple of measures: what must be known of the
whole tensor (or the whole model) first. A measure is additive statistics (`Sums`) or an order statistic (`Select`), so
that it can be taken over chunks of a tensor, over tensors of a model, and over shards of an array.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods import draws
from jaxmerge.methods.extras import Extra
from jaxmerge.methods.selection import Selection, keep
from jaxmerge.methods.selection.keys import flat_index

MeasureScope = Literal["tensor", "model"]
Cuts = Literal["elements", "rows", "never"]
Base = Literal["required", "optional", "source", "unused"]
Values = Mapping[str, Any]
Found = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """One tensor of every model, or a run of its elements, in the checkpoint's element order.

    Attributes:
      models: the sources' arrays, equal shapes, storage dtypes.
      base: the base's array, or None.
      seed: uint32 [pairs of models, 2], the draws' seeds for this tensor, or None without a key.
      offset: uint32 [], flat index of the first element in the whole tensor.
      depth: float32 [], how deep the tensor lies in its model: 0 in the first layer, 1 in the last.
      extras: by name, one array per model (or one that all share); nothing where this tensor has none.
      size: uint32 [], number of elements of the whole tensor.
      inputs: static axes of the tensor that are its inputs.
    """

    models: tuple[jax.Array, ...]
    base: jax.Array | None
    seed: jax.Array | None
    offset: jax.Array
    depth: jax.Array
    extras: Mapping[str, tuple[jax.Array, ...]]
    size: jax.Array
    inputs: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.models[0].shape

    def sources(self) -> list[jax.Array]:
        """The models in the arithmetic's dtype: float32, or float64 where a source has it."""
        return [widen(model) for model in self.models]

    def deltas(self) -> list[jax.Array]:
        """The task vectors, model - base, in the arithmetic's dtype."""
        return [widen(model) - widen(self._base()) for model in self.models]

    def with_base(self, delta: jax.Array) -> jax.Array:
        """base + delta."""
        return widen(self._base()) + delta

    def as_matrix(self, array: jax.Array) -> jax.Array:
        """An array of the tensor's shape as [outputs, inputs]."""
        outputs = [axis for axis in range(array.ndim) if axis not in self.inputs]
        columns = int(np.prod([array.shape[axis] for axis in self.inputs], dtype=np.int64))
        return jnp.transpose(array, [*outputs, *self.inputs]).reshape(-1, columns)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `as_matrix`."""
        outputs = [axis for axis in range(len(self.shape)) if axis not in self.inputs]
        order = [*outputs, *self.inputs]
        moved = matrix.reshape([self.shape[axis] for axis in order])
        return jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__))

    def uniform(self) -> list[jax.Array]:
        """One uniform draw per model and element; see `draws.uniform`."""
        if self.seed is None:
            raise ValueError("a random method needs a key")
        return draws.uniform(self.seed, len(self.models), self.shape, self.offset)

    def keep(self, values: jax.Array, selection: Selection) -> jax.Array:
        """Which of this chunk's values the selection over the whole tensor keeps."""
        index = flat_index(self.shape) + self.offset.astype(jnp.int32)
        return keep(values, selection, index)

    def _base(self) -> jax.Array:
        if self.base is None:
            raise ValueError("a task vector needs a base")
        return self.base


class OfSelected(NamedTuple):
    """Says that a sum is over the entries that an earlier `Select` keeps, so that a candidate need not read them all.

    Attributes:
      by: the name of a `Select` over one tensor, of one ranking and one count.
      terms: (chunk) -> one array per model, elementwise and free of hyperparameters and draws: what is summed.
    """

    by: str
    terms: Callable[[Chunk], list[jax.Array]]


class Sums(NamedTuple):
    """Additive statistics, then a small computation on them.

    Attributes:
      name: the key of the result in `found`.
      statistics: (chunk, values, found) -> pytree of sums; reducing the pytrees of two chunks gives that of both.
      finish: (sums, values, found) -> what `apply` uses; `found` holds nothing `Local`.
      needs_values: False where neither function reads hyperparameters or draws: a sweep then measures once.
      scope: over one tensor or over all tensors of the model.
      reduce: how the statistics of two chunks become those of both: their "sum", or the larger ("max").
      selected: where the statistics are [models], the sums of some terms over the selected entries: which and of what.
      unasked: (values) -> what the statistics come to where these values make the chunks irrelevant, so that a stream
        need not read them; else None.
    """

    name: str
    statistics: Callable[[Chunk, Values, Found], Any]
    finish: Callable[[Any, Values, Found], Any]
    needs_values: bool = True
    scope: MeasureScope = "tensor"
    reduce: Literal["sum", "max"] = "sum"
    selected: OfSelected | None = None
    unasked: Callable[[Values], Any] | None = None


class Select(NamedTuple):
    """Order statistics: for each model the counts[j] largest of its nonnegative values, ties to the lower index.

    Attributes:
      name: the key of the result in `found`.
      values: (chunk) -> one array of nonnegative values per model (over one tensor: per ranking, however many there
        are), elementwise and free of hyperparameters. Sums of products round differently from one program to the next:
        do without them where exactly k entries must be kept.
      of: the name of an earlier `Local`: `values` then takes what that found as a second argument, and (over one
        tensor) may return arrays of another size than the chunk's.
      counts: (values, size) -> per model, a tuple of uint32 [] counts.
      scope: over one tensor, or over all tensors of the model (ties to the name that sorts first).
      reads_found: whether `counts` takes what was measured before as a third argument.

    The result is, per model, a tuple of `Selection`, one per count.
    """

    name: str
    values: Callable[..., list[jax.Array]]
    counts: Callable[..., list[tuple[jax.Array, ...]]]
    scope: MeasureScope = "tensor"
    reads_found: bool = False
    of: str | None = None


class Local(NamedTuple):
    """What a chunk of whole rows says of itself, free of hyperparameters and draws: ranks, norms, angles within rows.

    Attributes:
      name: the key of the result in `found`.
      values: (chunk) -> pytree of arrays that belong to this chunk.
      scope: always "tensor".
      of: the name of an earlier `Sums` that needs no values: `values` then takes its result as a second argument.
      on_host: whether `values` runs as it stands, outside of any program, where the arrays are at hand; for functions
        that know a faster way there.
    """

    name: str
    values: Callable[..., Any]
    scope: Literal["tensor"] = "tensor"
    of: str | None = None
    on_host: bool = False


Measure = Sums | Select | Local


@dataclass(frozen=True, eq=False)
class LeafMethod:
    """One merge method for one tensor.

    Attributes:
      name: the registered name.
      apply: (chunk, values, found) -> the merged chunk in the arithmetic's dtype. Elementwise in the chunk, or as
        `cuts` says.
      hyperparams: what `values` holds.
      measures: what `found` holds, in the order in which it is taken; a later measure sees the earlier ones.
      base: "required" for task vectors, "optional" where they are used if there is one, "source" where a base is simply
        the first model, "unused" where it is accepted and ignored.
      models: how few and how many models it takes (a base counts only as a "source"; None for no limit).
      random: whether it draws (a key is then required).
      extras: what else it needs, by name; `chunk.extras` holds it.
      per_task: (chunk, values, found) -> a bool mask per model, of the chunk's shape, and factors [models] that make
        each model's own version of the result, or None; see `jaxmerge.methods.per_task`.
      sizes: (shape, inputs, models) -> what else than a "tensor" and a "model" a fraction may be a share of, by name;
        `shape` and `inputs` (axes) are the tensor's.
      cuts: how a tensor may be cut into chunks: between any "elements"; between "rows", that is between indices of the
        first axis of a tensor of two or more axes; or "never".
    """

    name: str
    apply: Callable[[Chunk, Values, Found], jax.Array]
    hyperparams: Mapping[str, Any]
    measures: tuple[Measure, ...] = ()
    base: Base = "required"
    models: tuple[int, int | None] = (1, None)
    random: bool = False
    cuts: Cuts = "elements"
    extras: Mapping[str, Extra] = field(default_factory=dict)
    per_task: Callable[[Chunk, Values, Found], tuple[list[jax.Array], jax.Array]] | None = None
    sizes: Callable[[tuple[int, ...], tuple[int, ...], int], Mapping[str, int]] = (
        lambda shape, inputs, models: {}
    )


def widen(array: jax.Array) -> jax.Array:
    """Casts to float32, or keeps float64."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)
