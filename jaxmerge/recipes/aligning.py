"""Matching the models of a planned alignment, and the order in which their tensors are read after it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.plan import Plan, PlannedSource
from jaxmerge.recipes.source_files import check_unchanged

if TYPE_CHECKING:
    from jaxmerge.align.orders import Order
    from jaxmerge.recipes.alignment import PlannedAlignment

Found = dict[str, Any]
"""What a matching found, as plain data: see `jaxmerge.align.checkpoints.recorded`."""


@dataclass(frozen=True, eq=False)
class Aligned:
    """Models that are matched.

    Attributes:
        found: per source that is brought into another order, what its matching found.
        orders: per such source, and tensor in which something moves, the order of its entries.
        data: sha256 (hex) of the inputs' file, or None.
    """

    found: Mapping[int, Found]
    orders: Mapping[int, Mapping[str, Order]]
    data: str | None


def aligned(
    plan: Plan,
    known: Mapping[int, Found] | None = None,
    finish: Callable[[int, Found], None] | None = None,
) -> Plan:
    """Matches the models of a plan; does nothing for one without an alignment.

    The model that the others are aligned to, and one other at a time, are loaded whole.

    Args:
        plan: the plan.
        known: what an earlier run has found.
        finish: called after each matching with the source's index and what was found.

    Returns:
        The plan, ready to be merged: its tensors are read in the order found.

    Raises:
        PlanError: models that cannot be matched, such as those with values that are not finite, or a
            record of an earlier run that does not fit.
        CheckpointError: a model cannot be read.
    """
    alignment = plan.alignment
    if alignment is None:
        return plan
    found = dict(known or {})
    missing = [index for index in alignment.models if index not in found]
    if missing:
        check_unchanged(plan)
        for index, one in _matched(plan, alignment, missing):
            found[index] = one
            if finish is not None:
                finish(index, one)
    found = {index: found[index] for index in alignment.models}
    orders = {index: _orders(alignment, plan.sources[index], one) for index, one in found.items()}
    digests = [
        hashlib.sha256(Path(file).read_bytes()).hexdigest() for file, _, _ in alignment.files
    ]
    return replace(plan, aligned=Aligned(found, orders, next(iter(digests), None)))


def _matched(plan: Plan, alignment: PlannedAlignment, missing: list[int]) -> Any:
    from jaxmerge.align.checkpoints import match_models, read_inputs, recorded
    from jaxmerge.converters import load_model

    family, config, _ = alignment.match
    apply_fn = family.apply_fn(config)
    inputs = None
    if alignment.files:
        inputs = read_inputs(alignment.files[0][0], family.inputs(config))

    def load(source: PlannedSource) -> Any:
        wide = any(info.dtype == "float64" for info in source.tensors.values())
        return load_model(
            source.path,
            family=family.name,
            config=alignment.config,
            dtype=np.float32 if wide else None,
            key=source.key,
        )[1]

    reference = load(plan.sources[alignment.to])
    for index in missing:
        source = plan.sources[index]
        try:
            permutations, info = match_models(
                alignment.spec, apply_fn, reference, load(source), inputs, alignment.how
            )
        except ValueError as error:
            to = plan.sources[alignment.to].name
            raise PlanError([f"{source.name} cannot be aligned with {to}: {error}"]) from error
        yield index, recorded(permutations, info)


def _orders(alignment: PlannedAlignment, source: PlannedSource, found: Found) -> dict[str, Order]:
    from jaxmerge.align.orders import tensor_orders

    family, config, prefix = alignment.match
    permutations = {name: np.array(p, np.int32) for name, p in found["permutations"].items()}
    orders = tensor_orders(
        alignment.spec, permutations, family.layout(config, prefix), family.shapes(config)
    )
    for name, target in family.aliases(config).items():
        if prefix + name in source.tensors and prefix + target in orders:
            orders[prefix + name] = orders[prefix + target]
    return orders
