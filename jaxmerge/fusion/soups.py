"""Greedy soup: the models, best first, that do not lower the score of their mean."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.fusion.streaming import StreamingAverage, begin, blend, finish, incoming, real
from jaxmerge.tree import stack, unflatten

Evaluate = Callable[[Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GreedySoupState:
    """What a greedy soup remembers.

    Attributes:
      step: int32 []; the models seen.
      count: int32 []; the models in the soup.
      score: float []; the soup's score, -inf while it is empty.
      values: the mean of the models in the soup, in the dtypes of the arithmetic.
      dtypes: the dtypes that `average` gives back, in the order of the tree; static.
    """

    step: jax.Array
    count: jax.Array
    score: jax.Array
    values: Any
    dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


class GreedySoupInfo(NamedTuple):
    """How a greedy soup came about.

    Attributes:
      order: int32 [models]; the models' indices in the order in which they were tried, the best first.
      scores: float [models]; each model's own score, in the order given.
      kept: bool [models]; whether the model is in the soup, in the order given.
      score: float []; the score of the soup.
    """

    order: jax.Array
    scores: jax.Array
    kept: jax.Array
    score: jax.Array


def greedy_soup(evaluate: Evaluate) -> StreamingAverage:
    r"""Mean of the models that do not lower its score, one model after the other.

    .. math:: S \leftarrow S \cup \{\theta\} \text{ if }
       s\big(\tfrac{1}{|S|+1} \textstyle\sum_{\theta_i \in S \cup \{\theta\}} \theta_i\big) \ge
       s\big(\tfrac{1}{|S|} \textstyle\sum_{\theta_i \in S} \theta_i\big)

    The paper's soup takes the models from the best to the worst: `soup_greedily` does.

    Args:
      evaluate: ``evaluate(params) -> score`` [], maximised, on held-out data; it sees a candidate mean in the dtypes
        that `average` gives back. Traced where `update` is; in an eager `update` any Python function will do.

    Returns:
      A `StreamingAverage`. The parameters given to `init` do not count; they are the average until a model enters. The
      first model whose score is finite enters; one with which the score is not finite never does.

    Raises:
      ValueError: (on update) a score that is not a scalar, or other tensors than those of `init`.

    Example:
      >>> soup = greedy_soup(lambda params: -jnp.abs(params["w"] - 2.0))
      >>> state = soup.init({"w": jnp.zeros(())})
      >>> for value in (1.0, 9.0, 3.0):
      ...     state = soup.update(state, {"w": jnp.asarray(value)})
      >>> soup.average(state)["w"], int(state.count)  # the 9 was left out
      (Array(2., dtype=float32), 2)

    Reference:
      Wortsman et al., Model soups, ICML 2022.
    """

    def update(state: GreedySoupState, params: Any) -> GreedySoupState:
        share = 1.0 / (state.count + 1).astype(real())
        values = blend(state.values, params, share)
        return _accept(state, values, _scalar(evaluate(finish(values, state.dtypes))))

    return StreamingAverage(_init, update, _average)


def soup_greedily(
    models: Sequence[Any],
    evaluate: Evaluate,
    *,
    host: bool = False,
    batch_size: int | None = None,
) -> tuple[Any, GreedySoupInfo]:
    """Scores models, sorts them, and makes their greedy soup.

    The models are tried from the best to the worst, of equal ones the earlier first. A model without a finite score is
    tried last and never enters.

    Args:
      models: one or more pytrees with the same tensors, cast to the dtypes of the first before anything else.
      evaluate: ``evaluate(params) -> score`` [], maximised, on held-out data.
      host: False: `evaluate` is traced; scores, order and soup are one compiled program, reused as long as `evaluate`
        is the same object, and this function may stand inside a `jit`. The models are stacked: the program needs
        their memory twice. True: `evaluate` is any Python function, called 2 n - 1 times with one model at a time.
      batch_size: how many models are scored at once under `vmap`; None for all. Unused with `host`.

    Returns:
      The soup and a `GreedySoupInfo`. Inside a `jit`, where nothing can be raised, models of which none has a finite
      score give the first of them, with nothing kept and score -inf.

    Raises:
      ValueError: no model; models with different tensors; a score that is not a scalar; a batch size below 1; no model
        with a finite score.

    Example:
      >>> models = [{"w": jnp.asarray(value)} for value in (9.0, 3.0, 1.0)]
      >>> soup, info = soup_greedily(models, lambda params: -jnp.abs(params["w"] - 2.0))
      >>> soup["w"], info.order.tolist(), info.kept.tolist()
      (Array(2., dtype=float32), [1, 2, 0], [False, True, True])

    Reference:
      Wortsman et al., Model soups, ICML 2022.
    """
    if not models:
        raise ValueError("soup_greedily needs at least one model, found an empty list")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"soup_greedily needs batch_size >= 1, found {batch_size}")
    models = _alike(models)
    if host:
        soup, info = _on_host(models, evaluate)
    else:
        soup, info = _compiled(models, evaluate, batch_size)
    if not isinstance(info.score, jax.core.Tracer) and not bool(jnp.isfinite(info.score)):
        raise ValueError(f"no model has a finite score: found {info.scores.tolist()}")
    return soup, info


def _alike(models: Sequence[Any]) -> list[Any]:
    """The models in the tree and the dtypes of the first."""
    first = jax.tree.map(jnp.asarray, models[0])
    definition = jax.tree.structure(first)
    alike = [first]
    for i, model in enumerate(models[1:], 1):
        try:
            alike.append(unflatten(definition, incoming(first, model)))
        except ValueError as error:
            raise ValueError(f"models[{i}] is unlike models[0]: {error}") from error
    return alike


@functools.partial(jax.jit, static_argnames=("evaluate", "batch_size"))
def _compiled(
    models: list[Any], evaluate: Evaluate, batch_size: int | None
) -> tuple[Any, GreedySoupInfo]:
    stacked = stack(models)

    def score(params: Any) -> jax.Array:
        return _scalar(evaluate(params))

    scores = jax.lax.map(score, stacked, batch_size=batch_size or len(models))
    order = _order(scores)
    soup = greedy_soup(evaluate)

    def step(state: GreedySoupState, i: jax.Array) -> tuple[GreedySoupState, jax.Array]:
        new = soup.update(state, jax.tree.map(lambda leaf: leaf[i], stacked))
        return new, new.count > state.count

    # All of them, though the first one's score is known: under vmap its last bits may differ from what the soup's
    # scores are compared with.
    state, kept = jax.lax.scan(step, soup.init(models[0]), order)
    kept = jnp.zeros_like(kept).at[order].set(kept)
    return soup.average(state), GreedySoupInfo(order, scores, kept, state.score)


def _on_host(models: list[Any], evaluate: Evaluate) -> tuple[Any, GreedySoupInfo]:
    scores = jnp.stack([_scalar(evaluate(model)) for model in models])
    order = _order(scores)
    best, *rest = order.tolist()
    soup = greedy_soup(evaluate)
    state = soup.init(models[0])
    values = blend(state.values, models[best], jnp.ones((), real()))
    state = _accept(state, values, scores[best])
    kept = jnp.zeros(len(models), bool).at[best].set(state.count > 0)
    for i in rest:
        new = soup.update(state, models[i])
        kept = kept.at[i].set(new.count > state.count)
        state = new
    return soup.average(state), GreedySoupInfo(order, scores, kept, state.score)


def _init(params: Any) -> GreedySoupState:
    values, dtypes = begin(params)
    none = jnp.zeros((), jnp.int32)
    return GreedySoupState(none, none, jnp.asarray(-jnp.inf, real()), values, dtypes)


def _average(state: GreedySoupState) -> Any:
    return finish(state.values, state.dtypes)


def _accept(state: GreedySoupState, values: Any, score: jax.Array) -> GreedySoupState:
    """The state with the candidate in its place, if its score is finite and not lower."""
    taken = jnp.isfinite(score) & (score >= state.score)
    return GreedySoupState(
        state.step + 1,
        state.count + taken.astype(jnp.int32),
        jnp.where(taken, score, state.score),
        jax.tree.map(lambda new, old: jnp.where(taken, new, old), values, state.values),
        state.dtypes,
    )


def _order(scores: jax.Array) -> jax.Array:
    """The models' indices, best first, of equal ones the earlier; those without a finite score last."""
    return jnp.argsort(-jnp.where(jnp.isfinite(scores), scores, -jnp.inf)).astype(jnp.int32)


def _scalar(score: Any) -> jax.Array:
    score = jnp.asarray(score, real())
    if score.shape != ():
        raise ValueError(f"evaluate gives one score, found shape {list(score.shape)}")
    return score
