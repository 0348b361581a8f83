"""REPAIR: the units of a merged model get back the means and deviations that they have in its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike

from jaxmerge.align.spec import Binding, PermutationSpec
from jaxmerge.align.symmetry.walk import trace
from jaxmerge.tracing.interpreter import CALLS, called, evaluate
from jaxmerge.tree import flatten, unflatten


class Spread(NamedTuple):
    """A unit's mean and standard deviation over examples and positions; arrays shaped as the leaf that shifts it."""

    mean: jax.Array
    deviation: jax.Array


@dataclass(frozen=True)
class RepairInfo:
    """What a repair could reach.

    Attributes:
      repaired: the leaves that took the shifts, in program order, each with the leaf that took the scales.
      skipped: nodes of the spec none of whose places takes a shift: layers without a bias, norms with a scale alone,
        layers that are used several times or run inside a loop. Their statistics stay as they are.
    """

    repaired: tuple[tuple[str, str], ...]
    skipped: tuple[str, ...]


def repair(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    merged: Any,
    models: Sequence[Any],
    x: Any,
    weights: ArrayLike | None = None,
) -> tuple[Any, RepairInfo]:
    r"""Gives the units of a merged model the statistics that they have in the models it was merged from.

    .. math:: y' = \frac{y - \mu}{\sigma} \sum_t w_t \sigma_t + \sum_t w_t \mu_t

    for every unit's pre-activation y, with :math:`\mu` and :math:`\sigma` its mean and standard deviation over `x` in
    the merged model, of which the layers before it are repaired already, and :math:`\mu_t, \sigma_t` those in model t.
    The scale goes into the kernel or the norm's scale that makes y, the shift into the bias added to it: the program
    stays the same, and one pass per model is enough. A unit that never changes in the merged model is only shifted.

    A network with batch norms may have its statistics reset instead, see `reset_batch_norm`.

    Args:
      spec: where the units stand; of the roles, "norm" says which leaves may take shifts, "out" and "norm" which may
        take scales.
      apply_fn: the function of all models.
      merged: the merged model.
      models: its sources, aligned with each other.
      x: one batch of inputs: a pytree, or a tuple of what `apply_fn` takes after the parameters.
      weights: w, [models]; by default all the same.

    Returns:
      The repaired model, and a `RepairInfo`.

    Raises:
      ValueError: no model, weights of another number, or no unit that can be repaired.

    Example:
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]["w"] + p["fc1"]["b"][None]) @ p["fc2"]
      >>> spec = PermutationSpec.from_axes({"fc1/w": (None, "P0"), "fc1/b": ("P0",), "fc2": ("P0", None)})
      >>> model = {"fc1": {"w": jnp.eye(2), "b": jnp.ones(2)}, "fc2": jnp.ones((2, 1))}
      >>> merged = {"fc1": {"w": jnp.eye(2) / 4, "b": jnp.zeros(2)}, "fc2": jnp.ones((2, 1))}
      >>> repaired, info = repair(spec, mlp, merged, [model], jnp.array([[0.0, 1.0], [2.0, -1.0]]))
      >>> repaired["fc1"]["w"].tolist(), repaired["fc1"]["b"].tolist(), info.repaired
      ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0], (('fc1/b', 'fc1/w'),))

    Reference:
      Jordan et al., REPAIR: REnormalizing Permuted Activations for Interpolation Repair, ICLR 2023.
    """
    if not models:
        raise ValueError("a repair needs the models that were merged, found none")
    count = len(models)
    w = jnp.full(count, 1 / count) if weights is None else jnp.asarray(weights)
    if w.shape != (count,):
        raise ValueError(f"expected {count} weights, one per model, found shape {list(w.shape)}")
    inputs = x if isinstance(x, tuple) else (x,)
    leaves, definition = flatten(merged)
    spec = spec.sized({path: leaf.shape for path, leaf in leaves.items()})

    def run(model: Any, targets: Mapping[str, Spread] | None) -> _Run:
        program = trace(apply_fn, model, inputs)
        walk = _Run(spec, flatten(model)[0], targets)
        walk.run(
            program.jaxpr,
            program.consts,
            [*map(_Leaf, walk.leaves), *map(jnp.asarray, jax.tree.leaves(inputs))],
        )
        return walk

    found: list[tuple[str, str]] = []

    def measured(model: Any) -> dict[str, Spread]:
        walk = run(model, None)
        found[:] = [site for site in walk.sites if walk.uses[site[0]] == walk.uses[site[1]] == 1]
        return {shift: walk.spreads[shift] for shift, _ in found}

    jax.eval_shape(measured, merged)
    sites = tuple(found)
    reached = {n for shift, _ in sites for a in spec.binding(shift).axes if a for n in a.nodes()}
    skipped = tuple(node.name for node in spec.free() if node.name not in reached)
    if not sites:
        raise ValueError(
            "no unit can be repaired: a shift goes into a bias that is added to a layer's or a norm's result, "
            f"and none is added to {', '.join(map(repr, skipped)) or 'any node of the spec'}"
        )

    @jax.jit
    def repaired(merged: Any, models: list[Any], w: jax.Array) -> dict[str, jax.Array]:
        each = [measured(model) for model in models]
        targets = jax.tree.map(
            lambda *parts: jnp.tensordot(w.astype(parts[0].dtype), jnp.stack(parts), 1), *each
        )
        return run(merged, targets).leaves

    new = repaired(merged, list(models), w)
    return unflatten(definition, new.values()), RepairInfo(sites, skipped)


