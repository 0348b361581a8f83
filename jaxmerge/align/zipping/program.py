"""The zip of whole models: clusters of units tree by tree, in the space asked for, and the merged parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.assignment import Solver
from jaxmerge.align.capturing import activations
from jaxmerge.align.matching import check_alpha, match_tree, visiting_turns
from jaxmerge.align.moments import CLAMP, Moments, combined, correlation, moments
from jaxmerge.align.permuting import Permutations, compose, identity, indices, permute
from jaxmerge.align.sites import find_sites
from jaxmerge.align.spaces import Measure, Space
from jaxmerge.align.spec import Axis, Binding, PermutationSpec
from jaxmerge.align.trees import Chain, Tree, trees
from jaxmerge.align.units import rows
from jaxmerge.align.zipping.greedy import greedy, kmeans
from jaxmerge.align.zipping.merging import merge_matrices, transformed
from jaxmerge.tree import flatten, unflatten

Method = Literal["greedy", "kmeans"]


class ZipInfo(NamedTuple):
    """How a zip went.

    Attributes:
      score: float, the mean over the trees of nodes of the mean similarity of units that were merged with each other.
      sweeps: how many sweeps over the trees were made.
      settled: whether the last sweep changed nothing.
      permutations: per model the order into which its heads, groups and what is only matched are brought.
      clusters: per merged node int32 [parents..., models, n], the merged unit of each unit, after the permutations.
    """

    score: float
    sweeps: int
    settled: bool
    permutations: tuple[Permutations, ...]
    clusters: dict[str, jax.Array]


@dataclass(frozen=True)
class Program:
    """What the steps are compiled for.

    Attributes:
      spec: with sizes.
      trees: those that are merged.
      models: how many.
      method, solver: as given.
    """

    spec: PermutationSpec
    trees: tuple[Tree, ...]
    models: int
    method: Method
    solver: Solver

    def parents(self) -> dict[str, tuple[str, ...]]:
        """Per node the names of the leading axes of its clusters."""
        return {c.node: (*c.layers, *c.outer) for tree in self.trees for c in tree.chains}


class _State(NamedTuple):
    permutations: tuple[Permutations, ...]
    clusters: dict[str, jax.Array]


def zipit(
    spec: PermutationSpec,
    models: Sequence[Any],
    space: Space,
    *,
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    a: Any = 0.5,
    b: Any = 1.0,
    method: Method = "greedy",
    order: Sequence[Sequence[str | int]] | None = None,
    key: jax.Array | None = None,
    sweeps: int = 100,
    patience: int = 5,
    solver: Solver = "auto",
) -> tuple[Any, ZipInfo]:
    r"""Merges models by zipping their units together: similar ones within and across models.

    .. math:: W = \frac1N \sum_m (M^m_{out})^\top W^m U^m_{in}

    with the matrices of `merge_matrices`: leaves that produce units, one value per unit, and running statistics take
    M, leaves that read them U. In a space with weights the clusters are found in sweeps, each tree under what
    the others have come to, as in `jaxmerge.align.match`.

    Units that something reads are merged. Heads, groups and whatever else has units within it are matched with those
    of the first model and what is within them is merged head by head: a mean of two heads is no head. Nodes that no
    leaf reads (queries and keys, whose products are taken) and those of a tied embedding, which would need M and U in
    one leaf, are matched as well.

    Args:
      spec: where the units stand.
      models: two trees of parameters or more.
      space: what is compared.
      x, apply_fn: as for `jaxmerge.align.match`, for spaces with activations.
      a: float [], how much of its similarity a merged unit keeps.
      b: float [], the share of merges that may be within models.
      method: "greedy", or "kmeans" for k-means in the same space from where the greedy merging ends; static.
      order, key, sweeps, patience, solver: as for `jaxmerge.align.match`.

    Returns:
      Parameters like one model's, for the same function, and a `ZipInfo`.

    Raises:
      ValueError: fewer than two models, no activations where the space needs them, parameters that do not fit the spec,
        or similarities that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> one = {"fc1": jax.random.normal(jax.random.key(0), (3, 8)), "fc2": jnp.ones((8, 2))}
      >>> spec = jm.align.symmetry(mlp, one, jnp.ones((1, 3)))
      >>> two = jm.align.permute(spec, {"fc1": jnp.roll(jnp.arange(8), 3)}, one)
      >>> merged, info = jm.align.zipit(spec, [one, two], jm.align.weight_space())
      >>> bool(jnp.allclose(merged["fc1"], one["fc1"])), info.settled
      (True, True)

    Reference:
      Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024. Xu et al., Training-Free
      Pretrained Model Merging, CVPR 2024 (both spaces).
    """
    program, leaves, info = zipped(
        spec, models, space, x, apply_fn, None, a, b, method, order, key, sweeps, patience, solver
    )
    each = carried_over(program, leaves, info)
    mean = {path: jnp.mean(jnp.stack([one[path] for one in each]), axis=0) for path in leaves[0]}
    like = flatten(models[0])
    return unflatten(like[1], (mean[path].astype(leaves[0][path].dtype) for path in like[0])), info


def zipped(
    spec: PermutationSpec,
    models: Sequence[Any],
    space: Space,
    x: Any,
    apply_fn: Callable[..., Any] | None,
    roots: Sequence[str] | None,
    a: Any,
    b: Any,
    method: Method,
    order: Sequence[Sequence[str | int]] | None,
    key: jax.Array | None,
    sweeps: int,
    patience: int,
    solver: Solver,
) -> tuple[Program, list[dict[str, jax.Array]], ZipInfo]:
    """Finds the clusters of the trees with the given roots (None for all); arguments as for `zipit`."""
    if len(models) < 2:
        raise ValueError(f"a zip takes two models or more, found {len(models)}")
    if method not in ("greedy", "kmeans"):
        raise ValueError(f"unknown method {method!r}; there are 'greedy' and 'kmeans'")
    leaves = [{k: jnp.asarray(v) for k, v in flatten(model)[0].items()} for model in models]
    for one in leaves:
        spec = spec.sized({path: np.shape(leaf) for path, leaf in one.items()})
    chosen = tuple(t for t in trees(spec) if roots is None or t.root in roots)
    if not chosen:
        raise ValueError("nothing can be merged: there is no free node")
    check_alpha(spec, space)
    program = Program(spec, chosen, len(models), method, solver)
    data: dict[str, jax.Array] = {}
    if space.data:
        if x is None or apply_fn is None:
            raise ValueError("the space compares activations: give x= and apply_fn=")
        data = _correlations(spec, apply_fn, models, x if isinstance(x, list) else [x])
    turns = np.asarray(visiting_turns(chosen, order, key, sweeps))
    state = _State(tuple(identity(spec) for _ in models), _as_they_are(program))
    step = functools.partial(_visit, program)
    if space.data:
        own = Space(jnp.float32(0), None, True)
        scores = []
        for index in range(len(chosen)):
            state, score = step(index, own, data, leaves, a, b, state)
            scores.append(float(score))
        _check_finite(program, scores)
        if space.weights is None:
            return program, leaves, _info(state, scores, 1, True)
    best, best_scores, idle, moved, sweep = state, [-math.inf] * len(chosen), 0, True, 0
    scores = [0.0] * len(chosen)
    while sweep < sweeps and idle < patience and moved:
        before = state
        for index in turns[sweep]:
            state, score = step(int(index), space, data, leaves, a, b, state)
            scores[index] = float(score)
        _check_finite(program, scores)
        moved = not all(
            np.array_equal(p, q)
            for p, q in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True)
        )
        idle += 1
        if np.mean(scores) > np.mean(best_scores):
            best, best_scores, idle = state, list(scores), 0
        sweep += 1
    return program, leaves, _info(best, best_scores, sweep, not moved)


def _info(state: _State, scores: Sequence[float], sweeps: int, settled: bool) -> ZipInfo:
    return ZipInfo(float(np.mean(scores)), sweeps, settled, state.permutations, state.clusters)


def _check_finite(program: Program, scores: Sequence[float]) -> None:
    for tree, score in zip(program.trees, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the similarity of node {tree.root!r} is not finite: are the models?")


def carried_over(
    program: Program, leaves: Sequence[Mapping[str, jax.Array]], info: ZipInfo
) -> list[dict[str, jax.Array]]:
    """Every model's leaves over the merged units; their mean is the merged model."""
    bound = dict(program.spec.leaves)
    found = []
    for one, permutations, matrices in zip(
        leaves, info.permutations, _matrices(program, info.clusters), strict=True
    ):
        aligned = permute(program.spec, permutations, dict(one))
        found.append(
            {
                path: transformed(program.spec, bound[path], leaf, matrices, program.parents())
                if path in bound
                else leaf
                for path, leaf in aligned.items()
            }
        )
    return found


