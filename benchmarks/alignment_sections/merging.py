"""Every way in which the section on quality merges two networks."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from alignment_sections.networks import Network, flat_groups

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
AVERAGE, WEIGHT, ACTIVATION = "average", "weight", "activation"
HALF, CHOSEN = "dual, alpha .5", "dual, alpha chosen"
ZIP, DUAL_ZIP, PARTIAL = "ZipIt", "dual zip", "partial zip"
ENSEMBLE, ALONE = "ensemble", "each on its own task"
SPLIT, FLAT = "dual .5, heads split", "dual .5, groups flat"
REFRESHED = 500
"""How many of the matched images running statistics are computed anew on, at most."""
KEPT_APART = 0.5
"""The share of the depth that a partial zip merges."""


class Merging:
    """Two networks, and the images that they are matched on.

    Running statistics of what is merged are computed anew on these images.

    Attributes:
      network: what both are.
      a, b: their variables.
      x: [n, side, side, 1].
      spec: the units that may be permuted.
    """

    def __init__(self, network: Network, a: Any, b: Any, x: jax.Array) -> None:
        self.network, self.a, self.b, self.x = network, a, b, x
        self.spec = jm.align.symmetry(network.apply, a, x)
        self._data = jm.align.activation_similarity(self.spec, network.apply, a, b, [x])

    def permutations(self) -> dict[str, jm.align.Permutations]:
        """Of b's units, by method."""
        spaces = {WEIGHT: jm.align.weight_space(), ACTIVATION: jm.align.activation_space()}
        found: dict[str, jm.align.Permutations] = {AVERAGE: jm.align.identity(self.spec)}
        for name, space in {**spaces, HALF: jm.align.dual_space(0.5)}.items():
            found[name] = self._matched(self.spec, space, self._data)
        return found

    def path(self) -> list[jm.align.Permutations]:
        """In dual space for every one of `ALPHAS`."""
        shares = jnp.asarray(ALPHAS)
        found, _ = jm.align.match_path(self.spec, self.a, self.b, shares, similarities=self._data)
        return [{name: p[i] for name, p in found.items()} for i in range(len(ALPHAS))]

    def aligned(self, permutations: Mapping[str, Any]) -> Any:
        """b with its units permuted."""
        return jm.align.permute(self.spec, permutations, self.b)

    def averaged(self, permutations: Mapping[str, Any]) -> Any:
        """The mean of a and the permuted b."""
        return self._mean(self.aligned(permutations))

    def zips(self) -> dict[str, Any]:
        """Zipped by activations, and in dual space."""
        spaces = {ZIP: jm.align.activation_space(), DUAL_ZIP: jm.align.dual_space(0.5)}
        return {
            name: finished(
                self.network, jm.align.zipit(*self._all(), space, **self._inputs())[0], self.x
            )
            for name, space in spaces.items()
        }

    def partly_zipped(self) -> list[Any]:
        """Both networks with their first layers zipped by activations; tails of their own.

        None where one stream of units runs through the whole network: nothing before its end is merged alone.
        """
        if isinstance(self.network.module, jm.models.ViT):
            return []
        params, axes, _ = jm.align.partial_zip(
            *self._all(), jm.align.activation_space(), KEPT_APART, **self._inputs()
        )
        leaves, definition = jax.tree.flatten(params)
        shared = [axis is None for axis in jax.tree.leaves(axes, is_leaf=lambda one: one is None)]
        return [
            finished(
                self.network,
                definition.unflatten(
                    leaf if same else leaf[i] for leaf, same in zip(leaves, shared, strict=True)
                ),
                self.x,
            )
            for i in range(2)
        ]

    def not_symmetries(self) -> dict[str, Any]:
        """Merged by permutations that change the function: heads split, groups of channels not minded."""
        space, found = jm.align.dual_space(0.5), {}
        split = jm.align.split_trees(self.spec)
        if split != self.spec:
            p = self._matched(split, space, None)
            found[SPLIT] = self._mean(jm.align.permute(split, p, self.b))
        if self.network.grouped:
            flat = flat_groups(self.x, self.a)
            p = self._matched(flat, space, None)
            found[FLAT] = self._mean(jm.align.permute(flat, p, self.b))
        return found

    def similarity(
        self, permutations: Mapping[str, jm.align.Permutations]
    ) -> dict[str, tuple[float, float]]:
        """Per permutation the mean similarity of matched units, in weights and in activations.

        The mean over sets of units of each set's mean; several sets within each head are left out.
        """
        left_out = {
            child.name
            for node in self.spec.nodes
            for child in self.spec.children(node.name)
            if len(self.spec.children(node.name)) > 1
        }
        found = {}
        for name, p in permutations.items():
            weights = jm.align.weight_similarity(self.spec, self.a, self.b, p)
            means = []
            for similar in (weights, self._data):
                taken = [
                    np.mean(np.asarray(one)[np.arange(len(one)), self._counted(p, node)])
                    for node, one in similar.items()
                    if node not in left_out
                ]
                means.append(float(np.mean(taken)))
            found[name] = (means[0], means[1])
        return found

    def _counted(self, permutations: Mapping[str, Any], node: str) -> np.ndarray:
        """Where each unit of a node goes, the units of all that it is within counted through."""
        own = np.asarray(permutations[node])
        for parent in self.spec.node(node).parents:
            return (self._counted(permutations, parent)[:, None] * own.shape[-1] + own).ravel()
        return own

    def _matched(
        self, spec: jm.align.PermutationSpec, space: jm.align.Space, data: Any
    ) -> jm.align.Permutations:
        given = self._inputs() if data is None else {"similarities": data}
        return jm.align.match(spec, self.a, self.b, space, **given)[0]

    def _mean(self, b: Any) -> Any:
        mean = jax.tree.map(lambda one, other: (one + other) / 2, self.a, b)
        return finished(self.network, mean, self.x)

    def _all(self) -> tuple[jm.align.PermutationSpec, list[Any]]:
        return self.spec, [self.a, self.b]

    def _inputs(self) -> dict[str, Any]:
        return {"x": self.x, "apply_fn": self.network.apply}


def apart(one: jm.align.Permutations, other: jm.align.Permutations) -> float:
    """Percent of units that two permutations match differently."""
    differ = [np.ravel(np.asarray(one[name]) != np.asarray(other[name])) for name in one]
    return 100 * float(np.mean(np.concatenate(differ)))


@functools.partial(jax.jit, static_argnums=0)
def finished(network: Network, variables: Any, x: jax.Array) -> Any:
    """With running statistics computed anew, if there are any."""
    if not network.batch_norm:
        return variables
    return jm.align.reset_batch_norm(
        network.apply_train, variables, [x[: REFRESHED // network.thrift]]
    )
