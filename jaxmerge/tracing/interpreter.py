"""Runs a traced program operation by operation, and calls a visitor where parameters meet activations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxmerge.tracing.contraction import contraction
from jaxmerge.tracing.site import Record, Site, Use, Visit, Visitor
from jaxmerge.tracing.views import Source, View, laid_out
from jaxmerge.tree import flatten, unflatten


class Interpretation(NamedTuple):
    """What running a program with a visitor gave.

    Attributes:
      outputs: what `apply_fn` returns.
      params: the parameters with the visitor's replacements.
      records: what the visitor kept, in program order.
      elsewhere: the paths of leaves that are used otherwise than at sites, alone or also.
    """

    outputs: Any
    params: Any
    records: list[Record]
    elsewhere: frozenset[str]


def interpret(
    apply_fn: Callable[[Any, Any], Any], params: Any, inputs: Any, visit: Visitor
) -> Interpretation:
    """Traces ``apply_fn(params, inputs)`` and runs it with a visitor at every linear use of a parameter.

    A site is a matrix product or an ungrouped convolution of an activation with one parameter leaf, which may have
    been cast, transposed, reshaped or sliced on the way. The walk goes through jit, custom derivatives, rematerialised
    and scanned functions that take parameters; of branches and open-ended loops it sees the result only, so that their
    inside has no sites, and neither has a leaf that was scaled, or joined with another, before its use, or that has an
    axis in common with the activation over which the product is batched (experts, groups). Where a function with a
    derivative of its own takes parameters, what is differentiated is its body.

    A leaf whose layers a scan (or an index) takes one by one gives one site with `Site.layers`; the visitor sees a
    layer at a time. Pure: may run inside jit, vmap and grad.

    Args:
      apply_fn: a traceable function of parameters and inputs.
      params: any pytree of arrays.
      inputs: whatever else `apply_fn` takes, a pytree of arrays.
      visit: called once per site in program order (again if JAX traces a loop's body again): (site, use) -> `Visit`.

    Returns:
      An `Interpretation`; with a visitor that only records, its outputs are those of `apply_fn`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = lambda params, x: params["scale"] * jnp.tanh(x @ params["w"])
      >>> params = {"w": jnp.ones((2, 3)), "scale": jnp.array(2.0)}
      >>> found = interpret(layer, params, jnp.ones((4, 2)), lambda site, use: Visit(use.inputs.shape))
      >>> [(record.site.path, record.site.inputs, record.value) for record in found.records]
      [('w', (0,), (4, 2))]
    """
    leaves, definition = flatten(params)
    closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, inputs)
    sources = [Source(path, jnp.asarray(leaf)) for path, leaf in leaves.items()]
    walk = _Walk(visit)
    given = [*map(View.of, sources), *map(jnp.asarray, jax.tree.leaves(inputs))]
    outputs = [walk.value(out) for out in walk.run(closed.jaxpr, closed.consts, given)]
    return Interpretation(
        jax.tree.unflatten(jax.tree.structure(shape), outputs),
        unflatten(definition, (source.current() for source in sources)),
        walk.records,
        frozenset(walk.elsewhere),
    )


def sites(apply_fn: Callable[[Any, Any], Any], params: Any, inputs: Any) -> list[Site]:
    """Lists the sites of a program in order, without computing anything.

    Args:
      apply_fn, params, inputs: as for `interpret`; arrays or `jax.ShapeDtypeStruct`s.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"q": jnp.ones((2, 4, 3)), "out": jnp.ones((4, 3, 2))}
      >>> layer = lambda p, x: jnp.einsum("nhe,hed->nd", jnp.einsum("nd,dhe->nhe", x, p["q"]), p["out"])
      >>> [(site.path, site.inputs) for site in sites(layer, params, jnp.ones((1, 2)))]
      [('q', (0,)), ('out', (0, 1))]
    """
    found: list[Site] = []

    def record(params: Any, inputs: Any) -> None:
        walked = interpret(apply_fn, params, inputs, lambda site, use: Visit(record=()))
        found.extend(record.site for record in walked.records)

    jax.eval_shape(record, params, inputs)
    return found


# Functions within the program that are looked through where they take parameters.
CALLS = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


class _Walk:
    """One walk through a program, with what the visitor kept, and what was used outside of sites, so far."""

    def __init__(self, visit: Visitor) -> None:
        self.visit = visit
        self.records: list[Record] = []
        self.elsewhere: set[str] = set()

    def value(self, value: Any) -> Any:
        """An array for what is used outside of sites."""
        if isinstance(value, View):
            self.elsewhere.add(value.source.path)
        return _value(value)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Runs a program on arrays and views; its results may be views too."""
        known: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self._step(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        if any(isinstance(operand, View) for operand in operands):
            if eqn.primitive.name in CALLS:
                return self.run(*called(eqn), operands)
            if eqn.primitive.name == "scan":
                return self._scan(eqn, operands)
            views = _views(eqn, operands)
            if views is not None:
                return views
            found = contraction(eqn, operands)
            if found is not None:
                source = found.view.source
                use = Use(source.current(), found.inputs, source.layer, source.replaced, found.rows)
                answer = self.visit(found.site, use)
                if answer.record is not None:
                    self.records.append(Record(found.site, source.layer, answer.record))
                if answer.parameter is not None:
                    source.replace(answer.parameter)
                values = [
                    _value(operand) if operand is found.view else self.value(operand)
                    for operand in operands
                ]
                output = evaluate(eqn, values)[0]
                return [output if answer.output is None else answer.output(output)]
        return evaluate(eqn, [self.value(operand) for operand in operands])

    def _scan(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """Runs a scan with its body walked through; stacked leaves are seen layer by layer."""
        first, count = loop_counts(eqn)
        last = first + count
        consts, carry, xs = operands[:first], operands[first:last], operands[last:]
        stacked = {x.source: x.source.current() for x in xs if _is_stack(x)}
        records: list[Record] = []
        replaced: list[Source] = []

        def body(state: list[Any], turn: tuple[Any, list[Any], list[Any]]) -> tuple[Any, Any]:
            layer, slices, others = turn
            one = {
                whole: Source(
                    whole.path,
                    value,
                    eqn.params["length"],
                    layer,
                    whole.repeated,
                    whole.replaced,
                )
                for whole, value in zip(stacked, slices, strict=True)
            }
            same: dict[Source, Source] = {}
            left = iter(others)
            args = [
                *(_in_loop(const, same) for const in consts),
                *state,
                *(
                    View(one[x.source], View.of(one[x.source]).dims, x.steps)
                    if _is_stack(x)
                    else next(left)
                    for x in xs
                ),
            ]
            outer, self.records = self.records, []
            try:
                results = self.run(*called(eqn), args)
                # JAX may trace the body more than once.
                records[:] = self.records
            finally:
                self.records = outer
            results = [self.value(result) for result in results]
            replaced[:] = [whole for whole in stacked if one[whole].replaced]
            kept = [
                (None if record.layer is None else jnp.asarray(record.layer), record.value)
                for record in records
            ]
            return results[:count], (results[count:], kept, [one[s].value for s in replaced])

        final, (ys, kept, values) = jax.lax.scan(
            body,
            [self.value(value) for value in carry],
            (
                jnp.arange(eqn.params["length"]),
                list(stacked.values()),
                [self.value(x) for x in xs if not _is_stack(x)],
            ),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        for record, (layer, value) in zip(records, kept, strict=True):
            self.records.append(Record(record.site, layer, value))
        for source, value in zip(replaced, values, strict=True):
            source.replace(value)
        return [*final, *ys]


def loop_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many the state."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # JAX 0.12 gives the operands as a tree.
    consts, state, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(state))


def _is_stack(value: Any) -> bool:
    return isinstance(value, View) and value.plain and value.source.layer is None


def _in_loop(value: Any, same: dict[Source, Source]) -> Any:
    """A constant of a loop: what replaces a leaf inside must not leak out of it."""
    if not isinstance(value, View):
        return value
    source = value.source
    if source not in same:
        same[source] = Source(
            source.path,
            source.current(),
            source.layers,
            source.layer,
            True,
            source.replaced,
        )
    return View(same[source], value.dims, value.steps, value.plain)


def _views(eqn: JaxprEqn, operands: list[Any]) -> list[View] | None:
    view, *rest = operands
    if not isinstance(view, View) or any(isinstance(other, View) for other in rest):
        return None
    return laid_out(eqn, view, rest, lambda value: evaluate(eqn, [value, *rest]))


def called(eqn: JaxprEqn) -> tuple[Jaxpr, list[Any]]:
    """The program of a called function, and its constants."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            body = eqn.params[name]
            return (body, []) if isinstance(body, Jaxpr) else (body.jaxpr, body.consts)
    raise NotImplementedError(f"the traced program calls {eqn.primitive.name!r} in an unknown form")


def evaluate(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """Does one operation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # Earlier versions of JAX return the functions among the parameters apart.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _value(value: Any) -> Any:
    return value.value() if isinstance(value, View) else value
