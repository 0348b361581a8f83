"""Folders of PEFT's LoRA adapters: which tensors of a model they change, and how."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxmerge.converters.checkpoint import open_checkpoint
from jaxmerge.converters.errors import CheckpointError, nearest
from jaxmerge.converters.tensor_info import TensorInfo

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
# The largest that PEFT writes lists a rank for every layer: some 100 kB.
_LARGEST_CONFIG = 10_000_000
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?!weight$)[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[^.]+)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.[^.]+){0,2}")
_COPY = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.(weight|bias)$)")

# What changes the meaning of the factors, and why a merged tensor cannot have it.
_REFUSED = {
    "use_qalora": "pools the inputs of quantised layers",
    "use_bdlora": "keeps blocks apart",
    "kasa_config": "has factors of its own",
    "monteclora_config": "draws its factors at random",
    "arrow_config": "chooses among adapters for every token",
    "alora_invocation_tokens": "acts only after certain tokens",
    "layer_replication": "repeats layers of the model",
    "target_parameters": "changes stacked parameters of experts",
    "trainable_token_indices": "trains rows of the embedding apart",
    "lora_bias": "has biases beside its factors",
}
# Initialisations that take what the factors hold at the start out of the model's own weights.
_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter adds to one tensor W: s B A, its transpose where W is stored [in, out].

    Attributes:
      target: the tensor's name in the model, as PEFT knows it.
      a: name of A `[r, in, ...]` in the adapter's file.
      b: name of B `[out, r, ...]`.
      rank: r.
      scale: s = alpha / r, or alpha / sqrt(r) with rank stabilisation.
      transposed: W is `[in, out]`: an embedding, or a layer of GPT-2's kind.
      magnitude: name of DoRA's magnitudes `[out]`, or None. With them the tensor becomes
        m (W + s B A) / ||W + s B A||, row by row.
      shape: of the update, as `[out, in, ...]` or transposed.
    """

    target: str
    a: str
    b: str
    rank: int
    scale: float
    transposed: bool
    magnitude: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as its headers describe it.

    Attributes:
      folder: where it is.
      weights: the file with its tensors, for `open_checkpoint`.
      config: `adapter_config.json`.
      tensors: what the file holds, by name.
      updates: target -> its low-rank update.
      replaced: target -> name in the file of a tensor that takes the target's place before any
        update: modules trained whole, biases, embeddings of another size.
    """

    folder: str
    weights: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    updates: Mapping[str, LowRankUpdate]
    replaced: Mapping[str, str]


def is_peft_adapter(path: str | os.PathLike[str]) -> bool:
    """Says whether a path is an adapter's folder: one with an `adapter_config.json`."""
    return os.path.isfile(os.path.join(path, CONFIG_NAME))


def read_peft_adapter(folder: str | os.PathLike[str]) -> PeftAdapter:
    """Reads what an adapter changes, without reading its tensors.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

    Returns:
      The adapter: every tensor of its file belongs to one update or replaces a tensor.

    Raises:
      CheckpointError: no adapter there, another kind than LoRA, a variant that no single tensor can
        have, factors without their partner or of wrong shapes.
    """
    folder = os.fspath(folder)
    config = _read_config(folder)
    _check_kind(folder, config)
    path = next(
        (path for name in WEIGHT_NAMES if os.path.isfile(path := os.path.join(folder, name))), None
    )
    if path is None:
        raise CheckpointError(f"{folder}: expected {' or '.join(WEIGHT_NAMES)}, found neither")
    with open_checkpoint(path) as checkpoint:
        tensors = dict(checkpoint.tensors)
    parts, replaced = _sorted_out(path, tensors)
    scaling = _Scaling(folder, config)
    updates = {}
    for module, found in parts.items():
        update = _update(path, module, found, tensors, scaling, config)
        updates[update.target] = update
    if not updates and not replaced:
        raise CheckpointError(f"{path}: the adapter changes nothing: no tensor is in it")
    return PeftAdapter(folder, path, config, tensors, updates, replaced)


def find_target(target: str, names: Collection[str]) -> str | None:
    """Finds an adapter's target among a model's names, which may have more or fewer prefixes.

    Args:
      target: a target of `PeftAdapter`.
      names: the model's tensors.

    Returns:
      The name that equals the target, else the one that ends in it or that it ends in; None
      where there is none or more than one.

    Example:
      >>> find_target("model.layers.0.q.weight", ["layers.0.q.weight", "layers.0.k.weight"])
      'layers.0.q.weight'
    """
    if target in names:
        return target
    ends = [n for n in names if n.endswith("." + target) or target.endswith("." + n)]
    return ends[0] if len(ends) == 1 else None