def _merges(tree: Tree, chain: Chain) -> bool:
    """Whether a node's units are merged, or only matched."""
    roles = {place.role for place in chain.places}
    return not tree.children(chain) and "in" in roles and "both" not in roles


def _as_they_are(program: Program) -> dict[str, jax.Array]:
    found = {}
    for tree in program.trees:
        for chain in tree.chains:
            if _merges(tree, chain):
                n = program.spec.size(chain.node)
                above = [program.spec.size(name) for name in (*chain.layers, *chain.outer)]
                units = jnp.arange(n, dtype=jnp.int32)
                found[chain.node] = jnp.broadcast_to(units, (*above, program.models, n))
    return found


def _matrices(
    program: Program, clusters: Mapping[str, jax.Array]
) -> list[dict[str, tuple[jax.Array, jax.Array]]]:
    """Per model and node M and U."""
    both = {name: merge_matrices(labels) for name, labels in clusters.items()}
    return [
        {name: (m[..., i, :, :], u[..., i, :, :]) for name, (m, u) in both.items()}
        for i in range(program.models)
    ]


def _correlations(
    spec: PermutationSpec, apply_fn: Callable[..., Any], models: Sequence[Any], batches: list[Any]
) -> dict[str, jax.Array]:
    """Per node [layers, models * units, models * units], Pearson's correlations of activations."""
    total: dict[str, Moments] = {}
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        sites = find_sites(spec, apply_fn, models[0], *inputs)
        each = [activations(sites, apply_fn, model, *inputs) for model in models]
        for name in each[0]:
            units = jnp.concatenate([one[name] for one in each], axis=-1)
            found = moments(units, units)
            total[name] = combined(total[name], found) if name in total else found
    if not total:
        raise ValueError("activations need at least one batch of inputs, found none")
    correlations = {name: correlation(m) for name, m in total.items()}
    return {name: s.reshape(-1, *s.shape[-2:]) for name, s in correlations.items()}


