"""Matching: the permutation of one model's units that makes them most similar to another's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.assignment import Solver, assign
from jaxmerge.align.permuting import Permutations, check, identity, random
from jaxmerge.align.similarity import (
    Rows,
    Similarities,
    activation_similarity,
    compared,
    given_rows,
    raw_rows,
)
from jaxmerge.align.spaces import Space, dual_space
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.align.trees import Chain, Tree, trees
from jaxmerge.align.units import Turned, turned
from jaxmerge.tree import flatten, nearest


class MatchInfo(NamedTuple):
    """How a matching went.

    Attributes:
      score: float [], the mean over all trees of nodes of the mean similarity of matched units.
      sweeps: int32 [], how many sweeps over the trees were made.
      similarity: per root of a tree, float [], the mean similarity of its matched units.
      settled: bool [], whether the last sweep moved nothing.
    """

    score: jax.Array
    sweeps: jax.Array
    similarity: dict[str, jax.Array]
    settled: jax.Array


def match(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    space: Space,
    *,
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    similarities: Similarities | None = None,
    start: Mapping[str, Any] | None = None,
    order: Sequence[Sequence[str | int]] | None = None,
    key: jax.Array | None = None,
    sweeps: int = 100,
    patience: int = 5,
    solver: Solver = "auto",
) -> tuple[Permutations, MatchInfo]:
    r"""Finds the permutation of `b`'s units that fits them to `a`'s.

    Coordinate descent: tree by tree of nodes (a layer's units; heads with what is in them) the assignment of largest
    similarity is taken, with everything else as it is matched by then, in sweeps over all trees until one changes
    nothing or `patience` sweeps have not bettered the score; the best sweep counts. What lies within other units (the
    values of a head) is matched for every pair of these first, and these by the sum of what that gives. One compiled
    program, whatever the space's alpha.

    Args:
      spec: where the units stand.
      a, b: trees of parameters; `a` stays as it is.
      space: what is compared, see `weight_space`, `activation_space` and `dual_space`.
      x: inputs, for spaces with activations: one batch (a pytree, or a tuple of what `apply_fn` takes after the
        parameters) or a list of batches.
      apply_fn: the function of both models, for spaces with activations.
      similarities: what `activation_similarity` gives, in place of `x` and `apply_fn`.
      start: where to start; by default from the match of the activations alone if there are any, else from `b` as is.
      order: per sweep the roots of the trees (or their indices) in the order of visits; fewer sweeps than are made
        are gone through again. By default random orders.
      key: for random orders; by default ``jax.random.key(0)``.
      sweeps: the most sweeps, static.
      patience: how many sweeps may go by without a better score, static.
      solver: see `jaxmerge.align.assign`.

    Returns:
      The permutations, for `jaxmerge.align.permute(spec, permutations, b)`, and a `MatchInfo`.

    Raises:
      ValueError: no activations where the space needs them, an unknown node in `order` or alpha, parameters that do not
        fit the spec, or similarities that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> a = {"fc1": jax.random.normal(jax.random.key(0), (3, 8)), "fc2": jnp.ones((8, 2))}
      >>> spec = jm.align.symmetry(mlp, a, jnp.ones((1, 3)))
      >>> b = jm.align.permute(spec, {"fc1": jnp.roll(jnp.arange(8), 3)}, a)
      >>> permutations, info = jm.align.match(spec, a, b, jm.align.weight_space())
      >>> bool(jnp.all(jm.align.permute(spec, permutations, b)["fc1"] == a["fc1"]))
      True

    Reference:
      Ainsworth et al., Git Re-Basin, ICLR 2023 (coordinate descent). Xu et al., Training-Free Pretrained Model Merging,
      CVPR 2024 (MuDSC: both spaces, groups).
    """
    problem, visits, first = _prepared(
        spec, a, b, space, x, apply_fn, similarities, start, order, key, sweeps
    )
    settings = _Settings(sweeps, patience, solver)
    result = _descend(problem.static, settings, _alone(space), problem.arrays, visits, first)
    found, info = jax.tree.map(lambda leaf: leaf[0], result)
    _check_finite(info)
    return found, info


def match_path(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    alphas: Any,
    *,
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    similarities: Similarities | None = None,
    order: Sequence[Sequence[str | int]] | None = None,
    key: jax.Array | None = None,
    sweeps: int = 100,
    patience: int = 5,
    solver: Solver = "auto",
) -> tuple[Permutations, MatchInfo]:
    """Matches in dual space for many shares of the weights, in one program.

    The activations are run once, and each share starts from what the one before it found: neighbours differ little.

    Args:
      alphas: [k], the shares in the order in which they are gone through.
      Others: as for `match`.

    Returns:
      As `match`, with a leading axis [k].

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> a, b = ({"fc1": jax.random.normal(jax.random.key(i), (3, 8)), "fc2": jnp.ones((8, 2))} for i in (0, 1))
      >>> x = jax.random.normal(jax.random.key(2), (16, 3))
      >>> spec = jm.align.symmetry(mlp, a, x)
      >>> found, _ = jm.align.match_path(spec, a, b, jnp.linspace(0.1, 0.9, 9), x=x, apply_fn=mlp)
      >>> found["fc1"].shape
      (9, 8)

    Reference:
      Xu et al., Training-Free Pretrained Model Merging, CVPR 2024.
    """
    spaces = dual_space(jnp.atleast_1d(jnp.asarray(alphas)))
    problem, visits, first = _prepared(
        spec, a, b, spaces, x, apply_fn, similarities, None, order, key, sweeps
    )
    settings = _Settings(sweeps, patience, solver)
    found, info = _descend(problem.static, settings, spaces, problem.arrays, visits, first)
    _check_finite(info)
    return found, info


def match_restarts(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    space: Space,
    restarts: int,
    *,
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    similarities: Similarities | None = None,
    key: jax.Array | None = None,
    sweeps: int = 100,
    patience: int = 5,
    solver: Solver = "auto",
) -> tuple[Permutations, MatchInfo]:
    """Matches many times at once, each time in other orders of visits and from another start, and keeps the best.

    Args:
      restarts: how many, static; the first starts as `match` does, in spaces without activations from `b` as it is, the
        others there from random permutations.
      key: for starts and orders; by default ``jax.random.key(0)``.
      Others: as for `match`.

    Returns:
      As `match`, of the restart with the best score.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> a, b = ({"fc1": jax.random.normal(jax.random.key(i), (3, 8)), "fc2": jnp.ones((8, 2))} for i in (0, 1))
      >>> spec = jm.align.symmetry(mlp, a, jnp.ones((1, 3)))
      >>> found, info = jm.align.match_restarts(spec, a, b, jm.align.weight_space(), 4)
      >>> found["fc1"].shape, info.score.shape
      ((8,), ())

    Reference:
      Ainsworth et al., Git Re-Basin, ICLR 2023 (the descent depends on its random orders).
    """
    if restarts < 1:
        raise ValueError(f"restarts: expected 1 or more, found {restarts}")
    problem, _, _ = _prepared(
        spec, a, b, space, x, apply_fn, similarities, None, None, None, sweeps
    )
    settings = _Settings(sweeps, patience, solver)
    keys = jax.random.split(jax.random.key(0) if key is None else key, restarts)
    visits = jax.vmap(lambda k: visiting_turns(problem.static.trees, None, k, sweeps))(keys)
    first = None
    if not space.data:
        first = jax.vmap(lambda k: random(problem.static.spec, jax.random.fold_in(k, 1)))(keys)
        still = identity(problem.static.spec)
        first = {name: p.at[0].set(still[name]) for name, p in first.items()}

    def one(visits: jax.Array, first: Permutations | None) -> tuple[Permutations, MatchInfo]:
        return _descend(problem.static, settings, _alone(space), problem.arrays, visits, first)

    found, info = jax.vmap(one)(visits, first)
    _check_finite(info)
    best = jnp.argmax(info.score[:, 0])
    return jax.tree.map(lambda leaf: leaf[best, 0], (found, info))


class _Settings(NamedTuple):
    sweeps: int
    patience: int
    solver: Solver


@dataclass(frozen=True)
class _Static:
    """What a program is compiled for."""

    spec: PermutationSpec
    trees: tuple[Tree, ...]
    neighbours: tuple[tuple[bool, ...], ...]


class _Arrays(NamedTuple):
    leaves_a: dict[str, Any]
    leaves_b: dict[str, Any]
    activations: Similarities


class _Problem(NamedTuple):
    static: _Static
    arrays: _Arrays


def _prepared(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    space: Space,
    x: Any,
    apply_fn: Callable[..., Any] | None,
    similarities: Similarities | None,
    start: Mapping[str, Any] | None,
    order: Sequence[Sequence[str | int]] | None,
    key: jax.Array | None,
    sweeps: int,
) -> tuple[_Problem, jax.Array, Permutations | None]:
    leaves_a, leaves_b = flatten(a)[0], flatten(b)[0]
    for leaves in (leaves_a, leaves_b):
        spec = spec.sized({path: np.shape(leaf) for path, leaf in leaves.items()})
    found = trees(spec)
    if not found:
        raise ValueError("nothing can be permuted: the spec has no free node")
    check_alpha(spec, space)
    if space.data and similarities is None:
        if x is None or apply_fn is None:
            raise ValueError(
                "the space compares activations: give x= and apply_fn=, or similarities="
            )
        batches = x if isinstance(x, list) else [x]
        similarities = activation_similarity(spec, apply_fn, a, b, batches)
    kept = {path for path, _ in spec.leaves}
    arrays = _Arrays(
        {path: jnp.asarray(leaves_a[path]) for path in leaves_a if path in kept},
        {path: jnp.asarray(leaves_b[path]) for path in leaves_b if path in kept},
        _layered(spec, found, similarities) if space.data and similarities is not None else {},
    )
    static = _Static(spec, found, _neighbours(spec, found))
    first = None if start is None else check(spec, start)
    return _Problem(static, arrays), visiting_turns(found, order, key, sweeps), first


def check_alpha(spec: PermutationSpec, space: Space) -> None:
    if isinstance(space.alpha, Mapping):
        names = [node.name for node in spec.free()]
        for name in space.alpha:
            if name not in names:
                raise ValueError(
                    f"alpha speaks of {name!r}, which is no node{nearest(name, names)}"
                )
        for name in names:
            if name not in space.alpha:
                raise ValueError(f"alpha has no value for node {name!r}")


def _layered(
    spec: PermutationSpec, found: Sequence[Tree], similarities: Similarities
) -> Similarities:
    """The similarities of activations as [layers, units, units], checked."""
    result = {}
    chains = {chain.node: chain for tree in found for chain in tree.chains}
    for name, array in similarities.items():
        if name not in chains:
            raise ValueError(
                f"similarities speak of {name!r}, which is no node{nearest(name, chains)}"
            )
        layers, units = _sizes(spec, chains[name])
        if np.size(array) != layers * units * units:
            raise ValueError(
                f"the similarity of {name!r}: expected {[layers, units, units]}, found {list(np.shape(array))}"
            )
        result[name] = jnp.asarray(array).reshape(layers, units, units)
    return result


def _sizes(spec: PermutationSpec, chain: Chain) -> tuple[int, int]:
    layers = [spec.size(name) for name in chain.layers]
    units = [spec.size(name) for name in (*chain.outer, chain.node)]
    return int(np.prod(layers, dtype=np.int64)), int(np.prod(units, dtype=np.int64))


def _neighbours(spec: PermutationSpec, found: Sequence[Tree]) -> tuple[tuple[bool, ...], ...]:
    """Which trees' similarities change when a tree is permuted: those with which it shares a leaf."""
    leaves = [
        {place.path for chain in tree.chains for place in chain.places if place.role != "stat"}
        for tree in found
    ]
    own = [
        any(
            sum(chain.node in axis.nodes() for _, axis in spec.binding(path).moving()) > 1
            for chain in tree.chains
            for path in mine
        )
        or _have_a_leaf_in_common(tree)
        for tree, mine in zip(found, leaves, strict=True)
    ]
    return tuple(
        tuple((i != j or own[i]) and bool(one & other) for j, other in enumerate(leaves))
        for i, one in enumerate(leaves)
    )


def _have_a_leaf_in_common(tree: Tree) -> bool:
    """Whether one leaf speaks of two nodes of a tree: grouped queries and values, by what reads them."""
    paths = [{p.path for p in chain.places if p.role != "stat"} for chain in tree.chains]
    return any(one & other for one, other in itertools.combinations(paths, 2))


def visiting_turns(
    found: Sequence[Tree],
    order: Sequence[Sequence[str | int]] | None,
    key: jax.Array | None,
    sweeps: int,
) -> jax.Array:
    """int32 [sweeps, trees]."""
    if order is None:
        keys = jax.random.split(jax.random.key(0) if key is None else key, sweeps)
        return jax.vmap(lambda k: jax.random.permutation(k, len(found)))(keys).astype(jnp.int32)
    names = [tree.root for tree in found]
    rounds = []
    for one in order:
        visits = []
        for item in one:
            if isinstance(item, str):
                if item not in names:
                    raise ValueError(f"order: no tree has the root {item!r}{nearest(item, names)}")
                visits.append(names.index(item))
            else:
                visits.append(int(item))
        if sorted(visits) != list(range(len(names))):
            raise ValueError(
                f"order: expected every one of {names} once in a sweep, found {list(one)}"
            )
        rounds.append(visits)
    return jnp.asarray([rounds[i % len(rounds)] for i in range(sweeps)], jnp.int32)


def _check_finite(info: MatchInfo) -> None:
    for name, value in info.similarity.items():
        if not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(value)):
            raise ValueError(f"the similarity of node {name!r} is not finite: are the models?")


