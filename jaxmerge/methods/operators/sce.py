"""SCE: select by variance, calculate weights from energies, erase minority signs."""

import functools
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import (
    Chunk,
    Found,
    LeafMethod,
    Measure,
    OfSelected,
    Select,
    Sums,
    Values,
)
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register

SMALLEST = 1.1754944e-38


@register
def sce(
    *,
    among: Literal["all", "varying"] = "all",
    weak: Literal["energy", "uniform"] = "energy",
) -> MergeMethod:
    r"""SCE: keeps the entries on which the models differ most, weighs the models by energy, erases minority signs.

    .. math:: \theta = \theta_0 + \lambda \frac{\sum_i a_i d_i m_i}{\sum_i a_i m_i}, \quad
       a_i = \frac{\|d_i\|^2}{\sum_j \|d_j\|^2}, \quad m_i = [\mathrm{sign}\, d_i = \mathrm{sign} \textstyle\sum_j d_j]

    with d_i zero but at the floor(select_topk * n) entries of largest variance across the models, of equal ones the
    lower index. The sign of 0 is +. One model has no variance to select by and stays whole.

    Args:
      among: select_topk is a share of "all" entries, or of those where the models differ at all ("varying"; models that
        agree then give the base below select_topk = 1).
      weak: weights are relative however small the task vectors ("energy"), or equal where the sum over the models of
        the mean square is below 1e-6 ("uniform").

    Returns:
      A `MergeMethod` with hyperparameters select_topk and scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([-1.0, 1.0])}
      >>> jm.merge("sce", [a, b], base=base, select_topk=0.5)["w"]
      Array([2., 0.], dtype=float32)

    Reference:
      Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024.
    """
    hyperparams = {
        "select_topk": Hyperparameter(
            1.0,
            0.0,
            1.0,
            "share of the entries that is kept, by variance across the models",
            kind="fraction",
            differentiable=False,
        ),
        "scale": SCALE,
    }
    measures: list[Measure] = []
    if among == "varying":
        measures.append(Sums("varying", _varying, lambda sums, values, found: sums, False))
        measures.append(Select("selection", _spread, _counts_of_varying, reads_found=True))
    else:
        measures.append(Select("selection", _spread, _counts))
    measures.append(
        Sums(
            "energy",
            functools.partial(_energies, among),
            lambda sums, values, found: _shares(weak, sums),
            selected=OfSelected("selection", _squares),
        )
    )
    leaf = LeafMethod(
        "sce",
        functools.partial(_merge, among),
        MappingProxyType(hyperparams),
        tuple(measures),
    )
    return from_leaf(leaf, summary="Select by variance, weigh by energy, erase minority signs.")


def _spread(chunk: Chunk) -> list[jax.Array]:
    """One array that grows with the variance across the models, and that rounds in one way wherever it is computed."""
    sources = chunk.sources()
    gaps = [jnp.abs(a - b) for i, a in enumerate(sources) for b in sources[:i]]
    if len(gaps) == 1:
        return [gaps[0].astype(jnp.float32)]
    # The sum of the squared gaps is the variance times models^2. The floor keeps a compiler from fusing product and
    # sum, which rounds differently.
    squares = [jnp.where(gap > 0, jnp.maximum(gap * gap, SMALLEST), 0.0) for gap in gaps]
    total = functools.reduce(jnp.add, squares, jnp.zeros_like(sources[0]))
    return [total.astype(jnp.float32)]


def _varying(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    sources = chunk.sources()
    differs = functools.reduce(jnp.maximum, sources) > functools.reduce(jnp.minimum, sources)
    return jnp.sum(differs, dtype=jnp.uint32)


def _counts(values: Values, size: int) -> list[tuple[jax.Array, ...]]:
    return [(values["select_topk"].count,)]


def _counts_of_varying(values: Values, size: int, found: Found) -> list[tuple[jax.Array, ...]]:
    share, varying = values["select_topk"].value, found["varying"]
    count = jnp.floor(share * varying.astype(jnp.float32)).astype(jnp.uint32)
    return [(jnp.where(share >= 1, jnp.uint32(size), jnp.minimum(count, varying)),)]


def _selected(among: str, chunk: Chunk, found: Found) -> list[jax.Array]:
    deltas = chunk.deltas()
    if len(deltas) == 1 and among == "all":
        return deltas
    ((selection,),) = found["selection"]
    kept = chunk.keep(_spread(chunk)[0], selection)
    return [jnp.where(kept, delta, 0.0) for delta in deltas]


def _energies(among: str, chunk: Chunk, values: Values, found: Found) -> jax.Array:
    """[models]: the mean squares."""
    deltas = _selected(among, chunk, found)
    return jnp.stack([jnp.sum(delta * delta / chunk.size) for delta in deltas])


def _squares(chunk: Chunk) -> list[jax.Array]:
    return [delta * delta / chunk.size for delta in chunk.deltas()]


def _shares(weak: str, energy: jax.Array) -> Any:
    total = jnp.sum(energy)
    strong = total >= 1e-6 if weak == "uniform" else total > 0
    return jnp.where(strong, energy / jnp.where(strong, total, 1.0), 1.0 / len(energy))


def _merge(among: str, chunk: Chunk, values: Values, found: Found) -> jax.Array:
    deltas, share = _selected(among, chunk, found), found["energy"]
    positive = functools.reduce(jnp.add, deltas) >= 0
    agrees = [(delta != 0) & ((delta > 0) == positive) for delta in deltas]
    parts = [jnp.where(a, share[i] * deltas[i], 0.0) for i, a in enumerate(agrees)]
    weights = [jnp.where(a, share[i], 0.0) for i, a in enumerate(agrees)]
    divisor = functools.reduce(jnp.add, weights)
    merged = functools.reduce(jnp.add, parts) / jnp.where(divisor > 0, divisor, 1.0)
    return chunk.with_base(values["scale"] * merged)
