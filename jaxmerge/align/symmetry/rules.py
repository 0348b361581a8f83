"""What each primitive operation says of its operands' axes.

A rule takes the operation, the operands' values and the record of uses, ties labels together, and returns the labels of
each result. It must hold for every relabelling that it allows; an operation without a rule allows none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.extend.core import JaxprEqn

from jaxmerge.align.symmetry.atoms import (
    Atom,
    Label,
    Segment,
    Split,
    cut,
    fix,
    fixed_axis,
    flat,
    forget,
    length,
    unify,
)
from jaxmerge.align.symmetry.values import Known, Traced, Uses, Value, labels_of, opaque, shape_of
from jaxmerge.tracing.interpreter import CALLS

Labels = list[Label]
Rule = Callable[[JaxprEqn, Sequence[Value], Uses], list[Value]]


def rule_of(name: str) -> Rule | None:
    """The rule of a primitive, or None."""
    if name in _ELEMENTWISE:
        return _elementwise
    if name in _ALONG_ONE_AXIS:
        return _along_one_axis
    if name.startswith("reduce_window"):
        return _windows
    return _RULES.get(name)


def moves_only(name: str) -> bool:
    """Whether a primitive hands its operand on as it is, or a part of it."""
    return name in _CASTS or name in _MOVES or name in CALLS


def _shapes(eqn: JaxprEqn) -> list[tuple[int, ...]]:
    return [shape_of(atom) for atom in eqn.invars]


def _result_shape(eqn: JaxprEqn) -> tuple[int, ...]:
    return shape_of(eqn.outvars[0])


def _path(value: Value) -> str | None:
    return value.path if isinstance(value, Traced) else None


def _layout(value: Value, labels: Labels) -> list[Value]:
    return [Traced(labels, _path(value))]


# Entry by entry -----------------------------------------------------------------------------------------------------


def _elementwise(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    shape = _result_shape(eqn)
    merged: Labels = [None] * len(shape)
    for value, given in zip(operands, _shapes(eqn), strict=True):
        if len(given) == len(shape):
            labels = labels_of(value)
            merged = [unify(a, b) for a, b in zip(merged, labels, strict=True)]
    casts = len(operands) == 1 and eqn.primitive.name in _CASTS
    return [Traced(list(merged), _path(operands[0]) if casts else None) for _ in eqn.outvars]


def _barrier(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    return list(operands)


_CASTS = {"convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient", "name"}
_ELEMENTWISE = _CASTS | {
    "abs",
    "acos",
    "acosh",
    "add",
    "add_any",
    "and",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "bessel_i0e",
    "bessel_i1e",
    "bitcast_convert_type",
    "cbrt",
    "ceil",
    "clamp",
    "complex",
    "conj",
    "cos",
    "cosh",
    "digamma",
    "div",
    "eq",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "ge",
    "gt",
    "igamma",
    "igammac",
    "imag",
    "integer_pow",
    "is_finite",
    "le",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
    "nextafter",
    "not",
    "or",
    "polygamma",
    "population_count",
    "pow",
    "real",
    "regularized_incomplete_beta",
    "rem",
    "round",
    "rsqrt",
    "select_n",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "sub",
    "tan",
    "tanh",
    "xor",
}


# Layout -------------------------------------------------------------------------------------------------------------


def _transpose(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels = labels_of(operands[0])
    return _layout(operands[0], [labels[i] for i in eqn.params["permutation"]])


def _broadcast(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    shape, result = _shapes(eqn)[0], _result_shape(eqn)
    labels: Labels = [None] * len(result)
    for i, place in enumerate(eqn.params["broadcast_dimensions"]):
        if shape[i] == result[place]:
            labels[place] = labels_of(operands[0])[i]
    return _layout(operands[0], labels)


def _squeeze(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    gone = {axis % len(_shapes(eqn)[0]) for axis in eqn.params["dimensions"]}
    labels = labels_of(operands[0])
    return _layout(operands[0], [label for i, label in enumerate(labels) if i not in gone])


def _expand_dims(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels = labels_of(operands[0])
    for axis in sorted(eqn.params["dimensions"]):
        labels.insert(axis, None)
    return _layout(operands[0], labels)


def _reshape(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels, shape, result = labels_of(operands[0]), _shapes(eqn)[0], _result_shape(eqn)
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return _all_fixed(labels, result)
    out: Labels = [None] * len(result)
    for before, after in _regrouped(shape, result):
        if [shape[i] for i in before] == [result[i] for i in after]:
            for i, j in zip(before, after, strict=True):
                out[j] = labels[i]
            continue
        if len(before) == 1 and len(after) > 1:
            separated = _separated(labels[before[0]], [result[i] for i in after])
            if separated is not None:
                for j, label in zip(after, separated, strict=True):
                    out[j] = label
                continue
        joined = _joined([labels[i] for i in before], [shape[i] for i in before])
        if len(after) == 1:
            out[after[0]] = joined
            continue
        parts = [Atom(result[i]) for i in after]
        if joined is not None:
            unify(joined, [list(parts)])
            for j, part in zip(after, parts, strict=True):
                out[j] = [[part]]
    return _layout(operands[0], out)


def _regrouped(
    shape: tuple[int, ...], result: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes (longer than 1) that a reshape turns into each other."""
    before = [i for i, n in enumerate(shape) if n != 1]
    after = [i for i, n in enumerate(result) if n != 1]
    groups = []
    while before:
        left, right = [before.pop(0)], [after.pop(0)]
        while (m := math.prod(shape[i] for i in left)) != (
            n := math.prod(result[i] for i in right)
        ):
            if m < n:
                left.append(before.pop(0))
            else:
                right.append(after.pop(0))
        groups.append((left, right))
    return groups


