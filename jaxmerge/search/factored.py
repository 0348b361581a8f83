"""Linear merges evaluated without being made: x W = x W_0 + sum_m c_m (x D_m)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.methods.inputs import flatten_all, is_mergeable
from jaxmerge.tracing import Site, Use, Visit, interpret
from jaxmerge.tree import unflatten

Factored = Callable[[jax.Array, Any], Any]


def factored(
    apply_fn: Callable[[Any, Any], Any], models: Sequence[Any], base: Any, inputs: Any
) -> tuple[Factored, tuple[str, ...]]:
    r"""Makes the function of the coefficients and the inputs that a linear merge computes.

    With task vectors :math:`D_m = W_m - W_0` task arithmetic is linear in the models, and so is every product with it:

    .. math:: x \Big(W_0 + \sum_m c_m D_m\Big) = x W_0 + \sum_m c_m (x D_m)

    A population of P candidates then needs no P copies of the weights: under `jax.vmap` over the coefficients the
    weights stay as they are, and N + 1 products of P times as many rows take the place of P merges and products. That
    pays where a candidate has few rows: making it costs 2 N d^2 operations for a matrix [d, d], the further products
    cost 2 N d^2 for each row, so the gain is in memory, and in time only for a handful of rows. Leaves that the program
    uses otherwise than in whole products (norms, biases, embeddings, tied tables) are merged for each candidate.

    Args:
      apply_fn: the model's function of parameters and inputs, traceable.
      models: trees of the same structure.
      base: their base.
      inputs: an example of the inputs, arrays or `jax.ShapeDtypeStruct`s, by which the program is read.

    Returns:
      The function (coefficients float32 [models], inputs) -> outputs, equal to ``apply_fn`` on
      ``task_arithmetic(weight=coefficients)`` up to rounding; and the paths of the leaves that are not merged. Pure:
      may be compiled, mapped and differentiated.

    Raises:
      ValueError: models that do not fit each other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"]) + params["b"][None]
      >>> base = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
      >>> a, b = ({"w": base["w"] + d, "b": base["b"] + d} for d in (1.0, -0.5))
      >>> run, kept = factored(apply_fn, [a, b], base, jnp.ones((1, 2)))
      >>> kept
      ('w',)
      >>> merged = {"w": base["w"] + 0.5, "b": base["b"] + 0.5}
      >>> bool(jnp.allclose(run(jnp.array([0.6, 0.2]), jnp.ones((1, 2))), apply_fn(merged, jnp.ones((1, 2)))))
      True
    """
    flat, origin, definition = flatten_all(list(models), base)
    assert origin is not None
    kept = _whole_products(apply_fn, base, inputs)
    deltas = {
        path: jnp.stack([jnp.asarray(one[path], jnp.float32) for one in flat])
        - jnp.asarray(leaf, jnp.float32)[None]
        for path, leaf in origin.items()
        if is_mergeable(leaf)
    }

    def run(coefficients: jax.Array, inputs: Any) -> Any:
        def visit(site: Site, use: Use) -> Visit:
            if site.path not in kept:
                return Visit()
            mine = deltas[site.path]
            mine = mine if use.layer is None else mine[:, use.layer]
            return Visit(
                output=lambda output: _with_products(site, use, mine, coefficients, output)
            )

        leaves = [
            _merged(leaf, deltas[path], coefficients)
            if path in deltas and path not in kept
            else leaf
            for path, leaf in origin.items()
        ]
        return interpret(apply_fn, unflatten(definition, leaves), inputs, visit).outputs

    return run, tuple(path for path in origin if path in kept)


def _whole_products(apply_fn: Callable[[Any, Any], Any], base: Any, inputs: Any) -> frozenset[str]:
    """The leaves that the program uses in whole products alone."""
    found: list[frozenset[str]] = []

    def look(params: Any, inputs: Any) -> None:
        walked = interpret(apply_fn, params, inputs, lambda site, use: Visit(record=()))
        met = frozenset(record.site.path for record in walked.records)
        parts = frozenset(record.site.path for record in walked.records if not record.site.whole)
        found.append(met - parts - walked.elsewhere)

    jax.eval_shape(look, base, inputs)
    return found[0]


def _merged(leaf: Any, deltas: jax.Array, coefficients: jax.Array) -> jax.Array:
    origin = jnp.asarray(leaf)
    merged = origin.astype(jnp.float32) + jnp.tensordot(coefficients, deltas, 1)
    return merged.astype(origin.dtype)


def _with_products(
    site: Site, use: Use, deltas: jax.Array, coefficients: jax.Array, output: jax.Array
) -> jax.Array:
    """The contraction's output with sum_m c_m (x D_m)."""
    models = deltas.shape[0]
    order = (0, *(axis + 1 for axis in site.inputs), *(axis + 1 for axis in site.outputs))
    columns = use.inputs.shape[-1]
    matrices = jnp.transpose(deltas, order).reshape(models, columns, -1)
    products = jnp.einsum("ni,mio->mno", use.inputs.astype(jnp.float32), matrices)
    added = jnp.tensordot(coefficients, products, 1)
    # Rows are the output's entries in another order: the transpose puts them back.
    shape = jax.ShapeDtypeStruct(output.shape, jnp.float32)
    (back,) = jax.linear_transpose(use.rows, shape)(added)
    return output + back.astype(output.dtype)
