"""What is in a checkpoint: formats, families, blocks, dtypes, ties, values that are no numbers."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxmerge.converters import byte_io, dtypes
from jaxmerge.converters.checkpoint import open_checkpoint
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.finite import non_finite
from jaxmerge.converters.gguf_reader import GgufCheckpoint
from jaxmerge.converters.peft_adapter import is_peft_adapter, read_peft_adapter
from jaxmerge.converters.quantised import refuse_quantised
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.tree import layer_of

Progress = Callable[[int, int], None]
# Read at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Block:
    """Tensors that belong together.

    Attributes:
      name: a module outside of the layers ("lm_head"), or one of all layers ("model.layers.*.mlp").
      layers: in how many layers it stands; 0 for a module outside of them.
      tensors: how many.
      parameters: how many elements.
      nbytes: their size.
    """

    name: str
    layers: int
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; all but `non_finite` and `equal` comes from headers.

    Attributes:
      path: as given.
      key: where in a PyTorch file the tensors stand.
      format: "safetensors", "torch" or "gguf".
      files: how many.
      nbytes: of all tensors.
      tensors: how many names.
      parameters: how many elements, tied tensors once.
      dtypes: name -> (tensors, parameters).
      quantised: what was dequantised as it was read, type -> tensors (GGUF); or {} .
      refused: why it cannot be merged as it is, such as a quantised model; None if it can.
      families: the families of `jaxmerge.models` that it fits.
      family_problem: why it fits none; None if it does.
      model_type: what its config says.
      adapter: of a LoRA adapter, what it is; else None.
      blocks: in the checkpoint's order.
      ties: groups of names that are one tensor.
      skipped: entries that are no tensors, name -> what they are.
      metadata: the file's own text entries.
      non_finite: name -> how many values are NaN or infinite; None if values were not read.
      equal: groups of matrices that hold the same bytes and are not tied; None if values were not read.
    """

    path: str
    key: str | None
    format: str
    files: int
    nbytes: int
    tensors: int
    parameters: int
    dtypes: dict[str, tuple[int, int]]
    quantised: dict[str, int]
    refused: str | None
    families: tuple[str, ...]
    family_problem: str | None
    model_type: str | None
    adapter: dict[str, Any] | None
    blocks: tuple[Block, ...]
    ties: tuple[tuple[str, ...], ...]
    skipped: dict[str, str]
    metadata: dict[str, str]
    non_finite: dict[str, int] | None
    equal: tuple[tuple[str, ...], ...] | None

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=2)


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    values: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Describes a checkpoint.

    Args:
      path: what `open_checkpoint` reads, or the folder of a LoRA adapter.
      key: where the state dict stands in a PyTorch file.
      values: whether all tensors are read, piece by piece, for NaN and infinity and for equal matrices.
      progress: called with the bytes read, and all bytes, where values are read.

    Returns:
      The description.

    Raises:
      CheckpointError: the checkpoint cannot be read.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from jaxmerge.converters import save_checkpoint
      >>> path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
      >>> save_checkpoint(path, {"fc1.weight": np.ones((3, 4), np.float32), "fc1.bias": np.ones(3, np.float32)})
      >>> found = inspect_checkpoint(path, values=True)
      >>> found.parameters, found.families, found.non_finite
      (15, ('mlp_fc',), {})
    """
    path = os.fspath(path)
    with open_checkpoint(path, key=key) as checkpoint:
        config = _config(path, checkpoint)
        infos = list(checkpoint.tensors.values())
        later = {name for group in checkpoint.ties for name in group[1:]}
        families, problem = _families(checkpoint, config)
        bad, equal = _values(checkpoint, progress) if values else (None, None)
        kind = config.get("model_type")
        return Inspection(
            path=path,
            key=checkpoint.key,
            format=checkpoint.format,
            files=len(checkpoint.files),
            nbytes=sum(info.nbytes for info in infos),
            tensors=len(infos),
            parameters=sum(math.prod(info.shape) for info in infos if info.name not in later),
            dtypes=_by_dtype(infos),
            quantised=_quantised(checkpoint),
            refused=_refused(checkpoint, config),
            families=families,
            family_problem=problem,
            model_type=kind if isinstance(kind, str) else None,
            adapter=_adapter(path),
            blocks=_blocks(infos),
            ties=tuple(checkpoint.ties),
            skipped=checkpoint.skipped,
            metadata=checkpoint.metadata,
            non_finite=bad,
            equal=equal,
        )


def _config(path: str, checkpoint: Checkpoint) -> Mapping[str, Any]:
    from jaxmerge.converters.model_loading import read_config

    return read_config(path) or checkpoint.config or {}


def _families(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], str | None]:
    if is_peft_adapter(checkpoint.path):
        return (), None
    from jaxmerge.converters import families
    from jaxmerge.converters.families.matching import recognise

    kind = config.get("model_type")
    known = families.FAMILIES.values()
    candidates = [one for one in known if kind is None or kind in one.accepted_types]
    found = []
    problem: str | None = f"no family reads the model_type {kind!r}" if not candidates else None
    for family in candidates:
        try:
            recognise(checkpoint.tensors, json=config, family=family.name, where=checkpoint.path)
        except CheckpointError as error:
            problem = str(error).removeprefix(f"{checkpoint.path}: ")
            continue
        found.append(family.name)
    if found:
        return tuple(found), None
    if len(candidates) > 1:
        lacking = "" if config else "there is no config.json, and "
        problem = f"{lacking}the tensors' names and shapes are those of no family"
    return (), problem


def _by_dtype(infos: list[TensorInfo]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for info in infos:
        tensors, parameters = found.get(info.dtype, (0, 0))
        found[info.dtype] = tensors + 1, parameters + math.prod(info.shape)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _quantised(checkpoint: Checkpoint) -> dict[str, int]:
    if not isinstance(checkpoint, GgufCheckpoint):
        return {}
    kinds = (checkpoint.quantisation(name) for name in checkpoint.tensors)
    return dict(collections.Counter(kind for kind in kinds if kind is not None))


def _refused(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    try:
        refuse_quantised(checkpoint.tensors, config, where=checkpoint.path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{checkpoint.path}: ")
    return None


def _adapter(path: str) -> dict[str, Any] | None:
    if not is_peft_adapter(path):
        return None
    adapter = read_peft_adapter(path)
    base = adapter.config.get("base_model_name_or_path")
    return {
        "base_model": base if isinstance(base, str) else None,
        "updates": len(adapter.updates),
        "ranks": sorted({update.rank for update in adapter.updates.values()}),
        "scales": sorted({update.scale for update in adapter.updates.values()}),
        "replaced": len(adapter.replaced),
        "magnitudes": sum(update.magnitude is not None for update in adapter.updates.values()),
    }


def _blocks(infos: list[TensorInfo]) -> tuple[Block, ...]:
    members: dict[str, list[TensorInfo]] = {}
    layers: dict[str, set[str]] = {}
    for info in infos:
        layer = layer_of(info.name)
        name = _block(info.name, layer)
        members.setdefault(name, []).append(info)
        if layer is not None:
            layers.setdefault(name, set()).add(layer)
    return tuple(
        Block(
            name,
            len(layers.get(name, ())),
            len(own),
            sum(math.prod(info.shape) for info in own),
            sum(info.nbytes for info in own),
        )
        for name, own in members.items()
    )


def _block(name: str, layer: str | None) -> str:
    if layer is None:
        return name.rpartition(".")[0] or name
    head = layer.rstrip("0123456789")
    module, _, rest = name[len(layer) :].lstrip("./").partition(".")
    return f"{head}*.{module}" if rest else f"{head}*"


def _values(
    checkpoint: Checkpoint, progress: Progress | None
) -> tuple[dict[str, int], tuple[tuple[str, ...], ...]]:
    bad: dict[str, int] = {}
    by_content: dict[Any, list[str]] = {}
    done, total = 0, sum(info.nbytes for info in checkpoint.tensors.values())
    for name in checkpoint.disk_order():
        info = checkpoint.tensors[name]
        digest, count = hashlib.blake2b(digest_size=16), 0
        size = math.prod(info.shape)
        step = max(_CHUNK // dtypes.storage_dtype(info.dtype).itemsize, 1)
        for start in range(0, size, step):
            part = checkpoint.read_flat(name, start, min(start + step, size))
            count += non_finite(part)
            if len(info.shape) > 1:
                digest.update(byte_io.as_bytes(part))
            done += part.nbytes
            if progress is not None:
                progress(done, total)
        if count:
            bad[name] = count
        if len(info.shape) > 1 and size:
            by_content.setdefault((info.shape, info.dtype, digest.digest()), []).append(name)
    tied = {name: group[0] for group in checkpoint.ties for name in group}
    equal = [
        tuple(names)
        for names in by_content.values()
        if len({tied.get(name, name) for name in names}) > 1
    ]
    order = list(checkpoint.tensors)
    return {name: bad[name] for name in order if name in bad}, tuple(equal)
