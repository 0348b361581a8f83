"""Flax configs as plain values and back: dataclasses and named tuples, nested, by their names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from jaxmerge import models
from jaxmerge.converters.errors import CheckpointError, nearest

_TYPE = "type"


def to_values(value: Any) -> Any:
    """Writes a config as dicts, lists, numbers and texts.

    Example:
      >>> from jaxmerge.models import MLPConfig
      >>> to_values(MLPConfig((4, 3)))
      {'type': 'MLPConfig', 'features': [4, 3], 'activation': 'relu', 'dtype': 'float32'}
    """
    if is_dataclass(value) or hasattr(value, "_fields"):
        named = value._fields if hasattr(value, "_fields") else [f.name for f in fields(value)]
        return {_TYPE: type(value).__name__} | {
            name: to_values(getattr(value, name)) for name in named
        }
    if isinstance(value, tuple):
        return [to_values(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"a config holds {value!r}, which is no plain value")


def from_values(config_type: type, values: Any) -> Any:
    """Reads a config back: the inverse of `to_values`.

    Only the dataclasses and named tuples of `jaxmerge.models` and of the config's own module are made: the values are
    data.

    Raises:
      CheckpointError: another type, an unknown one, or fields that do not fit.

    Example:
      >>> from jaxmerge.models import MLPConfig
      >>> from_values(MLPConfig, to_values(MLPConfig((4, 3)))) == MLPConfig((4, 3))
      True
    """
    own = vars(sys.modules[config_type.__module__])
    known = {
        name: kind
        for name, kind in {**vars(models), **own}.items()
        if isinstance(kind, type) and (is_dataclass(kind) or hasattr(kind, "_fields"))
    }

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(read(one) for one in value)
        if not isinstance(value, Mapping):
            return value
        name = value.get(_TYPE)
        if name not in known:
            raise CheckpointError(f"unknown type {name!r} in a config.{nearest(str(name), known)}")
        given = {key: read(one) for key, one in value.items() if key != _TYPE}
        try:
            return known[name](**given)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{name} in a config: {error}") from None

    config = read(values)
    if not isinstance(config, config_type):
        raise CheckpointError(f"expected a {config_type.__name__}, found {type(config).__name__}")
    return config
