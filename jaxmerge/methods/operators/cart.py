"""CART: the mean of the models, plus what each differs from it by, in low rank."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import spectra
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def cart() -> MergeMethod:
    r"""CART: task vectors measured from the mean of the models, cut to low rank, added back to the mean.

    .. math:: \theta = \bar\theta + \lambda \sum_t \mathrm{SVD}_r(\theta_t - \bar\theta)

    r is floor(rank * min(m, n)), at least 1 where the rank is not 0. Tensors that are not matrices get the mean. A base
    is not used.

    Returns:
      A `MergeMethod` with hyperparameters rank (a share of the full one; the paper's 8 % by default) and scale.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.diag(jnp.array([4.0, 1.0]))}, {"w": jnp.diag(jnp.array([0.0, 1.0]))}
      >>> jm.merge("cart", [a, b], scale=0.5)["w"].round(2)
      Array([[2., 0.],
             [0., 1.]], dtype=float32)

    Reference:
      Choi et al., Revisiting Weight Averaging for Model Merging, 2024.
    """
    rank = Hyperparameter(
        0.08,
        0.0,
        1.0,
        "share of the singular triplets of each difference from the mean that is kept",
        kind="fraction",
        differentiable=False,
        search=(0.0, 0.5),
        share_of="rank",
    )
    leaf = LeafMethod(
        "cart",
        _merge,
        MappingProxyType({"rank": rank, "scale": SCALE}),
        (Local("spectrum", _spectrum),),
        base="unused",
        sizes=_sizes,
        cuts="never",
    )
    return from_leaf(leaf, summary="Mean plus the differences from it in low rank.")


def _sizes(shape: tuple[int, ...], inputs: tuple[int, ...], models: int) -> Mapping[str, int]:
    return {"rank": min(shape) if spectra.is_matrix(shape, inputs) else 0}


def _mean(chunk: Chunk) -> jax.Array:
    return functools.reduce(jnp.add, chunk.sources()) / len(chunk.models)


def _spectrum(chunk: Chunk) -> spectra.Triplets | None:
    """The models' triplets in one row."""
    if not spectra.has_spectrum(chunk):
        return None
    mean = _mean(chunk)
    differences = spectra.matrices(chunk, [source - mean for source in chunk.sources()])
    return spectra.decompose(differences).side_by_side()


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    mean, spectrum = _mean(chunk), found["spectrum"]
    if spectrum is None:
        return mean
    rank, models = values["rank"], len(chunk.models)
    kept = jnp.maximum(rank.count, (rank.value > 0).astype(jnp.uint32))
    place = jnp.tile(jnp.arange(spectrum.s.size // models, dtype=jnp.uint32), models)
    left = jnp.where(place < kept, spectrum.s, 0.0)
    return mean + values["scale"] * chunk.from_matrix(
        spectra.product(spectrum.u * left[None], spectrum.v)
    )
