"""Optimal-transport fusion: units aligned softly, layer after layer, also between models of unequal widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmerge.align.assignment import sinkhorn
from jaxmerge.align.capturing import activations
from jaxmerge.align.moments import correlation, moments
from jaxmerge.align.similarity import compared, given_rows
from jaxmerge.align.sites import find_sites
from jaxmerge.align.spaces import Space
from jaxmerge.align.spec import Axis, Binding, PermutationSpec, Segment
from jaxmerge.align.trees import Chain, Place, Tree, trees
from jaxmerge.align.units import turned
from jaxmerge.tree import flatten, unflatten

Plans = dict[str, jax.Array]


def transport(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    space: Space,
    *,
    temperature: ArrayLike = 0.05,
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    iterations: int = 100,
) -> tuple[Any, Plans]:
    r"""Brings a model onto another's units by transport plans; the widths of the two may differ.

    .. math:: P = \arg\max_{P 1 = 1/n, \; P^T 1 = 1/m} \langle P, S \rangle + \tau H(P)

    for every layer's units, one layer after another, S comparing the n units of `a` with the m of `b`. A unit of the
    result is the mean of `b`'s units that the plan brings to it, :math:`n P`, and what reads it gets the shares of
    their outgoing weights, :math:`m P` (the columns of which sum to 1): copies of one unit share its outgoing
    weights, so that a model fits onto one of more units without a change of its function. As :math:`\tau \to 0` with
    equal widths this is a permutation. Weights are compared by what comes in, from layers that are aligned already.
    Units within others (the values of a head) are transported for every pair of these, and these by what that gives.

    The fusion is a merge of the result with `a`, such as ``jm.merge("linear", [a, moved], weight=[0.5, 0.5])``.

    Args:
      spec: where the units stand in `a`; `b` has the same leaves and axes. Widths that may differ are those of nodes
        that fill an axis alone; heads and groups have the same sizes in both.
      a, b: trees of parameters.
      space: what is compared, see `weight_space`, `activation_space` and `dual_space`.
      temperature: tau, in units of the similarity; traced.
      x: one batch of inputs for spaces with activations: a pytree, or a tuple of what `apply_fn` takes after the
        parameters.
      apply_fn: the function of both models, for spaces with activations.
      iterations: of Sinkhorn's scaling, static.

    Returns:
      A tree with the shapes of `a`, and per free node the plan [units of a, units of b], of sum 1; the units of a node
      within others are all of theirs.

    Raises:
      ValueError: no activations where the space needs them, layers that are stacked, or models that do not fit the
        spec.

    Example:
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["fc1"]) @ p["fc2"]
      >>> a = {"fc1": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), "fc2": jnp.array([[2.0], [3.0]])}
      >>> wide = {"fc1": a["fc1"][:, [1, 0, 1, 0]], "fc2": a["fc2"][jnp.array([1, 0, 1, 0])] / 2}
      >>> spec = PermutationSpec.from_axes({"fc1": (None, "P0"), "fc2": ("P0", None)})
      >>> from jaxmerge.align.spaces import weight_space
      >>> moved, plans = transport(spec, a, wide, weight_space(), temperature=0.01)
      >>> moved["fc1"].round(3).tolist() == a["fc1"].tolist(), moved["fc2"].round(1).astype(int).tolist()
      (True, [[2], [3]])

    Reference:
      Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020.
    """
    leaves_a, definition = flatten(a)
    leaves_b = flatten(b)[0]
    of_a, of_b = _sized(spec, leaves_a), _sized(spec, leaves_b)
    found = trees(of_a)
    for tree in found:
        for chain in tree.chains:
            if chain.layers:
                raise ValueError(
                    f"node {chain.node!r} stands in stacked layers: transport takes models with a subtree per layer "
                    "(`jaxmerge.models.unstack_layers`)"
                )
    seen: dict[str, jax.Array] = {}
    if space.data:
        if x is None or apply_fn is None:
            raise ValueError("the space compares activations: give x= and apply_fn=")
        seen = _seen(of_a, of_b, apply_fn, a, b, x if isinstance(x, tuple) else (x,))
    plans: Plans = {}
    moved = {path: jnp.asarray(leaf) for path, leaf in leaves_b.items()}
    bound = dict(of_a.leaves)
    for tree in _in_order(of_a, found):
        similar = {
            chain.node: _similarity(tree, chain, of_a, of_b, leaves_a, moved, plans, space, seen)
            for chain in tree.chains
        }
        new = _plans(tree, of_a, of_b, similar, temperature, iterations)
        for path, binding in bound.items():
            for i, axis in binding.moving():
                if set(axis.nodes()) & set(new):
                    matrix = _matrix(of_a, of_b, axis, new)
                    moved[path] = _along(moved[path], matrix, i)
        plans |= new
    result = (
        moved[path].astype(jnp.asarray(leaf).dtype) if path in bound else leaves_b[path]
        for path, leaf in leaves_a.items()
    )
    return unflatten(definition, result), plans


def _sized(spec: PermutationSpec, leaves: Mapping[str, Any]) -> PermutationSpec:
    """The spec with a model's own widths: those of nodes that fill an axis, beside factors that do not move."""
    alone = {
        axis.nodes()[0]
        for _, binding in spec.leaves
        for _, axis in binding.moving()
        if len(axis.segments) == 1 and len(axis.nodes()) == 1
    }
    inner = {
        name for node in spec.nodes for name in (*node.parents, *[node.name][: len(node.parents)])
    }
    free = tuple(
        replace(node, size=None) if node.name in alone - inner else node for node in spec.nodes
    )
    return replace(spec, nodes=free).sized({path: np.shape(leaf) for path, leaf in leaves.items()})


