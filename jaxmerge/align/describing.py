"""A spec in words."""

from __future__ import annotations

from jaxmerge.align.spec import Axis, Binding, PermutationSpec


def describe(spec: PermutationSpec) -> str:
    """Prints a spec readably: the nodes as trees, and under each the axes that it stands on.

    Example:
      >>> spec = PermutationSpec.from_axes(
      ...     {"value/kernel": (None, ("head", "value")), "out/kernel": (("head", "value"), None)},
      ...     sizes={"head": 2, "value": 3}, parents={"value": ["head"]})
      >>> print(describe(spec))
      head: 2 units, permuted
        value: 3 units, permuted within each head
      value/kernel  [., head x value]  out
      out/kernel    [head x value, .]  in
    """
    lines = []
    for node in spec.nodes:
        how = "fixed" if node.fixed else "permuted"
        if node.parents:
            how += f" within each {' and '.join(node.parents)}"
        size = "units" if node.size is None else f"{node.size} units"
        lines.append(f"{'  ' * len(node.parents)}{node.name}: {size}, {how}")
    width = max((len(path) for path, _ in spec.leaves), default=0)
    shapes = [_axes(binding) for _, binding in spec.leaves]
    broad = max(map(len, shapes), default=0)
    for (path, binding), shape in zip(spec.leaves, shapes, strict=True):
        roles = ", ".join(dict.fromkeys(axis.role for _, axis in binding.moving()))
        lines.append(f"{path:<{width}}  {shape:<{broad}}  {roles}")
    return "\n".join(lines)


def _axes(binding: Binding) -> str:
    return f"[{', '.join('.' if axis is None else _consists_of(axis) for axis in binding.axes)}]"


def _consists_of(axis: Axis) -> str:
    return " + ".join(" x ".join(map(str, segment)) for segment in axis.segments)
