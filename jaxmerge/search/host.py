"""Objectives that are any Python: asked for on the host, one candidate at a time or by several workers."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.checking import check_result
from jaxmerge.search.evaluating import Objective
from jaxmerge.search.generation import Record, ask, objective_key, tell
from jaxmerge.search.job import Carry, Search


def run_on_host(
    search: Search,
    objective: Objective,
    carry: Carry,
    numbers: Sequence[int],
    key: jax.Array,
    args: tuple[Any, ...],
    workers: int,
) -> tuple[Carry, Record]:
    """Runs generations whose candidates are evaluated on the host; asking and telling are compiled.

    Args:
      search: which.
      objective: (hyperparameters, key, *args) -> a number, or [objectives]; the hyperparameters are NumPy arrays.
      carry: of the generation before.
      numbers: of the generations.
      key: of the whole search.
      args: of the objective.
      workers: how many candidates are evaluated at once, each in a thread of its own, whose default device is one of
        this process's in turn.

    Returns:
      As `run_generations`; what did not run is left out.

    Raises:
      ValueError: the objective returned something else than numbers.
    """
    records: list[Record] = []
    for number in numbers:
        if bool(carry.stopped):
            break
        step = jnp.asarray(number, jnp.int32)
        genomes, points, state = _ask(search, carry, step, key)
        # One transfer; then candidates are slices.
        points = jax.device_get(points)
        shared = objective_key(key, step)

        def one(i: int, points: Any = points, shared: jax.Array = shared) -> np.ndarray:
            point = jax.tree.map(lambda leaf: leaf[i], points)
            device = jax.local_devices()[i % workers % jax.local_device_count()]
            try:
                with jax.default_device(device):
                    result = objective(point, shared, *args)
                check_result(result, search.objectives)
            except Exception as error:
                error.add_note(f"at the hyperparameters {point}")
                raise
            return np.asarray(result, np.float32)

        fitness = np.stack(_each(one, search.candidates, workers))
        carry, record = _tell(search, carry, state, genomes, fitness, step, key)
        records.append(record)
    if not records:
        return carry, {}
    return carry, jax.tree.map(lambda *values: jnp.stack(values), *records)


def _each(function: Callable[[int], np.ndarray], count: int, workers: int) -> list[np.ndarray]:
    if workers == 1:
        return [function(i) for i in range(count)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, range(count)))


@functools.partial(jax.jit, static_argnums=0)
def _ask(
    search: Search, carry: Carry, number: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any, Any]:
    genomes, state = ask(search, carry, number, key)
    return genomes, jax.vmap(search.space.decode)(genomes), state


_tell = jax.jit(tell, static_argnums=0)
