"""What a loaded model is, beside its parameters: all that saving it again needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmerge.converters import families
from jaxmerge.converters.families.family import ApplyFn, Config, Family
from jaxmerge.tree import Layout


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
      layout: how each leaf relates to the checkpoint's tensors; for `jaxmerge.merge(..., layout=...)`.
    """

    family: str
    model: Config
    prefix: str = ""
    json: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, np.ndarray] = field(default_factory=dict)
    layout: Layout = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
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

    def __hash__(self) -> int:
        return hash((self.family, self.model, self.prefix, self.layout))
