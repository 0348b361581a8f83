"""Segmentation: a model cut into blocks that differ, from its program and from how its task vectors lie."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Var

from jaxmerge.learning import block_labels
from jaxmerge.methods.inputs import is_mergeable
from jaxmerge.tracing import sites
from jaxmerge.tracing.interpreter import CALLS
from jaxmerge.tree import Layout, flatten
from jaxmerge.tree.blocks import labels_of

Labels = dict[str, str | tuple[str, ...]]

_TINY = 1e-12
# What a unit is weighs as much as how its task vectors lie.
_STRUCTURE = 2.0


class Unit(NamedTuple):
    """A layer, or another part of a model that is not cut further.

    Attributes:
      name: its label.
      size: its entries.
      features: float64 [features].
    """

    name: str
    size: float
    features: np.ndarray


def segment(
    models: Sequence[Any],
    base: Any = None,
    *,
    blocks: int = 4,
    layout: Layout | None = None,
    apply_fn: Callable[[Any, Any], Any] | None = None,
    inputs: Any = None,
) -> Labels:
    """Cuts a model into blocks of successive layers, each as much alike within itself as can be.

    The units are layers and the parts beside them (`jaxmerge.learning.block_labels`), in the order in which the program
    uses them first, or in that of the tree where no program is given. A unit u is described by what it is made of (the
    share of parameters in embeddings and vectors, matrices, and convolutions; the share that the program multiplies
    with activations) and by its task vectors d_m = models[m] - base:

        log(|d_m| / |base|) averaged over m,   cos(d_m, d_n) averaged over pairs,
        the share of |d| where the signs conflict,   log(|d|_4 / |d|_2): how few entries carry it,

    the latter scaled to unit variance over the units. Neighbours are then joined, always those whose joining raises the
    sum of squared distances to the blocks' means least (Ward; a unit of n parameters counts sqrt(n) times), until as
    many blocks are left as are asked for.

    Args:
      models: trees of the same structure.
      base: their base; None: their mean stands for it.
      blocks: how many; fewer where there are fewer units.
      layout: as for `jaxmerge.merge`; the layers of a stacked leaf are units of their own.
      apply_fn: the model's function of parameters and inputs, traced only.
      inputs: for `apply_fn`; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A label by pattern, as `jaxmerge.methods.by_block` takes them; a block is called by its first and its last unit.

    Raises:
      ValueError: no models, fewer than one block, or a program without its inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"conv": jnp.ones((3, 3, 2, 2)), "fc": [{"w": jnp.ones((4, 4))}, {"w": jnp.ones((4, 4))}]}
      >>> tuned = {"conv": base["conv"] + 0.5, "fc": [{"w": base["fc"][i]["w"] + 0.01} for i in range(2)]}
      >>> segment([tuned], base, blocks=2)
      {'conv': 'conv', 'fc/0/w': 'fc/0..fc/1', 'fc/1/w': 'fc/0..fc/1'}

    Reference:
      The blocks of AutoMerge, arXiv:2601.22748, are named by hand; this segmentation is ours.
    """
    if not models:
        raise ValueError("segment needs at least one model, found an empty list")
    if blocks < 1:
        raise ValueError(f"expected one block or more, found {blocks}")
    if (apply_fn is None) != (inputs is None):
        raise ValueError("apply_fn and inputs go together")
    layout = Layout() if layout is None else layout
    labels = block_labels(models[0], layout=layout)
    program = _program(apply_fn, models[0], inputs)
    units = _units(models, base, labels, layout, program)
    names = _joined(units, blocks)
    return {
        pattern: tuple(names[one] for one in label) if isinstance(label, tuple) else names[label]
        for pattern, label in labels.items()
    }


class Program(NamedTuple):
    """What a program says of the leaves of a model, by their paths.

    Attributes:
      order: in which it uses them first.
      multiplied: which of them meet activations in a product.
    """

    order: Mapping[str, int]
    multiplied: frozenset[str]


def _program(
    apply_fn: Callable[[Any, Any], Any] | None, params: Any, inputs: Any
) -> Program | None:
    if apply_fn is None:
        return None
    closed = jax.make_jaxpr(apply_fn)(params, inputs)
    paths = list(flatten(params)[0])
    order: dict[str, int] = {}
    _first_uses(closed.jaxpr, dict(zip(closed.jaxpr.invars, paths, strict=False)), order)
    multiplied = frozenset(site.path for site in sites(apply_fn, params, inputs))
    return Program(order, multiplied)


def _first_uses(jaxpr: Jaxpr, named: Mapping[Var, str], order: dict[str, int]) -> None:
    """Numbers the leaves in the order in which operations take them."""
    for equation in jaxpr.eqns:
        given = {i: v for i, v in enumerate(equation.invars) if isinstance(v, Var) and v in named}
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        if given and equation.primitive.name in CALLS and isinstance(inner, Jaxpr):
            # Constants come first.
            ahead = len(inner.invars) - len(equation.invars)
            below = {inner.invars[i + ahead]: named[v] for i, v in given.items()}
            _first_uses(inner, below, order)
            continue
        for variable in given.values():
            order.setdefault(named[variable], len(order))


def _units(
    models: Sequence[Any],
    base: Any,
    labels: Labels,
    layout: Layout,
    program: Program | None,
) -> list[Unit]:
    flat = [flatten(model)[0] for model in models]
    flat_base = None if base is None else flatten(base)[0]
    rules = tuple(labels.items())
    members: dict[str, list[tuple[str, np.ndarray]]] = {}
    for path, leaf in flat[0].items():
        if not is_mergeable(leaf):
            continue
        leaves = [jnp.asarray(one[path]) for one in flat]
        origin = None if flat_base is None else jnp.asarray(flat_base[path])
        stacked = layout.of(path).stacked
        sums = np.asarray(_statistics(stacked, leaves, origin), np.float64)
        for label, row in zip(
            labels_of(rules, path, layout.of(path)), sums if stacked else sums[None], strict=True
        ):
            members.setdefault(str(label), []).append((path, row))
    order = {name: i for i, name in enumerate(members)}
    if program is not None:
        unused = len(program.order)
        order = {
            name: min(program.order.get(path, unused) for path, _ in mine)
            for name, mine in members.items()
        }
    ranked = sorted(members, key=lambda name: order[name])
    return [
        Unit(
            name,
            float(sum(row[0] for _, row in members[name])),
            _features(members[name], layout, flat[0], program),
        )
        for name in ranked
    ]


def _features(
    members: list[tuple[str, np.ndarray]],
    layout: Layout,
    leaves: dict[str, Any],
    program: Program | None,
) -> np.ndarray:
    total = np.sum([row for _, row in members], axis=0)
    size, norm, change, fourth, conflict, magnitude, dot, norms = total
    kinds = np.zeros(4)
    for path, row in members:
        axes = np.ndim(leaves[path]) - layout.of(path).stacked
        kinds[0 if axes < 2 else 1 if axes == 2 else 2] += row[0]
        kinds[3] += row[0] * (program is None or path in program.multiplied)
    return np.array(
        [
            *(_STRUCTURE * kinds / size),
            0.5 * np.log((change + _TINY) / (norm + _TINY)),
            dot / (norms + _TINY),
            conflict / (magnitude + _TINY),
            0.25 * np.log(fourth + _TINY) - 0.5 * np.log(change + _TINY),
        ]
    )


def _statistics(stacked: bool, leaves: list[jax.Array], base: jax.Array | None) -> jax.Array:
    """float32 [8], with a leading axis over layers where they are stacked."""
    if stacked:
        return jax.vmap(lambda *args: _sums(list(args[:-1]), args[-1]))(
            *leaves, jnp.mean(jnp.stack(leaves), 0) if base is None else base
        )
    return _sums(leaves, jnp.mean(jnp.stack(leaves), 0) if base is None else base)


@jax.jit
def _sums(leaves: list[jax.Array], base: jax.Array) -> jax.Array:
    """Entries, |base|^2, mean |d|^2, mean |d|_4^4, sum |d| in conflict, sum |d|, mean pairwise dot and |d||d'|."""
    origin = base.astype(jnp.float32).ravel()
    deltas = jnp.stack([leaf.astype(jnp.float32).ravel() for leaf in leaves]) - origin[None]
    sizes = jnp.abs(deltas)
    agree = jnp.abs(jnp.sum(deltas, 0))
    gram = jnp.matmul(deltas, deltas.T, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.sqrt(jnp.diag(gram))
    pairs = jnp.triu(jnp.ones_like(gram), 1)
    many = max(1, len(leaves) * (len(leaves) - 1) // 2)
    return jnp.stack(
        [
            jnp.asarray(origin.size, jnp.float32),
            jnp.sum(origin**2),
            jnp.mean(jnp.sum(deltas**2, 1)),
            jnp.mean(jnp.sum(deltas**4, 1)),
            jnp.sum(jnp.sum(sizes, 0) - agree),
            jnp.sum(sizes),
            jnp.sum(gram * pairs) / many,
            jnp.sum(jnp.outer(lengths, lengths) * pairs) / many,
        ]
    )


def _scaled(units: list[Unit]) -> np.ndarray:
    """[units, features] of unit variance; what does not vary is 0."""
    features = np.stack([unit.features for unit in units])
    centred = features - features.mean(0)
    spread = centred.std(0)
    # Shares of parameters keep their scale, so that a small difference in kind stays small.
    spread[:4] = np.where(spread[:4] > 0, 1.0, 0.0)
    return np.where(spread > 1e-9, centred / np.where(spread > 1e-9, spread, 1.0), 0.0)


def _joined(units: list[Unit], blocks: int) -> dict[str, str]:
    """By unit the name of its block."""
    features, weights = _scaled(units), np.sqrt([unit.size for unit in units])
    groups = [[i] for i in range(len(units))]
    while len(groups) > blocks:
        costs = [_cost(features, weights, a, b) for a, b in itertools.pairwise(groups)]
        at = int(np.argmin(costs))
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    labels = {}
    for group in groups:
        first, last = units[group[0]].name, units[group[-1]].name
        for i in group:
            labels[units[i].name] = first if first == last else f"{first}..{last}"
    return labels


def _cost(features: np.ndarray, weights: np.ndarray, a: list[int], b: list[int]) -> float:
    """By how much joining two groups raises the weighted sum of squares about the means."""
    means = [np.average(features[group], axis=0, weights=weights[group]) for group in (a, b)]
    one, other = weights[a].sum(), weights[b].sum()
    return float(one * other / (one + other) * ((means[0] - means[1]) ** 2).sum())
