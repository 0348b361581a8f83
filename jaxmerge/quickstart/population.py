"""The population: many merge candidates, made and scored by one compiled program."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge import methods
from jaxmerge.data import Digits
from jaxmerge.methods import Hyperparameter, MergeMethod
from jaxmerge.quickstart.evaluation import fit
from jaxmerge.quickstart.network import LAYOUT
from jaxmerge.quickstart.training import Sources

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")

# How many candidates are made side by side: bounds the memory.
_BATCH = 64
# Values are multiples of this: exact in float32 and short in a recipe.
_STEP = 1 / 128


class Population(NamedTuple):
    """Scored candidates.

    Attributes:
      methods: [n] names.
      hyperparams: per candidate, those of its method: numbers, or tuples of one per model.
      accuracy: float32 [n], on the validation split.
      loss: float32 [n], mean negative log-likelihood there.
    """

    methods: tuple[str, ...]
    hyperparams: tuple[dict[str, float | tuple[float, ...]], ...]
    accuracy: np.ndarray
    loss: np.ndarray

    @property
    def best(self) -> int:
        """The candidate of highest accuracy; of equals, the one of least loss."""
        return int(np.lexsort((self.loss, -self.accuracy))[0])


def search_population(
    sources: Sources, digits: Digits, *, candidates: int, seed: int
) -> Population:
    """Samples candidates and scores them all in one compiled program.

    The method is a hyperparameter like any other (`jm.methods.choose`). The first candidates are
    the methods at their defaults; the others take the methods in turn, and hyperparameters at
    random from their search ranges.

    Args:
      sources: Flax variables of base and experts.
      digits: the validation split.
      candidates: how many.
      seed: of the sampling, and the key of random methods, as in a recipe's run.
    """
    parts = [methods.get(name)() for name in METHODS]
    method = methods.choose(parts)
    sampled = _sample(parts, len(sources.experts), candidates, np.random.default_rng(seed))
    state = method.init(sources.experts, sources.base, layout=LAYOUT)
    accuracy, loss = _score(method, state, sampled, jax.random.key(seed), digits)
    names = [METHODS[index] for index in sampled["method"]]
    return Population(
        tuple(names),
        tuple(_plain(sampled[name], row) for row, name in enumerate(names)),
        np.asarray(accuracy),
        np.asarray(loss),
    )


@functools.partial(jax.jit, static_argnums=0)
def _score(
    method: MergeMethod, state: Any, candidates: Any, key: jax.Array, digits: Digits
) -> tuple[jax.Array, jax.Array]:
    """[n] accuracies and [n] losses; `candidates` holds the hyperparameters, stacked."""

    def one(hyperparams: Any) -> tuple[jax.Array, jax.Array]:
        return fit(method.apply(state, hyperparams, key), digits)

    count = len(candidates["method"])
    return jax.lax.map(one, candidates, batch_size=min(_BATCH, count))


def _sample(
    parts: Sequence[MergeMethod], models: int, candidates: int, draw: np.random.Generator
) -> dict[str, Any]:
    index = np.arange(candidates, dtype=np.int32) % len(parts)
    values: dict[str, Any] = {"method": index}
    for method in parts:
        values[method.name] = {
            name: _sample_one(spec, models, candidates, draw)
            for name, spec in method.hyperparams.items()
        }
        for name, spec in method.hyperparams.items():
            values[method.name][name][: len(parts)] = spec.default
    return values


def _sample_one(
    spec: Hyperparameter, models: int, candidates: int, draw: np.random.Generator
) -> np.ndarray:
    """float32 [n] or [n, models], uniform in the search range."""
    if spec.kind == "flag":
        return draw.integers(0, 2, candidates).astype(np.float32)
    low, high = spec.search or (spec.low, spec.high)
    shape = (candidates, models) if spec.scope == "model" else (candidates,)
    value = draw.uniform(low, high, shape)
    if spec.scope == "model":
        # From one value for all models to one of its own for each.
        freedom = draw.uniform(0, 1, (candidates, 1))
        value = freedom * value + (1 - freedom) * value[:, :1]
    return (np.round(value / _STEP) * _STEP).astype(np.float32)


def _plain(values: Mapping[str, np.ndarray], row: int) -> dict[str, float | tuple[float, ...]]:
    return {
        name: tuple(map(float, value[row])) if value.ndim > 1 else float(value[row])
        for name, value in values.items()
    }
