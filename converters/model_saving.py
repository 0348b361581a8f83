"""From a Flax model back to its layout of checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from jaxmerge.converters import dtypes, folder
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.families.matching import recognise
from jaxmerge.converters.families.rules import listed
from jaxmerge.converters.model_config import ModelConfig
from jaxmerge.converters.model_loading import CONFIG_NAME
from jaxmerge.converters.partial_file import PartialFile
from jaxmerge.converters.saving import save_checkpoint
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.tree import TensorLayout, flatten


def save_model(
    path: str | os.PathLike[str],
    params: Any,
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    format: str | None = None,
    shard_size: int | None = None,
) -> None:
    """Writes a model in its family's layout, so that what reads that layout loads it.

    A folder is loaded by transformers where the family is one of theirs; the tensors pass
    `torch.nn.Module.load_state_dict(strict=True)`.

    Args:
      path: a folder (made if need be), which also gets config.json; or a file, safetensors or PyTorch by its suffix.
      params: the variables, as `load_model` returned them or merged from such.
      config: what `load_model` returned, or a `ModelConfig(family, flax_config)` of a model trained in JAX.
      dtype: of the floating-point tensors; None: each as it is.
      format: "safetensors" or "torch", as for `save_checkpoint`.
      shard_size: the most bytes of tensors in one safetensors file of a folder.

    Raises:
      CheckpointError: leaves that are missing, unexpected or of another shape than the config says; and as for
        `save_checkpoint`.

    Example:
      >>> import tempfile, jax
      >>> from jaxmerge.models import MLP, MLPConfig
      >>> model = MLPConfig((4, 3))
      >>> params = MLP(model).init(jax.random.key(0, impl="rbg"), np.ones((1, 4)))
      >>> out = tempfile.mkdtemp()
      >>> save_model(out, params, ModelConfig("mlp_fc", model))
      >>> sorted(os.listdir(out))
      ['config.json', 'model.safetensors']
    """
    path = os.fspath(path)
    tensors = to_checkpoint(params, config, where=path)
    if dtype is not None:
        wanted = dtypes.storage_dtype(dtype)
        tensors = {
            name: tensor.astype(wanted) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor
            for name, tensor in tensors.items()
        }
    ties = {target: [target] for target in config.aliases.values()}
    for name, target in config.aliases.items():
        tensors[name] = tensors[target]
        ties[target].append(name)
    is_file = path.endswith((folder.SAFETENSORS_SUFFIX, *folder.TORCH_SUFFIXES))
    torch = format == "torch" or path.endswith(folder.TORCH_SUFFIXES)
    save_checkpoint(
        path,
        tensors,
        format=format,
        metadata=None if torch else {"format": "pt"},
        shard_size=shard_size,
        ties=list(ties.values()),
    )
    if not is_file:
        text = _config_text(config, tensors)
        if dtype is not None:
            # transformers 5 writes "dtype", older versions "torch_dtype"; it loads the weights as that.
            stored = dtypes.storage_dtype(dtype).name
            text.update({key: stored for key in ("dtype", "torch_dtype") if key in config.json})
        with PartialFile(os.path.join(path, CONFIG_NAME)) as file:
            file.write_at((json.dumps(text, indent=2, ensure_ascii=False) + "\n").encode(), 0)


def to_checkpoint(
    params: Any, config: ModelConfig, *, where: str = "params"
) -> dict[str, np.ndarray]:
    """The tensors of a model by name, on the host, in the checkpoint's element order; buffers too, tied names once.

    Raises:
      CheckpointError: leaves that are missing, unexpected or of another shape than the config says.
    """
    leaves, _ = flatten(params)
    check_leaves(leaves, config, where)
    tensors: dict[str, np.ndarray] = {}
    for path, layout in config.layout.items():
        leaf = np.asarray(leaves[path])
        for name, layer in zip(layout.names, leaf if layout.stacked else [leaf], strict=True):
            tensors[name] = to_tensor(layer, layout)
    own = [name.removeprefix(config.prefix) for name in tensors]
    for name, new in config.table.buffers(config.model, own).items():
        full = config.prefix + name
        tensors[full] = config.buffers.get(full, new)
    return tensors


def to_tensor(leaf: np.ndarray, layout: TensorLayout) -> np.ndarray:
    """One layer of a leaf as its checkpoint's tensor, on the host; may be a view."""
    if layout.axes is not None:
        leaf = np.transpose(leaf, layout.axes)
    return leaf if layout.shape is None else leaf.reshape(layout.shape)


def check_leaves(leaves: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """Checks that leaves, by path, are those of a model; anything with a shape will do.

    Raises:
      CheckpointError: leaves that are missing, unexpected or of another shape than the config says.
    """
    layout = config.layout
    missing = [path for path in layout if path not in leaves]
    unexpected = [path for path in leaves if path not in layout]
    said = []
    if missing:
        said.append(f"missing {listed(missing)}.{nearest(missing[0], unexpected)}")
    if unexpected:
        said.append(f"unexpected {listed(unexpected)}.{nearest(unexpected[0], layout)}")
    if not said and any(one.stacked for one in layout.values()):
        # The family's shapes are those of single layers; a stacked leaf is checked by its layout.
        for path, one in layout.items():
            one.check(path, leaves[path].shape)
    elif not said:
        said += [
            f"{path!r} expected {list(shape)}, found {list(np.shape(leaves[path]))}."
            for path, shape in config.table.shapes(config.model).items()
            if np.shape(leaves[path]) != shape
        ][:4]
    if said:
        raise CheckpointError(
            f"{where}: not the parameters of {config.family} with this config: {' '.join(said)}"
        )


def _config_text(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The config.json that was read where it says what the model is, else with what the model says instead."""
    table, given = config.table, config.json
    infos = {name: TensorInfo.of(name, array.shape, array.dtype) for name, array in tensors.items()}
    try:
        read = recognise(infos, json=given, family=config.family).config
    except CheckpointError:
        read = None
    if given and read is not None and replace(read, dtype=config.model.dtype) == config.model:
        return dict(given)
    kept = given if given.get("model_type") in table.accepted_types else {}
    return {**kept, **table.json(config.model)}
