"""What the methods' benchmarks merge: decoders, and for any registered method all that it needs."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from jaxmerge.methods import LeafMethod, Local, MergeMethod, Select

LAYERS = 4
"""Layers of a decoder whose size is given in elements."""


SMALLER = {"spectral": 4, "solving": 64}
"""How many times smaller the models are for kinds of methods that compute rather than move data."""


@dataclass(frozen=True)
class Inputs:
    """What a merge takes, on the device."""

    models: list[Any]
    base: Any
    extras: dict[str, Any] | None
    key: jax.Array | None

    @property
    def trees(self) -> list[Any]:
        return [*self.models, *([] if self.base is None else [self.base])]

    @property
    def size(self) -> int:
        return nbytes((self.trees, self.extras))


def kind(leaf: LeafMethod) -> str:
    """What sort of work a method does, from what its leaf method declares.

    elementwise  nothing is measured before, nothing drawn
    random       draws, measures nothing
    measured     takes sums over a tensor or the model first
    trimmed      takes order statistics first, of a tensor, a model or within rows
    spectral     takes a tensor apart in `init`
    solving      solves a system of equations for each candidate
    """
    apart = any(isinstance(one, Local) for one in leaf.measures)
    if leaf.cuts == "never":
        return "spectral" if apart else "solving"
    if apart or any(isinstance(one, Select) for one in leaf.measures):
        return "trimmed"
    if leaf.measures:
        return "measured"
    return "random" if leaf.random else "elementwise"


def models_for(sort: str, elements: int, seed: int) -> tuple[Any, ...]:
    """A base and two fine-tunes of about so many elements, or fewer for the kinds in `SMALLER`."""
    return trees(LAYERS, width_of(elements // SMALLER.get(sort, 1)), 3, seed)


def width_of(elements: int) -> int:
    """The width at which `LAYERS` layers and their embedding have about so many elements."""
    return max(64, 64 * round(math.sqrt(elements / (4 + 11.5 * LAYERS)) / 64))


def decoder(layers: int, width: int, seed: int) -> dict[str, Any]:
    """Nine tensors a layer, an embedding and a norm: 11.5 width^2 elements a layer and 4 width^2 beside."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (width, width),
        "k": (width // 4, width),
        "v": (width // 4, width),
        "o": (width, width),
        "gate": (3 * width, width),
        "up": (3 * width, width),
        "down": (width, 3 * width),
        "norm1": (width,),
        "norm2": (width,),
    }

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(shape[-1]))

    blocks = {f"layers_{i}": {n: draw(s) for n, s in shapes.items()} for i in range(layers)}
    return {"embed": draw((4 * width, width)), "norm": draw((width,)), **blocks}


@functools.cache
def trees(layers: int, width: int, count: int, seed: int) -> tuple[Any, ...]:
    """A base and `count - 1` fine-tunes of it."""
    base = decoder(layers, width, seed)
    tuned = [
        jax.tree.map(lambda x, d: x + np.float32(0.1) * d, base, decoder(layers, width, seed + i))
        for i in range(1, count)
    ]
    return tuple(jax.tree.map(jnp.asarray, tree) for tree in (base, *tuned))


def inputs(
    method: MergeMethod, base: Any, tuned: list[Any], seed: int, *, stacked: str | None = None
) -> Inputs:
    """Two models where the method takes two, with the base, extras and key that it needs; see `extras`."""
    most = method.models[1]
    count = 2 if most is None else min(2, most)
    models = tuned[: count - 1] if method.base == "source" else tuned[:count]
    sources = len(models) + (method.base == "source")
    return Inputs(
        models,
        None if method.base == "unused" else base,
        extras(method, base, sources, seed, stacked),
        jax.random.key(seed) if method.random else None,
    )


def extras(
    method: MergeMethod, tree: Any, sources: int, seed: int, stacked: str | None
) -> dict[str, Any] | None:
    """What the method cannot do without beside the models: random, with the shapes of the tree.

    Leaves whose paths begin with `stacked` hold layers on their first axis.
    """
    rng = np.random.default_rng(seed + 100)

    def one(spec: Any) -> Any:
        if spec.kind == "like":
            return jax.tree.map(
                lambda x: jnp.asarray(np.abs(rng.standard_normal(x.shape, dtype=np.float32))), tree
            )
        leaves = jm.tree.flatten(tree)[0]
        axis = -1 if spec.side == "inputs" else -2
        return {
            path: _gram(rng, leaf.shape[:-2], leaf.shape[axis])
            for path, leaf in leaves.items()
            if leaf.ndim - (stacked is not None and path.startswith(stacked)) == 2
        }

    needed = {name: spec for name, spec in method.extras.items() if spec.required}
    found = {
        name: one(spec) if spec.per == "shared" else [one(spec) for _ in range(sources)]
        for name, spec in needed.items()
    }
    return found or None


def defaults(method: MergeMethod, sources: int) -> dict[str, Any]:
    """The default hyperparameters as arrays: the programs that are timed take them as data."""
    return {
        name: jnp.full((sources,) if spec.scope == "model" else (), spec.default, jnp.float32)
        for name, spec in method.hyperparams.items()
    }


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of what describes them."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def weighted_sum(count: int) -> Any:
    """The ruler: a jitted weighted sum of `count` trees."""
    weights = jnp.linspace(0.4, 0.6, count)

    @jax.jit
    def add(weights: jax.Array, trees: list[Any]) -> Any:
        def one(*leaves: jax.Array) -> jax.Array:
            terms = [weights[i] * leaf for i, leaf in enumerate(leaves)]
            return functools.reduce(jnp.add, terms)

        return jax.tree.map(one, *trees)

    return functools.partial(add, weights)


def merging(method: MergeMethod, given: Inputs) -> dict[str, Any]:
    """The arguments of `jm.merge` beside the method."""
    options: Mapping[str, Any] = {"base": given.base, "key": given.key, "extras": given.extras}
    return {name: value for name, value in options.items() if value is not None}


def _gram(rng: np.random.Generator, layers: tuple[int, ...], size: int) -> jax.Array:
    half = rng.standard_normal((*layers, size, size), dtype=np.float32) / np.float32(size)
    return jnp.asarray(half @ half.swapaxes(-1, -2))
