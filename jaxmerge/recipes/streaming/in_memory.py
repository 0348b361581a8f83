"""Methods that are not built from a leaf method see all tensors at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.converters import Checkpoint
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.methods import merge
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.inputs import read_whole
from jaxmerge.recipes.plan import Plan, PlannedTensor
from jaxmerge.tree import Layout, TensorLayout


def merge_in_memory(
    plan: Plan, tensors: Sequence[PlannedTensor], checkpoints: Sequence[Checkpoint]
) -> dict[str, np.ndarray]:
    """Merges all tensors of one of a plan's merges.

    Args:
      plan: the plan.
      tensors: those of the merge, each tied one once.
      checkpoints: the plan's sources, open.

    Returns:
      The merged tensors by name.

    Raises:
      PlanError: the tensors have different hyperparameters, or some have a base and others none.
      CheckpointError: a source is not finite or cannot be read.
    """
    method = plan.merges[tensors[0].merge].method
    first = tensors[0]
    for tensor in tensors:
        if tensor.hyperparameters != first.hyperparameters:
            raise PlanError(
                [
                    f"{method.name} merges all tensors at once, and so with the same numbers, but "
                    f"{tensor.name!r} has others than {first.name!r}"
                ]
            )
    wide = any(one.dtype == "float64" for tensor in tensors for one in tensor.inputs)
    models = [
        {tensor.name: read_whole(checkpoints, plan, tensor.models[i]) for tensor in tensors}
        for i in range(len(first.models))
    ]
    based = [tensor for tensor in tensors if tensor.base is not None]
    base = {
        tensor.name: read_whole(checkpoints, plan, tensor.base)
        for tensor in based
        if tensor.base is not None
    }
    layout = Layout(
        {tensor.name: TensorLayout((tensor.name,), depths=(tensor.depth,)) for tensor in tensors}
    )
    hyperparameters: dict[str, Any] = dict(first.hyperparameters)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        merged = merge(
            method,
            models,
            base=base or None,
            key=jax.random.key(plan.seed),
            layout=layout,
            **hyperparameters,
        )
        params = method.params_of(merged)
        return {
            tensor.name: np.asarray(params[tensor.name]).astype(
                storage_dtype(tensor.dtype), copy=False
            )
            for tensor in tensors
        }
