"""TSV-Merge: each task's leading singular vectors, side by side, made orthogonal."""

import functools
import math
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import spectra
from jaxmerge.methods.operators.task_vectors import SCALE, WEIGHT
from jaxmerge.methods.registry import register


@register
def tsv(*, rank: float = 1.0) -> MergeMethod:
    r"""TSV-Merge: the leading singular vectors of all task vectors in one basis, made orthogonal.

    .. math:: \theta = \theta_0 + \lambda \hat U \Sigma \hat V^T, \quad
       U = [U_1 \dots U_T], \ \Sigma = \mathrm{diag}(w_1 \Sigma_1, \dots, w_T \Sigma_T), \ V = [V_1 \dots V_T]

    with the top floor(rank * min(m, n) / T), at least 1, singular triplets of every d_t, and the polar factor
    :math:`\hat U = P Q^T` of :math:`U = P D Q^T`. Singular values below 1e-6 of the largest are 0. Tensors that are not
    matrices get :math:`\lambda \sum_t w_t d_t / T`.

    Args:
      rank: how many triplets of each task are kept, as a multiple of min(m, n) / T (static: the polar factors depend on
        it).

    Returns:
      A `MergeMethod` with hyperparameters weight [models] and scale. Needs a base.

    Raises:
      ValueError: rank is not positive.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = ({"w": jnp.diag(jnp.array(x))} for x in ([0.0, 0.0], [2.0, 0.0], [0.0, 3.0]))
      >>> jnp.abs(jm.merge("tsv", [a, b], base=base)["w"]).round(2)
      Array([[2., 0.],
             [0., 3.]], dtype=float32)

    Reference:
      Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025.
    """
    if not rank > 0:
        raise ValueError(f"tsv: rank must be positive, found {rank}")
    leaf = LeafMethod(
        "tsv",
        _merge,
        MappingProxyType({"weight": WEIGHT, "scale": SCALE}),
        (Local("spectrum", functools.partial(_spectrum, rank)),),
        cuts="never",
    )
    return from_leaf(leaf, summary="Leading singular vectors of all tasks, made orthogonal.")


def _spectrum(rank: float, chunk: Chunk) -> spectra.Triplets | None:
    """Orthogonal factors with the tasks' singular values between them, [models * kept]."""
    if not spectra.has_spectrum(chunk):
        return None
    full = spectra.decompose(spectra.matrices(chunk, chunk.deltas()))
    kept = max(math.floor(rank * full.s.shape[-1] / len(chunk.models)), 1)
    u, s, v = full.top(kept).side_by_side()
    return spectra.Triplets(spectra.polar(u), s, spectra.polar(v))


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    weight, spectrum = values["weight"], found["spectrum"]
    if spectrum is None:
        parts = [weight[i] * delta for i, delta in enumerate(chunk.deltas())]
        delta = functools.reduce(jnp.add, parts) / len(parts)
    else:
        weighted = jnp.repeat(weight, spectrum.s.size // weight.size) * spectrum.s
        delta = chunk.from_matrix(spectra.product(spectrum.u * weighted[None], spectrum.v))
    return chunk.with_base(values["scale"] * delta)
