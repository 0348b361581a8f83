"""Averages along a training run: uniform, stochastic weight averaging, exponential, and over the latest models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.fusion.streaming import (
    AverageState,
    StreamingAverage,
    arithmetic,
    begin,
    blend,
    finish,
    incoming,
    is_averaged,
    real,
)

Schedule = Callable[[jax.Array], jax.Array | float]


def uniform_soup() -> StreamingAverage:
    r"""Mean of all models seen, as a running mean.

    .. math:: \bar\theta_n = \bar\theta_{n-1} + \frac{\theta_n - \bar\theta_{n-1}}{n}

    Returns:
      A `StreamingAverage`. The parameters given to `init` do not count.

    Example:
      >>> soup = uniform_soup()
      >>> state = soup.init({"w": jnp.zeros(2)})
      >>> for value in (1.0, 2.0, 6.0):
      ...     state = soup.update(state, {"w": jnp.full(2, value)})
      >>> soup.average(state)["w"]
      Array([3., 3.], dtype=float32)

    Reference:
      Wortsman et al., Model soups, ICML 2022.
    """
    return swa()


def swa(*, start: int | jax.Array = 0, every: int | jax.Array = 1) -> StreamingAverage:
    r"""Stochastic weight averaging: mean of the models at steps start, start + every, start + 2 every, ...

    .. math:: \bar\theta = \frac{1}{n} \sum_{i=0}^{n-1} \theta_{start + i \cdot every}

    Args:
      start: int, or integer array []; the first step that counts. The first update is step 0.
      every: int, or integer array [], 1 or more; steps from one model to the next. The learning rate's cycle, in a
        cyclic schedule.

    Returns:
      A `StreamingAverage`, to be updated at every training step. The parameters given to `init` do not count; they are
      the average until a model does.

    Raises:
      ValueError: a negative start, or an `every` below 1 (not checked where traced).

    Example:
      >>> average = swa(start=1, every=2)
      >>> def step(state, value):
      ...     return average.update(state, {"w": value}), None
      >>> state, _ = jax.lax.scan(step, average.init({"w": jnp.zeros(())}), jnp.arange(6.0))
      >>> average.average(state)["w"]  # of 1, 3 and 5
      Array(3., dtype=float32)

    Reference:
      Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018.
    """
    _check_whole("swa", "start", start, 0)
    _check_whole("swa", "every", every, 1)

    def init(params: Any) -> AverageState:
        values, dtypes = begin(params)
        return AverageState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), values, dtypes)

    def update(state: AverageState, params: Any) -> AverageState:
        due = _due(state.step, start, every)
        count = state.weight + due.astype(jnp.int32)
        share = jnp.where(due, 1.0 / jnp.maximum(count, 1).astype(real()), 0.0)
        return AverageState(state.step + 1, count, blend(state.values, params, share), state.dtypes)

    return StreamingAverage(init, update, _mean)


def ema(decay: float | jax.Array | Schedule = 0.999, *, debias: bool = True) -> StreamingAverage:
    r"""Exponential moving average.

    .. math:: m_t = d_t m_{t-1} + (1 - d_t) \theta_t, \quad W_t = d_t W_{t-1} + (1 - d_t), \quad
       \bar\theta_t = m_t / W_t

    With a constant decay and `debias`, W_t = 1 - d^t. The state holds the quotient itself, so that a constant
    sequence is returned exactly.

    Args:
      decay: in [0, 1): a number, an array [] (traced: sweep it, learn it), or a schedule as optax has them, called with
        the number of earlier updates (int32 []). A Python number is the most exact: 1 - decay is then taken in float64.
      debias: True: m_0 = W_0 = 0, and the parameters given to `init` do not count. False: W_0 = 1 and m_0 is what
        `init` was given, so that the average starts there.

    Returns:
      A `StreamingAverage`. A traced decay of 1 takes nothing.

    Raises:
      ValueError: a decay outside [0, 1), or one that is not a scalar (values are not checked where traced).

    Example:
      >>> average = ema(0.5, debias=False)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> for value in (4.0, 8.0):
      ...     state = average.update(state, {"w": jnp.full(1, value)})
      >>> average.average(state)["w"]  # 0/4 + 4/4 + 8/2
      Array([5.], dtype=float32)

    Reference:
      Polyak & Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 1992; Tarvainen
      & Valpola, Mean teachers are better role models, NeurIPS 2017.
    """
    rate = _rate(decay)

    def init(params: Any) -> AverageState:
        values, dtypes = begin(params)
        weight = jnp.asarray(0.0 if debias else 1.0, real())
        return AverageState(jnp.zeros((), jnp.int32), weight, values, dtypes)

    def update(state: AverageState, params: Any) -> AverageState:
        new = rate(state.step)
        weight = state.weight + new * (1.0 - state.weight)
        share = new / jnp.where(weight > 0, weight, 1.0)
        return AverageState(
            state.step + 1, weight, blend(state.values, params, share), state.dtypes
        )

    return StreamingAverage(init, update, _mean)


def lawa(last: int, *, start: int | jax.Array = 0, every: int | jax.Array = 1) -> StreamingAverage:
    r"""Latest weight averaging: mean of the last k of the models at steps start, start + every, ...

    .. math:: \bar\theta_n = \frac{1}{\min(k, n)} \sum_{i = \max(1, n - k + 1)}^{n} \theta_i

    Args:
      last: k, 1 or more; static. The state holds k models, in the dtypes given to `init`.
      start: int, or integer array []; the first step that counts. The first update is step 0.
      every: int, or integer array [], 1 or more; steps from one model to the next.

    Returns:
      A `StreamingAverage`, to be updated at every training step. The parameters given to `init` do not count; they are
      the average until a model does.

    Raises:
      ValueError: a `last` or `every` below 1, or a negative start (not checked where traced).

    Example:
      >>> average = lawa(2)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> for value in (1.0, 2.0, 6.0):
      ...     state = average.update(state, {"w": jnp.full(1, value)})
      >>> average.average(state)["w"]
      Array([4.], dtype=float32)

    Reference:
      Kaddour, Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging, 2022;
      Sanyal et al., Early weight averaging meets high learning rates for LLM pre-training, 2023.
    """
    _check_whole("lawa", "last", last, 1)
    _check_whole("lawa", "start", start, 0)
    _check_whole("lawa", "every", every, 1)
    last = int(last)

    def init(params: Any) -> AverageState:
        values, dtypes = begin(params)
        rings = jax.tree.map(ring_of, finish(values, dtypes))
        return AverageState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), rings, dtypes)

    def ring_of(leaf: jax.Array) -> jax.Array:
        if not is_averaged(leaf.dtype):
            return leaf
        # Filled with the leaf, not with zeros: so it lies on the leaf's devices.
        return jnp.broadcast_to(leaf[None], (last, *leaf.shape))

    def update(state: AverageState, params: Any) -> AverageState:
        due = _due(state.step, start, every)
        slot = state.weight % last

        def put(ring: jax.Array, new: jax.Array) -> jax.Array:
            if not is_averaged(ring.dtype):
                return jnp.where(due, new, ring)
            old = jax.lax.dynamic_index_in_dim(ring, slot, 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(ring, jnp.where(due, new, old), slot, 0)

        leaves, definition = jax.tree.flatten(state.values)
        news = incoming(jax.tree.map(_slot, state.values), params)
        values = jax.tree.unflatten(definition, list(map(put, leaves, news)))
        return AverageState(
            state.step + 1, state.weight + due.astype(jnp.int32), values, state.dtypes
        )

    def average(state: AverageState) -> Any:
        count = jnp.clip(state.weight, 1, last)

        def mean(ring: jax.Array) -> jax.Array:
            if not is_averaged(ring.dtype):
                return ring
            ring = ring.astype(arithmetic(ring.dtype))
            used = jnp.expand_dims(jnp.arange(last) < count, range(1, ring.ndim))
            # From the first model on: equal models give that model exactly.
            apart = jnp.where(used, ring - ring[:1], jnp.zeros_like(ring))
            return ring[0] + jnp.sum(apart, axis=0) / count.astype(ring.dtype)

        return finish(jax.tree.map(mean, state.values), state.dtypes)

    return StreamingAverage(init, update, average)


def _mean(state: AverageState) -> Any:
    return finish(state.values, state.dtypes)


def _slot(ring: jax.Array) -> jax.ShapeDtypeStruct:
    shape = ring.shape[1:] if is_averaged(ring.dtype) else ring.shape
    return jax.ShapeDtypeStruct(shape, ring.dtype)


def _due(step: jax.Array, start: int | jax.Array, every: int | jax.Array) -> jax.Array:
    """Whether the model of this step counts: bool []."""
    return (step >= start) & ((step - start) % every == 0)


def _rate(decay: Any) -> Callable[[jax.Array], jax.Array]:
    """1 - decay as a function of the step."""
    if callable(decay):
        return lambda step: 1.0 - jnp.asarray(decay(step), real())
    if np.shape(decay) != ():
        raise ValueError(f"ema takes a scalar decay, found shape {list(np.shape(decay))}")
    if isinstance(decay, jax.core.Tracer):
        return lambda step: 1.0 - decay.astype(real())
    value = float(decay)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"ema needs 0 <= decay < 1, found {value}")
    # Not in float32: at 0.9999 that would change the rate by 1e-4 of itself.
    return lambda step: jnp.asarray(1.0 - value, real())


def _check_whole(owner: str, name: str, value: Any, low: int) -> None:
    """Raises a ValueError unless the value is a whole number not below `low`; of a traced one only shape and dtype."""
    if np.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{owner} takes one integer {name}, found {value!r}")
    if not isinstance(value, jax.core.Tracer) and int(value) < low:
        raise ValueError(f"{owner} needs {name} >= {low}, found {int(value)}")
