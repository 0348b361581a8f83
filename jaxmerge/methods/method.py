"""`MergeMethod`: a pair of pure functions, and how a leaf method becomes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax

from jaxmerge.methods import engine
from jaxmerge.methods.extras import Extra
from jaxmerge.methods.leaf import Base, LeafMethod


@dataclass(frozen=True, eq=False)
class MergeMethod:
    """A merge method: `init` does the heavy work that no hyperparameter touches, `apply` makes one candidate.

    Both are pure and run under `jax.jit`, `jax.vmap` and `jax.grad`. Objects compare by identity and constructors cache
    them, so a method can be a static argument.

    Attributes:
      init: (models, base=None, *, layout=None, extras=None, dtype=None) -> state.
      apply: (state, hyperparams={}, key=None) -> params, or (params, `PerTask`) where `per_task` says so.
      hyperparams: `Hyperparameter` by name; nested where a combinator nests them.
      name: the registered name.
      summary: one line for tables.
      base: see `LeafMethod`.
      models: how few and how many models it takes; a base counts only as a "source"; None for no limit.
      random: whether `apply` needs a key.
      extras: what else `init` needs: `Extra` by name.
      per_task: whether `apply` also returns what makes each model's own version of the result.
      leaf: the leaf method that it is built from, or None.
      family: the task-vector family's description of it, or None (lets `choose` fuse members).
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    hyperparams: Mapping[Any, Any]
    name: str = "custom"
    summary: str = ""
    base: Base = "optional"
    models: tuple[int, int | None] = (1, None)
    random: bool = False
    extras: Mapping[str, Extra] = field(default_factory=dict)
    per_task: bool = False
    leaf: LeafMethod | None = None
    family: Any = field(default=None, repr=False)

    def params_of(self, result: Any) -> Any:
        """The merged parameters in what `apply` returned."""
        return result[0] if self.per_task else result


def from_leaf(leaf: LeafMethod, *, summary: str, family: Any = None) -> MergeMethod:
    """Builds a `MergeMethod` over any pytree from a method for one tensor.

    Args:
      leaf: the leaf method.
      summary: one line for tables.
      family: see `MergeMethod`.

    Returns:
      The method. Its state groups leaves of equal shape and dtype, so that compile time does not grow with depth.
    """

    def init(
        models: Any,
        base: Any = None,
        *,
        layout: Any = None,
        extras: Any = None,
        dtype: Any = None,
    ) -> engine.MergeState:
        return engine.init(leaf, models, base, layout=layout, extras=extras, dtype=dtype)

    def apply(
        state: engine.MergeState,
        hyperparams: Mapping[str, Any] = MappingProxyType({}),
        key: jax.Array | None = None,
    ) -> Any:
        return engine.apply(leaf, state, hyperparams, key)

    return MergeMethod(
        init,
        apply,
        leaf.hyperparams,
        leaf.name,
        summary,
        leaf.base,
        leaf.models,
        leaf.random,
        leaf.extras,
        leaf.per_task is not None,
        leaf,
        family,
    )
