"""The diagonal Fisher information of a classifier or decoder, example by example."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import flatten, nearest, unflatten

Apply = Callable[[Any, Any], jax.Array]
Kind = Literal["exact", "sampled", "empirical"]
Mask = Callable[[Any], jax.Array]


def fisher(
    apply_fn: Apply,
    params: Any,
    batches: Iterable[Any],
    *,
    kind: Kind = "exact",
    key: jax.Array | None = None,
    samples: int = 1,
    chunk: int = 16,
    mask: Mask | None = None,
) -> Any:
    r"""Diagonal Fisher information over a stream of batches, the weights of `jm.methods.fisher`.

    .. math:: F = \mathbb{E}_x \sum_c p(c | x) \, (\nabla_\theta \log p(c | x))^2

    Each example's gradient is squared by itself: the square of a batch's summed gradient is another quantity. With
    `kind="exact"` the sum runs over all classes. "sampled" draws classes from the model instead, an unbiased
    estimate. "empirical" takes the labels given, which is not the Fisher information unless the model is as
    uncertain as the data, but is what much of the literature uses.

    Logits may have positions between the examples and the classes (tokens, pixels). The outputs at different
    positions are independent given the input, so an example's exact Fisher is the sum over its positions;
    "sampled" and "empirical" take one gradient of the sum of the positions' log-probabilities, square it, and so cost
    one backward pass per sample however many positions there are. Prefer them for decoders.

    A gradient is taken of one example at a time: `apply_fn` sees batches of one. What couples a batch's examples, such
    as BatchNorm in training mode, has no per-example gradient; use running averages. Statistics kept among `params`
    count as parameters if they are floating point.

    Args:
      apply_fn: (params, inputs) -> logits [examples, classes] or [examples, *positions, classes]. Hashable; batches of
        equal shape share one compiled program, as do models of equal shape.
      params: a pytree of arrays.
      batches: an iterable of inputs, or of pairs (inputs, labels) for "empirical". Inputs are an array or a pytree of
        arrays [examples, ...], labels integers [examples, *positions]; a negative label counts as masked.
      kind: "exact", "sampled" or "empirical".
      key: for "sampled". Draws depend on the key and on the example's place in the stream, not on how it is cut.
      samples: classes drawn for each output, for "sampled".
      chunk: how many gradients are held at once, each as large as `params`. An example has one for each position and
        class ("exact"), one for each sample, or one ("empirical").
      mask: inputs -> booleans [examples, *positions], the outputs that count. An example with none does not count
        towards the mean, so that padding keeps all batches of one shape.

    Returns:
      A tree like `params`, float32 (float64 where the parameter is): the mean over examples. Leaves that are not
      floating point get zeros.

    Raises:
      ValueError: no examples, labels of another shape or beyond the classes, or an option out of range.

    Example:
      A fair coin's only parameter is its log odds, whose Fisher information is p (1 - p).

      >>> import jax.numpy as jnp
      >>> coin = lambda params, x: jnp.stack([0 * x, params["odds"] + 0 * x], axis=-1)
      >>> found = fisher(coin, {"odds": 0.0}, [jnp.zeros(3), jnp.zeros(2)])
      >>> round(float(found["odds"]), 3)
      0.25

    Reference:
      Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022.
    """
    options = _options(kind, key, samples, chunk, mask)
    if hasattr(batches, "shape") or isinstance(batches, Mapping | str):
        raise ValueError(
            f"batches is an iterable of batches, found {type(batches).__name__}: put one batch in a list"
        )
    total, count, seen = _zeros(params), jnp.int32(0), 0
    for number, batch in enumerate(batches):
        inputs, labels = _split(batch, kind, number)
        _check_labels(apply_fn, params, inputs, labels, f"batch {number}: ")
        total, count = _add(apply_fn, options, total, count, params, inputs, labels, key, seen)
        seen += _examples(inputs)
    if int(count) == 0:
        found = "all outputs are masked" if seen else "batches is empty"
        raise ValueError(f"the Fisher information needs at least one example: {found}")
    return jax.tree.map(lambda x: x / count, total)


def batch_fisher(
    apply_fn: Apply,
    params: Any,
    inputs: Any,
    labels: Any = None,
    *,
    kind: Kind = "exact",
    key: jax.Array | None = None,
    samples: int = 1,
    chunk: int = 16,
    mask: Mask | None = None,
) -> tuple[Any, jax.Array]:
    """Sum over one batch of what `fisher` averages: pure, to jit, to vmap over stacked models, or to scan.

    Args:
      apply_fn, params, key, samples, chunk, mask: as in `fisher`.
      inputs: [examples, ...], an array or a pytree of arrays.
      labels: [examples, *positions] integers for "empirical", else None.
      kind: "exact", "sampled" or "empirical".

    Returns:
      The sums, a tree like `params`, and the number of examples that count, int32 [].

    Raises:
      ValueError: as in `fisher`. Labels inside a trace are only checked for their shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: x @ params["w"]
      >>> models = {"w": jnp.zeros((5, 3, 2))}  # 5 models
      >>> sums, count = jax.vmap(lambda params: batch_fisher(model, params, jnp.ones((4, 3))))(models)
      >>> sums["w"].shape, count.tolist()
      ((5, 3, 2), [4, 4, 4, 4, 4])
    """
    options = _options(kind, key, samples, chunk, mask)
    if (labels is None) == (kind == "empirical"):
        raise ValueError(f"kind={kind!r} takes {'labels' if labels is None else 'no labels'}")
    _check_labels(apply_fn, params, inputs, labels, "")
    return _sums(apply_fn, options, params, inputs, labels, key, 0)


class _Options(NamedTuple):
    kind: Kind
    samples: int
    chunk: int
    mask: Mask | None


class _Outputs(NamedTuple):
    """The logits' positions and number of classes."""

    positions: tuple[int, ...]
    classes: int


