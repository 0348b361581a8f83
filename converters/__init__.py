"""Checkpoints in and out: safetensors and PyTorch files, as flat dicts of arrays."""

from jaxmerge.converters.address import split_key
from jaxmerge.converters.checkpoint import load_checkpoint, open_checkpoint
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.finite import non_finite
from jaxmerge.converters.quantised import refuse_quantised
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.saving import save_checkpoint
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.converters.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "TensorInfo",
    "load_checkpoint",
    "non_finite",
    "open_checkpoint",
    "refuse_quantised",
    "save_checkpoint",
    "split_key",
]
