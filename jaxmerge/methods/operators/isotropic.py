"""Isotropic merging: a flat spectrum, in which no task's directions outweigh another's."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.counting import count
from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import spectra
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register


@register
def iso_c() -> MergeMethod:
    r"""Iso-C: the sum of the task vectors with all its singular values made equal.

    .. math:: \theta = \theta_0 + \lambda U \left[(1 - \mu) \Sigma + \mu \bar\sigma I\right] V^T, \quad
       \textstyle\sum_t d_t = U \Sigma V^T

    with the mean over the nonzero singular values: those above 1e-6 of the largest. Tensors that are not matrices get
    the mean of the task vectors, times :math:`\lambda`.

    Returns:
      A `MergeMethod` with hyperparameters scale and mixing (:math:`\mu`: 1 is the paper's flat spectrum, 0 the plain
      sum). Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> jnp.abs(jm.merge("iso_c", [a], base=base)["w"]).round(2)
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Reference:
      Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025.
    """
    mixing = Hyperparameter(1.0, 0.0, 1.0, "from the sum's own spectrum (0) to a flat one (1)")
    leaf = LeafMethod(
        "iso_c",
        _merge_flat,
        MappingProxyType({"scale": SCALE, "mixing": mixing}),
        (Local("flat", _flat),),
        cuts="never",
    )
    return from_leaf(leaf, summary="Sum of the task vectors with a flat spectrum.")


@register
def iso_cts(*, common: float = 0.8) -> MergeMethod:
    r"""Iso-CTS: a subspace that all tasks share, each task's strongest directions outside it, one flat spectrum.

    .. math:: \theta = \theta_0 + \lambda \bar\sigma \, \mathrm{polar}[U_c\, U_1 \dots U_T] \,
       \mathrm{polar}[V_c\, V_1 \dots V_T]^T

    With r = min(m, n), every task has s = round((r - floor(common r)) / T) directions of its own, at most floor(r / T).
    U_c, V_c are the top r - T s singular vectors of sum_t d_t; U_t, V_t the top s of d_t - U_c U_c^T d_t; the mean runs
    over all their nonzero singular values. U spans outputs, as the layout says. Tensors that are not matrices get the
    mean of the task vectors, times :math:`\lambda`.

    Args:
      common: share of the rank that goes to the common subspace (static: the polar factors depend on it).

    Returns:
      A `MergeMethod` with the hyperparameter scale. Needs a base.

    Raises:
      ValueError: common is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = ({"w": jnp.diag(jnp.array(x))} for x in ([0.0, 0.0], [4.0, 0.0], [0.0, 2.0]))
      >>> jnp.abs(jm.merge("iso_cts", [a, b], base=base)["w"]).round(2)
      Array([[3., 0.],
             [0., 3.]], dtype=float32)

    Reference:
      Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"iso_cts: common must lie in [0, 1], found {common}")
    leaf = LeafMethod(
        "iso_cts",
        _merge_joined,
        MappingProxyType({"scale": SCALE}),
        (Local("joined", functools.partial(_joined, common)),),
        cuts="never",
    )
    return from_leaf(leaf, summary="Common and task-specific directions with a flat spectrum.")


def _sum(chunk: Chunk) -> jax.Array:
    return functools.reduce(jnp.add, chunk.deltas())


def _flat(chunk: Chunk) -> jax.Array | None:
    if not spectra.has_spectrum(chunk):
        return None
    u, s, v = spectra.decompose(chunk.as_matrix(_sum(chunk)))
    return chunk.from_matrix(spectra.mean_of_nonzero(s) * spectra.product(u, v))


def _merge_flat(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    flat, total = found["flat"], _sum(chunk)
    if flat is None:
        return chunk.with_base(values["scale"] * (total / len(chunk.models)))
    # The spectrum is linear in the mixing, and so is the matrix: a candidate needs no product.
    mixing = values["mixing"]
    return chunk.with_base(values["scale"] * ((1.0 - mixing) * total + mixing * flat))


def _joined(common: float, chunk: Chunk) -> jax.Array | None:
    if not spectra.has_spectrum(chunk):
        return None
    deltas = spectra.matrices(chunk, chunk.deltas())
    tasks, rank = len(chunk.models), min(chunk.shape)
    each = min(round((rank - int(count(common, rank))) / tasks), rank // tasks)
    shared = spectra.decompose(jnp.sum(deltas, axis=0)).top(rank - tasks * each)
    parts = [shared]
    if each:
        inside = spectra.product(shared.u[None], spectra.product(shared.u.T[None], deltas))
        # What rounding leaves of a task vector inside the common subspace is no direction.
        own = spectra.decompose(deltas - inside, spectra.RANK * spectra.norms(deltas))
        parts.append(own.top(each).side_by_side())
    u = jnp.concatenate([part.u for part in parts], axis=1)
    s = jnp.concatenate([part.s for part in parts])
    v = jnp.concatenate([part.v for part in parts], axis=0)
    mean = spectra.mean_of_nonzero(s)
    return chunk.from_matrix(mean * spectra.product(spectra.polar(u), spectra.polar(v)))


def _merge_joined(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    delta = found["joined"]
    if delta is None:
        delta = _sum(chunk) / len(chunk.models)
    return chunk.with_base(values["scale"] * delta)
