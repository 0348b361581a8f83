"""How a search scores a candidate: without data, by a user's function, or by a metric on examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.converters import load_model
from jaxmerge.evaluation import (
    accuracy,
    cross_entropy,
    perplexity,
    score_batches,
    score_next_tokens,
)
from jaxmerge.evaluation import score as score_labels
from jaxmerge.methods import MergeMethod
from jaxmerge.recipes import Plan
from jaxmerge.search import Space
from jaxmerge.searching.schema import BALANCE, Metric, SearchFile
from jaxmerge.sweeping import EvaluatorError, balance, load_evaluator

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scoring:
    """Scores of a candidate.

    Attributes:
        scores: (hyperparameters, *args) -> float32 [scores], more is better.
        args: arrays that it needs.
        names: of the scores.
        traced: whether it may be compiled; else it gets and gives NumPy arrays.
        notes: remarks for the user.
    """

    scores: Callable[..., Any]
    args: tuple[Any, ...]
    names: tuple[str, ...]
    traced: bool
    notes: tuple[str, ...] = ()


def make_scoring(
    search: SearchFile,
    plan: Plan,
    method: MergeMethod,
    models: list[dict[str, np.ndarray]],
    base: dict[str, np.ndarray] | None,
    filled: Callable[[Any], Any],
    space: Space,
) -> Scoring:
    """Makes what a search file asks for.

    Args:
        search: the file.
        plan: of a merge of the models.
        method: the merge method with its combinators.
        models, base: tensors by name.
        filled: puts what is fixed into a point.
        space: what varies.
    """
    key = jax.random.key(plan.seed) if method.random else None
    if isinstance(search.objective, Metric):
        return _by_metric(search, search.objective, plan, method, key)
    state = method.init(models, base, dtype=plan.resolved.written_dtype)
    ties = {t.name: t.tied_to for t in plan.tensors if t.action == "merge" and t.tied_to}

    def merged(hyperparams: Any, state: Any) -> dict[str, Any]:
        found = method.params_of(method.apply(state, hyperparams, key))
        return {**found, **{name: found[other] for name, other in ties.items()}}

    if search.objective == BALANCE:
        return _by_balance(method, models, base, state, merged)
    try:
        evaluate = load_evaluator(search.objective)
    except EvaluatorError as error:
        raise search.error(str(error).replace("--evaluate ", "objective: "), "objective") from None

    def scores(hyperparams: Any, state: Any) -> Any:
        return jnp.atleast_1d(jnp.asarray(evaluate(merged(hyperparams, state)))).astype(jnp.float32)

    genome = jax.ShapeDtypeStruct((space.size,), jnp.float32)
    try:
        shape = jax.eval_shape(lambda g, s: scores(filled(space.decode(g)), s), genome, state)
    except Exception as error:
        return _on_host(evaluate, plan, models, base, state, merged, filled, space, error)
    if len(shape.shape) != 1 or shape.size == 0:
        raise EvaluatorError(
            "the objective must return a number or one number per task, found shape "
            f"{list(shape.shape)}"
        )
    return Scoring(scores, (state,), _tasks(shape.size), True)


def _tasks(count: int) -> tuple[str, ...]:
    return ("score",) if count == 1 else tuple(f"task {i}" for i in range(count))


def _by_balance(
    method: MergeMethod,
    models: list[dict[str, np.ndarray]],
    base: dict[str, np.ndarray] | None,
    state: Any,
    merged: Callable[[Any, Any], dict[str, Any]],
) -> Scoring:
    is_source = method.base == "source" and base is not None
    sources = [base, *models] if is_source and base is not None else models
    prepared = balance.prepare(sources, None if is_source else base, list(models[0]))

    def scores(hyperparams: Any, state: Any, groups: Any) -> jax.Array:
        cosines = balance.cosines(merged(hyperparams, state), prepared._replace(groups=groups))
        return jnp.min(cosines)[None].astype(jnp.float32)

    note = (
        "the objective is a proxy, made without data: the smallest cosine between the merge and a "
        "source; `objective: module:function` gives one of your own"
    )
    return Scoring(scores, (state, prepared.groups), ("balance",), True, (note,))


def _on_host(
    evaluate: Callable[[dict[str, Any]], Any],
    plan: Plan,
    models: list[dict[str, np.ndarray]],
    base: dict[str, np.ndarray] | None,
    state: Any,
    merged: Callable[[Any, Any], dict[str, Any]],
    filled: Callable[[Any], Any],
    space: Space,
    cause: Exception,
) -> Scoring:
    merge = jax.jit(merged)

    def scores(hyperparams: Any, state: Any) -> np.ndarray:
        arrays = {name: np.asarray(array) for name, array in merge(hyperparams, state).items()}
        result = np.atleast_1d(np.asarray(evaluate(arrays), np.float32))
        if result.ndim != 1 or result.size == 0:
            raise EvaluatorError(
                "the objective must return a number or one number per task, found shape "
                f"{list(result.shape)}"
            )
        return result

    try:
        first = scores(filled(jax.device_get(space.decode(space.initial_genome()))), state)
    except EvaluatorError:
        raise
    except Exception as error:
        raise EvaluatorError(
            f"the objective failed with {type(error).__name__}: {error}"
        ) from error
    note = (
        f"the objective cannot be traced ({type(cause).__name__}): it runs on the host, one "
        "candidate after the other, on NumPy arrays; written with jax.numpy it would be compiled "
        "with the search"
    )
    return Scoring(scores, (state,), _tasks(first.size), False, (note,))


def _by_metric(
    search: SearchFile, metric: Metric, plan: Plan, method: MergeMethod, key: jax.Array | None
) -> Scoring:
    """Merges Flax parameters, whose layout makes the merge that of the checkpoints."""
    resolved = plan.resolved
    loaded = [load_model(model.locate(search.folder), key=model.key) for model in resolved.models]
    apply_fn, _, config = loaded[0]
    base = None
    if resolved.base is not None:
        reference = resolved.base
        base = load_model(reference.locate(search.folder), key=reference.key)[1]
    models = [params for _, params, _ in loaded]
    state = method.init(models, base, layout=config.layout, dtype=resolved.written_dtype)
    data = tuple(_examples(search, name) for name in metric.data)
    measure = {"accuracy": accuracy, "cross_entropy": cross_entropy, "perplexity": perplexity}
    sign = 1.0 if metric.metric == "accuracy" else -1.0

    def scores(hyperparams: Any, state: Any, data: Any) -> jax.Array:
        params = method.params_of(method.apply(state, hyperparams, key))
        found = []
        for one in data:
            next_tokens = "tokens" in one
            inputs = one["tokens"] if next_tokens else one["inputs"]
            counted = score_batches(
                apply_fn,
                params,
                inputs,
                one["tokens"] if next_tokens else one["labels"],
                batch_size=metric.batch_size,
                score=score_next_tokens if next_tokens else score_labels,
            )
            found.append(sign * measure[metric.metric](counted))
        return jnp.stack(found).astype(jnp.float32)

    names = tuple(Path(name).stem for name in metric.data)
    return Scoring(scores, (state, data), names, True)


def _examples(search: SearchFile, name: str) -> dict[str, np.ndarray]:
    path = next(
        (folder / name for folder in (Path.cwd(), search.folder) if (folder / name).is_file()), None
    )
    if path is None:
        raise search.error(f"no such file: {name}", "objective", "data")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, AttributeError) as error:
        raise search.error(f"{name} is no .npz file: {error}", "objective", "data") from None
    if not ({"inputs", "labels"} <= found.keys() or "tokens" in found):
        raise search.error(
            f"{name} has the arrays {sorted(found)}; expected `inputs` and `labels`, or `tokens`",
            "objective",
            "data",
        )
    return found
