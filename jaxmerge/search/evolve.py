"""`evolve`: a whole search in one compiled program."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge.free_memory import available_memory
from jaxmerge.search import best, checkpoints
from jaxmerge.search.checking import trace
from jaxmerge.search.evaluating import Objective
from jaxmerge.search.generation import objective_key, run_generations, start
from jaxmerge.search.host import run_on_host
from jaxmerge.search.job import AXIS, Carry, Search, place
from jaxmerge.search.memory import bytes_of_candidate, plan_chunk
from jaxmerge.search.space import Space
from jaxmerge.search.strategies import Strategy
from jaxmerge.search.strategies import strategy as strategy_named

History = dict[str, np.ndarray]
Progress = Callable[[int, int, History], None]


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
      best: the best point, in the form that the objective gets: NumPy arrays.
      fitness: its fitness; of several objectives [points, objectives], one row for each point of the front.
      genome: its genome, float32 [size], or [points, size]. `best` is then a tree of arrays [points, ...].
      history: float32 [generations] by name: "best" so far, "generation_best", "mean" (of what is finite), "spread"
        (the mean standard deviation of a coordinate), "nonfinite" and "evaluations" (so far), and what the strategy
        adds. Of several restarts the best, the mean or the sum. Of several objectives "best_0", "best_1" and so on.
      generations: how many ran.
      evaluations: how many candidates were evaluated.
      stopped: whether it ended early, for want of progress.
      chunk: how many candidates a device evaluated at once.
      state: the strategy's, each leaf [restarts, ...].
    """

    best: Any
    fitness: Any
    genome: np.ndarray
    history: History
    generations: int
    evaluations: int
    stopped: bool
    chunk: int
    state: Any


