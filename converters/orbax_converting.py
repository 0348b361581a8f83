"""Models to orbax's format and back, by way of their Flax variables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SUFFIX = ".orbax"
_MARK = "_CHECKPOINT_METADATA"


def is_orbax(path: Path) -> bool:
    """Says whether a path is a folder of orbax's."""
    return (path / _MARK).is_file()


def convert(
    source: Path, target: Path, key: str | None, dtype: np.dtype | None, shard_size: int | None
) -> tuple[int, int]:
    """Converts to or from orbax; see `jaxmerge.converters.convert`.

    Args:
      source: any checkpoint, or a folder of orbax's.
      target: one of the two is orbax's.
      key: where the state dict stands in a PyTorch file.
      dtype: of the floating-point arrays; None: each as it is.
      shard_size: for a folder of safetensors, the most bytes in one file.

    Returns:
      How many arrays were written, and their bytes.

    Raises:
      CheckpointError: as for `load_model`, `save_model`, `load_orbax` and `save_orbax`.
    """
    # Flax and orbax are needed by no other conversion.
    from jaxmerge.converters.model_loading import load_model
    from jaxmerge.converters.model_saving import save_model
    from jaxmerge.converters.orbax_folder import load_orbax, save_orbax
    from jaxmerge.converters.saving import save_checkpoint
    from jaxmerge.tree import flatten

    if is_orbax(source):
        tree, config = load_orbax(source, dtype=dtype)
    else:
        _, tree, config = load_model(source, key=key, dtype=dtype)
    leaves, _ = flatten(tree)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == SUFFIX:
        save_orbax(target, tree, config)
    elif config is None:
        save_checkpoint(target, leaves, shard_size=shard_size)
    else:
        save_model(target, tree, config, shard_size=shard_size)
    return len(leaves), sum(leaf.nbytes for leaf in leaves.values())
