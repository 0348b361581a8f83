"""What a loaded model is, beside its parameters: all that saving it again needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from jaxmerge.converters import dtypes, families
from jaxmerge.converters.config_values import from_values, to_values
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import ApplyFn, Config, Family
from jaxmerge.tree import Layout, TensorLayout


@dataclass(frozen=True)
class ModelConfig:
    """A model's static description; `load_model` returns it.

    Attributes:
      family: the name of its layout of checkpoints.
      model: the Flax config, such as an `MLPConfig`.
      prefix: what stands before every name in the checkpoint.
      json: the config.json that was read; {} where there was none.
      aliases: second names of tensors that the checkpoint had, by name: tied tensors are one leaf.
      buffers: tensors that carry no information of the model, with the values that were read.
      layout: how each leaf relates to the checkpoint's tensors; for `jaxmerge.merge(..., layout=...)`. Left out: as the
        family's table has it.

    Raises:
      CheckpointError: no such family, a config of another one, or no model of this config.
    """

    family: str
    model: Config
    prefix: str = ""
    json: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    layout: Layout = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not isinstance(self.model, self.table.config_type):
            raise CheckpointError(
                f"family {self.family!r} has a {self.table.config_type.__name__} as config, found "
                f"{type(self.model).__name__}"
            )
        if self.layout is None:
            object.__setattr__(self, "layout", self.table.layout(self.model, self.prefix))

    @property
    def table(self) -> Family:
        """The family itself."""
        return families.get(self.family)

    @property
    def apply_fn(self) -> ApplyFn:
        """(params, inputs) -> one array; the same object for equal Flax configs."""
        return self.table.apply_fn(self.model)

    def to_json(self) -> dict[str, Any]:
        """The description as plain values, for formats that keep some beside the arrays.

        Example:
          >>> from jaxmerge.models import MLPConfig
          >>> config = ModelConfig("mlp_fc", MLPConfig((4, 3)))
          >>> ModelConfig.from_json(config.to_json()) == config
          True
        """
        return {
            "family": self.family,
            "model": to_values(self.model),
            "prefix": self.prefix,
            "json": dict(self.json),
            "aliases": dict(self.aliases),
            "buffers": {
                name: {"dtype": array.dtype.name, "values": array.tolist()}
                for name, array in self.buffers.items()
            },
            "layout": {path: asdict(tensor) for path, tensor in self.layout.items()},
        }

    @classmethod
    def from_json(cls, text: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
          CheckpointError: it is not what `to_json` gives, or of a family that this version does not know.
        """
        try:
            given = TypeAdapter(_Json).validate_python(text)
        except ValidationError as error:
            raise CheckpointError(
                f"not a model's description: {error.errors()[0]['msg']}"
            ) from None
        table = families.get(given.family)
        return cls(
            given.family,
            from_values(table.config_type, given.model),
            given.prefix,
            given.json,
            given.aliases,
            {
                name: np.array(buffer.values, dtypes.storage_dtype(buffer.dtype))
                for name, buffer in given.buffers.items()
            },
            Layout(given.layout),
        )

    def __hash__(self) -> int:
        return hash((self.family, self.model, self.prefix, self.layout))


@dataclass(frozen=True)
class _Buffer:
    dtype: str
    values: Any


@dataclass(frozen=True)
class _Json:
    """What `to_json` gives, for its validation."""

    family: str
    model: dict[str, Any]
    prefix: str
    json: dict[str, Any]
    aliases: dict[str, str]
    buffers: dict[str, _Buffer]
    layout: dict[str, TensorLayout]
