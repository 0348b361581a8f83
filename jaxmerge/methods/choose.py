"""`choose`: a traced choice between methods; members of the task-vector family share one kernel."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Fraction, Hyperparameter
from jaxmerge.methods.leaf import (
    Base,
    Chunk,
    Cuts,
    Found,
    LeafMethod,
    Local,
    Measure,
    Select,
    Sums,
    Values,
)
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import Family, Settings, family_leaf


def choose(methods: Sequence[MergeMethod] | Mapping[str, MergeMethod]) -> MergeMethod:
    """Makes the method itself a hyperparameter.

    The hyperparameter "method" is a traced index into `methods`; the methods' own hyperparameters nest under their
    names. Members of the task-vector family with one scope are one kernel whose mask and consensus are switched, so a
    population over them costs little more than the dearest of them. Other methods are branches: one candidate runs one
    branch, but under `vmap` over the index every branch runs, and what methods measure beforehand (norms, orders) is
    measured for all. Per-task results of `emr` and `tall_masks` are left out: the merged parameters alone are
    returned.

    Args:
      methods: methods with different names, or a mapping from a name of your own to a method.

    Returns:
      A `MergeMethod`; equal arguments give the same object.

    Raises:
      ValueError: fewer than one method, or one name twice.
      TypeError: a method that is not built from a leaf method.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> method = jm.methods.choose([jm.methods.linear(), jm.methods.task_arithmetic()])
      >>> state = method.init([{"w": jnp.ones(1)}, {"w": 3 * jnp.ones(1)}], {"w": jnp.zeros(1)})
      >>> jax.vmap(lambda i: method.apply(state, {"method": i})["w"])(jnp.arange(2)).ravel()
      Array([2., 4.], dtype=float32)
    """
    if isinstance(methods, Mapping):
        items = tuple(methods.items())
    else:
        items = tuple((method.name, method) for method in methods)
    names = [name for name, _ in items]
    if not items:
        raise ValueError("choose needs at least one method")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"choose has {twice[0]!r} twice; give a mapping with names of your own")
    for name, method in items:
        if method.leaf is None:
            raise TypeError(f"choose needs methods built from a leaf method; {name!r} is not")
    return _build(items)


class Branch(NamedTuple):
    """One leaf method, the choices that it serves, and how it reads the nested hyperparameters."""

    leaf: LeafMethod
    serves: tuple[int, ...]
    values: Callable[[Values], Values]


@functools.cache
def _build(items: tuple[tuple[str, MergeMethod], ...]) -> MergeMethod:
    needs_base = any(method.base == "required" for _, method in items)
    branches = _branches(items, needs_base)
    branch_of = [0] * len(items)
    for b, branch in enumerate(branches):
        for position in branch.serves:
            branch_of[position] = b

    def apply(chunk: Chunk, values: Values, found: Found) -> jax.Array:
        def run(b: int) -> jax.Array:
            branch = branches[b]
            seen = {one.name: found[f"{b}/{one.name}"] for one in branch.leaf.measures}
            return branch.leaf.apply(chunk, branch.values(values), seen)

        if len(branches) == 1:
            return run(0)
        chosen = jnp.asarray(branch_of)[values["method"]]
        return jax.lax.switch(chosen, [functools.partial(run, b) for b in range(len(branches))])

    hyperparams: dict[str, Any] = {
        "method": Hyperparameter(
            0.0, 0.0, float(len(items) - 1), "which method", kind="index", differentiable=False
        )
    }
    hyperparams.update({name: method.hyperparams for name, method in items})
    lows = [branch.leaf.models[0] for branch in branches]
    highs = [branch.leaf.models[1] for branch in branches if branch.leaf.models[1] is not None]
    bases: tuple[Base, ...] = ("required", "source", "optional", "unused")
    cuts: tuple[Cuts, ...] = ("never", "rows", "elements")
    leaf = LeafMethod(
        "choose",
        apply,
        MappingProxyType(hyperparams),
        tuple(
            _measure(one, b, branch)
            for b, branch in enumerate(branches)
            for one in branch.leaf.measures
        ),
        base=next(base for base in bases if base in [method.base for _, method in items]),
        models=(max(lows), min(highs) if highs else None),
        random=any(method.random for _, method in items),
        cuts=next(cut for cut in cuts if cut in [branch.leaf.cuts for branch in branches]),
        extras=MappingProxyType(
            {name: extra for branch in branches for name, extra in branch.leaf.extras.items()}
        ),
        sizes=lambda shape, inputs, models: {
            name: size
            for branch in branches
            for name, size in branch.leaf.sizes(shape, inputs, models).items()
        },
    )
    return from_leaf(leaf, summary="A traced choice between methods.")


def _branches(items: tuple[tuple[str, MergeMethod], ...], needs_base: bool) -> list[Branch]:
    branches: list[Branch] = []
    fused: dict[str, list[int]] = {}
    for position, (name, method) in enumerate(items):
        if method.family is not None:
            # A member that does not trim fits either scope.
            scope = method.family.scope if method.family.trims else "any"
            fused.setdefault(scope, []).append(position)
            continue
        assert method.leaf is not None
        leaf = _base_as_source(method.leaf) if needs_base else method.leaf
        branches.append(Branch(leaf, (position,), lambda values, name=name: values[name]))  # type: ignore[misc]
    free = fused.pop("any", [])
    if free:
        fused.setdefault(next(iter(fused), "tensor"), []).extend(free)
    for scope, positions in fused.items():
        members = [(items[p][0], items[p][1].family) for p in sorted(positions)]
        family = _fused(members, tuple(sorted(positions)), len(items), scope)
        leaf = family_leaf("choose", family, {})
        branches.append(Branch(leaf, tuple(sorted(positions)), lambda values: values))
    return branches


def _fused(
    members: list[tuple[str, Family]], positions: tuple[int, ...], choices: int, scope: Any
) -> Family:
    """One family member whose settings are those of the chosen member."""
    place = [positions.index(i) if i in positions else 0 for i in range(choices)]

    def settings(values: Values) -> Settings:
        each = [family.settings(values[name]) for name, family in members]
        local = jnp.asarray(place)[values["method"]]
        pick = functools.partial(_pick, local)
        densities = [one.density for one in each if one.density is not None]
        density = None
        if densities:
            whole = Fraction(jnp.ones_like(densities[0].value), jnp.zeros_like(densities[0].count))
            given = [whole if one.density is None else one.density for one in each]
            density = jax.tree.map(lambda *x: pick(list(x)), *given)
        skip = epsilon = rescale = None
        if any(one.skip is not None for one in each):
            weights = each[0].weight
            none = Fraction(jnp.zeros_like(weights), jnp.zeros_like(weights, jnp.uint32))
            skips = [none if one.skip is None else one.skip for one in each]
            skip = jax.tree.map(lambda *x: pick(list(x)), *skips)
        if any(one.epsilon is not None for one in each):
            even = jnp.zeros_like(each[0].weight)
            epsilon = pick([even if one.epsilon is None else one.epsilon for one in each])
        if any(one.rescale is not None for one in each):
            zero = jnp.zeros((), jnp.float32)
            rescale = pick([zero if one.rescale is None else one.rescale for one in each])
        return Settings(
            pick([one.weight for one in each]),
            pick([one.scale for one in each]),
            pick([one.normalize for one in each]),
            density,
            pick([one.trims for one in each]),
            pick([one.drops for one in each]),
            pick([one.elects for one in each]),
            rescale,
            pick([one.by_mass for one in each]),
            pick([one.absolute for one in each]),
            skip,
            epsilon,
        )

    return Family(
        settings,
        any(family.trims for _, family in members),
        any(family.drops for _, family in members),
        any(family.rescales for _, family in members),
        scope,
        any(family.ranks for _, family in members),
    )


def _pick(local: jax.Array, options: list[Any]) -> Any:
    """The chosen one; a flag that all members share stays static."""
    if isinstance(options[0], bool):
        if len(set(options)) == 1:
            return options[0]
        return jnp.asarray(options)[local]
    return options[0] if len(options) == 1 else jnp.stack(options)[local]


def _measure(one: Measure, b: int, branch: Branch) -> Measure:
    """A branch's measure under a name of its own, reading the nested hyperparameters."""
    name = f"{b}/{one.name}"

    def seen(found: Found) -> Found:
        return {
            earlier.name: found[f"{b}/{earlier.name}"]
            for earlier in branch.leaf.measures
            if f"{b}/{earlier.name}" in found
        }

    if isinstance(one, Select | Local):
        one = one._replace(of=one.of and f"{b}/{one.of}")
    if isinstance(one, Select):
        counts = one.counts
        if one.reads_found:
            return one._replace(
                name=name,
                counts=lambda values, size, found: counts(branch.values(values), size, seen(found)),
            )
        return one._replace(
            name=name, counts=lambda values, size: counts(branch.values(values), size)
        )
    if isinstance(one, Local):
        return one._replace(name=name)
    statistics, finish = one.statistics, one.finish
    if not one.needs_values:
        return one._replace(name=name)
    return one._replace(
        name=name,
        statistics=lambda chunk, values, found: statistics(
            chunk, branch.values(values), seen(found)
        ),
        finish=lambda sums, values, found: finish(sums, branch.values(values), seen(found)),
    )


def _base_as_source(leaf: LeafMethod) -> LeafMethod:
    """Lets a method that counts the base among its models stand beside methods that need it apart."""
    if leaf.base != "source":
        return leaf
    if any(spec.scope == "model" for spec in leaf.hyperparams.values()):
        raise ValueError(
            f"choose cannot put {leaf.name!r}, which has a value for the base too, beside task-vector methods"
        )

    def joined(chunk: Chunk) -> Chunk:
        assert chunk.base is not None
        return replace(chunk, models=(chunk.base, *chunk.models), base=None)

    measures: list[Measure] = []
    for one in leaf.measures:
        if isinstance(one, Sums):
            statistics = one.statistics
            measures.append(
                one._replace(
                    statistics=lambda chunk, values, found, f=statistics: f(  # type: ignore[misc]
                        joined(chunk), values, found
                    )
                )
            )
        else:
            raise ValueError(f"choose cannot put {leaf.name!r} beside task-vector methods")
    low, high = leaf.models
    return replace(
        leaf,
        apply=lambda chunk, values, found: leaf.apply(joined(chunk), values, found),
        measures=tuple(measures),
        base="required",
        models=(max(1, low - 1), None if high is None else high - 1),
    )