# The program --------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """Where the descent stands.

    Attributes:
      permutations: of all free nodes.
      scores: [trees], the mean similarity of matched units when a tree was last matched.
      weights: per node the similarity of the weights, as of when it was last computed.
      stale: [trees], whether what a tree's weights are compared under has moved since.
      due: [trees], whether a tree must be matched again.
    """

    permutations: Permutations
    scores: jax.Array
    weights: Similarities
    stale: jax.Array
    due: jax.Array


class _Run(NamedTuple):
    state: _State
    best: Permutations
    best_scores: jax.Array
    sweep: jax.Array
    idle: jax.Array
    moved: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descend(
    static: _Static,
    settings: _Settings,
    spaces: Space,
    arrays: _Arrays,
    visits: jax.Array,
    first: Permutations | None,
) -> tuple[Permutations, MatchInfo]:
    """Descends in one space after the other, each from what the one before it found.

    Args:
      spaces: with a leading axis.

    Returns:
      Permutations and how it went, with a leading axis.
    """
    known = _known(static, spaces, arrays)
    start = _start(static, settings, spaces, known, arrays, first)

    def step(state: _State, space: Space) -> tuple[_State, Any]:
        if space.weights is None:
            info = _info(static, state.scores, jnp.int32(1), jnp.bool_(True))
        else:
            # What the weights say of the present permutations does not depend on alpha.
            state = state._replace(due=jnp.ones_like(state.due))
            state, info = _swept(static, settings, space, known, arrays, visits, state)
        return state, (state.permutations, info)

    return jax.lax.scan(step, start, spaces)[1]


def _alone(space: Space) -> Space:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], space)


class _Known(NamedTuple):
    """What no permutation changes of a node: rows of `a`, the weights of `b` and their norms."""

    a: Rows
    b: Turned
    norm: jax.Array


Known = dict[str, _Known]


def _known(static: _Static, space: Space, arrays: _Arrays) -> Known:
    found: Known = {}
    for tree in static.trees:
        for chain in tree.chains:
            if space.weights is None or all(place.role == "stat" for place in chain.places):
                continue
            of_a, of_b = (turned(chain, leaves) for leaves in (arrays.leaves_a, arrays.leaves_b))
            found[chain.node] = _Known(
                given_rows(static.spec, chain, of_a, None, space.weights),
                of_b,
                given_rows(static.spec, chain, of_b, None, space.weights).norm,
            )
    return found


def _start(
    static: _Static,
    settings: _Settings,
    space: Space,
    known: Known,
    arrays: _Arrays,
    first: Permutations | None,
) -> _State:
    """The state before the first sweep: the activations' own match where there are any."""
    count = len(static.trees)
    state = _State(
        identity(static.spec) if first is None else first,
        jnp.zeros(count),
        {name: jnp.zeros(_shape(static.spec, name, static.trees)) for name in known},
        jnp.ones(count, bool),
        jnp.ones(count, bool),
    )
    if space.data and (first is None or space.weights is None):
        for index, tree in enumerate(static.trees):
            similar = {
                chain.node: arrays.activations[chain.node]
                for chain in tree.chains
                if chain.node in arrays.activations
            }
            found, score = match_tree(
                static.spec, tree, similar, state.permutations, settings.solver
            )
            state = state._replace(
                permutations={**state.permutations, **found},
                scores=state.scores.at[index].set(score),
            )
    return state


