"""Checkpoints in and out: safetensors, PyTorch and GGUF files, as flat dicts of arrays or as Flax models."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmerge.converters.address import split_key
from jaxmerge.converters.checkpoint import load_checkpoint, open_checkpoint
from jaxmerge.converters.converting import Converted, convert
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.finite import non_finite
from jaxmerge.converters.quantised import refuse_quantised
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.saving import save_checkpoint
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.converters.writer import CheckpointWriter

if TYPE_CHECKING:
    from jaxmerge.converters import families, lora
    from jaxmerge.converters.inspecting import inspect_checkpoint
    from jaxmerge.converters.model_config import ModelConfig
    from jaxmerge.converters.model_loading import load_model
    from jaxmerge.converters.model_saving import save_model
    from jaxmerge.converters.model_stacking import stack_model, unstack_model
    from jaxmerge.converters.nnx_state import from_nnx_state, to_nnx_state
    from jaxmerge.converters.orbax_folder import load_orbax, save_orbax

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "Converted",
    "ModelConfig",
    "TensorInfo",
    "convert",
    "families",
    "from_nnx_state",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_orbax",
    "lora",
    "non_finite",
    "open_checkpoint",
    "refuse_quantised",
    "save_checkpoint",
    "save_model",
    "save_orbax",
    "split_key",
    "stack_model",
    "to_nnx_state",
    "unstack_model",
]

# Loaded at first use: reading and writing tensors needs no Flax.
_MODELS = {
    "ModelConfig": "model_config",
    "from_nnx_state": "nnx_state",
    "inspect_checkpoint": "inspecting",
    "load_model": "model_loading",
    "load_orbax": "orbax_folder",
    "save_model": "model_saving",
    "save_orbax": "orbax_folder",
    "stack_model": "model_stacking",
    "to_nnx_state": "nnx_state",
    "unstack_model": "model_stacking",
}


def __getattr__(name: str) -> Any:
    if name in ("families", "lora"):
        return importlib.import_module(f"jaxmerge.converters.{name}")
    if name in _MODELS:
        return getattr(importlib.import_module(f"jaxmerge.converters.{_MODELS[name]}"), name)
    raise AttributeError(f"module 'jaxmerge.converters' has no attribute {name!r}")
