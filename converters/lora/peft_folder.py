"""PEFT's folders of LoRA adapters, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from jaxmerge.converters import dtypes
from jaxmerge.converters.checkpoint import open_checkpoint
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.lora.adapter import LoraAdapter
from jaxmerge.converters.lora.factors import Kind, LowRank
from jaxmerge.converters.partial_file import PartialFile
from jaxmerge.converters.peft_adapter import (
    CONFIG_NAME,
    WEIGHT_NAMES,
    LowRankUpdate,
    find_target,
    fit,
    read_peft_adapter,
)
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.saving import save_checkpoint

_PREFIX = "base_model.model."


def load_lora(
    folder: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> LoraAdapter:
    """Loads a LoRA adapter from PEFT's folder.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
      shapes: the model's tensors; the adapter gets their names, and is fitted to layers that are stored [in, out].
        None: names as PEFT knows them, orientation as the adapter's config says.

    Returns:
      The adapter, float32 factors with the scale alpha / r in them.

    Raises:
      CheckpointError: not a LoRA adapter, a variant that is not supported, or it does not fit the model.

    Example:
      >>> import tempfile
      >>> folder = os.path.join(tempfile.mkdtemp(), "adapter")
      >>> update = LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), (2, 3))
      >>> save_lora(folder, LoraAdapter({"fc.weight": update}))
      >>> load_lora(folder).updates["fc.weight"].shape
      (2, 3)
    """
    read = read_peft_adapter(folder)
    names = None if shapes is None else list(shapes)

    def named(target: str) -> str:
        if names is None:
            return target
        found = find_target(target, names)
        if found is None:
            raise CheckpointError(
                f"{read.folder}: the adapter changes {target!r}, which is not in the model"
            )
        return found

    with open_checkpoint(read.weights) as checkpoint:
        updates, magnitudes = {}, {}
        for update in read.updates.values():
            name = named(update.target)
            if shapes is not None:
                update = fit(update, shapes[name], where=read.folder)
            updates[name] = _low_rank(update, checkpoint)
            if update.magnitude is not None:
                magnitudes[name] = jnp.asarray(checkpoint.read(update.magnitude), jnp.float32)
        replaced = {
            named(target): jnp.asarray(checkpoint.read(name))
            for target, name in read.replaced.items()
        }
    base, task = (read.config.get(key) for key in ("base_model_name_or_path", "task_type"))
    return LoraAdapter(
        updates,
        replaced,
        magnitudes,
        base_model=base if isinstance(base, str) else None,
        task_type=task if isinstance(task, str) else None,
    )


def save_lora(
    folder: str | os.PathLike[str], adapter: LoraAdapter, *, dtype: DTypeLike = "float32"
) -> None:
    """Writes an adapter as a folder that PEFT loads (`PeftModel.from_pretrained(model, folder)`).

    The scale is in the factors: lora_alpha equals the rank, tensor by tensor.

    Args:
      folder: must not exist or be empty.
      adapter: without magnitudes.
      dtype: of the factors; tensors trained whole keep theirs.

    Raises:
      CheckpointError: the folder is not empty, names that are no weights of modules, an adapter that changes nothing,
        or magnitudes (DoRA).
    """
    place = Path(folder)
    check_adapter_folder(place)
    stored_dtype = dtypes.floating_dtype(dtype)
    if adapter.magnitudes:
        raise CheckpointError(f"{place}: DoRA's magnitudes are read, not written")
    if not adapter.updates and not adapter.replaced:
        raise CheckpointError(f"{place}: the adapter changes nothing")
    tensors: dict[str, np.ndarray] = {}
    for name, update in adapter.updates.items():
        for suffix, factor in _factors(update).items():
            tensors[_PREFIX + _module(name, place) + suffix] = factor.astype(stored_dtype)
    adapted = {_module(name, place) for name in adapter.updates}
    for name, tensor in adapter.replaced.items():
        module, _, part = name.rpartition(".")
        # PEFT keeps the layer that it adapts inside its own.
        inside = ".base_layer" if module in adapted else ""
        tensors[f"{_PREFIX}{module}{inside}.{part}"] = np.asarray(tensor)
    config = json.dumps(_config(adapter, place), indent=2) + "\n"
    place.mkdir(parents=True, exist_ok=True)
    save_checkpoint(place / WEIGHT_NAMES[0], tensors, metadata={"format": "pt"}, ties=[])
    with PartialFile(str(place / CONFIG_NAME)) as file:
        file.write_at(config.encode(), 0)


def check_adapter_folder(folder: str | os.PathLike[str]) -> None:
    """Raises a CheckpointError unless an adapter may be written there: nothing, or an empty folder."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"{place}: exists already and is not empty; choose another folder")


def _low_rank(update: LowRankUpdate, checkpoint: Checkpoint) -> LowRank:
    a = jnp.asarray(checkpoint.read(update.a), jnp.float32).reshape(update.rank, -1)
    b = jnp.asarray(checkpoint.read(update.b), jnp.float32).reshape(-1, update.rank)
    if not update.transposed:
        return LowRank(update.scale * b, a, update.shape)
    kind: Kind = "embedding" if ".lora_embedding_A" in update.a else "transposed"
    return LowRank(update.scale * a.T, b.T, update.shape, kind)


def _factors(update: LowRank) -> dict[str, np.ndarray]:
    """The factors as PEFT stores them, by what follows the module's name."""
    left, right = np.asarray(update.left), np.asarray(update.right)
    if update.kind == "embedding":
        return {".lora_embedding_A": left.T, ".lora_embedding_B": right.T}
    if update.kind == "transposed":
        return {".lora_A.weight": left.T, ".lora_B.weight": right.T}
    window = [1] * (len(update.shape) - 2)
    return {
        ".lora_A.weight": right.reshape(-1, *update.shape[1:]),
        ".lora_B.weight": left.reshape(*left.shape, *window),
    }


def _module(name: str, place: Path) -> str:
    module = name.removesuffix(".weight")
    if module == name or not module:
        raise CheckpointError(f"{place}: {name!r}: PEFT adapts the weights of modules: NAME.weight")
    return module


def _config(adapter: LoraAdapter, place: Path) -> dict[str, Any]:
    ranks = {_module(name, place): update.rank for name, update in adapter.updates.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count, default=1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    whole = {name.rpartition(".")[0] for name in adapter.replaced}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "all" if whole & set(ranks) else "none",
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(whole - set(ranks)) or None,
        "fan_in_fan_out": any(update.kind == "transposed" for update in adapter.updates.values()),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