def _shape(spec: PermutationSpec, name: str, found: Sequence[Tree]) -> tuple[int, int, int]:
    chain = next(chain for tree in found for chain in tree.chains if chain.node == name)
    layers, units = _sizes(spec, chain)
    return layers, units, units


def _visit(
    static: _Static,
    settings: _Settings,
    space: Space,
    known: Known,
    arrays: _Arrays,
    index: int,
    state: _State,
) -> _State:
    """Matches one tree if what it depends on has moved."""
    tree = static.trees[index]
    neighbours = jnp.asarray(static.neighbours[index])

    def fresh(state: _State) -> Similarities:
        found = {
            chain.node: _weights(static.spec, chain, known[chain.node], state.permutations)
            for chain in tree.chains
            if chain.node in known
        }
        return {**state.weights, **found}

    def again(state: _State) -> _State:
        weights = jax.lax.cond(state.stale[index], fresh, lambda state: state.weights, state)
        similar = {}
        for chain in tree.chains:
            one = _blended(chain, space, weights, arrays)
            if one is not None:
                similar[chain.node] = one
        found, score = match_tree(static.spec, tree, similar, state.permutations, settings.solver)
        moved = jnp.any(
            jnp.stack([jnp.any(found[name] != state.permutations[name]) for name in found])
        )
        stale = (state.stale | (neighbours & moved)).at[index].set(moved & neighbours[index])
        due = (state.due | (neighbours & moved)).at[index].set(moved & neighbours[index])
        return _State(
            {**state.permutations, **found},
            state.scores.at[index].set(score),
            weights,
            stale,
            due,
        )

    return jax.lax.cond(state.due[index], again, lambda state: state, state)


