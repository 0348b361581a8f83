"""How similar the units of two models are, by their weights and by their activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.capturing import activations
from jaxmerge.align.moments import CLAMP, Moments, combined, correlation, moments
from jaxmerge.align.permuting import Permutations, check
from jaxmerge.align.sites import find_sites
from jaxmerge.align.spaces import Measure
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.align.trees import Chain, trees
from jaxmerge.align.units import Turned, rows, turned
from jaxmerge.tree import flatten

Similarities = dict[str, jax.Array]


def weight_similarity(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    permutations: Mapping[str, Any] | None = None,
    *,
    measure: Measure = "correlation",
) -> Similarities:
    r"""How similar the units of two models are by their weights.

    .. math:: S_{ij} = \mathrm{corr}(w^a_i, w^b_j)

    with w the vector of all of a unit's incoming and outgoing weights, biases and scales (running statistics are left
    out). A unit's own axis is as it is; all others are in the order that the permutations bring `b` into.

    Args:
      spec: where the units stand.
      a, b: trees of parameters.
      permutations: of `b`'s units; by default none.
      measure: Pearson's "correlation", or the inner "product".

    Returns:
      Per free node [layers..., units of a, units of b]; the units of a node within others are all of theirs.

    Example:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0")})
      >>> w = jnp.array([[1.0, 4.0], [2.0, 3.0]])
      >>> weight_similarity(spec, {"w": w}, {"w": w})["P0"].round(1).tolist()
      [[1.0, -1.0], [-1.0, 1.0]]
    """
    leaves_a, leaves_b = flatten(a)[0], flatten(b)[0]
    spec = spec.sized({path: np.shape(leaf) for path, leaf in leaves_a.items()})
    found = check(spec, permutations or {})
    similar = {}
    for tree in trees(spec):
        for chain in tree.chains:
            if any(place.role != "stat" for place in chain.places):
                of_a = given_rows(spec, chain, turned(chain, leaves_a), None, measure)
                of_b = given_rows(spec, chain, turned(chain, leaves_b), found, measure)
                whole = compared(of_a, of_b)
                similar[chain.node] = whole if chain.layers else whole[0]
    return similar


def activation_similarity(
    spec: PermutationSpec, apply_fn: Callable[..., Any], a: Any, b: Any, batches: Iterable[Any]
) -> Similarities:
    r"""How similar the units of two models are by their activations on the same inputs: Pearson's correlations.

    Args:
      spec: where the units stand.
      apply_fn: the function of both models.
      a, b: trees of parameters.
      batches: inputs, one after the other; each a pytree, or a tuple of what `apply_fn` takes after the parameters.

    Returns:
      Per free node that has activations [layers..., units of a, units of b].

    Raises:
      ValueError: there is no batch.

    Example:
      >>> import jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> params = {"fc1": jnp.eye(2), "fc2": jnp.ones((2, 3))}
      >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> spec = jm.align.symmetry(mlp, params, x)
      >>> activation_similarity(spec, mlp, params, params, [x])["fc1"].round(3).tolist()
      [[1.0, -1.0], [-1.0, 1.0]]
    """
    function = hashable(apply_fn)
    total: dict[str, Moments] | None = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        found = _batch_moments(spec, function, a, b, inputs)
        total = found if total is None else {k: combined(total[k], m) for k, m in found.items()}
    if total is None:
        raise ValueError("activations need at least one batch of inputs, found none")
    return {name: correlation(m) for name, m in total.items()}


def hashable(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that programs can be kept for; those of objects that cannot be hashed are compiled at each call."""
    try:
        hash(apply_fn)
    except TypeError:
        return functools.partial(apply_fn)
    return apply_fn


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_moments(
    spec: PermutationSpec, apply_fn: Callable[..., Any], a: Any, b: Any, inputs: tuple[Any, ...]
) -> dict[str, Moments]:
    sites = find_sites(spec, apply_fn, a, *inputs)
    of_a, of_b = (activations(sites, apply_fn, params, *inputs) for params in (a, b))
    return {name: moments(of_a[name], of_b[name]) for name in of_a}


class Rows(NamedTuple):
    """A node's rows of weights, place by place, with what makes their products correlations.

    Attributes:
      parts: per place [layers, features, units], less the unit's mean over all features where correlations are meant.
      norm: [layers, units], their norm; 1 for inner products.
    """

    parts: list[jax.Array]
    norm: jax.Array


def given_rows(
    spec: PermutationSpec,
    chain: Chain,
    leaves: Turned,
    permutations: Permutations | None,
    measure: Measure,
) -> Rows:
    """The rows of one model's units; `leaves` is what `turned` gives."""
    return standard(raw_rows(spec, chain, leaves, permutations), measure)


def raw_rows(
    spec: PermutationSpec, chain: Chain, leaves: Turned, permutations: Permutations | None
) -> list[jax.Array]:
    """Per place [layers, features, units], the weights as they are."""
    layers = len(chain.layers)
    found = []
    for part in rows(spec, chain, leaves, permutations):
        count = int(np.prod(part.shape[:layers], dtype=np.int64))
        found.append(part.reshape(count, part.shape[layers], -1))
    return found


def standard(parts: Sequence[jax.Array], measure: Measure) -> Rows:
    """Rows of weights [layers, features, units] as they are compared."""
    if measure == "product":
        return Rows(list(parts), jnp.ones((len(parts[0]), parts[0].shape[-1])))
    features = sum(part.shape[1] for part in parts)
    mean = functools.reduce(jnp.add, (jnp.sum(part, 1) for part in parts)) / features
    centred = [part - mean[:, None] for part in parts]
    squares = functools.reduce(jnp.add, (jnp.sum(part**2, 1) for part in centred))
    return Rows(centred, jnp.sqrt(squares))


def compared(a: Rows, b: Rows) -> jax.Array:
    """[layers, units of a, units of b]: correlations, or inner products.

    The means of `b` need not be taken off: the features of `a` sum to 0 where they count.
    """
    products = functools.reduce(
        jnp.add,
        (
            jnp.einsum("lfi,lfj->lij", one, other, precision=jax.lax.Precision.HIGHEST)
            for one, other in zip(a.parts, b.parts, strict=True)
        ),
    )
    return products / jnp.maximum(a.norm[:, :, None] * b.norm[:, None, :], CLAMP)