class _Leaf:
    """A parameter, moved and spread but not computed with: what a program does to its axes alone."""

    def __init__(self, path: str, view: Callable[[jax.Array], jax.Array] | None = None) -> None:
        self.path = path
        self.view = view or (lambda leaf: leaf)

    def then(self, eqn: JaxprEqn) -> _Leaf:
        before = self.view
        return _Leaf(self.path, lambda leaf: evaluate(eqn, [before(leaf)])[0])


class _Scaled(NamedTuple):
    """A value that grows with the entries of one leaf, unit by unit."""

    value: jax.Array
    path: str


_MOVES = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose", "copy"}


class _Run:
    """Runs a program, measures what biases are added to, and, given targets, repairs it on the way."""

    def __init__(
        self,
        spec: PermutationSpec,
        leaves: Mapping[str, Any],
        targets: Mapping[str, Spread] | None,
    ) -> None:
        self.leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
        self.targets = targets
        self.sites: list[tuple[str, str]] = []
        self.spreads: dict[str, Spread] = {}
        self.uses = dict.fromkeys(self.leaves, 0)
        self._bound = dict(spec.leaves)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        known: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            known.update(zip(eqn.outvars, self._step(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in CALLS:
            return self.run(*called(eqn), operands)
        if name in _MOVES and len(operands) == 1:
            (one,) = operands
            if isinstance(one, _Leaf):
                return [one.then(eqn)]
            if isinstance(one, _Scaled):
                return [_Scaled(evaluate(eqn, [one.value])[0], one.path)]
        for one in operands:
            if isinstance(one, _Leaf):
                self.uses[one.path] += 1
        values = [self._value(one) for one in operands]
        results = evaluate(eqn, values)
        if name in ("add", "add_any"):
            for shift, scaled in (operands, operands[::-1]):
                if isinstance(shift, _Leaf) and isinstance(scaled, _Scaled):
                    return [self._shifted(shift, scaled.path, results[0])]
        scales = [one for one in operands if isinstance(one, _Leaf) and self._scales(one.path)]
        if name in ("mul", "dot_general", "conv_general_dilated") and scales:
            return [_Scaled(results[0], scales[0].path)]
        passed = operands if name == "mul" else operands[:1] if name == "div" else ()
        grown = [one for one in passed if isinstance(one, _Scaled)]
        return [_Scaled(results[0], grown[0].path)] if len(grown) == 1 else results

    def _value(self, one: Any) -> Any:
        if isinstance(one, _Leaf):
            return one.view(self.leaves[one.path])
        return one.value if isinstance(one, _Scaled) else one

    def _scales(self, path: str) -> bool:
        binding = self._bound.get(path)
        return binding is not None and any(
            axis.role in ("out", "norm") for _, axis in binding.moving()
        )

    def _shifted(self, shift: _Leaf, scale: str, result: jax.Array) -> jax.Array:
        """The sum of a bias and what a kernel or a norm's scale makes: measured, and repaired if it is to be."""
        binding = self._bound.get(shift.path)
        if binding is None or {axis.role for _, axis in binding.moving()} != {"norm"}:
            return result
        axes = _matching_axes(binding, self._bound[scale])
        leaf = self.leaves[shift.path]
        if axes is None or any(
            axis is None and n > 1 for axis, n in zip(binding.axes, leaf.shape, strict=True)
        ):
            return result
        self.sites.append((shift.path, scale))
        wide = jnp.promote_types(result.dtype, jnp.float32)

        def view(entries: jax.Array) -> jax.Array:
            return jnp.broadcast_to(shift.view(entries), result.shape)

        spread_out = jax.linear_transpose(view, leaf)

        def summed(array: jax.Array) -> jax.Array:
            (total,) = spread_out(array)
            return total.astype(wide)

        def over(entries: jax.Array) -> jax.Array:
            return view(entries.astype(leaf.dtype)).astype(result.dtype)

        samples = summed(jnp.ones_like(result))
        mean = summed(result) / samples
        centred = result - over(mean)
        deviation = jnp.sqrt(summed(centred**2) / samples)
        self.spreads[shift.path] = Spread(mean, deviation)
        if self.targets is None or shift.path not in self.targets:
            return result
        target = self.targets[shift.path]
        still = deviation <= 0
        factor = jnp.where(still, 1, target.deviation / jnp.where(still, 1, deviation))
        self.leaves[shift.path] = ((leaf - mean) * factor + target.mean).astype(leaf.dtype)
        kernel = self.leaves[scale]
        shape = [1] * kernel.ndim
        for own, its in axes.items():
            shape[its] = leaf.shape[own]
        order = sorted(axes, key=axes.__getitem__)
        kept = jnp.transpose(
            jnp.reshape(factor, [leaf.shape[i] for i in sorted(axes)]), _ranks(order)
        )
        along = jnp.broadcast_to(jnp.reshape(kept, shape), kernel.shape)
        self.leaves[scale] = (kernel * along).astype(kernel.dtype)
        return centred * over(factor) + over(target.mean)


def _matching_axes(shift: Binding, scale: Binding) -> dict[int, int] | None:
    """For each axis of a bias that moves, the axis of the kernel or scale with the same units."""
    found: dict[int, int] = {}
    for i, axis in shift.moving():
        same = [
            j
            for j, other in scale.moving()
            if other.segments == axis.segments and other.role in ("out", "norm")
        ]
        if len(same) != 1 or same[0] in found.values():
            return None
        found[i] = same[0]
    return found


def _ranks(order: Sequence[int]) -> list[int]:
    places = sorted(order)
    return [places.index(one) for one in order]