def _separated(label: Label, sizes: list[int]) -> Labels | None:
    """The axes of a split that can wait; None where it must be carried out."""
    if label is None:
        return [None] * len(sizes)
    segments = flat(label)
    if len(segments) != 1 or len(segments[0]) != 1:
        return None
    (atom,) = segments[0]
    if atom.kind is not None or atom.factor or atom.fixed:
        return None
    return [[[factor]] for factor in Split(atom, sizes).factors]


def _joined(labels: Labels, sizes: list[int]) -> Label:
    """One axis of several, the first slowest."""
    if all(label is None for label in labels):
        return None
    segment: Segment = []
    for label, size in zip(labels, sizes, strict=True):
        segments = [[Atom(size)]] if label is None else flat(label)
        if len(segments) != 1:
            # The product of a concatenation with something is no axis that could be cut.
            fix(label)
            segments = [[Atom(size, fixed=True)]]
        segment += segments[0]
    return [segment]


def _all_fixed(labels: Labels, result: tuple[int, ...]) -> list[Value]:
    for label in labels:
        fix(label)
    return [opaque(result)]


def _concatenate(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    axis, shapes = eqn.params["dimension"], _shapes(eqn)
    given = [labels_of(value) for value in operands]
    out: Labels = []
    for i in range(len(shapes[0])):
        if i != axis:
            out.append(functools.reduce(unify, (labels[i] for labels in given)))
            continue
        joined: list[Segment] = []
        for labels, shape in zip(given, shapes, strict=True):
            if shape[i]:
                joined += flat(labels[i] or [[Atom(shape[i])]])
        out.append(joined)
    _forget_axis(out, axis)
    return [Traced(out)]


def _slice(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    params = eqn.params
    if params["strides"] is not None and set(params["strides"]) != {1}:
        strided = [s != 1 for s in params["strides"]]
        labels = labels_of(operands[0])
        result = _result_shape(eqn)
        for i, skips in enumerate(strided):
            if skips:
                fix(labels[i])
                labels[i] = fixed_axis(result[i])
        starts = [0 if s else a for s, a in zip(strided, params["start_indices"], strict=True)]
        limits = [
            n if s else b for s, b, n in zip(strided, params["limit_indices"], result, strict=True)
        ]
        return _layout(operands[0], _ranges(labels, starts, limits))
    labels = labels_of(operands[0])
    return _layout(operands[0], _ranges(labels, params["start_indices"], params["limit_indices"]))


def _split(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    axis, shape = eqn.params["axis"], _shapes(eqn)[0]
    results: list[Value] = []
    start = 0
    for size in eqn.params["sizes"]:
        starts = [start if i == axis else 0 for i in range(len(shape))]
        limits = [start + size if i == axis else n for i, n in enumerate(shape)]
        results += _layout(operands[0], _ranges(labels_of(operands[0]), starts, limits))
        start += size
    return results


def _dynamic_slice(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    shape, result = _shapes(eqn)[0], _result_shape(eqn)
    labels = labels_of(operands[0])
    first = [int(np.asarray(start.array)) for start in operands[1:] if isinstance(start, Known)]
    if len(first) == len(shape):
        starts = [min(max(a, 0), n - m) for a, n, m in zip(first, shape, result, strict=True)]
        limits = [a + m for a, m in zip(starts, result, strict=True)]
        return _layout(operands[0], _ranges(labels, starts, limits))
    for i, (whole, part) in enumerate(zip(shape, result, strict=True)):
        if whole != part:
            fix(labels[i])
            _forget_axis(labels, i)
            labels[i] = fixed_axis(part)
    return [Traced(labels)]


def _dynamic_update_slice(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    whole, part = _shapes(eqn)[:2]
    labels, update = labels_of(operands[0]), labels_of(operands[1])
    for i, (n, m) in enumerate(zip(whole, part, strict=True)):
        if n == m:
            labels[i] = unify(labels[i], update[i])
        else:
            fix(labels[i])
            fix(update[i])
            labels[i] = fixed_axis(n)
    return [Traced(labels)]


def _ranges(labels: Labels, starts: Sequence[int], limits: Sequence[int]) -> Labels:
    """The labels of a block of a value."""
    labels = list(labels)
    for i, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        label = labels[i]
        if label is None or limit - start == sum(map(length, label)):
            continue
        if limit == start:
            labels[i] = None
            continue
        taken = _part_of_a_split(labels, i, start, limit)
        if taken is not None:
            labels = taken
            continue
        segments, position, kept = cut(label, [start, limit]), 0, []
        for segment in segments:
            if start <= position < limit:
                kept.append(segment)
            position += length(segment)
        _forget_axis([*labels[:i], kept, *labels[i + 1 :]], i, gone=label)
        labels[i] = kept if limit - start > 1 else None
    return labels


def _part_of_a_split(labels: Labels, axis: int, start: int, limit: int) -> Labels | None:
    """Takes part of the slowest factor of a split that still waits: a cut of what was to be split."""
    label = labels[axis]
    assert label is not None
    if len(label) != 1 or len(label[0]) != 1:
        return None
    waiting = label[0][0].pending
    if waiting is None or label[0][0] is not waiting.factors[0]:
        return None
    sizes = [factor.size for factor in waiting.factors]
    each = math.prod(sizes[1:])
    segments = cut([[waiting.atom]], [each * i for i in range(1, sizes[0])])
    taken = segments[start:limit]
    if len(taken) != 1 or len(segments) != sizes[0]:
        return None
    renewed: dict[int, Label] = {id(waiting.factors[0]): None}
    if len(sizes) == 2:
        renewed[id(waiting.factors[1])] = taken
    else:
        (segment,) = taken
        again = Split(segment[0], sizes[1:])
        for old, new in zip(waiting.factors[1:], again.factors, strict=True):
            renewed[id(old)] = [[new]]
    return [
        renewed.get(id(one[0][0]), one) if one and len(one) == 1 and len(one[0]) == 1 else one
        for one in labels
    ]


def _forget_axis(labels: Labels, axis: int, gone: Label = None) -> None:
    others = [label for i, label in enumerate(labels) if i != axis]
    forget(others, [labels[axis] if gone is None else gone])


def _reverse(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels = labels_of(operands[0])
    for axis in eqn.params["dimensions"]:
        fix(labels[axis])
    return [Traced(labels)]


def _pad(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels, result = labels_of(operands[0]), _result_shape(eqn)
    for i, padding in enumerate(eqn.params["padding_config"]):
        if tuple(padding) != (0, 0, 0):
            fix(labels[i])
            labels[i] = fixed_axis(result[i])
    return [Traced(labels)]


# Contractions -------------------------------------------------------------------------------------------------------


def _dot_general(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    contracted, batched = eqn.params["dimension_numbers"]
    sides = [labels_of(value) for value in operands[:2]]
    free = [
        [i for i in range(len(labels)) if i not in (*contracted[side], *batched[side])]
        for side, labels in enumerate(sides)
    ]
    for side, labels in enumerate(sides):
        summed = [labels[i] for i in contracted[side]]
        kept = [labels[i] for i in range(len(labels)) if i not in contracted[side]]
        forget(kept, summed)
        forget(summed, [labels[i] for i in free[side]])
        uses.contract(operands[side], summed)
    for i, j in zip(*contracted, strict=True):
        unify(sides[0][i], sides[1][j])
    batch = [unify(sides[0][i], sides[1][j]) for i, j in zip(*batched, strict=True)]
    return [Traced([*batch, *(sides[0][i] for i in free[0]), *(sides[1][i] for i in free[1])])]


def _convolution(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    params, result = eqn.params, _result_shape(eqn)
    image, kernel = (labels_of(value) for value in operands)
    lhs, rhs, out = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return _all_fixed([*image, *kernel], result)
    labels: Labels = [None] * len(result)
    window = [*(image[i] for i in lhs[2:]), *(kernel[i] for i in rhs[2:])]
    for label in window:
        fix(label)
    for place in out[2:]:
        labels[place] = fixed_axis(result[place])
    labels[out[0]] = image[lhs[0]]
    channels, inputs, outputs = image[lhs[1]], kernel[rhs[1]], kernel[rhs[0]]
    forget([image[lhs[0]], channels, inputs, outputs], window)
    if groups == 1:
        uses.contract(operands[1], [inputs])
        forget([outputs], [inputs])
        forget([inputs], [outputs])
        forget([labels[out[0]]], [channels])
        unify(channels, inputs)
    else:
        shapes = _shapes(eqn)
        each = shapes[1][rhs[1]]
        made = shapes[1][rhs[0]] // groups
        group, inside, width = Atom(groups), Atom(each), Atom(made)
        axes = [group] if each == 1 else [group, inside]
        channels = unify(channels, [axes])
        outputs = unify(outputs, [[group] if made == 1 else [group, width]])
        if each > 1:
            uses.contract(operands[1], [inputs])
            forget([[[width]]], [[[inside]]])
            forget([[[inside]]], [[[width]]])
            unify(inputs, [[inside]])
        outputs = outputs if outputs is not None else [[group, width]]
    labels[out[1]] = outputs
    return [Traced(labels)]


# Reductions and what runs along an axis -----------------------------------------------------------------------------


def _reduce(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels, axes = labels_of(operands[0]), eqn.params["axes"]
    kept = [label for i, label in enumerate(labels) if i not in axes]
    gone = [labels[i] for i in axes]
    forget(kept, gone)
    return [Traced(kept)]


def _arg_reduce(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels = labels_of(operands[0])
    for axis in eqn.params["axes"]:
        fix(labels[axis])
    return _reduce(eqn, operands, uses)


_ALONG_ONE_AXIS = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"}


def _along_one_axis(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    axis = eqn.params["axis" if "axis" in eqn.params else "dimension"]
    given = [labels_of(value) for value in operands]
    labels = [functools.reduce(unify, same) for same in zip(*given, strict=True)]
    for one in given:
        fix(one[axis])
    labels[axis] = fixed_axis(_result_shape(eqn)[axis])
    return [Traced(list(labels)) for _ in eqn.outvars]


def _top_k(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    labels = labels_of(operands[0])
    axis = eqn.params.get("axis", -1) % len(labels)
    fix(labels[axis])
    labels[axis] = fixed_axis(_result_shape(eqn)[axis])
    return [Traced(list(labels)) for _ in eqn.outvars]


def _windows(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    """Pooling: axes with a window of 1 pass, the others are fixed."""
    result, params = _result_shape(eqn), eqn.params
    given = [labels_of(value) for value in operands if value_rank(value) == len(result)]
    if len(given) != len(eqn.outvars):
        return _all_fixed([label for labels in given for label in labels], result)
    labels = [functools.reduce(unify, same) for same in zip(*given, strict=True)]
    for i, window in enumerate(params["window_dimensions"]):
        plain = (
            window == 1
            and params["window_strides"][i] == 1
            and tuple(params["padding"][i]) == (0, 0)
        )
        if not plain:
            fix(labels[i])
            labels[i] = fixed_axis(result[i])
    return [Traced(list(labels)) for _ in eqn.outvars]


def value_rank(value: Value) -> int:
    return len(value.labels) if isinstance(value, Traced) else np.ndim(value.array)


# Look-ups -----------------------------------------------------------------------------------------------------------


def _gather(eqn: JaxprEqn, operands: Sequence[Value], uses: Uses) -> list[Value]:
    """Axes that are taken whole pass, those that are indexed are fixed (an embedding's vocabulary)."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, result = _shapes(eqn)[0], _result_shape(eqn)
    labels = labels_of(operands[0])
    for label in labels_of(operands[1]):
        fix(label)
    path = _path(operands[0])
    if path is not None:
        uses.looked_up.add(path)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    gone = {*numbers.collapsed_slice_dims, *batching}
    out: Labels = [fixed_axis(size) for size in result]
    kept = [i for i in range(len(shape)) if i not in gone]
    passing = []
    for place, i in zip(numbers.offset_dims, kept, strict=True):
        if sizes[i] == shape[i]:
            out[place] = labels[i]
            passing.append(i)
        else:
            fix(labels[i])
    for i in gone:
        fix(labels[i])
    forget([labels[i] for i in passing], [labels[i] for i in range(len(shape)) if i not in passing])
    return [Traced(out)]


_MOVES = {
    "broadcast_in_dim",
    "dynamic_slice",
    "expand_dims",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "transpose",
    "scan",
}
_RULES: dict[str, Rule] = {
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "mesh_cast": _barrier,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "pvary": _barrier,
    "reshape": _reshape,
    "reshard": _barrier,
    "rev": _reverse,
    "sharding_constraint": _barrier,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "top_k": _top_k,
    "transpose": _transpose,
    **dict.fromkeys(
        (f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or", "xor")),
        _reduce,
    ),
}