def fit(update: LowRankUpdate, shape: tuple[int, ...], *, where: str) -> LowRankUpdate:
    """Fits an update to the tensor that it changes.

    An adapter's config says for all layers at once whether they are stored `[in, out]`; a tensor
    that is not square says it better.

    Args:
      update: the update.
      shape: of the tensor.
      where: the adapter, for the message.

    Returns:
      The update, transposed if that is how its shape is the tensor's.

    Raises:
      CheckpointError: neither way.

    Example:
      >>> update = LowRankUpdate("w", "a", "b", 1, 2.0, False, None, (2, 3))
      >>> fit(update, (3, 2), where="adapter").transposed
      True
    """
    if update.shape != shape and len(shape) == 2 and update.shape == shape[::-1]:
        update = replace(update, shape=shape, transposed=not update.transposed)
    if update.shape != shape:
        raise CheckpointError(
            f"{where}: {update.b!r} @ {update.a!r} has shape {list(update.shape)}, but "
            f"{update.target!r} of the model has {list(shape)}"
        )
    if update.magnitude is not None and (update.transposed or len(shape) != 2):
        raise CheckpointError(
            f"{where}: {update.magnitude!r}: DoRA of an embedding, a convolution, or a layer stored "
            "[in, out] is not supported: merge it with peft"
        )
    return update


def delta(
    update: LowRankUpdate, a: np.ndarray, b: np.ndarray, rows: slice | np.ndarray = slice(None)
) -> np.ndarray:
    """Computes rows of an update: s B A, or its transpose.

    Args:
      update: the update.
      a: A as stored.
      b: B as stored.
      rows: which rows of the tensor that is changed: a slice, or an array of numbers.

    Returns:
      float32 `[rows, ...]`.

    Example:
      >>> update = LowRankUpdate("w", "a", "b", 1, 2.0, False, None, (2, 3))
      >>> delta(update, np.ones((1, 3)), np.array([[1.0], [2.0]]), slice(1, 2))
      array([[4., 4., 4.]], dtype=float32)
    """
    down = a.astype(np.float32).reshape(update.rank, -1)
    up = b.astype(np.float32).reshape(-1, update.rank)
    left, right = (down.T, up.T) if update.transposed else (up, down)
    return ((left[rows] @ right) * np.float32(update.scale)).reshape(-1, *update.shape[1:])


class _Scaling:
    """Ranks and scales of modules, by the patterns of a config."""

    def __init__(self, folder: str, config: Mapping[str, Any]) -> None:
        self._where = os.path.join(folder, CONFIG_NAME)
        self._rank = self._number("r", config.get("r", 8))
        self._alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        self._rank_stabilised = config.get("use_rslora") is True
        self._ranks = self._patterns("rank_pattern", config)
        self._alphas = self._patterns("alpha_pattern", config)

    def of(self, module: str) -> tuple[int, float]:
        """Returns the rank and the scale of a module."""
        rank, alpha = self._rank, self._alpha
        # As in PEFT the first pattern decides, and it must match the end of the module's name.
        rank = next((value for p, value in self._ranks if p.match(module)), rank)
        alpha = next((value for p, value in self._alphas if p.match(module)), alpha)
        if rank != int(rank) or rank < 1:
            raise CheckpointError(f"{self._where}: the rank of {module!r} is {rank:g}")
        return int(rank), alpha / (math.sqrt(rank) if self._rank_stabilised else rank)

    def _patterns(self, key: str, config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], float]]:
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{self._where}: {key!r}: expected patterns with numbers")
        return [(self._pattern(key, p), self._number(key, value)) for p, value in given.items()]

    def _pattern(self, key: str, pattern: str) -> re.Pattern[str]:
        # Repetitions within repetitions take exponential time on names made to fail.
        repetitions = re.findall(r"(?<!\\)[*+{]", pattern)
        if len(pattern) > 500 or len(repetitions) > 4 or re.search(r"\)[*+{]", pattern):
            raise CheckpointError(
                f"{self._where}: {key!r}: pattern {pattern[:60]!r} is too complex"
            )
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise CheckpointError(
                f"{self._where}: {key!r}: pattern {pattern!r} cannot be read: {error}"
            ) from None

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise CheckpointError(f"{self._where}: {key!r}: expected a positive number, {value!r}")
        return float(value)


