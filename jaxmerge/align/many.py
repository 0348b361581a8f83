"""Matching of many models: to the first, to each other's mean, or through a common universe of units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.assignment import Solver
from jaxmerge.align.matching import match
from jaxmerge.align.permuting import Permutations, compose, identity, inverse, permute
from jaxmerge.align.spaces import Space
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.tree import flatten

Scheme = Literal["reference", "mean", "universe"]


class ManyInfo(NamedTuple):
    """How a matching of many models went.

    Attributes:
      rounds: how many rounds over the models were made.
      settled: whether the last round moved nothing.
      scores: per model the score of its last match; the first is 1 where it is the reference.
    """

    rounds: int
    settled: bool
    scores: tuple[float, ...]


def match_many(
    spec: PermutationSpec,
    models: Sequence[Any],
    space: Space,
    *,
    scheme: Scheme = "universe",
    x: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    rounds: int = 20,
    key: jax.Array | None = None,
    solver: Solver = "auto",
) -> tuple[list[Permutations], ManyInfo]:
    r"""Finds permutations that bring many models into one order.

    "reference" matches each model to the first. "mean" (MergeMany) matches, in random turns, each model to the mean of
    the others as they are by then, until a round moves nothing. "universe" seeks an order that belongs to no model:

    .. math:: \max_{\pi_1 \ldots \pi_N} \Big\lVert \sum_m \pi_m \theta_m \Big\rVert^2

    (in the measure of the space) by turns between the mean in the universe and the match of every model to it; it
    begins with the models matched to the one that all others fit best. Whatever the scheme, the permutation from model
    i to model j is that from i to the common order and back from it to j (`between`): along a cycle of models these
    come to the identity.

    Args:
      spec: where the units stand.
      models: two trees of parameters or more.
      space: what is compared. Means of models have activations too: those of the function at the mean.
      scheme: see above.
      x, apply_fn, solver: as for `jaxmerge.align.match`.
      rounds: the most rounds over the models.
      key: for the turns; by default ``jax.random.key(0)``.

    Returns:
      For each model the permutations into the common order, and a `ManyInfo`.

    Raises:
      ValueError: fewer than two models, an unknown scheme, and as for `jaxmerge.align.match`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> one = {"fc1": jax.random.normal(jax.random.key(0), (3, 8)), "fc2": jnp.ones((8, 2))}
      >>> spec = jm.align.symmetry(mlp, one, jnp.ones((1, 3)))
      >>> models = [jm.align.permute(spec, {"fc1": jnp.roll(jnp.arange(8), i)}, one) for i in range(3)]
      >>> found, info = jm.align.match_many(spec, models, jm.align.weight_space())
      >>> same = [jm.align.permute(spec, p, m)["fc1"] for p, m in zip(found, models)]
      >>> bool(jnp.all(same[0] == same[1]) & jnp.all(same[1] == same[2])), info.settled
      (True, True)

    Reference:
      Ainsworth et al., Git Re-Basin, ICLR 2023 (MergeMany). Crisostomi et al., C^2M^3: Cycle-Consistent Multi-Model
      Merging, NeurIPS 2024 (the universe; there the maximum is sought by Frank-Wolfe steps).
    """
    if len(models) < 2:
        raise ValueError(f"match_many takes two models or more, found {len(models)}")
    if scheme not in ("reference", "mean", "universe"):
        raise ValueError(f"unknown scheme {scheme!r}; there are 'reference', 'mean' and 'universe'")
    spec = spec.sized({path: np.shape(leaf) for path, leaf in flatten(models[0])[0].items()})
    key = jax.random.key(0) if key is None else key

    def fitted(
        target: Any, model: Any, start: Permutations | None = None
    ) -> tuple[Permutations, float]:
        found, info = match(
            spec, target, model, space, x=x, apply_fn=apply_fn, start=start, key=key, solver=solver
        )
        return found, float(info.score)

    def to_one(reference: int) -> tuple[list[Permutations], list[float]]:
        found = [
            (identity(spec), 1.0) if i == reference else fitted(models[reference], model)
            for i, model in enumerate(models)
        ]
        return [p for p, _ in found], [score for _, score in found]

    if scheme == "reference":
        permutations, scores = to_one(0)
        return permutations, ManyInfo(1, True, tuple(scores))
    if scheme == "universe":
        starts = [to_one(i) for i in range(len(models))]
        permutations, scores = max(starts, key=lambda start: sum(start[1]))
    else:
        permutations, scores = [identity(spec)] * len(models), [0.0] * len(models)
    for turn in range(rounds):
        moved = False
        for i in np.asarray(jax.random.permutation(jax.random.fold_in(key, turn), len(models))):
            left_out = int(i) if scheme == "mean" else None
            target = _mean(spec, models, permutations, left_out)
            # Later rounds go on from where the model stands: another start could leave a better order.
            first = permutations[i] if turn or scheme == "universe" else None
            found, scores[i] = fitted(target, models[i], first)
            moved |= not _same(found, permutations[i])
            permutations = [found if j == i else p for j, p in enumerate(permutations)]
        if not moved:
            return permutations, ManyInfo(turn + 1, True, tuple(scores))
    return permutations, ManyInfo(rounds, False, tuple(scores))


def between(
    spec: PermutationSpec, permutations: Sequence[Permutations], source: int, target: int
) -> Permutations:
    """The permutation that brings one of many matched models into another's order, by way of the common one.

    Args:
      spec: with sizes.
      permutations: as `match_many` gives them.
      source, target: which models.

    Example:
      >>> spec = PermutationSpec.from_axes({"w": ("P0",)}, sizes={"P0": 3})
      >>> to_common = [{"P0": jnp.array([0, 1, 2])}, {"P0": jnp.array([1, 2, 0])}]
      >>> between(spec, to_common, 0, 1)["P0"].tolist()
      [2, 0, 1]
    """
    return compose(spec, permutations[source], inverse(spec, permutations[target]))


def _mean(
    spec: PermutationSpec,
    models: Sequence[Any],
    permutations: Sequence[Permutations],
    left_out: int | None,
) -> Any:
    aligned = [
        permute(spec, p, model)
        for i, (p, model) in enumerate(zip(permutations, models, strict=True))
        if i != left_out
    ]
    return jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *aligned)


def _same(one: Permutations, other: Permutations) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)
