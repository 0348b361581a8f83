r"""The Gaussian of CMA-ES: how it is sampled and updated, inactive coordinates left alone.

A candidate is

.. math:: x = m + \sigma H A C^{1/2} z, \quad z \sim N(0, I)

with the mean m, the step size sigma, the covariance C, and two diagonal matrices: A belongs to the margin (1 for
continuous coordinates, see `margin`), H holds the width of coordinates that were not active (1 where all always are).

What of a candidate is not active counts for nothing. With :math:`a_{ki}` = 1 where coordinate i of candidate k is
active, :math:`y_k` the displacement :math:`(x_k - m) / (\sigma H A)` there and 0 elsewhere, and the positive weights
w (of sum 1), :math:`\omega_i = \sum_k w_k a_{ki}` is the share of the weight with which a coordinate was active. Then

- the mean moves by :math:`\sigma H_i \sum_k w_k y_{ki}`;
- both paths of coordinate i are updated at the rates :math:`c_\sigma \omega_i` and :math:`c_c \omega_i`, with a
  step of unit selection variance, :math:`\sum_k w_k y_{ki} / \sqrt{\sum_k w_k^2 a_{ki}}`;
- the step size compares :math:`\sum_i \omega_i p_{\sigma i}^2` with what :math:`\sum_i \omega_i` dimensions give;
- row and column i of C forget at the coordinate's own rate: :math:`C \leftarrow D^{1/2} C D^{1/2} + \dots` with
  :math:`D_i = 1 - c_1 (1 - \delta) \omega_i - c_\mu \sum_k w_k a_{ki}` (here w has the negative weights too), and the
  rank-one term takes :math:`\sqrt{\omega_i} p_{ci}`;
- where sigma changes by a factor f, H_i changes by :math:`f^{\omega_i - 1}`: what is not active keeps its width.

So a coordinate that no candidate had active keeps its mean, its standard deviation and its paths, and where all are
active this is the update of Hansen's tutorial. C stays positive definite: a candidate of negative weight takes away no
more than the active part of :math:`D^{1/2} C D^{1/2}` allows.

Reference:
  Hansen, The CMA evolution strategy: a tutorial, arXiv:1604.00772. Inactive coordinates: our own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.strategies.ranking import logarithmic

_HIGHEST = jax.lax.Precision.HIGHEST
NARROWEST, WIDEST = 1e-6, 10.0
"""Between which the largest standard deviation is held: a float32 genome in [0, 1] resolves no less."""
_SMALLEST_EIGENVALUE = 1e-7
"""Of C, relative to the largest: what float32 holds."""


class Rates(NamedTuple):
    """The constants of an update; they follow from the dimension and the population size.

    Attributes:
      weights: float64 [population], of the ranks; the positive ones sum to 1, the others are negative.
      step: c_sigma, of the path that the step size follows.
      damping: d_sigma.
      path: c_c, of the path of the rank-one update.
      rank_one: c_1.
      rank_many: c_mu.
      period: in generations, how often the eigenvectors of C are computed anew.
    """

    weights: np.ndarray
    step: float
    damping: float
    path: float
    rank_one: float
    rank_many: float
    period: int


class Gaussian(NamedTuple):
    """The distribution over n coordinates, float32.

    Attributes:
      mean: m, [n].
      spread: sigma, [].
      covariance: C, [n, n].
      vectors: of C, [n, n], by column.
      roots: of the eigenvalues of C, [n].
      path: p_c, [n].
      step_path: p_sigma, [n].
      held: the diagonal of H, [n].
      generation: int32 [], the updates so far.
    """

    mean: jax.Array
    spread: jax.Array
    covariance: jax.Array
    vectors: jax.Array
    roots: jax.Array
    path: jax.Array
    step_path: jax.Array
    held: jax.Array
    generation: jax.Array


def rates(dimension: int, population: int) -> Rates:
    """The tutorial's defaults (its table 1), with negative weights.

    Args:
      dimension: n, at least 1.
      population: lambda, at least 4.
    """
    n = dimension
    raw = logarithmic(population)
    better, worse = np.maximum(raw, 0), np.maximum(-raw, 0)
    mu = better.sum() ** 2 / (better**2).sum()
    mu_of_worse = worse.sum() ** 2 / (worse**2).sum()
    rank_one = 2 / ((n + 1.3) ** 2 + mu)
    rank_many = min(1 - rank_one, 2 * (0.25 + mu + 1 / mu - 2) / ((n + 2) ** 2 + mu))
    against = min(
        1 + rank_one / rank_many,
        1 + 2 * mu_of_worse / (mu + 2),
        (1 - rank_one - rank_many) / (n * rank_many),
    )
    step = (mu + 2) / (n + mu + 5)
    return Rates(
        weights=better / better.sum() - against * worse / worse.sum(),
        step=step,
        damping=1 + 2 * max(0.0, np.sqrt((mu - 1) / (n + 1)) - 1) + step,
        path=(4 + mu / n) / (n + 4 + 2 * mu / n),
        rank_one=rank_one,
        rank_many=rank_many,
        period=max(1, int(1 / ((rank_one + rank_many) * n * 10))),
    )


def initial(mean: jax.Array, spread: jax.Array) -> Gaussian:
    """The isotropic distribution.

    Args:
      mean: float32 [n].
      spread: the standard deviation of every coordinate, float32 [].
    """
    n = mean.shape[0]
    return Gaussian(
        mean=mean,
        spread=spread,
        covariance=jnp.eye(n),
        vectors=jnp.eye(n),
        roots=jnp.ones(n),
        path=jnp.zeros(n),
        step_path=jnp.zeros(n),
        held=jnp.ones(n),
        generation=jnp.zeros((), jnp.int32),
    )


def sample(key: jax.Array, gaussian: Gaussian, margin: jax.Array, population: int) -> jax.Array:
    """Draws candidates.

    Args:
      key: one key.
      gaussian: n coordinates.
      margin: the diagonal of A, [n].
      population: how many.

    Returns:
      float32 [population, n].
    """
    z = jax.random.normal(key, (population, gaussian.mean.shape[0]))
    y = jnp.matmul(z * gaussian.roots[None], gaussian.vectors.T, precision=_HIGHEST)
    return gaussian.mean[None] + (gaussian.spread * gaussian.held * margin)[None] * y


def deviation(gaussian: Gaussian, margin: jax.Array) -> jax.Array:
    """The standard deviation of each coordinate, [n]; margin: the diagonal of A, [n]."""
    return gaussian.spread * gaussian.held * margin * jnp.sqrt(jnp.diagonal(gaussian.covariance))


def update(
    gaussian: Gaussian,
    values: jax.Array,
    active: jax.Array,
    weights: jax.Array,
    margin: jax.Array,
    constants: Rates,
) -> Gaussian:
    """One update; the module's docstring says what is done.

    Args:
      gaussian: n coordinates.
      values: float32 [population, n].
      active: bool [population, n]; what is False here counts for nothing, whatever the value.
      weights: float32 [2, population], of the candidates: the positive weights, and all of them.
      margin: the diagonal of A, [n].
      constants: `rates` of n and the population.
    """
    positive, signed = weights
    width = gaussian.spread * gaussian.held * margin
    y = jnp.where(active, (values - gaussian.mean[None]) / width[None], 0)
    here = active.astype(jnp.float32)
    share = _dot(positive, here)
    moved = _dot(positive, y)
    variance = _dot(positive**2, here)
    direction = jnp.where(variance > 0, moved * jax.lax.rsqrt(jnp.maximum(variance, 1e-30)), 0)

    step_path = _follow(
        gaussian.step_path, _whitened(gaussian, direction[None])[0], constants.step * share
    )
    dimension = jnp.sum(share)
    length = jnp.sqrt(_dot(share, step_path**2)) / _expected_length(dimension)
    exponent = constants.step / constants.damping * (length - 1)
    factor = jnp.where(dimension > 0, jnp.exp(jnp.minimum(exponent, 1)), 1)

    n = gaussian.mean.shape[0]
    begun = 1 - (1 - constants.step) ** (2 * (gaussian.generation.astype(jnp.float32) + 1))
    stalled = length >= (1.4 + 2 / (n + 1)) * jnp.sqrt(begun)
    rate = constants.path * share
    path = _follow(gaussian.path, jnp.where(stalled, 0, direction), rate)
    lost = jnp.where(stalled, constants.path * (2 - constants.path), 0)

    keep = 1 - constants.rank_one * (1 - lost) * share - constants.rank_many * _dot(signed, here)
    allowed = keep / jnp.max(keep)
    lengths = jnp.sum(_whitened(gaussian, y * jax.lax.rsqrt(allowed)[None]) ** 2, axis=1)
    against = signed * jnp.sum(here, axis=1) / jnp.maximum(lengths, 1e-8)
    each = jnp.where(signed >= 0, signed, against)
    rank_many = jnp.matmul(y.T * each[None], y, precision=_HIGHEST)
    drawn = jnp.sqrt(share) * path
    kept = jnp.sqrt(keep)
    covariance = (
        gaussian.covariance * kept[:, None] * kept[None]
        + constants.rank_one * drawn[:, None] * drawn[None]
        + constants.rank_many * rank_many
    )
    covariance = (covariance + covariance.T) / 2

    widest = jnp.sqrt(jnp.max(jnp.diagonal(covariance)))
    spread = jnp.clip(gaussian.spread * factor, NARROWEST / widest, WIDEST / widest)
    generation = gaussian.generation + 1
    vectors, roots = _decomposed(gaussian, covariance, generation, constants.period)
    return Gaussian(
        mean=gaussian.mean + gaussian.spread * gaussian.held * moved,
        spread=spread,
        covariance=covariance,
        vectors=vectors,
        roots=roots,
        path=path,
        step_path=step_path,
        held=gaussian.held * (spread / gaussian.spread) ** (share - 1),
        generation=generation,
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _follow(path: jax.Array, direction: jax.Array, rate: jax.Array) -> jax.Array:
    return (1 - rate) * path + jnp.sqrt(rate * (2 - rate)) * direction


def _whitened(gaussian: Gaussian, y: jax.Array) -> jax.Array:
    """C^(-1/2) y of every row."""
    rotated = _dot(y, gaussian.vectors) / gaussian.roots[None]
    return _dot(rotated, gaussian.vectors.T)


def _expected_length(dimension: jax.Array) -> jax.Array:
    """Of a standard normal vector; the approximation holds from one dimension on."""
    n = jnp.maximum(dimension, 1)
    root = jnp.sqrt(jnp.maximum(dimension, 1e-30))
    return root * (1 - 1 / (4 * n) + 1 / (21 * n**2))


def _decomposed(
    gaussian: Gaussian, covariance: jax.Array, generation: jax.Array, period: int
) -> tuple[jax.Array, jax.Array]:
    def anew() -> tuple[jax.Array, jax.Array]:
        values, vectors = jnp.linalg.eigh(covariance)
        return vectors, jnp.sqrt(jnp.maximum(values, _SMALLEST_EIGENVALUE * values[-1]))

    if period == 1:
        return anew()
    old = (gaussian.vectors, gaussian.roots)
    return jax.lax.cond(generation % period == 0, anew, lambda: old)


def metrics(gaussian: Gaussian) -> dict[str, jax.Array]:
    """The step size ("step_size") and the condition number of C ("condition")."""
    roots = gaussian.roots
    return {"step_size": gaussian.spread, "condition": (jnp.max(roots) / jnp.min(roots)) ** 2}
