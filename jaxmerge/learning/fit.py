"""`fit`: gradient descent on a method's hyperparameters, through the merge."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge.methods import Hyperparameter, MergeMethod, get, hyperparameters
from jaxmerge.tree import Layout, PerBlock, flatten, nearest

Objective = Callable[[Any, Any, jax.Array | None], jax.Array]
Keep = Literal["last", "best"]

ADAM = optax.adam(1e-2)
"""The default optimiser, one object, so that calls without one share a compiled program."""


class FitResult(NamedTuple):
    """What `fit` found.

    Attributes:
      hyperparams: float32 arrays (or `PerBlock` of them) by name, nested where the method nests them: all that the
        method takes, so that `jaxmerge.merge(method, models, **hyperparams)` gives `params` again.
      params: the merged model there, in the storage dtypes.
      losses: float32 [steps], the objective before each update, not finite where it was not.
      skipped: int32 [], how many steps were left out because something was not finite.
    """

    hyperparams: dict[Any, Any]
    params: Any
    losses: jax.Array
    skipped: jax.Array


def fit(
    method: str | MergeMethod,
    models: Sequence[Any],
    objective: Objective,
    *,
    base: Any = None,
    hyperparams: Mapping[Any, Any] | None = None,
    learn: str | Sequence[str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    batches: Any = None,
    keep: Keep = "last",
    key: jax.Array | None = None,
    layout: Layout | None = None,
    extras: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> FitResult:
    r"""Learns a method's hyperparameters by gradient descent on any differentiable objective of the merged model.

    .. math:: \min_{l \le h \le u} L(\mathrm{apply}(s, h)), \qquad
       h \leftarrow \mathrm{clip}(h + \mathrm{update}(\nabla_h L), l, u), \qquad s = \mathrm{init}(\mathrm{models})

    `init` runs once; all steps are one compiled scan. Calls with an equal method, objective, optimiser, number of steps
    and shapes share one compilation: keep the objective and the optimiser as objects rather than making new ones for
    each call, and pass data as `batches` rather than by closing over it. To continue a fit, start from its
    `hyperparams`. To learn in other coordinates, derive a method whose `apply` maps them to the hyperparameters.

    Args:
      method: a registered name, or what a constructor returns.
      models, base, layout, extras, dtype: as for `jaxmerge.merge`. With ``dtype=jnp.float32`` the objective sees the
        merged model before it is rounded to the storage dtype.
      objective: (params, batch, key) -> float []; minimised, traced. `params` is what the method's `apply` returns,
        `batch` one slice of `batches` or None, `key` another key for each step, or None without `key`.
      hyperparams: where to start, in the forms that `jaxmerge.merge` takes, nested where the method nests them; the
        others start at their defaults.
      learn: the names that are learned, "block/name" where they nest ("block" for all of a block that can be); default:
        all that can be. The others stay where they start. One number for all models becomes one per model.
      optimizer: an optax transformation; default: Adam with step size 0.01.
      steps: how many updates.
      batches: a pytree of arrays [batches, ...]; step i sees batch i modulo their number. None for no data.
      keep: the "last" iterate, or the "best": that with the lowest loss before an update (each on its own batch).
      key: a JAX key; required by random methods, which draw anew in each step; `params` is drawn with the key itself.

    Returns:
      A `FitResult`. A step in which the loss, a gradient, the update or the optimiser's state is not finite changes
      nothing but the count of skipped steps.

    Raises:
      ValueError: an unknown name, one whose gradient says nothing (fractions, flags, indices), a value out of bounds,
        batches of different number, a missing key; raised before any work.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> a, b = {"w": jnp.array([0.0, 0.0])}, {"w": jnp.array([4.0, 2.0])}
      >>> loss = lambda params, batch, key: jnp.sum((params["w"] - jnp.array([1.0, 0.5])) ** 2)
      >>> found = fit("slerp", [a, b], loss, optimizer=optax.sgd(0.02), steps=50)
      >>> round(float(found.hyperparams["t"]), 2)
      0.25
    """
    if isinstance(method, str):
        method = get(method)()
    if steps < 1:
        raise ValueError(f"fit needs at least one step, found steps={steps}")
    if keep not in ("last", "best"):
        raise ValueError(f'keep is "last" or "best", found {keep!r}')
    if method.random and key is None:
        raise ValueError(f"{method.name} is random and needs key=, for example jax.random.key(0)")
    _check_batches(batches)
    sources = len(models) + (method.base == "source" and base is not None)
    checked = hyperparameters.check(method.hyperparams, hyperparams or {}, sources, method.name)
    specs = _by_path(method.hyperparams, method.hyperparams)
    names = _names(method.name, specs, learn)
    values = {
        path: _start(specs[path], value, sources, path in names)
        for path, value in _by_path(method.hyperparams, checked).items()
    }
    state = method.init(models, base, layout=layout, extras=extras, dtype=dtype)
    program = _Program(method, objective, ADAM if optimizer is None else optimizer, steps, keep)
    start = {name: values.pop(name) for name in names}
    learned, losses, skipped = _descend(program, state, start, values, batches, key)
    found = _nested(method.hyperparams, {**values, **learned})
    return FitResult(found, method.apply(state, found, key), losses, skipped)


class _Program(NamedTuple):
    """What is static in a descent; equal ones share a compilation."""

    method: MergeMethod
    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int
    keep: Keep


@functools.partial(jax.jit, static_argnums=0)
def _descend(
    program: _Program,
    state: Any,
    start: dict[str, Any],
    fixed: dict[str, Any],
    batches: Any,
    key: jax.Array | None,
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Runs all steps; the learned values, the losses, and how many steps were skipped."""
    method = program.method
    specs = _by_path(method.hyperparams, method.hyperparams)
    optimizer = optax.with_extra_args_support(program.optimizer)

    def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        learned, memory, best, lowest, skipped = carry
        batch = jax.tree.map(lambda leaf: leaf[index % leaf.shape[0]], batches)
        merging, judging = (
            (None, None) if key is None else jax.random.split(jax.random.fold_in(key, index))
        )

        def loss_of(learned: dict[str, Any]) -> jax.Array:
            point = _nested(method.hyperparams, {**fixed, **learned})
            loss = program.objective(method.apply(state, point, merging), batch, judging)
            if jnp.shape(loss) != ():
                raise ValueError(
                    f"the objective must return a scalar, found shape {list(jnp.shape(loss))}"
                )
            return jnp.asarray(loss, jnp.float32)

        loss, gradient = jax.value_and_grad(loss_of)(learned)
        # Some transformations (line searches, reduce_on_plateau) ask for the loss.
        updates, moved_memory = optimizer.update(
            gradient, memory, learned, value=loss, grad=gradient, value_fn=loss_of
        )
        moved = _projected(specs, optax.apply_updates(learned, updates))
        sound = (
            jnp.isfinite(loss)
            & _stays_finite(gradient, learned)
            & _stays_finite((moved, moved_memory), (learned, memory))
        )
        better = loss < lowest
        best = _either(better, learned, best)
        lowest = jnp.where(better, loss, lowest)
        learned, memory = _either(sound, (moved, moved_memory), (learned, memory))
        return (learned, memory, best, lowest, skipped + ~sound), loss

    carry = (start, optimizer.init(start), start, jnp.float32(jnp.inf), jnp.int32(0))
    (last, _, best, _, skipped), losses = jax.lax.scan(step, carry, jnp.arange(program.steps))
    return (last if program.keep == "last" else best), losses, skipped