def _visit(
    program: Program,
    index: int,
    space: Space,
    data: Mapping[str, jax.Array],
    leaves: Sequence[Mapping[str, jax.Array]],
    a: Any,
    b: Any,
    state: _State,
) -> tuple[_State, jax.Array]:
    """Finds one tree's clusters anew, and the mean similarity of what they bring together."""
    tree = program.trees[index]
    similar = _similar(program, index, space, data, leaves, state)
    permutations = _matched(program, tree, similar)
    clusters = dict(state.clusters)
    scores = []
    for chain in tree.chains:
        if chain.node not in similar:
            continue
        at = similar[chain.node]
        if permutations is not None:
            at = _ordered(program, chain, at, permutations)
        n = program.spec.size(chain.node)
        above = [program.spec.size(name) for name in (*chain.layers, *chain.outer)]
        if _merges(tree, chain):
            labels = _clustered(program.models, program.method, at, a, b)
            clusters[chain.node] = labels.reshape(*above, program.models, n)
        else:
            labels = jnp.broadcast_to(jnp.tile(jnp.arange(n), program.models), at.shape[:2])
        scores.append(jax.vmap(_together)(at, labels))
    value = jnp.mean(jnp.concatenate([score.ravel() for score in scores])) if scores else 0.0
    if permutations is None:
        return state._replace(clusters=clusters), jnp.asarray(value)
    composed = [
        compose(program.spec, old, {**identity(program.spec), **new})
        for old, new in zip(state.permutations, permutations, strict=True)
    ]
    return _State(tuple(composed), clusters), jnp.asarray(value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _clustered(models: int, method: Method, similarity: jax.Array, a: Any, b: Any) -> jax.Array:
    def one(similarity: jax.Array) -> jax.Array:
        labels = greedy(similarity, models, a, b)
        if method == "kmeans":
            labels = kmeans(similarity, labels, similarity.shape[0] // models)
        return labels

    return jax.vmap(one)(similarity)


def _together(similarity: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean similarity of different units in one cluster."""
    same = (labels[:, None] == labels[None, :]) & ~jnp.eye(len(labels), dtype=bool)
    return jnp.sum(jnp.where(same, similarity, 0)) / jnp.sum(same)


def _similar(
    program: Program,
    index: int,
    space: Space,
    data: Mapping[str, jax.Array],
    leaves: Sequence[Mapping[str, jax.Array]],
    state: _State,
) -> dict[str, jax.Array]:
    """Per node of a tree [layers, models * units, models * units]; units in the order they have by now."""
    tree = program.trees[index]
    found = {}
    if space.weights is not None:
        paths = {place.path for chain in tree.chains for place in chain.places}
        near = [{path: one[path] for path in paths} for one in leaves]
        found = _by_weights(program, index, space.weights, near, state)
    for chain in tree.chains:
        if not space.data or chain.node not in data:
            continue
        one = data[chain.node]
        if not (len(tree.chains) == 1 and _merges(tree, chain)):
            one = _reordered(program, chain, one, state.permutations)
        if chain.node in found:
            products = found[chain.node]
            share = space.share(chain.node).astype(products.dtype)
            one = share * products + (1 - share) * one.astype(products.dtype)
        found[chain.node] = one
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _by_weights(
    program: Program,
    index: int,
    measure: Measure,
    leaves: Sequence[Mapping[str, jax.Array]],
    state: _State,
) -> dict[str, jax.Array]:
    """The similarities of one tree's units by their weights, all else as it is merged by now."""
    near = set(leaves[0])
    spec = replace(program.spec, leaves=tuple(one for one in program.spec.leaves if one[0] in near))
    aligned = [
        permute(spec, p, dict(one)) for p, one in zip(state.permutations, leaves, strict=True)
    ]
    matrices = _matrices(program, state.clusters)
    found = {}
    for chain in program.trees[index].chains:
        if all(place.role == "stat" for place in chain.places):
            continue
        each = [_features(program, chain, one, m) for one, m in zip(aligned, matrices, strict=True)]
        units = jnp.concatenate(each, axis=1)
        if measure == "correlation":
            units = units - jnp.mean(units, -1, keepdims=True)
        products = jnp.einsum("lif,ljf->lij", units, units, precision=jax.lax.Precision.HIGHEST)
        if measure == "correlation":
            norm = jnp.sqrt(jnp.sum(units**2, -1))
            products = products / jnp.maximum(norm[:, :, None] * norm[:, None, :], CLAMP)
        found[chain.node] = products
    return found


def _features(
    program: Program,
    chain: Chain,
    leaves: Mapping[str, jax.Array],
    matrices: Mapping[str, tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """[layers, units, features]: all that one model's weights say of a node's units, all else as it is merged."""
    bound = dict(program.spec.leaves)
    layers = math.prod(program.spec.size(name) for name in chain.layers)
    parts = []
    for place in chain.places:
        if place.role == "stat":
            continue
        own = (chain.node, place.axis)
        leaf = transformed(
            program.spec,
            bound[place.path],
            leaves[place.path],
            matrices,
            program.parents(),
            own,
        )
        for part in rows(program.spec, replace(chain, places=(place,)), {place.path: leaf}):
            parts.append(part.reshape(layers, -1, part.shape[-1]))
    return jnp.concatenate(parts, axis=-1)


def _matched(
    program: Program, tree: Tree, similar: Mapping[str, jax.Array]
) -> list[Permutations] | None:
    """Per model the permutations that bring what is only matched into the first model's order; None if all merges."""
    if len(tree.chains) == 1 and _merges(tree, tree.chains[0]):
        return None
    still = identity(program.spec)
    found = [still]
    for i in range(1, program.models):
        blocks = {}
        for name, whole in similar.items():
            n = whole.shape[-1] // program.models
            blocks[name] = whole[:, :n, i * n : (i + 1) * n]
        one, _ = match_tree(program.spec, tree, blocks, still, program.solver)
        found.append({**still, **one})
    return found


def _reordered(
    program: Program, chain: Chain, whole: jax.Array, permutations: Sequence[Permutations]
) -> jax.Array:
    """The similarities of a node's units once each model's are permuted."""
    layers = whole.shape[0]
    n = whole.shape[-1] // program.models
    order = (*chain.layers, *chain.outer, chain.node)
    binding = Binding((Axis((order,), "norm"),))
    each = [
        indices(program.spec, binding, p, 0)[0].reshape(layers, n) % n + i * n
        for i, p in enumerate(permutations)
    ]
    index = jnp.concatenate(each, axis=1)
    whole = jnp.take_along_axis(whole, index[:, :, None], axis=1)
    return jnp.take_along_axis(whole, index[:, None, :], axis=2)


def _ordered(
    program: Program, chain: Chain, whole: jax.Array, permutations: Sequence[Permutations]
) -> jax.Array:
    """[layers * outer units, models * n, models * n]: what is within each outer unit, the models' matched."""
    whole = _reordered(program, chain, whole, permutations)
    n = program.spec.size(chain.node)
    outer = whole.shape[-1] // (program.models * n)
    split = whole.reshape(-1, program.models, outer, n, program.models, outer, n)
    inside = jnp.diagonal(split, axis1=2, axis2=5)
    inside = jnp.moveaxis(inside, -1, 1)
    return inside.reshape(-1, program.models * n, program.models * n)