def _options(
    kind: Kind, key: jax.Array | None, samples: int, chunk: int, mask: Mask | None
) -> _Options:
    kinds = ("exact", "sampled", "empirical")
    if kind not in kinds:
        raise ValueError(f"kind is one of {', '.join(kinds)}, found {kind!r}{nearest(kind, kinds)}")
    if kind == "sampled" and key is None:
        raise ValueError("kind='sampled' is random and needs key=, for example jax.random.key(0)")
    for name, value in (("samples", samples), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} is at least 1, found {value}")
    return _Options(kind, samples, chunk, mask)


def _split(batch: Any, kind: Kind, number: int) -> tuple[Any, Any]:
    if kind != "empirical":
        return batch, None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"batch {number}: kind='empirical' takes pairs (inputs, labels), found {type(batch).__name__}"
        )
    return batch[0], batch[1]


def _examples(inputs: Any) -> int:
    shapes = {path: np.shape(leaf) for path, leaf in flatten(inputs)[0].items()}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) != 1 or None in lengths:
        found = {path or "inputs": list(shape) for path, shape in shapes.items()}
        raise ValueError(
            f"inputs are arrays [examples, ...] with one number of examples, found {found}"
        )
    (length,) = lengths
    return int(length or 0)


def _outputs(apply_fn: Apply, params: Any, inputs: Any) -> _Outputs:
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jax.dtypes.result_type(x)), inputs
    )
    logits = jax.eval_shape(apply_fn, params, one)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) < 2 or shape[0] != 1 or 0 in shape:
        found = type(logits).__name__ if shape is None else f"{list(shape)} for one example"
        raise ValueError(f"apply_fn returns logits [examples, *positions, classes], found {found}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"apply_fn returns floating-point logits, found {logits.dtype}")
    return _Outputs(tuple(shape[1:-1]), shape[-1])


def _check_labels(apply_fn: Apply, params: Any, inputs: Any, labels: Any, where: str) -> None:
    if _examples(inputs) == 0:
        raise ValueError(f"{where}the Fisher information needs at least one example, found none")
    if labels is None:
        return
    positions, classes = _outputs(apply_fn, params, inputs)
    expected = (_examples(inputs), *positions)
    if np.shape(labels) != expected:
        raise ValueError(
            f"{where}labels are [examples, *positions] = {list(expected)}, "
            f"found {list(np.shape(labels))}"
        )
    dtype = jax.dtypes.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{where}labels are integers, found {dtype}")
    if not isinstance(labels, jax.core.Tracer) and (largest := int(np.max(labels))) >= classes:
        raise ValueError(f"{where}labels are below {classes}, the classes; found {largest}")


def _zeros(params: Any) -> Any:
    if not any(_floating(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError("params has no floating-point leaf to differentiate by")
    return jax.tree.map(lambda leaf: jnp.zeros(np.shape(leaf), _dtype(leaf)), params)


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating)


def _dtype(leaf: Any) -> Any:
    dtype = jax.dtypes.result_type(leaf)
    return jnp.promote_types(jnp.float32, dtype) if _floating(leaf) else jnp.float32


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add(
    apply_fn: Apply,
    options: _Options,
    total: Any,
    count: jax.Array,
    params: Any,
    inputs: Any,
    labels: Any,
    key: jax.Array | None,
    start: jax.Array,
) -> tuple[Any, jax.Array]:
    sums, found = _sums(apply_fn, options, params, inputs, labels, key, start)
    return jax.tree.map(jnp.add, total, sums), count + found


def _sums(
    apply_fn: Apply,
    options: _Options,
    params: Any,
    inputs: Any,
    labels: Any,
    key: jax.Array | None,
    start: Any,
) -> tuple[Any, jax.Array]:
    """Sums of squared gradients, and how many examples count; `start` is the first example's place in the stream."""
    outputs = _outputs(apply_fn, params, inputs)
    examples, size = _examples(inputs), int(np.prod(outputs.positions, dtype=np.int64))
    counted = _counted(options.mask, inputs, labels, (examples, *outputs.positions))
    counted = counted.reshape(examples, size)
    labels = jnp.zeros((examples, size), int) if labels is None else labels
    labels = jnp.asarray(labels).reshape(examples, size)
    rows = {"exact": size * outputs.classes, "sampled": options.samples, "empirical": 1}
    # As few blocks as fit, of equal size: none is mostly padding.
    at_once = _even(rows[options.kind], options.chunk)
    together = _even(examples, max(1, options.chunk // at_once))
    leaves, definition = flatten(params)
    zeros = flatten(_zeros(params))[0]
    floats = {path: jnp.asarray(leaf) for path, leaf in leaves.items() if _floating(leaf)}

    def example(index: jax.Array) -> dict[str, jax.Array]:
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index][None], inputs)

        def logits(values: dict[str, jax.Array]) -> jax.Array:
            out = apply_fn(unflatten(definition, {**leaves, **values}.values()), x)
            wide = jnp.promote_types(jnp.float32, out.dtype)
            return out.astype(wide).reshape(size, outputs.classes)

        out, pull = jax.vjp(logits, floats)
        draw = None if key is None else jax.random.fold_in(key, start + index)
        cotangent = _cotangents(options, out, labels[index], counted[index], draw)

        def add(sums: dict[str, jax.Array], row: jax.Array) -> tuple[dict[str, jax.Array], None]:
            (gradients,) = jax.vmap(pull)(jax.vmap(cotangent)(row))
            wide = {path: g.astype(zeros[path].dtype) for path, g in gradients.items()}
            return {path: sums[path] + jnp.sum(g * g, axis=0) for path, g in wide.items()}, None

        start_from = {path: zeros[path] for path in floats}
        return jax.lax.scan(add, start_from, _blocks(rows[options.kind], at_once))[0]

    def add(sums: dict[str, jax.Array], index: jax.Array) -> tuple[dict[str, jax.Array], None]:
        # Places beyond the last example repeat it, and count 0 times.
        squares = jax.vmap(example)(jnp.minimum(index, examples - 1))
        real = (index < examples).astype(jnp.float32)
        return {
            path: sums[path] + jnp.tensordot(real, squares[path], axes=1, precision="highest")
            for path in floats
        }, None

    sums, _ = jax.lax.scan(add, {path: zeros[path] for path in floats}, _blocks(examples, together))
    count = jnp.sum(jnp.any(counted, axis=1), dtype=jnp.int32)
    return unflatten(definition, {**zeros, **sums}.values()), count


def _cotangents(
    options: _Options,
    logits: jax.Array,
    labels: jax.Array,
    counted: jax.Array,
    key: jax.Array | None,
) -> Callable[[jax.Array], jax.Array]:
    """Row number -> what to pull back to the parameters from an example's logits [positions, classes].

    The gradient of log p(c) in the logits is e_c - p. A row of weight w is pulled back times sqrt(w): its square then
    counts w times, and small probabilities square no large gradients. Rows beyond the last are 0.
    """
    positions, classes = logits.shape
    p = jax.nn.softmax(logits, axis=-1)
    weight = counted.astype(p.dtype)

    def exact(row: jax.Array) -> jax.Array:
        position, label = jnp.minimum(row // classes, positions - 1), row % classes
        inside = jnp.where(row < positions * classes, weight[position], 0.0)
        score = jax.nn.one_hot(label, classes, dtype=p.dtype) - p[position]
        score = inside * jnp.sqrt(p[position, label]) * score
        return jnp.zeros_like(p).at[position].set(score)

    def whole(chosen: jax.Array) -> jax.Array:
        return weight[:, None] * (jax.nn.one_hot(chosen, classes, dtype=p.dtype) - p)

    if options.kind == "exact":
        return exact
    if options.kind == "empirical":
        return lambda row: whole(labels)
    assert key is not None

    def sampled(row: jax.Array) -> jax.Array:
        chosen = jax.random.categorical(jax.random.fold_in(key, row), logits)
        share = jnp.where(row < options.samples, options.samples**-0.5, 0.0)
        return share * whole(chosen)

    return sampled


def _counted(mask: Mask | None, inputs: Any, labels: Any, shape: tuple[int, ...]) -> jax.Array:
    counted = jnp.ones(shape, bool)
    if mask is not None:
        given = jnp.asarray(mask(inputs))
        if given.shape != shape:
            raise ValueError(
                f"mask returns [examples, *positions] = {list(shape)}, found {list(given.shape)}"
            )
        counted = given.astype(bool)
    return counted if labels is None else counted & (jnp.asarray(labels) >= 0)


def _even(number: int, most: int) -> int:
    """The smallest block of which no more are needed than of blocks of `most`."""
    return -(-number // -(-number // most))


def _blocks(number: int, size: int) -> jax.Array:
    """Indices from 0 as [blocks, size]; the last ones may reach beyond `number`."""
    blocks = -(-number // size)
    return jnp.arange(blocks * size).reshape(blocks, size)
