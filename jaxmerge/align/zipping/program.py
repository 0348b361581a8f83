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
from jaxmerge.align.similarity import hashable, raw_rows
from jaxmerge.align.sites import find_sites
from jaxmerge.align.spaces import Measure, Space
from jaxmerge.align.spec import Axis, Binding, PermutationSpec
from jaxmerge.align.trees import Chain, Tree, trees
from jaxmerge.align.units import turned
from jaxmerge.align.zipping.greedy import greedy, kmeans
from jaxmerge.align.zipping.merging import merge_matrices, transformed
from jaxmerge.tree import flatten, unflatten

Method = Literal["greedy", "kmeans"]


class ZipInfo(NamedTuple):
    """How a zip went.

    Attributes:
      score: float [], the mean over the trees of nodes of the mean similarity of units that were merged together.
      sweeps: int32 [], how many sweeps over the trees were made.
      settled: bool [], whether the last sweep changed nothing.
      permutations: per model the order into which its heads, groups and what is only matched are brought.
      clusters: per merged node int32 [parents..., models, n], the merged unit of each unit, after the permutations.
    """

    score: jax.Array
    sweeps: jax.Array
    settled: jax.Array
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
    the others have come to, as in `jaxmerge.align.match`, in one compiled program.

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
      >>> bool(jnp.allclose(merged["fc1"], one["fc1"])), bool(info.settled)
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
    turns = visiting_turns(chosen, order, key, sweeps)
    found = _swept(program, _Limits(sweeps, patience), space, data, leaves, a, b, turns)
    _check_finite(program, found.scores)
    return program, leaves, found.info


def _info(
    state: _State, scores: jax.Array, sweeps: int | jax.Array, settled: bool | jax.Array
) -> ZipInfo:
    return ZipInfo(
        jnp.mean(scores),
        jnp.int32(sweeps),
        jnp.bool_(settled),
        state.permutations,
        state.clusters,
    )


