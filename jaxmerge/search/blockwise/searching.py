"""`automerge`: a technique and its hyperparameters for each block of a model, found by search."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import methods as registered
from jaxmerge.methods import MergeMethod, by_block, choose
from jaxmerge.search.blockwise.recipe import recipe_text
from jaxmerge.search.blockwise.scoring import balanced, discrepancy, preservation
from jaxmerge.search.blockwise.segmenting import segment
from jaxmerge.search.evolve import History, Result, evolve
from jaxmerge.search.spaces_of import Range, space_of
from jaxmerge.tree import Layout
from jaxmerge.tree.blocks import Label, Rules, block_names, label_rules

Evaluate = Callable[[Any, jax.Array, Any], jax.Array]

DEFAULT_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
"""The techniques of the paper."""


@dataclass(frozen=True)
class AutoMerge:
    """What `automerge` found.

    Attributes:
      params: the merged model.
      chosen: for each block its method and its hyperparameters: NumPy arrays.
      score: the objective that was maximised, on the data of the search.
      scores: [tasks] of the merged model, on the same data.
      sources: [tasks], each task's own source.
      preservation: scores / sources.
      discrepancy: the largest preservation less the smallest.
      history: per generation, see `jaxmerge.search.Result`; fitness is the negative score.
      evaluations: how many merges were evaluated.
      seed: of the random methods' draws, for recipes and `jaxmerge.merge`.
      method: the method of which `params` is a merge: by blocks, at `hyperparams`.
      hyperparams: the best point.
      whole: the same search with the whole model as one block; None unless asked for.
      search: what `evolve` gave.
    """

    params: Any
    chosen: Mapping[Label, tuple[MergeMethod, Mapping[str, Any]]]
    score: float
    scores: np.ndarray
    sources: np.ndarray
    preservation: np.ndarray
    discrepancy: float
    history: History
    evaluations: int
    seed: int
    method: MergeMethod
    hyperparams: Any
    whole: "AutoMerge | None"
    search: Result
    _rules: Rules = field(repr=False)
    _layout: Layout = field(repr=False)

    def recipe(
        self, models: Sequence[str], base: str | None = None, *, dtype: str | None = None
    ) -> str:
        """Writes the merge as a recipe, which `jaxmerge merge --seed` runs to the same parameters.

        Args:
          models: where the models are, in their order.
          base: where the base is.
          dtype: of the output; None: that of the base, or of the first model.

        Returns:
          YAML text.

        Raises:
          ValueError: a method that is not registered.
        """
        return recipe_text(
            self.chosen, self._rules, self.params, self._layout, models, base, dtype, self.seed
        )


def automerge(
    models: Sequence[Any],
    base: Any,
    evaluate: Evaluate,
    *,
    key: jax.Array,
    blocks: int | Any = 4,
    methods: Sequence[str | MergeMethod] = DEFAULT_METHODS,
    data: Any = None,
    sources: Any = None,
    balance: float = 0.5,
    layout: Layout | None = None,
    apply_fn: Callable[[Any, Any], Any] | None = None,
    inputs: Any = None,
    only: Sequence[str] | None = None,
    ranges: Mapping[str, Range] | None = None,
    whole: bool = False,
    seed: int = 0,
    strategy: str = "cat_cma",
    population: int = 16,
    generations: int = 25,
    **search: Any,
) -> AutoMerge:
    """Merges each block of a model by the technique that a search finds best for it.

    A point of the search is a technique for each block, and under it that technique's hyperparameters, which count only
    while it is chosen. Merging, evaluation and the search are one program. With P_t the share of its source's score
    that task t keeps, what is maximised is

        mean_t P_t - balance (max_t P_t - min_t P_t).

    Args:
      models: trees of the same structure.
      base: their base, or None for methods without one.
      evaluate: (params, key, data) -> [tasks], or [tasks, examples] whose mean counts; larger is better, and positive
        for the sources. Pure and traced. Give it data that neither trained the models nor will judge the result.
      key: of the search.
      blocks: how many blocks `segment` makes; or labels, as for `jaxmerge.methods.by_block`.
      methods: names or methods, all built from a leaf method; a recipe can name registered ones.
      data: what `evaluate` gets, a pytree of arrays.
      sources: [tasks], the score that each task's own source reaches; None: models and tasks are as many, and model t
        is the source of task t.
      balance: how much evenness counts, 0 or more.
      layout: as for `jaxmerge.merge`.
      apply_fn, inputs: for `segment`.
      only, ranges: what is varied and within which bounds, see `jaxmerge.search.space_of`; names nest as in
        "BLOCK/METHOD/density", a last part alone ("density") is enough.
      whole: also search with the whole model as one block, at the same budget, to compare.
      seed: of the draws of random methods, the same for all candidates.
      strategy, population, generations, search: as for `jaxmerge.search.evolve`.

    Returns:
      An `AutoMerge`.

    Raises:
      ValueError: tasks that are no sources, sources whose scores are not positive, labels that miss a tensor, or what
        `evolve` and `space_of` refuse; before anything is searched.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> base = {"eye": {"w": jnp.zeros(2)}, "head": {"w": jnp.zeros(2)}}
      >>> a = {"eye": {"w": jnp.array([1.0, 0.0])}, "head": {"w": jnp.array([1.0, 0.0])}}
      >>> b = {"eye": {"w": jnp.array([0.0, 1.0])}, "head": {"w": jnp.array([0.0, 1.0])}}
      >>> def evaluate(params, key, data):
      ...     flat = jnp.concatenate([params["eye"]["w"], params["head"]["w"]])
      ...     wanted = jnp.array([[1.0, 0, 1, 0], [0, 1.0, 0, 1]])
      ...     return jnp.exp(-jnp.sum((wanted * (flat[None] - wanted)) ** 2, axis=1))
      >>> found = jm.search.automerge(
      ...     [a, b], base, evaluate, key=jax.random.key(0), blocks={"eye/*": "eye", "head/*": "head"},
      ...     methods=["linear", "task_arithmetic"], strategy="random", population=64, generations=4)
      >>> list(found.chosen), bool(found.score > 0.8)
      (['eye', 'head'], True)

    Reference:
      AutoMerge, arXiv:2601.22748.
    """
    if balance < 0:
        raise ValueError(f"balance must be 0 or more, found {balance:g}")
    layout = Layout() if layout is None else layout
    if isinstance(blocks, int):
        blocks = segment(
            models, base, blocks=blocks, layout=layout, apply_fn=apply_fn, inputs=inputs
        )
    rules = label_rules(blocks)
    made = [_made(one) for one in methods]
    technique = choose(made)
    method = by_block(dict.fromkeys(block_names(rules), technique), blocks)
    space = space_of(method, models=len(models), only=only, ranges=ranges)
    state = method.init(models, base, layout=layout)
    draws = jax.random.key(seed)
    reference = _reference(models, evaluate, key, data, sources)
    result = evolve(
        _objective(method, evaluate),
        space,
        strategy=strategy,
        population=population,
        generations=generations,
        key=key,
        args=(state, draws, data, jnp.asarray(reference), jnp.float32(balance)),
        **search,
    )
    params = method.apply(state, result.best, draws)
    scores = _scores(evaluate, params, key, data)
    kept = preservation(scores, reference)
    other = None
    if whole:
        other = automerge(
            models, base, evaluate, key=key, blocks={"**": "model"}, methods=made, data=data,
            sources=reference, balance=balance, layout=layout, only=only, ranges=ranges, seed=seed,
            strategy=strategy, population=population, generations=generations, **search,
        )  # fmt: skip
    return AutoMerge(
        params=params,
        chosen={
            label: _chosen(made, technique, result.best.get(label, {}))
            for label in block_names(rules)
        },
        score=float(balanced(kept, balance)),
        scores=np.asarray(scores),
        sources=np.asarray(reference),
        preservation=np.asarray(kept),
        discrepancy=float(discrepancy(kept)),
        history=result.history,
        evaluations=result.evaluations,
        seed=seed,
        method=method,
        hyperparams=result.best,
        whole=other,
        search=result,
        _rules=rules,
        _layout=layout,
    )


@functools.lru_cache(maxsize=64)
def _objective(method: MergeMethod, evaluate: Evaluate) -> Callable[..., jax.Array]:
    """The same function for the same search, which then is not compiled anew."""

    def objective(
        point: Any, key: jax.Array, state: Any, draws: Any, data: Any, reference: Any, balance: Any
    ) -> jax.Array:
        scores = _scores(evaluate, method.apply(state, point, draws), key, data)
        return -balanced(preservation(scores, reference), balance)

    return objective


def _made(one: str | MergeMethod) -> MergeMethod:
    return registered.get(one)() if isinstance(one, str) else one


def _scores(evaluate: Evaluate, params: Any, key: jax.Array, data: Any) -> jax.Array:
    scores = evaluate(params, key, data)
    return scores if scores.ndim == 1 else jnp.mean(scores, axis=tuple(range(1, scores.ndim)))


def _reference(
    models: Sequence[Any], evaluate: Evaluate, key: jax.Array, data: Any, given: Any
) -> np.ndarray:
    """float32 [tasks]: what each task's own source scores."""
    shape = jax.eval_shape(functools.partial(_scores, evaluate), models[0], key, data).shape
    if len(shape) != 1:
        raise ValueError(
            f"evaluate must return scores [tasks] or [tasks, examples], found shape {list(shape)}"
        )
    if given is not None:
        reference = np.asarray(given, np.float32)
        if reference.shape != shape:
            raise ValueError(
                f"sources: expected one score per task, {list(shape)}, found {list(reference.shape)}"
            )
    elif shape != (len(models),):
        raise ValueError(
            f"evaluate returns {shape[0]} tasks for {len(models)} models: give sources=, the score that "
            "each task's own source reaches"
        )
    else:
        scores = jax.jit(functools.partial(_scores, evaluate))
        reference = np.array(
            [scores(model, key, data)[task] for task, model in enumerate(models)], np.float32
        )
    bad = np.flatnonzero(~(reference > 0) | ~np.isfinite(reference))
    if bad.size:
        raise ValueError(
            f"task {bad[0]}: its source scores {reference[bad[0]]:g}, but shares of a score need one above 0: "
            "return an accuracy, or exp(-loss)"
        )
    return reference


def _chosen(
    made: Sequence[MergeMethod], technique: MergeMethod, point: Mapping[str, Any]
) -> tuple[MergeMethod, dict[str, Any]]:
    """A block's method and all its hyperparameters, defaults too."""
    default = technique.hyperparams["method"].default
    method = made[int(point.get("method", default))]
    own = point.get(method.name, {})
    return method, {name: own.get(name, spec.default) for name, spec in method.hyperparams.items()}
