"""Partial zip: the first layers of several models become one, each keeps its own from there on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.assignment import Solver
from jaxmerge.align.sites import find_sites
from jaxmerge.align.spaces import Space
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.align.symmetry.values import Position
from jaxmerge.align.trees import trees
from jaxmerge.align.zipping.program import Method, ZipInfo, carried_over, zipped
from jaxmerge.tree import flatten, nearest, unflatten


def partial_zip(
    spec: PermutationSpec,
    models: Sequence[Any],
    space: Space,
    upto: float | Sequence[str],
    *,
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    a: Any = 0.5,
    b: Any = 1.0,
    method: Method = "greedy",
    key: jax.Array | None = None,
    sweeps: int = 100,
    patience: int = 5,
    solver: Solver = "auto",
) -> tuple[Any, Any, ZipInfo]:
    """Zips the first layers of models and leaves every model its own tail, which reads the shared units.

    ``jax.vmap(apply_fn, in_axes=(axes, None))(params, x)`` gives all models' outputs and computes what they share once.

    Args:
      spec, models, space: as for `jaxmerge.align.zipit`.
      upto: the roots of the trees of nodes to merge, or a share in (0, 1] of all of them, those whose units the program
        looks at first. Of a share, trees that are computed from others that are not merged are left out (the layers
        within a residual stage that goes on beyond it).
      Others: as for `jaxmerge.align.zipit`.

    Returns:
      Parameters (leaves that models keep for themselves have a leading axis [models]), the axes for `jax.vmap` in a
      tree of the same form (0 for those, None for shared leaves), and a `ZipInfo`.

    Raises:
      ValueError: an unknown root, a named tree that is computed from one that is not named, a share outside (0, 1] or
        too small for any tree, and as for `jaxmerge.align.zipit`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(jnp.tanh(x @ p["fc1"]) @ p["fc2"]) @ p["fc3"]
      >>> shapes = {"fc1": (3, 8), "fc2": (8, 8), "fc3": (8, 2)}
      >>> models = [{n: jax.random.normal(jax.random.key(i), s) for n, s in shapes.items()} for i in (0, 1)]
      >>> x = jax.random.normal(jax.random.key(2), (16, 3))
      >>> spec = jm.align.symmetry(mlp, models[0], x)
      >>> params, axes, _ = jm.align.partial_zip(
      ...     spec, models, jm.align.activation_space(), ["fc1"], x=x, apply_fn=mlp)
      >>> axes, jax.vmap(mlp, in_axes=(axes, None))(params, x).shape
      ({'fc1': None, 'fc2': 0, 'fc3': 0}, (2, 16, 2))

    Reference:
      Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024 (partial zipping).
    """
    like, definition = flatten(models[0])
    spec = spec.sized({path: np.shape(leaf) for path, leaf in like.items()})
    roots = _chosen(spec, models[0], upto, x, apply_fn)
    program, leaves, info = zipped(
        spec, models, space, x, apply_fn, roots, a, b, method, None, key, sweeps, patience, solver
    )
    each = carried_over(program, leaves, info)
    inside = {chain.node for tree in program.trees for chain in tree.chains}
    shared = _shared(spec, inside)
    params, axes = [], []
    for path in like:
        stack = jnp.stack([one[path] for one in each])
        kept = jnp.mean(stack, axis=0) if path in shared else stack
        params.append(kept.astype(leaves[0][path].dtype))
        axes.append(None if path in shared else 0)
    return unflatten(definition, params), unflatten(definition, axes), info


def _shared(spec: PermutationSpec, inside: set[str]) -> set[str]:
    """The leaves that produce merged units from nothing but merged units."""
    found = set()
    for path, binding in spec.leaves:
        moving = [axis for _, axis in binding.moving()]
        free = {n for axis in moving for n in axis.nodes() if not spec.node(n).fixed}
        if free and free <= inside and any(axis.role != "in" for axis in moving):
            found.add(path)
    return found


def _sources(spec: PermutationSpec) -> dict[str, set[str]]:
    """Per root of a tree the roots of the trees that its units are computed from."""
    root = {chain.node: tree.root for tree in trees(spec) for chain in tree.chains}
    found: dict[str, set[str]] = {name: set() for name in root.values()}
    for _, binding in spec.leaves:
        axes = [axis for _, axis in binding.moving()]
        made = {root[n] for axis in axes if axis.role != "in" for n in axis.nodes() if n in root}
        read = {root[n] for axis in axes if axis.role == "in" for n in axis.nodes() if n in root}
        for name in made:
            found[name] |= read - {name}
    return found


def _chosen(
    spec: PermutationSpec,
    model: Any,
    upto: float | Sequence[str],
    x: Any,
    apply_fn: Callable[..., Any] | None,
) -> list[str]:
    sources = _sources(spec)
    if not isinstance(upto, float | int):
        for name in upto:
            if name not in sources:
                raise ValueError(f"no tree has the root {name!r}{nearest(name, sources)}")
            left = sorted(sources[name] - set(upto))
            if left:
                raise ValueError(f"{name!r} is computed from {left[0]!r}, which is not merged")
        return list(upto)
    if not 0 < upto <= 1:
        raise ValueError(f"upto: expected a share in (0, 1], found {upto}")
    if x is None or apply_fn is None:
        raise ValueError("a share of the depth needs the program: give x= and apply_fn=")
    batch = x[0] if isinstance(x, list) else x
    sites = find_sites(spec, apply_fn, model, *(batch if isinstance(batch, tuple) else (batch,)))
    # Heads and groups are looked at where what is within them is.
    places: dict[str, Position] = {}
    for tree in trees(spec):
        seen = [sites[chain.node][0].position for chain in tree.chains if sites[chain.node]]
        if seen:
            places[tree.root] = max(seen)
    order = sorted((name for name in sources if name in places), key=places.__getitem__)
    chosen = set(order[: math.floor(upto * len(sources) + 1e-9)])
    while any(sources[name] - chosen for name in chosen):
        chosen = {name for name in chosen if not sources[name] - chosen}
    if not chosen:
        raise ValueError(f"upto: within the first {upto} of the layers no tree is complete")
    return [name for name in order if name in chosen]
