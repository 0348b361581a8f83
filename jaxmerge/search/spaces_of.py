"""`space_of`: the search space of a merge method, from what it says of its hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.methods import MergeMethod
from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.search.space import Space, space
from jaxmerge.search.variables import Scale, Variable, When, binary, categorical, continuous
from jaxmerge.search.variables import integer as whole
from jaxmerge.search.variables import when as under
from jaxmerge.tree import PerBlock, matches, nearest
from jaxmerge.tree.blocks import Rules, block_names, label_rules

Range = tuple[float, float] | tuple[float, float, Scale]


def space_of(
    method: MergeMethod,
    labels: Any = None,
    *,
    models: int,
    only: Sequence[str] | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> Space:
    """Makes the space of a method's hyperparameters.

    Bounds are the ranges that `MergeMethod.hyperparams` names for searches, initial values the defaults. A
    hyperparameter of "model" scope has a value for each model; a flag is binary, an index an integer. The method that
    `choose` picks is categorical, and the hyperparameters of each method are active only where it is picked. A point
    goes into `method.apply` as it is.

    Args:
      method: any method, also one made by `choose` or `by_block`, whose hyperparameters nest.
      labels: as for `jaxmerge.tree.per_block`: every block gets values of its own; None: one set for the whole model.
        `jaxmerge.learning.block_labels` labels by layer. Shares of a whole model cannot differ between blocks and do
        not.
      models: how many models are merged, as the method counts them.
      only: which hyperparameters are varied; the others keep their defaults. A name ("density"), or a pattern of
        nested names ("attn/**", "*/ties/density"); None: all.
      ranges: bounds by name or pattern, in place of the method's: (low, high) or (low, high, "log").

    Returns:
      The space.

    Raises:
      ValueError: a name or a pattern that fits nothing, bounds that the method does not allow, nothing to vary, or a
        number of models that the method does not take.

    Example:
      >>> import jaxmerge as jm
      >>> labels = {"layers/0/**": "first", "layers/1/**": "second", "**": "rest"}
      >>> method = jm.methods.ties(scope="tensor")
      >>> space = jm.search.space_of(method, labels, models=2, only=["density", "weight"])
      >>> [(path, variable.shape) for path, variable in space.variables]
      [('density/values', (3, 2)), ('weight/values', (3, 2))]
    """
    ranges = dict(ranges or {})
    low, high = method.models
    if models < low or (high is not None and models > high):
        most = " or more" if high is None else f" to {high}" if high > low else ""
        raise ValueError(f"{method.name} takes {low}{most} models, found {models}")
    rules = None if labels is None else label_rules(labels)
    maker = _Maker(models, rules, ranges)
    known = list(_names(method.hyperparams))
    for pattern in [*(only or ()), *ranges]:
        if not any(_fits(name, pattern) for name in known):
            raise ValueError(
                f"{method.name} has no hyperparameter {pattern!r}{nearest(pattern, known)} "
                f"(it takes: {', '.join(known) or 'none'})"
            )
    wanted = [name for name in known if only is None or any(_fits(name, one) for one in only)]
    tree = maker.tree(method.hyperparams, "", (), wanted)
    if not tree:
        raise ValueError(f"{method.name} has no hyperparameters to vary")
    return space(tree)


class _Maker:
    """Builds the tree of variables level by level."""

    def __init__(self, models: int, rules: Rules | None, ranges: Mapping[str, Range]) -> None:
        self.models, self.rules, self.ranges = models, rules, ranges
        self.blocks = () if rules is None else block_names(rules)

    def tree(
        self,
        specs: Mapping[Any, Any],
        prefix: str,
        conditions: tuple[tuple[str, str], ...],
        wanted: Sequence[str],
    ) -> dict[Any, Any]:
        """The variables of one level; `conditions` are pairs (path of a choice, choice)."""
        result: dict[Any, Any] = {}
        members = [name for name, spec in specs.items() if isinstance(spec, Mapping)]
        choice = _is_choice(specs, members)
        for name, spec in specs.items():
            path = f"{prefix}{name}"
            if isinstance(spec, Mapping):
                inner = conditions
                if choice and len(members) > 1 and f"{prefix}method" in wanted:
                    inner = (*conditions, (f"{prefix}method{self._suffix}", str(name)))
                elif choice and members[int(specs["method"].default)] != name:
                    # The choice is not varied: only the default method counts.
                    continue
                below = self.tree(spec, f"{path}/", inner, wanted)
                if below:
                    result[name] = below
            elif path in wanted:
                names = members if choice and name == "method" else None
                variable = self._variable(spec, path, conditions, names)
                if variable is not None:
                    result[name] = variable
        return result

    @property
    def _suffix(self) -> str:
        return "" if self.rules is None else "/values"

    def _variable(
        self,
        spec: Hyperparameter,
        path: str,
        conditions: tuple[Any, ...],
        members: Sequence[Any] | None,
    ) -> Any:
        per_block = self.rules is not None and not (
            spec.kind == "fraction" and spec.share_of == "model"
        )
        shape = (len(self.blocks),) if per_block else ()
        if spec.scope == "model":
            shape = (*shape, self.models)
        if members is not None:
            if len(members) < 2:
                return None
            made: Variable | None = categorical(
                [str(name) for name in members],
                shape,
                when=self._when(conditions, shape, per_block),
            )
        else:
            made = self._numeric(spec, path, shape, self._when(conditions, shape, per_block))
        if made is None or not per_block:
            return made
        assert self.rules is not None
        return PerBlock(made, self.rules, self.blocks)

    def _numeric(
        self, spec: Hyperparameter, path: str, shape: tuple[int, ...], conditions: tuple[When, ...]
    ) -> Variable | None:
        given = next((self.ranges[one] for one in self.ranges if _fits(path, one)), None)
        scale: Scale = "linear"
        if given is None:
            low, high = spec.search or (spec.low, spec.high)
        else:
            low, high = given[:2]
            scale = given[2] if len(given) == 3 else "linear"
            if low < spec.low or high > spec.high:
                raise ValueError(
                    f"{path} must lie in [{spec.low:g}, {spec.high:g}], found the range "
                    f"[{low:g}, {high:g}]"
                )
        if low == high:
            return None
        try:
            if spec.kind == "flag":
                return binary(shape, when=conditions)
            initial = spec.default if low <= spec.default <= high else None
            if spec.kind == "index":
                return whole(int(low), int(high), shape, initial, when=conditions)
            return continuous(low, high, shape=shape, scale=scale, initial=initial, when=conditions)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _when(
        self, conditions: tuple[Any, ...], shape: tuple[int, ...], per_block: bool
    ) -> tuple[When, ...]:
        if self.rules is None or not conditions:
            return tuple(under(path, choice) for path, choice in conditions)
        if not per_block:
            # A value that all blocks share counts whatever they choose.
            return ()
        rows = np.arange(len(self.blocks)).reshape(-1, *[1] * (len(shape) - 1))
        index = np.broadcast_to(rows, shape)
        return tuple(under(path, choice, index=index) for path, choice in conditions)


def _is_choice(specs: Mapping[Any, Any], members: Sequence[Any]) -> bool:
    """Whether this is what `choose` takes: an index named "method" beside the methods."""
    method = specs.get("method")
    return (
        isinstance(method, Hyperparameter)
        and method.kind == "index"
        and bool(members)
        and len(members) == len(specs) - 1
    )


def _names(specs: Mapping[Any, Any], prefix: str = "") -> list[str]:
    names = []
    for name, spec in specs.items():
        path = f"{prefix}{name}"
        names += _names(spec, f"{path}/") if isinstance(spec, Mapping) else [path]
    return names


def _fits(name: str, pattern: str) -> bool:
    return matches(name, pattern) or matches(name.rpartition("/")[2], pattern)