def _swept(
    static: _Static,
    settings: _Settings,
    space: Space,
    known: Known,
    arrays: _Arrays,
    visits: jax.Array,
    start: _State,
) -> tuple[_State, MatchInfo]:
    """Sweeps until nothing moves or nothing gets better."""
    count = len(static.trees)
    branches = [
        functools.partial(_visit, static, settings, space, known, arrays, index)
        for index in range(count)
    ]

    def sweep(run: _Run) -> _Run:
        turn = visits[run.sweep]
        state = jax.lax.fori_loop(
            0, count, lambda i, state: jax.lax.switch(turn[i], branches, state), run.state
        )
        better = jnp.mean(state.scores) > jnp.mean(run.best_scores)
        best = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), state.permutations, run.best
        )
        same = [
            jnp.all(state.permutations[name] == run.state.permutations[name])
            for name in state.permutations
        ]
        return _Run(
            state,
            best,
            jnp.where(better, state.scores, run.best_scores),
            run.sweep + 1,
            jnp.where(better, 0, run.idle + 1),
            ~jnp.all(jnp.stack(same)),
        )

    def goes_on(run: _Run) -> jax.Array:
        return (run.sweep < settings.sweeps) & (run.idle < settings.patience) & run.moved

    worst = jnp.full(count, -jnp.inf)
    run = _Run(start, start.permutations, worst, jnp.int32(0), jnp.int32(0), jnp.bool_(True))
    run = jax.lax.while_loop(goes_on, sweep, run)
    # Where the best sweep was not the last one, what is known of the last one does not hold.
    last = [jnp.all(run.best[name] == run.state.permutations[name]) for name in run.best]
    stale = run.state.stale | ~jnp.all(jnp.stack(last))
    state = run.state._replace(permutations=run.best, stale=stale)
    return state, _info(static, run.best_scores, run.sweep, ~run.moved)


