"""A family: one layout of checkpoints, and the Flax module that computes the same function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from pydantic import TypeAdapter, ValidationError

from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.families.rules import Rule, derive_layout
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.tree import Layout, flatten

Config = Any
"""A frozen dataclass of plain values from `jaxmerge.models`; each family has its own."""

ApplyFn = Callable[[Any, Any], jax.Array]
"""(params, inputs) -> one array: logits of a classifier or decoder, last hidden state of an encoder."""


def no_aliases(config: Config) -> Mapping[str, str]:
    """A layout in which no tensor has a second name."""
    return {}


def no_buffers(config: Config, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """A layout of parameters and running statistics alone."""
    return {}


def batch_counters(config: Config, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The `num_batches_tracked` that PyTorch's BatchNorm keeps beside its running statistics.

    Example:
      >>> batch_counters(None, ["bn.weight", "bn.running_mean", "bn.running_var"])
      {'bn.num_batches_tracked': array(0)}
    """
    stems = [name.removesuffix("running_var") for name in names if name.endswith(".running_var")]
    return {f"{stem}num_batches_tracked": np.zeros((), np.int64) for stem in stems}


@dataclass(frozen=True)
class Family:
    """One layout of checkpoints.

    Attributes:
      name: what `load_model(family=...)` calls it, "resnet_cifar".
      config_type: the Flax config's type.
      module: config -> linen module.
      inputs: config -> inputs as `jax.ShapeDtypeStruct`s, batch 1; the leaves' shapes are found by tracing with them.
      rules: config -> the key table. A fused tensor (q, k and v in one) stays one leaf, so that a rule is one to one.
      config_of: (config.json, tensors by name) -> config. The first is {} where there is none; then the config comes
        from the tensors' shapes. Raises a CheckpointError that says what is missing or not supported.
      config_to: config -> config.json; None: `plain_json`.
      model_types: the Hugging Face `model_type`s that it reads; the family's own name is always read.
      prefixes: what may stand before every name, beside "", "module." and "_orig_mod.".
      aliases: config -> second names of tensors (a tied head), by name. A checkpoint may lack them; where it has them,
        they must hold the same values, and they are written again.
      buffers: (config, names) -> tensors without information of their own that the layout has beside `names`. A
        checkpoint may lack them; they are always written, with the values that were read.
      ignored: patterns of names that may stand in a checkpoint, are not read, and are not written.
      apply: config -> apply_fn; None: that of the module.
    """

    name: str
    config_type: type
    module: Callable[[Config], nn.Module]
    inputs: Callable[[Config], Any]
    rules: Callable[[Config], Sequence[Rule]]
    config_of: Callable[[Mapping[str, Any], Mapping[str, TensorInfo]], Config]
    config_to: Callable[[Config], Mapping[str, Any]] | None = None
    model_types: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    aliases: Callable[[Config], Mapping[str, str]] = no_aliases
    buffers: Callable[[Config, Sequence[str]], Mapping[str, np.ndarray]] = no_buffers
    ignored: tuple[str, ...] = ()
    apply: Callable[[Config], ApplyFn] | None = None

    def layout(self, config: Config, prefix: str = "") -> Layout:
        """The static layout of every leaf, as the table and the module have it."""
        return _layout(self, config, prefix)

    def shapes(self, config: Config) -> Mapping[str, tuple[int, ...]]:
        """The shape of every leaf by path, found without computing anything."""
        return {path: leaf.shape for path, leaf in flatten(variables_of(self, config))[0].items()}

    def apply_fn(self, config: Config) -> ApplyFn:
        """The pure function (params, inputs) -> array: the same object for equal configs."""
        return _apply_fn(self, config)

    def json(self, config: Config) -> dict[str, Any]:
        """The config.json of a config."""
        return dict(
            plain_json(self.name, config) if self.config_to is None else self.config_to(config)
        )

    @property
    def accepted_types(self) -> tuple[str, ...]:
        """Every `model_type` that it reads."""
        return (*self.model_types, self.name)


def plain_json(family: str, config: Config) -> dict[str, Any]:
    """The config.json of a layout that has none of its own: the Flax config's fields."""
    return {"model_type": family, **asdict(config)}


def from_plain_json(config_type: type, json: Mapping[str, Any]) -> Config:
    """The inverse of `plain_json`.

    Raises:
      CheckpointError: fields that the config does not have, that are missing, or of another type.

    Example:
      >>> from jaxmerge.models import MLPConfig
      >>> from_plain_json(MLPConfig, {"model_type": "mlp", "features": [4, 3]})
      MLPConfig(features=(4, 3), activation='relu', dtype='float32')
    """
    given = {key: value for key, value in json.items() if key != "model_type"}
    known = {field.name for field in fields(config_type)}
    for key in given:
        if key not in known:
            raise CheckpointError(
                f"config: {config_type.__name__} has no field {key!r}.{nearest(key, known)}"
            )
    try:
        return TypeAdapter(config_type).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"config: {config_type.__name__}: {field}: {first['msg']}") from None


@cache
def variables_of(family: Family, config: Config) -> Any:
    """The tree of a family's variables as `jax.ShapeDtypeStruct`s.

    Raises:
      CheckpointError: there is no model of this config.
    """

    def init(inputs: Any) -> Any:
        return family.module(config).init(jax.random.key(0), inputs)

    try:
        return jax.eval_shape(init, family.inputs(config))
    except Exception as error:
        # Flax and JAX have many words for widths that do not fit together.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        unknown = "unknown " if isinstance(error, KeyError) else ""
        raise CheckpointError(
            f"family {family.name}: no such model: {unknown}{reason[0]}"
        ) from error


@cache
def _layout(family: Family, config: Config, prefix: str) -> Layout:
    shapes = family.shapes(config)
    return derive_layout(family.rules(config), shapes, family=family.name, prefix=prefix)


@cache
def _apply_fn(family: Family, config: Config) -> ApplyFn:
    if family.apply is not None:
        return family.apply(config)
    module = family.module(config)

    def apply(params: Any, inputs: Any) -> jax.Array:
        return cast(jax.Array, module.apply(params, inputs))

    return apply