def _seen(
    of_a: PermutationSpec,
    of_b: PermutationSpec,
    apply_fn: Callable[..., Any],
    a: Any,
    b: Any,
    inputs: tuple[Any, ...],
) -> dict[str, jax.Array]:
    """The correlations of the activations, [units of a, units of b] per node."""
    values = [
        activations(find_sites(spec, apply_fn, params, *inputs), apply_fn, params, *inputs)
        for spec, params in ((of_a, a), (of_b, b))
    ]
    return {name: correlation(moments(one, values[1][name])) for name, one in values[0].items()}


def _in_order(spec: PermutationSpec, found: tuple[Tree, ...]) -> list[Tree]:
    """Trees, those first whose units read only from such as came before; the least bound where there is a circle."""
    needs: dict[str, set[str]] = {}
    root = {chain.node: tree.root for tree in found for chain in tree.chains}
    for tree in found:
        mine = {chain.node for chain in tree.chains}
        needs[tree.root] = {
            root[name]
            for _, binding in spec.leaves
            if any(axis.role == "out" and mine & set(axis.nodes()) for _, axis in binding.moving())
            for _, axis in binding.moving()
            if axis.role == "in"
            for name in axis.nodes()
            if name in root and root[name] != tree.root
        }
    left, order = {tree.root: tree for tree in found}, []
    while left:
        # In a circle (a residual stream) the one that some kernel alone already speaks of.
        ready = {
            root[name]
            for _, binding in spec.leaves
            for _, axis in binding.moving()
            if axis.role in ("out", "both")
            for name in axis.nodes()
            if name in root and not (_roots(binding, root) - {root[name]}) & set(left)
        }
        first = min(left, key=lambda name: (name not in ready, len(needs[name] & set(left))))
        order.append(left.pop(first))
    return order


def _roots(binding: Binding, root: Mapping[str, str]) -> set[str]:
    return {root[name] for _, axis in binding.moving() for name in axis.nodes() if name in root}


def _similarity(
    tree: Tree,
    chain: Chain,
    of_a: PermutationSpec,
    of_b: PermutationSpec,
    leaves_a: Mapping[str, Any],
    moved: Mapping[str, jax.Array],
    plans: Plans,
    space: Space,
    seen: Mapping[str, jax.Array],
) -> jax.Array:
    """[units of a, units of b] of a node; what nothing speaks of yet is as similar as anything else."""
    mine = {one.node for one in tree.chains}
    units = [math.prod(spec.shape(chain.node)) for spec in (of_a, of_b)]
    total = jnp.zeros(units)
    share = space.share(chain.node)
    bound = dict(of_a.leaves)

    def speaks(place: Place) -> bool:
        others = {
            name
            for i, axis in bound[place.path].moving()
            if i != place.axis
            for name in axis.nodes()
        }
        free = {name for name in others if not of_a.node(name).fixed} - mine
        return place.role in ("out", "norm", "both") and free <= set(plans)

    places = tuple(place for place in chain.places if speaks(place))
    if space.weights is not None and places:
        sizes = {node.name: node.size for node in of_b.nodes if node.name in mine}
        mixed = replace(
            of_a,
            nodes=tuple(replace(n, size=sizes.get(n.name, n.size)) for n in of_a.nodes),
        )
        partly = replace(chain, places=places)
        each = (
            given_rows(one, partly, turned(partly, leaves), None, space.weights)
            for one, leaves in ((of_a, leaves_a), (mixed, moved))
        )
        total = total + share * compared(*each)[0]
    if space.data and chain.node in seen:
        total = total + (1 - share) * seen[chain.node]
    return total