def _names(
    method: str, specs: Mapping[str, Hyperparameter], learn: str | Sequence[str] | None
) -> list[str]:
    """The paths of the hyperparameters that are learned."""
    able = [path for path, spec in specs.items() if spec.differentiable and spec.kind == "real"]
    can = f"those that can: {', '.join(able) or 'none'}"
    if learn is None:
        if not able:
            raise ValueError(f"{method} has no hyperparameter that gradients can learn")
        return able
    chosen: list[str] = []
    for name in [learn] if isinstance(learn, str) else learn:
        inside = [path for path in specs if path == name or path.startswith(f"{name}/")]
        if not inside:
            raise ValueError(
                f"{method} has no hyperparameter {name!r}{nearest(name, specs)}; {can}"
            )
        usable = [path for path in inside if path in able]
        if not usable:
            kinds = " and ".join(sorted({specs[path].kind for path in inside}))
            raise ValueError(
                f"{method}: {name} ({kinds}) cannot be learned, its gradient says nothing; {can}"
            )
        chosen += [path for path in usable if path not in chosen]
    if not chosen:
        raise ValueError(f"learn= names nothing; {can}")
    return chosen


def _start(spec: Hyperparameter, value: Any, sources: int, learned: bool) -> Any:
    """A checked value as float32 within the bounds; one per model where it is learned and has that scope."""
    blocks = isinstance(value, PerBlock)
    array = jnp.asarray(value.values if blocks else value, jnp.float32)
    if learned and spec.scope == "model" and array.ndim == (1 if blocks else 0):
        array = jnp.broadcast_to(array[..., None], (*array.shape, sources))
    array = jnp.clip(array, *_bounds(spec))
    return PerBlock(array, value.rules, value.blocks) if blocks else array


