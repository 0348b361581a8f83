"""From a checkpoint to a Flax model: a pure function, its parameters, and what saving needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from jaxmerge.converters import dtypes
from jaxmerge.converters.checkpoint import open_checkpoint
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.family import ApplyFn, Config, variables_of
from jaxmerge.converters.families.matching import Match, recognise
from jaxmerge.converters.model_config import ModelConfig
from jaxmerge.converters.quantised import refuse_quantised
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.tree import TensorLayout, flatten, unflatten

CONFIG_NAME = "config.json"
_LARGEST_CONFIG = 16_000_000


def load_model(
    path: str | os.PathLike[str],
    *,
    family: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    key: str | None = None,
) -> tuple[ApplyFn, Any, ModelConfig]:
    """Loads a checkpoint as a Flax model.

    Args:
      path: a folder with weights and, where the layout has one, config.json; or a single file, which may carry its
        config (GGUF); see `open_checkpoint`.
      family: a name out of `jaxmerge.converters.families.names()`; None: by the `model_type` of config.json, else the
        one family that the tensors fit.
      config: the Flax config, or a mapping in place of config.json, for what the tensors' shapes do not tell.
      dtype: of the floating-point leaves; None: each as it is stored.
      key: where the state dict stands in a PyTorch file; see `open_checkpoint`.

    Returns:
      apply_fn: (params, inputs) -> one array, pure; the same object for equal configs, so it may be a static argument.
      params: the variables, {"params": ...} and "batch_stats" where there are running statistics; JAX arrays.
      config: what `save_model` needs; `config.layout` makes merges the same as those of the checkpoint.

    Raises:
      CheckpointError: as for `open_checkpoint`; no family fits or several do; tensors that are missing, unexpected, of
        other shapes, quantised, or tied by their family but different.

    Example:
      >>> import tempfile
      >>> from jaxmerge.converters import save_checkpoint
      >>> path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
      >>> save_checkpoint(path, {"fc1.weight": np.ones((3, 4), np.float32), "fc1.bias": np.zeros(3, np.float32)})
      >>> apply_fn, params, config = load_model(path)
      >>> config.family, apply_fn(params, np.ones((1, 4))).shape
      ('mlp_fc', (1, 3))
    """
    path = os.fspath(path)
    with open_checkpoint(path, key=key) as checkpoint:
        text = read_config(path) or dict(checkpoint.config or {})
        refuse_quantised(checkpoint.tensors, text, where=path)
        match = recognise(checkpoint.tensors, json=text, family=family, config=config, where=path)
        loaded = _describe(match, checkpoint, text)
        params = _read(match, checkpoint, None if dtype is None else dtypes.storage_dtype(dtype))
    return loaded.apply_fn, params, loaded


def read_config(path: str) -> dict[str, Any]:
    """The parsed config.json of a folder; {} for files and for folders without one.

    Raises:
      CheckpointError: it is not a JSON object.
    """
    file = os.path.join(path, CONFIG_NAME)
    if not os.path.isfile(file):
        return {}
    if os.path.getsize(file) > _LARGEST_CONFIG:
        raise CheckpointError(f"{file}: too large to be a config: {os.path.getsize(file)} bytes")
    try:
        with open(file, encoding="utf-8") as stream:
            parsed = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(parsed).__name__}")
    return parsed


def to_leaf(array: np.ndarray, layout: TensorLayout, shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint's tensor as its leaf of the given shape, on the host; may be a view."""
    if layout.axes is None:
        return array.reshape(shape)
    array = array.reshape(tuple(shape[axis] for axis in layout.axes))
    return np.transpose(array, np.argsort(layout.axes))


def _describe(match: Match, checkpoint: Checkpoint, text: dict[str, Any]) -> ModelConfig:
    family, config, prefix = match
    layout = family.layout(config, prefix)
    own = [one.names[0].removeprefix(prefix) for one in layout.values()]
    aliases = {
        prefix + name: prefix + target
        for name, target in family.aliases(config).items()
        if prefix + name in checkpoint.tensors
    }
    for name, target in aliases.items():
        if not _same(checkpoint, name, target):
            raise CheckpointError(
                f"{checkpoint.path}: family {family.name} with this config has {name!r} tied to "
                f"{target!r}, found other values in it"
            )
    buffers = {
        prefix + name: checkpoint.read(prefix + name)
        if prefix + name in checkpoint.tensors
        else new
        for name, new in family.buffers(config, own).items()
    }
    return ModelConfig(family.name, config, prefix, text, aliases, buffers, layout)


def _same(checkpoint: Checkpoint, name: str, target: str) -> bool:
    # A record in a safetensors file may outlive an edit; the other formats truly share storage.
    if checkpoint.format != "safetensors" and any(
        name in group and target in group for group in checkpoint.ties
    ):
        return True
    first, second = checkpoint.read(name), checkpoint.read(target)
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


def _read(match: Match, checkpoint: Checkpoint, dtype: np.dtype | None) -> Any:
    family, config, prefix = match
    layout = family.layout(config, prefix)
    templates, definition = flatten(variables_of(family, config))
    paths = {layout[path].names[0]: path for path in templates}
    leaves: dict[str, jax.Array] = {}
    for name in checkpoint.disk_order():
        path = paths.get(name)
        if path is None:
            continue
        array = to_leaf(checkpoint.read(name), layout[path], templates[path].shape)
        if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(dtype)
        leaf = jnp.asarray(array)
        if leaf.dtype != array.dtype:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} is {array.dtype}, which JAX holds only with "
                "jax_enable_x64; or give a dtype"
            )
        leaves[path] = leaf
    return unflatten(definition, (leaves[path] for path in templates))