def _plans(
    tree: Tree,
    of_a: PermutationSpec,
    of_b: PermutationSpec,
    similar: Mapping[str, jax.Array],
    temperature: ArrayLike,
    iterations: int,
) -> Plans:
    """The plans of a tree: inner ones for every pair of outer units, then the outer one by their gains."""

    def within(chain: Chain) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean gains of pairs, [outer of a, outer of b], and conditional plans, [outer pairs..., n, m] of sum 1."""
        n, m = (spec.size(chain.node) for spec in (of_a, of_b))
        score = similar[chain.node]
        score = jnp.transpose(
            jnp.reshape(score, (score.shape[0] // n, n, score.shape[1] // m, m)), (0, 2, 1, 3)
        )
        inner: dict[str, jax.Array] = {}
        for child in tree.children(chain):
            gains, plans = within(child)
            shape = (score.shape[0], n, score.shape[1], m)
            score = score + jnp.transpose(jnp.reshape(gains, shape), (0, 2, 1, 3))
            inner |= plans
        plan = sinkhorn(score, temperature, iterations=iterations)
        joint = {chain.node: plan}
        for name, part in inner.items():
            width = part.shape[-2:]
            outer = jnp.transpose(plan, (0, 2, 1, 3)).reshape(part.shape[:2])
            # The plan of all pairs of blocks, taken together within the units further out.
            whole = (outer[..., None, None] * part).reshape(
                plan.shape[0], plan.shape[2], plan.shape[1], plan.shape[3], *width
            )
            whole = jnp.transpose(whole, (0, 2, 1, 4, 3, 5))
            joint[name] = whole.reshape(
                *plan.shape[:2], plan.shape[2] * width[0], plan.shape[3] * width[1]
            )
        return jnp.sum(plan * score, (-2, -1)), joint

    _, found = within(tree.chains[0])
    return {name: plan[0, 0] for name, plan in found.items()}


def _matrix(of_a: PermutationSpec, of_b: PermutationSpec, axis: Axis, plans: Plans) -> jax.Array:
    """[a's indices, b's indices] of an axis: rows of sum 1 where units are produced, columns where they are read."""
    blocks = [_segment_matrix(of_a, of_b, segment, axis.role, plans) for segment in axis.segments]
    return jax.scipy.linalg.block_diag(*blocks)


def _segment_matrix(
    of_a: PermutationSpec, of_b: PermutationSpec, segment: Segment, role: str, plans: Plans
) -> jax.Array:
    """The product over a segment's factors of their plans, each given the units that it is within."""
    count = len(segment)
    place = {factor: i for i, factor in enumerate(segment) if isinstance(factor, str)}
    sides = [[spec.size(factor) for factor in segment] for spec in (of_a, of_b)]
    terms: list[Any] = []
    for i, factor in enumerate(segment):
        if not (isinstance(factor, str) and factor in plans):
            terms += [jnp.eye(sides[0][i]), [i, count + i]]
            continue
        parents = of_a.node(factor).parents
        if not set(parents) <= set(place):
            raise ValueError(
                f"node {factor!r} and {parents[-1]!r}, which it is within, stand on different axes of a leaf: "
                "transport takes models in which they share an axis"
            )
        within = [place[parent] for parent in parents]
        joint = jnp.reshape(plans[factor], [side[k] for side in sides for k in (*within, i)])
        if within:
            outer = jnp.reshape(plans[parents[-1]], [side[k] for side in sides for k in within])
            outer = jnp.expand_dims(outer, (len(within), 2 * len(within) + 1))
            joint = joint / jnp.broadcast_to(jnp.maximum(outer, 1e-30), joint.shape)
        terms += [joint, [*within, i, *(count + k for k in (*within, i))]]
    whole = jnp.einsum(*terms, list(range(2 * count)))
    matrix = whole.reshape(math.prod(sides[0]), math.prod(sides[1]))
    masses = jnp.sum(matrix, axis=0 if role == "in" else 1, keepdims=True)
    return matrix / jnp.broadcast_to(jnp.maximum(masses, 1e-30), matrix.shape)


def _along(leaf: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    mapped = jnp.tensordot(
        matrix.astype(wide.dtype), wide, axes=(1, axis), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(mapped, 0, axis)