def evolve(
    objective: Objective,
    space: Space,
    *,
    strategy: str | Strategy = "cma_es",
    population: int = 64,
    generations: int = 100,
    key: jax.Array,
    args: tuple[Any, ...] = (),
    chunk: int | None = None,
    restarts: int = 1,
    mesh: Mesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 10,
    host: bool = False,
    workers: int = 1,
    reevaluate: int = 0,
    patience: int | None = None,
    tolerance: float = 0.0,
    initial: Any = None,
    objectives: int = 1,
    progress: Progress | None = None,
) -> Result:
    """Searches a space for the point of the smallest objective.

    Candidates, their evaluation and the strategy's update are one program, traced and compiled once and run over all
    generations. All candidates of a generation see the same key: their differences are their own, not luck.

    Args:
      objective: (hyperparameters, key, *args) -> a number, smaller is better, or [objectives]. Pure, and traced; the
        hyperparameters are a point of the space. What is not finite counts as a little worse than the worst.
      space: what varies.
      strategy: a name of `strategy_names`, or a strategy.
      population: candidates per generation, where the strategy is given by name.
      generations: how many at most.
      key: a PRNG key; the same key gives the same result.
      args: arrays that the objective needs. Large ones, and those that lie on several hosts, belong here rather than
        into the objective's closure.
      chunk: candidates evaluated at once on each device; None: planned from the memory that one takes.
      restarts: independent searches side by side in the same program; the first begins at the initial point, the others
        at random ones.
      mesh: devices to spread the population over, with an axis "population". Further axes are free for the models,
        whose placement in `args` decides.
      checkpoint: a folder that keeps the state; a search that finds its own there goes on from it, to the same result
        bit for bit.
      every: generations between checkpoints, and between calls of `progress`.
      host: the objective is any Python function and gets NumPy arrays; only asking and telling are compiled.
      workers: how many candidates a host objective evaluates at once, in threads.
      reevaluate: for noisy objectives: how many of the best candidates each generation evaluates again, under its own
        key; 0, or 2 and more. The result is the best by the mean of these evaluations and two standard errors; the
        one that brought a candidate among them, which was lucky, does not count.
      patience: generations without progress after which the search ends; None: never.
      tolerance: by how much the best must fall to count as progress.
      initial: a point to begin at; None: the space's initial values.
      objectives: how many numbers the objective returns. Of several the result is the front of points that none
        beats in all.
      progress: called with the generations done, all generations, and the history so far.

    Returns:
      The best point, its fitness, and the history.

    Raises:
      ValueError: a budget below one generation, a population that the strategy cannot take, an objective of another
        shape, one that cannot be traced or depends on Python state, one candidate that does not fit into memory, a
        checkpoint of another search: all before anything is compiled. Also an objective that is never finite, found
        after the first generations.

    Example:
      >>> import jax, jaxmerge as jm
      >>> space = jm.search.space({"x": jm.search.continuous(-2.0, 2.0, shape=(2,))})
      >>> result = jm.search.evolve(
      ...     lambda point, key: ((point["x"] - 0.5) ** 2).sum(), space, population=8, generations=30,
      ...     key=jax.random.key(0))
      >>> result.best["x"].round(2).tolist()
      [0.5, 0.5]

    Reference:
      Hansen, The CMA evolution strategy: a tutorial, arXiv:1604.00772, 2016; the other strategies name their own.
    """
    _check_numbers(generations, chunk, restarts, every, workers, reevaluate, patience, tolerance)
    if not isinstance(space, Space):
        raise TypeError(f"expected a space made by jaxmerge.search.space, found {space!r}")
    who = (
        strategy_named(strategy, population, space, objectives)
        if isinstance(strategy, str)
        else strategy
    )
    _check_strategy(who, space, objectives, reevaluate, patience)
    _check_mesh(mesh, host)
    key = _typed(key)
    genome = space.initial_genome() if initial is None else space.encode(initial)

    # Settled once the memory of a candidate is known.
    search = Search(
        space, who, restarts, objectives, reevaluate, patience, float(tolerance), 1, mesh
    )
    folder = None if checkpoint is None else Path(checkpoint).absolute()
    identity = _identity(search, key, genome)
    found = None if folder is None else checkpoints.latest(folder)
    if found is not None:
        checkpoints.check(found, identity)
    if not host:
        search = _planned(search, objective, key, args, chunk)

    key, genome, args = place(mesh, (key, genome, args))
    carry = start(search, key, genome)
    history: History = {}
    done = 0
    if found is not None:
        done, carry, history = checkpoints.load(found, carry, mesh)
    blocks = folder is not None or progress is not None or host
    length = min(every, generations) if blocks else generations
    while done < generations and not bool(carry.stopped):
        if host:
            numbers = range(done, min(done + length, generations))
            carry, record = run_on_host(search, objective, carry, numbers, key, args, workers)
        else:
            first, total = (np.int32(one) for one in (done, generations))
            carry, record = run_generations(
                search, objective, length, carry, first, total, key, args
            )
        history = _appended(history, record)
        done = len(history["evaluations"])
        _check_finite(carry)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.save(folder, done, carry, history, identity)
        if progress is not None:
            progress(done, generations, history)
    return _result(search, carry, history)


