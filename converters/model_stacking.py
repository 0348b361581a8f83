"""A loaded model with all its layers in one array, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import ApplyFn
from jaxmerge.converters.model_config import ModelConfig
from jaxmerge.models.stacking import stack_layers, stack_layout, unstack_layers


def stack_model(params: Any, config: ModelConfig) -> tuple[ApplyFn, Any, ModelConfig]:
    """Stacks a model's layers on axis 0; it then runs them in one `lax.scan` and compiles in the time of one layer.

    A merge with the layouts of both forms gives the same numbers, and `save_model` writes the same files.

    Args:
      params: the variables, as `load_model` returned them or merged from such.
      config: what `load_model` returned.

    Returns:
      What `load_model` returns, of the stacked model.

    Raises:
      CheckpointError: the family has no stacked form, or the model is stacked already.
    """
    _check(config, stacked=False)
    model = replace(config.model, stacked=True)
    stacked = replace(config, model=model, layout=stack_layout(config.layout))
    return stacked.apply_fn, stack_layers(params), stacked


def unstack_model(params: Any, config: ModelConfig) -> tuple[ApplyFn, Any, ModelConfig]:
    """The inverse of `stack_model`."""
    _check(config, stacked=True)
    model = replace(config.model, stacked=False)
    layout = config.table.layout(model, config.prefix)
    plain = replace(config, model=model, layout=layout)
    return plain.apply_fn, unstack_layers(params), plain


def _check(config: ModelConfig, *, stacked: bool) -> None:
    if not hasattr(config.model, "stacked"):
        raise CheckpointError(f"models of family {config.family} have no stacked form")
    if config.model.stacked != stacked:
        raise CheckpointError(
            f"the model's layers are {'not stacked' if stacked else 'stacked already'}"
        )
