"""What is wrong with an objective, found by tracing it, before anything is compiled."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxmerge.search.evaluating import Objective, candidate
from jaxmerge.search.space import Space

# Where Python objects lie in memory.
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def trace(
    objective: Objective, space: Space, key: jax.Array, args: tuple[Any, ...], objectives: int
) -> core.ClosedJaxpr:
    """Traces an objective twice and checks what it returns.

    Args:
      objective: (hyperparameters, key, *args) -> a number, or [objectives].
      space: what is searched.
      key: like that of a generation.
      args: of the objective.
      objectives: how many numbers are expected.

    Returns:
      The trace of `candidate`; the search's program uses it again.

    Raises:
      ValueError: it cannot be traced, returns something else, or is another function each time it is traced.
      TypeError: it is no function.
    """
    if not callable(objective):
        raise TypeError(f"the objective must be a function, found {objective!r}")
    genome = jax.ShapeDtypeStruct((space.size,), jnp.float32)

    def checked(hyperparams: Any, key: jax.Array, *args: Any) -> Any:
        result = objective(hyperparams, key, *args)
        check_result(result, objectives)
        return result

    try:
        # A function of its own each time: its trace is not kept.
        again = candidate.trace(checked, space, genome, key, args).jaxpr
        kept = candidate.trace(objective, space, genome, key, args).jaxpr
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            "the objective cannot be traced: it needs its arguments as Python or NumPy numbers. "
            "Write it with jax.numpy, or give host=True.\n" + str(error).strip().splitlines()[0]
        ) from error
    if not _same(again, kept):
        raise ValueError(
            "the objective is another function each time it is traced: it depends on Python state "
            "(a counter, a clock, numpy.random), which a compiled program would freeze. Draw "
            "random numbers from its key, pass data by args=, or give host=True"
        )
    return kept


def check_result(result: Any, objectives: int) -> None:
    """Raises a ValueError unless this is the fitness of one candidate, traced or not."""
    expected = "a number" if objectives == 1 else f"{objectives} numbers, an array [{objectives}]"
    hint = ""
    if isinstance(result, int | float | np.ndarray | np.generic | jax.Array):
        dtype, shape = jnp.result_type(result), np.shape(result)
        real = dtype == jnp.bool_ or (
            jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)
        )
        if shape == (() if objectives == 1 else (objectives,)) and real:
            return
        found = f"{dtype}{list(shape)}"
        if objectives == 1 and len(shape) == 1:
            hint = f"; for several objectives give objectives={shape[0]}"
    else:
        found = f"a {type(result).__name__}"
    raise ValueError(f"the objective must return {expected}, found {found}{hint}")


def _same(one: core.ClosedJaxpr, other: core.ClosedJaxpr) -> bool:
    if _ADDRESS.sub("", str(one)) != _ADDRESS.sub("", str(other)):
        return False
    return all(map(_equal, one.consts, other.consts))


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if jnp.issubdtype(jnp.result_type(one), jax.dtypes.extended):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