def _info(static: _Static, scores: jax.Array, sweeps: jax.Array, settled: jax.Array) -> MatchInfo:
    each = {tree.root: scores[i] for i, tree in enumerate(static.trees)}
    return MatchInfo(jnp.mean(scores), sweeps, each, settled)


def match_tree(
    spec: PermutationSpec,
    tree: Tree,
    similar: Similarities,
    permutations: Permutations,
    solver: Solver,
) -> tuple[Permutations, jax.Array]:
    """The best permutations of a tree's nodes under the given similarities, and the mean matched similarity."""
    if not similar:
        return {chain.node: permutations[chain.node] for chain in tree.chains}, jnp.float32(0)
    root = tree.chains[0]
    layers, _ = _sizes(spec, root)
    pairs, inner = _pairs(spec, tree, root, similar, layers, solver)
    columns = assign(pairs[:, 0, 0], solver)
    broken = jnp.any(columns < 0)
    found: Permutations = {}
    _resolve(spec, tree, root, columns[:, None], inner, found)
    units = sum(_sizes(spec, c)[1] for c in tree.chains if c.node in similar) * layers
    value = jnp.sum(jnp.take_along_axis(pairs[:, 0, 0], columns[..., None], axis=-1))
    # What is not finite has no assignment, and no score.
    return found, jnp.where(broken, jnp.nan, value / units).astype(jnp.float32)