def _check_finite(program: Program, scores: jax.Array) -> None:
    if isinstance(scores, jax.core.Tracer):
        return
    for tree, score in zip(program.trees, np.asarray(scores), strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the similarity of node {tree.root!r} is not finite: are the models?")


def carried_over(
    program: Program, leaves: Sequence[Mapping[str, jax.Array]], info: ZipInfo
) -> list[dict[str, jax.Array]]:
    """Every model's leaves over the merged units; their mean is the merged model."""
    return _carried_over(program, leaves, info.permutations, info.clusters)


@functools.partial(jax.jit, static_argnums=0)
def _carried_over(
    program: Program,
    leaves: Sequence[Mapping[str, jax.Array]],
    orders: Sequence[Permutations],
    clusters: Mapping[str, jax.Array],
) -> list[dict[str, jax.Array]]:
    bound = dict(program.spec.leaves)
    spec = _permuting(program, set(bound))
    found = []
    for one, permutations, matrices in zip(
        leaves, orders, _matrices(program, clusters), strict=True
    ):
        aligned = permute(spec, permutations, dict(one)) if spec.leaves else one
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
    function = hashable(apply_fn)
    total: dict[str, Moments] | None = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        found = _batch_moments(spec, function, tuple(models), inputs)
        total = found if total is None else {k: combined(total[k], m) for k, m in found.items()}
    if total is None:
        raise ValueError("activations need at least one batch of inputs, found none")
    correlations = {name: correlation(m) for name, m in total.items()}
    return {name: s.reshape(-1, *s.shape[-2:]) for name, s in correlations.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_moments(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    models: tuple[Any, ...],
    inputs: tuple[Any, ...],
) -> dict[str, Moments]:
    sites = find_sites(spec, apply_fn, models[0], *inputs)
    each = [activations(sites, apply_fn, model, *inputs) for model in models]
    units = {name: jnp.concatenate([one[name] for one in each], axis=-1) for name in each[0]}
    return {name: moments(whole, whole) for name, whole in units.items()}


# The program --------------------------------------------------------------------------------------------------------


class _Limits(NamedTuple):
    sweeps: int
    patience: int


class _Found(NamedTuple):
    info: ZipInfo
    scores: jax.Array


class _Run(NamedTuple):
    """Where the sweeps stand.

    Attributes:
      state: as of the last sweep.
      scores: [trees], of the last sweep.
      best, best_scores: of the best one.
      sweep: how many there were.
      idle: how many in a row were no better.
      moved: whether the last one changed anything.
    """

    state: _State
    scores: jax.Array
    best: _State
    best_scores: jax.Array
    sweep: jax.Array
    idle: jax.Array
    moved: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _swept(
    program: Program,
    limits: _Limits,
    space: Space,
    data: Mapping[str, jax.Array],
    leaves: Sequence[Mapping[str, jax.Array]],
    a: Any,
    b: Any,
    turns: jax.Array,
) -> _Found:
    """Sweeps over the trees until nothing moves or nothing gets better, from what the activations alone say."""
    count = len(program.trees)
    stacked = {path: jnp.stack([one[path] for one in leaves]) for path in leaves[0]}

    def visited(
        space: Space, turn: jax.Array, state: _State, scores: jax.Array
    ) -> tuple[_State, jax.Array]:
        groups = _alike(program, space, data)
        branches = [
            functools.partial(_visit, program, group, space, data, stacked, a, b)
            for group in groups
        ]
        branch = jnp.array(
            [next(g for g, of in enumerate(groups) if i in of) for i in range(count)]
        )

        def visit(i: jax.Array, carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
            index = turn[i]
            state, score = jax.lax.switch(branch[index], branches, index, carry[0])
            return state, carry[1].at[index].set(score)

        found: tuple[_State, jax.Array] = jax.lax.fori_loop(0, count, visit, (state, scores))
        return found

    state = _State(
        tuple(identity(program.spec) for _ in range(program.models)), _as_they_are(program)
    )
    scores = jnp.zeros(count)
    if space.data:
        own = Space(jnp.float32(0), None, True)
        state, scores = visited(own, jnp.arange(count), state, scores)
        if space.weights is None:
            return _Found(_info(state, scores, 1, True), scores)

    def sweep(run: _Run) -> _Run:
        state, scores = visited(space, turns[run.sweep], run.state, run.scores)
        better = jnp.mean(scores) > jnp.mean(run.best_scores)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state, run.best)
        same = [
            jnp.all(new == old)
            for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(run.state), strict=True)
        ]
        return _Run(
            state,
            scores,
            best,
            jnp.where(better, scores, run.best_scores),
            run.sweep + 1,
            jnp.where(better, 0, run.idle + 1),
            ~jnp.all(jnp.stack(same)),
        )

    def goes_on(run: _Run) -> jax.Array:
        return (run.sweep < limits.sweeps) & (run.idle < limits.patience) & run.moved

    worst = jnp.full(count, -jnp.inf)
    run = _Run(state, scores, state, worst, jnp.int32(0), jnp.int32(0), jnp.bool_(True))
    run = jax.lax.while_loop(goes_on, sweep, run)
    return _Found(_info(run.best, run.best_scores, run.sweep, ~run.moved), run.scores)


def _alike(program: Program, space: Space, data: Mapping[str, jax.Array]) -> list[tuple[int, ...]]:
    """The trees by their indices, together where all of their units are merged and as many: they share a program."""
    groups: dict[Any, list[int]] = {}
    for index, tree in enumerate(program.trees):
        (root, *inner) = tree.chains
        known = space.weights is not None or root.node in data
        layers = math.prod(program.spec.size(name) for name in root.layers)
        alike = not inner and _merges(tree, root) and known
        key = (layers, program.spec.size(root.node)) if alike else index
        groups.setdefault(key, []).append(index)
    return [tuple(group) for group in groups.values()]


def _visit(
    program: Program,
    group: tuple[int, ...],
    space: Space,
    data: Mapping[str, jax.Array],
    leaves: Mapping[str, jax.Array],
    a: Any,
    b: Any,
    index: jax.Array,
    state: _State,
) -> tuple[_State, jax.Array]:
    """Finds the clusters of one tree of a group anew, and the mean similarity of what they bring together."""
    if len(group) == 1:
        return _visit_one(program, group[0], space, data, leaves, a, b, state)
    nodes = [program.trees[i].root for i in group]

    def similar(i: int, state: _State) -> jax.Array:
        (one,) = _similar(program, i, space, data, leaves, state).values()
        return one.astype(jnp.result_type(float))

    place = jnp.argmax(jnp.array(group) == index)
    at = jax.lax.switch(place, [functools.partial(similar, i) for i in group], state)
    labels = _clustered(program.models, program.method, at, a, b)
    clusters = dict(state.clusters)
    for i, node in enumerate(nodes):
        old = clusters[node]
        clusters[node] = jnp.where(place == i, labels.reshape(old.shape), old)
    return state._replace(clusters=clusters), jnp.mean(jax.vmap(_together)(at, labels))


def _visit_one(
    program: Program,
    index: int,
    space: Space,
    data: Mapping[str, jax.Array],
    leaves: Mapping[str, jax.Array],
    a: Any,
    b: Any,
    state: _State,
) -> tuple[_State, jax.Array]:
    """What `_visit` does for a tree that is like no other."""
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
    value: Any = jnp.mean(jnp.concatenate([s.ravel() for s in scores])) if scores else 0.0
    value = jnp.asarray(value, jnp.result_type(float))
    if permutations is None:
        return state._replace(clusters=clusters), value
    composed = [
        compose(program.spec, old, {**identity(program.spec), **new})
        for old, new in zip(state.permutations, permutations, strict=True)
    ]
    return _State(tuple(composed), clusters), value


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
    leaves: Mapping[str, jax.Array],
    state: _State,
) -> dict[str, jax.Array]:
    """Per node of a tree [layers, models * units, models * units]; units in the order they have by now."""
    tree = program.trees[index]
    found = {}
    if space.weights is not None:
        paths = {place.path for chain in tree.chains for place in chain.places}
        near = {path: leaves[path] for path in paths}
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