def _planned(
    search: Search,
    objective: Objective,
    key: jax.Array,
    args: tuple[Any, ...],
    chunk: int | None,
) -> Search:
    """Checks the objective and settles how many candidates are evaluated at once."""
    shared = jax.eval_shape(objective_key, key, jax.ShapeDtypeStruct((), jnp.int32))
    traced = trace(objective, search.space, shared, args, search.objectives)
    devices = 1 if search.mesh is None else search.mesh.shape[AXIS]
    candidates = -(-search.candidates // devices)
    if chunk is None:
        device = jax.local_devices()[0] if search.mesh is None else search.mesh.local_devices[0]
        varying = [i == 0 for i in range(len(traced.jaxpr.invars))]
        nbytes = bytes_of_candidate(traced, varying)
        chunk = plan_chunk(candidates, nbytes, available_memory(device), device.platform)
    return replace(search, chunk=min(chunk, candidates))


def _appended(history: History, record: dict[str, Any]) -> History:
    """The history with what ran; generations that did not are NaN."""
    new = {name: np.asarray(value) for name, value in record.items()}
    ran = ~np.isnan(new["evaluations"])
    return {
        name: np.concatenate([history[name], value[ran]]) if history else value[ran]
        for name, value in new.items()
    }


def _result(search: Search, carry: Carry, history: History) -> Result:
    genome, fitness = best.finest(search, carry.best)
    decode = search.space.decode if search.objectives == 1 else jax.vmap(search.space.decode)
    return Result(
        best=jax.device_get(decode(jnp.asarray(genome))),
        fitness=fitness if fitness.ndim else float(fitness),
        genome=genome,
        history=history,
        generations=len(history["evaluations"]),
        evaluations=int(carry.evaluations),
        stopped=bool(carry.stopped),
        chunk=search.chunk,
        state=carry.state,
    )


def _identity(search: Search, key: jax.Array, genome: jax.Array) -> dict[str, Any]:
    """What makes two searches the same, as plain data."""
    who = search.strategy
    kind = getattr(who, "algorithm", type(who).__name__)
    return {
        "space": search.space.fingerprint,
        "strategy": kind,
        "population": who.population_size,
        "restarts": search.restarts,
        "objectives": search.objectives,
        "reevaluate": search.reevaluate,
        "patience": search.patience,
        "tolerance": search.tolerance,
        "key": checkpoints.identity_of_key(key),
        "initial": np.asarray(genome).astype(float).round(6).tolist(),
    }


def _check_numbers(
    generations: int,
    chunk: int | None,
    restarts: int,
    every: int,
    workers: int,
    reevaluate: int,
    patience: int | None,
    tolerance: float,
) -> None:
    if generations < 1:
        raise ValueError(f"the budget is below one generation: generations={generations}")
    for name, value in (
        ("chunk", chunk),
        ("restarts", restarts),
        ("every", every),
        ("workers", workers),
        ("patience", patience),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if reevaluate < 0 or reevaluate == 1:
        raise ValueError(f"reevaluate must be 0, or at least 2, found {reevaluate}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, found {tolerance}")


def _check_strategy(
    who: Strategy, space: Space, objectives: int, reevaluate: int, patience: int | None
) -> None:
    if who.space != space:
        raise ValueError("the strategy was made for another space")
    if objectives < 1:
        raise ValueError(f"objectives must be at least 1, found {objectives}")
    if who.multiobjective != (objectives > 1):
        wanted = "several objectives" if who.multiobjective else "one objective"
        raise ValueError(f"{type(who).__name__} takes {wanted}, found objectives={objectives}")
    if objectives > 1 and (reevaluate or patience is not None):
        raise ValueError("reevaluate and patience are for one objective")
    if reevaluate > who.population_size:
        raise ValueError(
            f"reevaluate is {reevaluate}, more than the population of {who.population_size}"
        )


def _check_mesh(mesh: Mesh | None, host: bool) -> None:
    if mesh is None:
        return
    if host:
        raise ValueError("a host objective runs on this host; give workers= rather than mesh=")
    if AXIS not in mesh.shape:
        raise ValueError(f"the mesh needs an axis {AXIS!r}, its axes are {list(mesh.axis_names)}")
    if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "the mesh's axes must be automatic: jax.make_mesh(..., "
            "axis_types=(jax.sharding.AxisType.Auto,))"
        )


def _typed(key: Any) -> jax.Array:
    if isinstance(key, jax.Array) and key.shape == ():
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key
    elif isinstance(key, jax.Array | np.ndarray) and (key.dtype, key.shape) == (np.uint32, (2,)):
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(f"key must be one key of jax.random.key, found {key!r}")


def _check_finite(carry: Carry) -> None:
    if np.isinf(np.asarray(carry.best["fitness"])).all():
        raise ValueError(
            f"the objective was not finite for any of {int(carry.evaluations)} candidates"
        )
