"""Evaluations to the target on known functions: our strategies, plain CMA-ES, and the package cmaes."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Table

from jaxmerge.search.strategies import strategy
from jaxmerge.search.strategies.catcma import CatCMA
from jaxmerge.search.strategies.margin import MarginCMAES
from jaxmerge.search.strategies.umda import UMDA
from search_sections import Options, peer, verdict, versioned
from search_sections.functions import FUNCTIONS, TARGET, Function

SPREAD = 0.25
UMDA_POPULATION = 64
"""UMDA learns frequencies: a handful of candidates tells none."""


def run(options: Options) -> Iterator[Table]:
    peer("cmaes")
    names = ["margin", "catcma", "umda", "plain CMA-ES", "cmaes: margin"]
    notes = [
        f"Medians of {options.seeds} seeds of the evaluations until a candidate's value is below {TARGET:g}; empty",
        f"where half of the runs do not find it in {options.evaluations}. found: how many runs of each do. Half of",
        f"the n scalar variables are discrete. plain CMA-ES: that of {versioned('evosax')} as `evolve` runs it, on",
        f"the genome, which `decode` rounds; cmaes: margin: CMAwM of {versioned('cmaes')}, told the same grid. All",
        f"start in the middle of the space with a standard deviation of {SPREAD} of its range and take 4 + 3 ln n",
        f"candidates a generation, UMDA {UMDA_POPULATION}. Limit: margin and catcma need fewer evaluations than plain",
        "CMA-ES.",
    ]
    for function, make in FUNCTIONS.items():
        about = " ".join(str(make.__doc__).split())
        table = Table(
            f"Evaluations to the target: {function}",
            {"n": "d", **dict.fromkeys(names, ".0f"), "found": "", "holds": ""},
            [about, *notes],
        )
        table.start()
        for n in options.dimensions:
            table.add(n=n, **_row(make(n), n, options))
        yield table


def _row(function: Function, n: int, options: Options) -> dict[str, Any]:
    population = 4 + int(3 * math.log(n))
    taken = {
        "margin": _ours(MarginCMAES(population, function.space), function, options),
        "catcma": _ours(CatCMA(population, function.space), function, options),
        "umda": _ours(UMDA(UMDA_POPULATION, function.space), function, options),
        "plain CMA-ES": _ours(strategy("cma_es", population, function.space), function, options),
        "cmaes: margin": _package(population, function, options),
    }
    medians = {name: float(np.median(counts)) for name, counts in taken.items()}
    plain = medians["plain CMA-ES"]
    slower = [name for name in ("margin", "catcma") if not medians[name] < plain]
    cells: dict[str, Any] = {
        name: {"median": value, "min": float(min(taken[name])), "max": _finite(max(taken[name]))}
        if math.isfinite(value)
        else None
        for name, value in medians.items()
    }
    found = " ".join(str(int(np.sum(np.isfinite(counts)))) for counts in taken.values())
    return {
        **cells,
        "found": found,
        "holds": verdict(not slower, f"{' and '.join(slower)} no faster than plain CMA-ES"),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _ours(es: Any, function: Function, options: Options) -> np.ndarray:
    """Evaluations of each seed, all in one program; infinite where the target was not reached."""
    population = es.population_size
    params = es.default_params._replace(initial_spread=SPREAD)
    middle = jnp.full(function.space.size, 0.5)

    def unfinished(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return ~carry[3] & (carry[1] + population <= options.evaluations)

    def generation(carry: tuple[Any, jax.Array, jax.Array, jax.Array]) -> Any:
        state, count, key, _ = carry
        key, now = jax.random.split(key)
        genomes, state = es.ask(now, state, params)
        fitness = function.of_genomes(genomes)
        hit = fitness <= TARGET
        found = jnp.any(hit)
        state, _ = es.tell(now, genomes, fitness, state, params)
        return state, count + jnp.where(found, jnp.argmax(hit) + 1, population), key, found

    @jax.jit
    @jax.vmap
    def search(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = es.init(key, middle, params)
        start = (state, jnp.zeros((), int), key, jnp.zeros((), bool))
        _, count, _, found = jax.lax.while_loop(unfinished, generation, start)
        return count, found

    count, found = search(jax.random.split(jax.random.key(options.seed), options.seeds))
    return np.where(found, count, np.inf)


def _package(population: int, function: Function, options: Options) -> np.ndarray:
    from cmaes import CMAwM

    evaluate = jax.jit(function.of_genomes)
    kinds = [column.kind for column in function.space.columns]
    levels = function.space.levels
    bounds, steps = np.zeros((len(kinds), 2)), np.zeros(len(kinds))
    bounds[:, 1] = 1
    for i, kind in enumerate(kinds):
        if kind == "binary":
            steps[i] = 1
        elif kind == "integer":
            steps[i] = 1 / levels[i]
            bounds[i] = steps[i] / 2, 1 - steps[i] / 2
    taken = []
    for seed in range(options.seed, options.seed + options.seeds):
        strategy = CMAwM(
            mean=np.full(len(kinds), 0.5),
            sigma=SPREAD,
            bounds=bounds,
            steps=steps,
            seed=seed,
            population_size=population,
        )
        count, reached = 0, False
        while not reached and count + population <= options.evaluations:
            asked = [strategy.ask() for _ in range(population)]
            fitness = np.asarray(evaluate(np.stack([e for e, _ in asked]).astype(np.float32)))
            hits = np.flatnonzero(fitness <= TARGET)
            reached = hits.size > 0
            count += int(hits[0]) + 1 if reached else population
            told = [(raw, float(value)) for (_, raw), value in zip(asked, fitness, strict=True)]
            strategy.tell(told)
        taken.append(count if reached else np.inf)
    return np.array(taken)