def _read_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG_NAME)
    try:
        size = os.path.getsize(path)
        if size > _LARGEST_CONFIG:
            raise CheckpointError(f"{path}: {size} bytes are too many for an adapter's config")
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no LoRA adapter: {CONFIG_NAME} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(config).__name__}")
    return config


def _check_kind(folder: str, config: Mapping[str, Any]) -> None:
    where = os.path.join(folder, CONFIG_NAME)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: expected peft_type 'LORA', found {config.get('peft_type')!r}"
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{where}: {key!r} {reason}, which is not supported: merge it with peft"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_INITIALISATIONS):
        raise CheckpointError(
            f"{where}: training began from {start!r}, which changes the model's own weights: convert "
            "the adapter to plain LoRA with peft first (path_initial_model_for_weight_conversion)"
        )


def _sorted_out(
    path: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Splits the file's names into parts of updates by module, and replaced tensors."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in tensors:
        short = name.removeprefix(_PREFIX)
        for kind, pattern in (("", _FACTOR), ("embedding ", _EMBEDDING), ("m", _MAGNITUDE)):
            match = pattern.fullmatch(short)
            if match is not None:
                part = kind + match["side"] if kind != "m" else "magnitude"
                module = parts.setdefault(match["module"].removesuffix(".base_layer"), {})
                if part in module:
                    raise CheckpointError(
                        f"{path}: {module[part]!r} and {name!r} are one part of one module: a file "
                        "holds one adapter"
                    )
                module[part] = name
                break
        else:
            if "lora_" in short or not short.endswith((".weight", ".bias")):
                raise CheckpointError(f"{path}: tensor {name!r} is no part of a LoRA adapter")
            target = _COPY.sub("", short)
            if target in replaced:
                raise CheckpointError(f"{path}: {replaced[target]!r} and {name!r} are one tensor")
            replaced[target] = name
    return parts, replaced


def _update(
    path: str,
    module: str,
    found: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    scaling: _Scaling,
    config: Mapping[str, Any],
) -> LowRankUpdate:
    embedding = any(part.startswith("embedding") for part in found)
    a, b = ("embedding A", "embedding B") if embedding else ("A", "B")
    for part, other in ((a, b), (b, a)):
        if part not in found:
            partner = found.get(other) or found["magnitude"]
            raise CheckpointError(
                f"{path}: {partner!r} has no partner lora_{part.replace(' ', '_')}"
                f"{nearest(partner, [name for name in tensors if name != partner])}"
            )
    rank, scale = scaling.of(module)
    down, up = tensors[found[a]], tensors[found[b]]
    for info in (down, up):
        if not info.dtype.startswith(("float", "bfloat")) or len(info.shape) < 2:
            raise CheckpointError(
                f"{path}: tensor {info.name!r}: expected a matrix of floats, found "
                f"{info.dtype}{list(info.shape)}"
            )
    if down.shape[0] != rank or up.shape[1] != rank or math.prod(up.shape[2:]) != 1:
        raise CheckpointError(
            f"{path}: module {module!r} has rank {rank} by {CONFIG_NAME}: expected A [{rank}, in] "
            f"and B [out, {rank}], found {list(down.shape)} and {list(up.shape)}"
        )
    transposed = embedding or (config.get("fan_in_fan_out") is True and len(down.shape) == 2)
    shape = (up.shape[0], *down.shape[1:])
    magnitude = found.get("magnitude")
    if magnitude is not None:
        found_shape = tensors[magnitude].shape
        if len(shape) == 2 and not embedding and found_shape != shape[:1]:
            raise CheckpointError(
                f"{path}: tensor {magnitude!r}: expected shape {list(shape[:1])}, found "
                f"{list(found_shape)}"
            )
    elif config.get("use_dora") is True:
        raise CheckpointError(f"{path}: module {module!r} has no lora_magnitude_vector (use_dora)")
    return LowRankUpdate(
        target=f"{module}.weight",
        a=found[a],
        b=found[b],
        rank=rank,
        scale=scale,
        transposed=transposed,
        magnitude=magnitude,
        shape=(shape[1], shape[0]) if transposed else shape,
    )
