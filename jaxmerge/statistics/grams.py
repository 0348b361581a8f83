"""Gram matrices of what goes into the linear layers of a model, captured from its traced program."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.methods.extras import Gram
from jaxmerge.methods.leaf import widen
from jaxmerge.tracing import Record, Site, Use, Visit, interpret
from jaxmerge.tree import flatten, matches, nearest
from jaxmerge.tree.paths import Pattern

Where = Pattern | Sequence[Pattern] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GramSum:
    """Sums that a `Gram` is the mean of; those of two batches are added leaf by leaf.

    Attributes:
      total: X^T X, float32 [in, in] or [layers, in, in]; float64 where X is.
      count: the rows of X, of the same dtype, [] or [layers].
      axes: as `Gram.axes`.
    """

    total: jax.Array
    count: jax.Array
    axes: tuple[int, ...] = field(metadata={"static": True})

    def mean(self) -> Gram:
        """The mean over rows; zeros where there were none."""
        count = jnp.maximum(self.count, 1)
        return Gram(self.total / count[..., None, None], self.axes)


def grams(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    where: Where = None,
) -> dict[str, Gram]:
    r"""Gram matrices of the inputs of every linear layer, by tracing the model as it is.

    .. math:: G = \tfrac{1}{n} X^\top X

    where the rows of X are what the layer sees, one per example and position (a convolution: its patches). Which
    parameters are linear layers is read off the program (see `jaxmerge.tracing.interpret`). A leaf that is used in
    several places (tied weights) gets the mean over the rows of all of them; of places that contract different axes of
    it, the first in the program counts. A lookup in an embedding table is none.

    Args:
      apply_fn: a traceable function (params, inputs) -> anything; hashable. One program is compiled per function and
        shape of batch.
      params: any pytree of arrays.
      batches: inputs of the model, each a pytree of arrays; read once, one at a time.
      where: patterns of paths (see `jaxmerge.tree.matches`) to keep, for example where an output head has a large
        Gram matrix that is not needed; default all.

    Returns:
      A `Gram` by path of leaf: float32 [in, in], or [layers, in, in] where the leaf holds stacked layers that the
      program takes one by one.

    Raises:
      ValueError: no batch, or patterns that no parameter matches.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"fc1": jnp.eye(2), "fc2": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.maximum(x @ params["fc1"], 0) @ params["fc2"]
      >>> found = grams(apply_fn, params, [jnp.array([[2.0, -2.0]]), jnp.array([[0.0, 2.0]])])
      >>> print(found["fc1"].matrix, found["fc2"].matrix, sep="\n")
      [[ 2. -2.]
       [-2.  4.]]
      [[2. 0.]
       [0. 2.]]

    Reference:
      Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023.
    """
    check_batches(batches)
    patterns = check_where(where, params)
    sums: dict[str, GramSum] | None = None
    for batch in batches:
        one = _sums(params, batch, apply_fn=apply_fn, where=patterns)
        sums = one if sums is None else add(sums, one)
    if sums is None:
        raise ValueError("Gram matrices need at least one batch of inputs, found none")
    return {path: one.mean() for path, one in sums.items()}


def batch_grams(
    apply_fn: Callable[[Any, Any], Any], params: Any, inputs: Any, *, where: Where = None
) -> dict[str, GramSum]:
    """The sums behind `grams` for one batch, as a pure function to jit, or to vmap over stacked models.

    Args:
      apply_fn, params, where: as for `grams`.
      inputs: one batch.

    Returns:
      A `GramSum` by path of leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> models, batches = {"w": jnp.ones((5, 3, 2))}, jnp.ones((5, 7, 3))
      >>> sums = jax.vmap(lambda params, batch: batch_grams(apply_fn, params, batch))(models, batches)
      >>> sums["w"].total.shape, sums["w"].mean().matrix.shape
      ((5, 3, 3), (5, 3, 3))
    """

    def visit(site: Site, use: Use) -> Visit:
        return Visit(gram_of(use.inputs)) if is_kept(site.path, where) else Visit()

    return gathered(interpret(apply_fn, params, inputs, visit).records)


def gram_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X^T X and the number of rows of X [n, in]."""
    x = widen(x)
    total = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    return total, jnp.asarray(x.shape[0], total.dtype)


def gathered(records: Sequence[Record]) -> dict[str, GramSum]:
    """Adds what `gram_of` gave at the sites of each leaf; sites unlike the leaf's first one are left out."""
    first: dict[str, Site] = {}
    sums: dict[str, GramSum] = {}
    for record in records:
        site = record.site
        if not is_like(first.setdefault(site.path, site), site):
            continue
        added = _gathered(record)
        one = sums.get(site.path)
        sums[site.path] = added if one is None else jax.tree.map(jnp.add, one, added)
    return sums


def is_like(one: Site, other: Site) -> bool:
    """Whether two sites of a leaf have inputs of the same kind."""
    return (one.inputs, one.layers) == (other.inputs, other.layers)


def is_kept(path: str, where: Where) -> bool:
    """Whether a path matches the patterns."""
    if where is None:
        return True
    patterns = [where] if isinstance(where, str | re.Pattern) else where
    return any(matches(path, pattern) for pattern in patterns)


def check_where(where: Where, params: Any) -> Where:
    """The patterns in a hashable form; raises a ValueError where they match no parameter."""
    known = flatten(params)[0]
    if where is not None and not any(is_kept(path, where) for path in known):
        hint = nearest(where, known) if isinstance(where, str) else ""
        raise ValueError(f"where={where!r} matches no parameter{hint}")
    return where if where is None or isinstance(where, str | re.Pattern) else tuple(where)


def check_batches(batches: Any) -> None:
    """Raises a ValueError where one batch was given instead of several."""
    if hasattr(batches, "shape") or isinstance(batches, Mapping | str):
        raise ValueError(
            f"batches is an iterable of batches, found {type(batches).__name__}: put one batch in a list"
        )


@functools.partial(jax.jit, donate_argnums=0)
def add(total: Any, other: Any) -> Any:
    """Adds two trees of sums."""
    return jax.tree.map(jnp.add, total, other)


def _gathered(record: Record) -> GramSum:
    """Sums over the turns of loops; layer by layer where the leaf is stacked."""
    total, count = record.value
    width = total.shape[-1]
    total, count = total.reshape((-1, width, width)), count.reshape((-1,))
    if record.site.layers is None:
        total, count = jnp.sum(total, axis=0), jnp.sum(count)
    else:
        layer = jnp.reshape(jnp.asarray(record.layer), (-1,))
        layers = record.site.layers
        total = jnp.zeros((layers, width, width), total.dtype).at[layer].add(total)
        count = jnp.zeros((layers,), count.dtype).at[layer].add(count)
    return GramSum(total, count, record.site.inputs)


@functools.partial(jax.jit, static_argnames=("apply_fn", "where"))
def _sums(
    params: Any, batch: Any, *, apply_fn: Callable[[Any, Any], Any], where: Where
) -> dict[str, GramSum]:
    return batch_grams(apply_fn, params, batch, where=where)
