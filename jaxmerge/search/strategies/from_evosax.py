"""The strategies of evosax, made to look like our own: a box, a spread, and one kind of `init`."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmerge.search.space import Space

# evosax's own rates are made for the weights of networks.
_LEARNING_RATE = 0.1
# These do not take a population and a genome alone: the first two evolve several populations at once, the third needs
# to be told how to sample, the fourth how many generations there will be.
_OTHERS = ("SV_CMA_ES", "SV_Open_ES", "RandomSearch", "DiffusionEvolution")


class Params(NamedTuple):
    """What may be traced.

    Attributes:
      initial_spread: the standard deviation with which the search sets out, in genome coordinates.
      own: the algorithm's own parameters.
    """

    initial_spread: Any
    own: Any


@dataclass(frozen=True)
class FromEvosax:
    """An algorithm of evosax.

    It sees x = (genome - 1/2) / initial_spread, so that its own spread of 1 is the one asked for, whatever it calls it.
    What it asks for is clipped to the space, and so is its mean. An algorithm that needs an evaluated population to
    begin with gets it in the first generation.

    Attributes:
      population_size: as the algorithm takes it.
      space: what is searched.
      algorithm: its name in evosax.
    """

    population_size: int
    space: Space
    algorithm: str

    multiobjective: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _made(self.algorithm, self.population_size, self.space.size)

    @property
    def default_params(self) -> Params:
        """A spread of 0.2 and the algorithm's own defaults."""
        made = _made(self.algorithm, self.population_size, self.space.size)
        with jax.numpy_rank_promotion("allow"):
            return Params(0.2, made.default_params)

    def init(self, key: jax.Array, mean: jax.Array, params: Params) -> dict[str, Any]:
        """Starts at a genome."""
        made = _made(self.algorithm, self.population_size, self.space.size)
        inside = _inside(mean, params)
        with jax.numpy_rank_promotion("allow"):
            if not _by_population(made):
                return {"own": _settled(made.init(key, inside, params.own))}
            spread = jax.random.normal(key, (self.population_size, self.space.size))
            population = inside[None] + spread.at[0].set(0.0)
            # The true fitness is not known before the first generation.
            fitness = jnp.zeros(self.population_size)
            own = _settled(made.init(key, population, fitness, params.own))
        return {"own": own, "first": population, "started": jnp.zeros((), bool)}

    def ask(self, key: jax.Array, state: Any, params: Params) -> tuple[jax.Array, Any]:
        """Asks, and clips."""
        made = _made(self.algorithm, self.population_size, self.space.size)
        with jax.numpy_rank_promotion("allow"):
            population, own = made.ask(key, state["own"], params.own)
        own = _like(own, state["own"])
        if "started" in state:
            population = jnp.where(state["started"], population, state["first"])
            own = _where(state["started"], own, state["own"])
        genomes = jnp.clip(0.5 + params.initial_spread * population, 0.0, 1.0)
        return genomes.astype(jnp.float32), {**state, "own": own}

    def tell(
        self,
        key: jax.Array,
        population: jax.Array,
        fitness: jax.Array,
        state: Any,
        params: Params,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Tells what was clipped."""
        made = _made(self.algorithm, self.population_size, self.space.size)
        inside = _inside(population, params)
        with jax.numpy_rank_promotion("allow"):
            # Metrics are left out: they hold whole genomes.
            own, _ = made.tell(key, inside, fitness, state["own"], params.own)
            own = _like(own, state["own"])
            if "started" in state:
                begun = made.init(key, inside, fitness, params.own)
                own = _where(state["started"], own, _like(begun, state["own"]))
                state = {**state, "started": jnp.ones((), bool)}
        if getattr(own, "mean", None) is not None:
            low, high = -0.5 / params.initial_spread, 0.5 / params.initial_spread
            own = own.replace(mean=jnp.clip(own.mean, low, high))
        return {**state, "own": own}, {}


def evosax_names() -> list[str]:
    """The names of evosax's strategies that need nothing but a population and a genome."""
    from evosax.algorithms import algorithms

    return [name for name in algorithms if name not in _OTHERS]


@functools.lru_cache(maxsize=256)
def _made(name: str, population_size: int, dimensions: int) -> Any:
    """One instance: evosax compiles anew for each."""
    from evosax.algorithms import algorithms

    kind = algorithms[name]
    options: dict[str, Any] = {}
    if "optimizer" in inspect.signature(kind).parameters:
        options["optimizer"] = optax.adam(_LEARNING_RATE)
    if "subspace_dims" in inspect.signature(kind).parameters:
        options["subspace_dims"] = min(4, dimensions)
    try:
        with jax.numpy_rank_promotion("allow"):
            return kind(population_size=population_size, solution=jnp.zeros(dimensions), **options)
    except AssertionError as error:
        raise ValueError(
            f"{name} cannot take a population of {population_size} over {dimensions} "
            f"coordinates: {error}"
        ) from None


def _by_population(made: Any) -> bool:
    return "fitness" in inspect.signature(type(made).init).parameters


def _inside(genome: jax.Array, params: Params) -> jax.Array:
    return (genome - 0.5) / params.initial_spread


def _settled(state: Any) -> Any:
    """Arrays of definite dtypes, as a scan needs them."""
    return jax.tree.map(lambda x: _cast(jnp.asarray(x), jnp.asarray(x).dtype), state)


def _like(state: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: _cast(jnp.asarray(x), y.dtype), state, other)


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return array
    return jax.lax.convert_element_type(array, dtype)


def _where(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)