def _by_weights(
    program: Program,
    index: int,
    measure: Measure,
    leaves: Mapping[str, jax.Array],
    state: _State,
) -> dict[str, jax.Array]:
    """The similarities of one tree's units by their weights, all else as it is merged by now."""
    chains = [
        chain
        for chain in program.trees[index].chains
        if any(place.role != "stat" for place in chain.places)
    ]
    spec = _permuting(program, set(leaves))
    near = {n for path in leaves for n in _nodes(program.spec, path)}
    matrices = {
        name: tuple(jnp.moveaxis(matrix, -3, 0) for matrix in merge_matrices(labels))
        for name, labels in state.clusters.items()
        if name in near
    }
    orders = jax.tree.map(lambda *each: jnp.stack(each), *state.permutations)

    def of_model(leaves: Any, permutations: Permutations, matrices: Any) -> list[jax.Array]:
        if spec.leaves:
            leaves = permute(spec, permutations, leaves)
        return [_features(program, chain, leaves, matrices) for chain in chains]

    found = {}
    each = jax.vmap(of_model)(dict(leaves), orders, matrices)
    for chain, features in zip(chains, each, strict=True):
        units = jnp.moveaxis(features, 0, 1).reshape(features.shape[1], -1, features.shape[-1])
        if measure == "correlation":
            units = units - jnp.mean(units, -1, keepdims=True)
        products = jnp.einsum("lif,ljf->lij", units, units, precision=jax.lax.Precision.HIGHEST)
        if measure == "correlation":
            norm = jnp.sqrt(jnp.sum(units**2, -1))
            products = products / jnp.maximum(norm[:, :, None] * norm[:, None, :], CLAMP)
        found[chain.node] = products
    return found


def _permuting(program: Program, paths: set[str]) -> PermutationSpec:
    """The spec of those of some leaves that hold a node whose units are permuted, not only merged."""
    permuted = {
        chain.node
        for tree in program.trees
        for chain in tree.chains
        if len(tree.chains) > 1 or not _merges(tree, chain)
    }
    kept = (
        (path, binding)
        for path, binding in program.spec.leaves
        if path in paths and permuted & _nodes(program.spec, path)
    )
    return replace(program.spec, leaves=tuple(kept))


def _nodes(spec: PermutationSpec, path: str) -> set[str]:
    """The nodes in a leaf."""
    return {name for _, axis in dict(spec.leaves)[path].moving() for name in axis.nodes()}


def _features(
    program: Program,
    chain: Chain,
    leaves: Mapping[str, jax.Array],
    matrices: Mapping[str, tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """[layers, units, features]: all that one model's weights say of a node's units, all else as it is merged."""
    bound = dict(program.spec.leaves)
    parts: list[jax.Array] = []
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
        alone = replace(chain, places=(place,))
        parts += raw_rows(program.spec, alone, turned(alone, {place.path: leaf}), None)
    return jnp.swapaxes(jnp.concatenate(parts, axis=1), 1, 2)


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