def _projected(specs: Mapping[str, Hyperparameter], learned: dict[str, Any]) -> dict[str, Any]:
    return {
        path: jax.tree.map(lambda array, path=path: jnp.clip(array, *_bounds(specs[path])), value)
        for path, value in learned.items()
    }


def _bounds(spec: Hyperparameter) -> tuple[np.float32, np.float32]:
    """The outermost float32 numbers within the bounds."""
    low, high = np.float32(spec.low), np.float32(spec.high)
    if float(low) < spec.low:
        low = np.nextafter(low, np.float32(np.inf))
    if float(high) > spec.high:
        high = np.nextafter(high, np.float32(-np.inf))
    return low, high


def _stays_finite(new: Any, old: Any) -> jax.Array:
    """Whether nothing that was finite has ceased to be."""
    sound = jnp.bool(True)
    for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if jnp.issubdtype(after.dtype, jnp.inexact):
            sound &= jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))
    return sound


def _either(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), yes, no)


def _by_path(specs: Mapping[Any, Any], tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a tree shaped like the specs by "block/name"."""
    flat: dict[str, Any] = {}
    for name, spec in specs.items():
        path = f"{prefix}{name}"
        if isinstance(spec, Mapping):
            flat.update(_by_path(spec, tree[name], f"{path}/"))
        else:
            flat[path] = tree[name]
    return flat


def _nested(specs: Mapping[Any, Any], flat: Mapping[str, Any], prefix: str = "") -> dict[Any, Any]:
    """The inverse of `_by_path`."""
    return {
        name: _nested(spec, flat, f"{prefix}{name}/")
        if isinstance(spec, Mapping)
        else flat[f"{prefix}{name}"]
        for name, spec in specs.items()
    }


def _check_batches(batches: Any) -> None:
    leaves, _ = flatten(batches)
    lengths: dict[int, str] = {}
    for path, leaf in leaves.items():
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] == 0:
            raise ValueError(
                f"batches need a leading axis of at least one batch; {path!r} has shape {list(np.shape(leaf))}"
            )
        lengths.setdefault(np.shape(leaf)[0], path)
    if len(lengths) > 1:
        (one, first), (two, second) = list(lengths.items())[:2]
        raise ValueError(f"batches: {first!r} has {one}, {second!r} has {two}")
