"""Hypervolume of NSGA-II on ZDT1-3 beside pymoo at equal evaluations."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Table

from jaxmerge.search import continuous, space
from jaxmerge.search.pareto import NSGA2, hypervolume
from search_sections import Options, peer, verdict, versioned

VARIABLES, POPULATION, GENERATIONS = 30, 100, 200
LIMIT = 0.99
REFERENCE = (1.1, 1.1)


def _zdt(h: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def objectives(x: jax.Array) -> jax.Array:
        g = 1 + 9 * jnp.mean(x[1:])
        return jnp.stack([x[0], g * h(x[0], g)])

    return objectives


PROBLEMS = {
    "zdt1": _zdt(lambda f, g: 1 - jnp.sqrt(f / g)),
    "zdt2": _zdt(lambda f, g: 1 - (f / g) ** 2),
    "zdt3": _zdt(lambda f, g: 1 - jnp.sqrt(f / g) - f / g * jnp.sin(10 * jnp.pi * f)),
}


def run(options: Options) -> Iterator[Table]:
    peer("pymoo")
    table = Table(
        "Hypervolume of NSGA-II",
        {
            "problem": "",
            "jaxmerge": ".4f",
            "pymoo": ".4f",
            "ratio": ".4f",
            "s a run": ".2f",
            "pymoo s": ".2f",
            "holds": "",
        },
        [
            f"{VARIABLES} variables, population {POPULATION}, {GENERATIONS} generations, reference {REFERENCE}:",
            f"medians of {options.seeds} seeds; both packages' fronts are measured by the same function. NSGA2",
            f"of {versioned('pymoo')} with its own defaults. s a run: of all seeds' runs in one program, compiled,",
            f"divided by the seeds. Limit: at least {LIMIT:.0%} of pymoo's hypervolume.",
        ],
    )
    table.start()
    measure = jax.jit(hypervolume)
    reference = jnp.array(REFERENCE)
    for name, objectives in PROBLEMS.items():
        ours, seconds = _ours(objectives, options)
        theirs, their_seconds = _pymoo(name, options)
        volumes = {
            "jaxmerge": [float(measure(front, reference)) for front in ours],
            "pymoo": [float(measure(front, reference)) for front in theirs],
        }
        ratio = float(np.median(volumes["jaxmerge"]) / np.median(volumes["pymoo"]))
        cells = {
            key: {"median": float(np.median(v)), "min": min(v), "max": max(v)}
            for key, v in volumes.items()
        }
        table.add(
            problem=name,
            **cells,
            ratio=ratio,
            holds=verdict(ratio >= LIMIT, f"{ratio:.4f} of pymoo's"),
            **{"s a run": seconds, "pymoo s": their_seconds},
        )
    yield table


def _ours(objectives: Callable[[jax.Array], jax.Array], options: Options) -> tuple[Any, float]:
    where = space({"x": continuous(0, 1, shape=(VARIABLES,))})
    strategy = NSGA2(POPULATION, where)
    params = strategy.default_params

    def generation(state: Any, key: jax.Array) -> tuple[Any, None]:
        genomes, state = strategy.ask(key, state, params)
        fitness = jax.vmap(lambda genome: objectives(where.decode(genome)["x"]))(genomes)
        return strategy.tell(key, genomes, fitness, state, params)[0], None

    @jax.jit
    @jax.vmap
    def search(key: jax.Array) -> jax.Array:
        first, key = jax.random.split(key)
        mean = jax.random.uniform(first, (VARIABLES,))
        state = strategy.init(key, mean, params)
        return jax.lax.scan(generation, state, jax.random.split(key, GENERATIONS))[0].fitness

    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    compiled = search.lower(keys).compile()
    started = time.perf_counter()
    fronts = jax.block_until_ready(compiled(keys))
    return fronts, (time.perf_counter() - started) / options.seeds


def _pymoo(name: str, options: Options) -> tuple[list[np.ndarray], float]:
    algorithm = peer("pymoo.algorithms.moo.nsga2").NSGA2
    minimize = peer("pymoo.optimize").minimize
    problem = peer("pymoo.problems").get_problem(name, n_var=VARIABLES)
    fronts = []
    started = time.perf_counter()
    for seed in range(options.seed, options.seed + options.seeds):
        found = minimize(problem, algorithm(pop_size=POPULATION), ("n_gen", GENERATIONS), seed=seed)
        fronts.append(np.asarray(found.F, np.float32))
    return fronts, (time.perf_counter() - started) / options.seeds