def _weights(
    spec: PermutationSpec, chain: Chain, known: _Known, permutations: Permutations
) -> jax.Array:
    """[layers, units, units], the similarity of one node's weights."""
    return compared(known.a, Rows(raw_rows(spec, chain, known.b, permutations), known.norm))


def _blended(
    chain: Chain, space: Space, weights: Similarities, arrays: _Arrays
) -> jax.Array | None:
    """[layers, units, units] of one node in the space, None where nothing speaks of it."""
    data = arrays.activations.get(chain.node) if space.data else None
    if chain.node not in weights:
        return data
    of_weights = weights[chain.node]
    if data is None:
        return of_weights
    share = space.share(chain.node).astype(of_weights.dtype)
    return share * of_weights + (1 - share) * data.astype(of_weights.dtype)


Inner = dict[str, jax.Array]


def _pairs(
    spec: PermutationSpec,
    tree: Tree,
    chain: Chain,
    similar: Similarities,
    layers: int,
    solver: Solver,
) -> tuple[jax.Array, Inner]:
    """What matching two units of a node is worth: themselves, and the best of what is within them.

    Returns:
      [layers, outer units of a, outer units of b, units, units], and for each node within the columns
      [layers, outer of a, outer of b, units] of the best matching for every pair of what it is within.
    """
    size = spec.size(chain.node)
    outer = _sizes(spec, chain)[1] // size
    total = jnp.zeros((layers, outer, outer, size, size))
    if chain.node in similar:
        whole = similar[chain.node].reshape(layers, outer, size, outer, size)
        total = whole.transpose(0, 1, 3, 2, 4)
    inner: Inner = {}
    for child in tree.children(chain):
        pairs, below = _pairs(spec, tree, child, similar, layers, solver)
        columns = assign(pairs, solver)
        value = jnp.sum(jnp.take_along_axis(pairs, columns[..., None], axis=-1), axis=(-1, -2))
        inner |= {**below, child.node: columns}
        worth = value.reshape(layers, outer, size, outer, size).transpose(0, 1, 3, 2, 4)
        total = total + worth
    return total, inner


def _resolve(
    spec: PermutationSpec,
    tree: Tree,
    chain: Chain,
    columns: jax.Array,
    inner: Inner,
    found: Permutations,
) -> None:
    """Reads the permutations of a node and of what is within it off the chosen pairs.

    Args:
      columns: [layers, outer units of a, units], the chosen units of b within the chosen outer units.
    """
    layers, outer, size = columns.shape
    order = (*chain.layers, *chain.outer, chain.node)
    shape = [spec.size(name) for name in order]
    array = columns.reshape(shape)
    parents = (*spec.node(chain.node).parents, chain.node)
    found[chain.node] = jnp.transpose(array, [order.index(name) for name in parents])
    if chain.outer:
        above = _flat(spec, chain, found)
        partners = above[..., None] * size + columns
    else:
        partners = columns
    partners = partners.reshape(layers, outer * size)
    for child in tree.children(chain):
        chosen = jnp.take_along_axis(inner[child.node], partners[:, :, None, None], axis=2)
        _resolve(spec, tree, child, chosen[:, :, 0], inner, found)


def _flat(spec: PermutationSpec, chain: Chain, found: Permutations) -> jax.Array:
    """[layers, outer]: the outer unit of b, counted through, that each outer unit of a is matched with."""
    index: jax.Array | None = None
    for depth, name in enumerate(chain.outer):
        size = spec.size(name)
        columns = found[name].reshape(-1, *(spec.size(n) for n in chain.outer[: depth + 1]))
        columns = columns.reshape(columns.shape[0], -1, size)
        base = jnp.zeros_like(columns[..., :1]) if index is None else index[..., None]
        index = (base * size + columns).reshape(columns.shape[0], -1)
    assert index is not None
    return index
