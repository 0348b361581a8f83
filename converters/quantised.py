"""Recognising quantised checkpoints, which cannot be merged as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.tensor_info import TensorInfo

_ADVICE = (
    "merging needs plain weights: use the original checkpoint (or dequantise this one first) and "
    "quantise after the merge"
)
_BITSANDBYTES = re.compile(
    r"^(?P<weight>.*)\.(SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state(\..*)?)$"
)
_SCALES = re.compile(r"^(?P<stem>.*)weight_(scale|scale_inv|scale_2)$")
_SCALED = ("float8", "int8", "uint8")


def refuse_quantised(
    tensors: Mapping[str, TensorInfo] | Iterable[TensorInfo],
    config: Mapping[str, Any] | None = None,
    *,
    where: str = "checkpoint",
) -> None:
    """Raises an error if a checkpoint is quantised.

    Recognised are bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors, MXFP4 blocks and float8 or int8
    weights with scales, by their tensors; and whatever `quantization_config` names. Plain float8
    weights without scales are not quantised in this sense.

    Args:
      tensors: the infos, as in `Checkpoint.tensors`.
      config: the model's parsed `config.json`, if it has one.
      where: the checkpoint, for the message.

    Raises:
      CheckpointError: names the scheme, the tensor that shows it, and what to do instead.

    Example:
      >>> refuse_quantised([TensorInfo.of("fc.weight", (2, 2), "float32")])
      >>> refuse_quantised([TensorInfo.of("fc.qweight", (2, 2), "int32")], where="m")
      Traceback (most recent call last):
      jaxmerge.converters.errors.CheckpointError: m: quantised (AWQ, or GPTQ without g_idx; tensor
      'fc.qweight'); merging needs plain weights: ...
    """
    infos = tensors.values() if isinstance(tensors, Mapping) else tensors
    known = {info.name: info.dtype for info in infos}
    for name, dtype in known.items():
        scheme = _scheme(name, dtype, known)
        if scheme is not None:
            raise CheckpointError(f"{where}: quantised ({scheme}; tensor {name!r}); {_ADVICE}")
    method = _configured(config or {})
    if method is not None:
        raise CheckpointError(
            f"{where}: quantised ({method}, by quantization_config in config.json); {_ADVICE}"
        )


def _scheme(name: str, dtype: str, known: Mapping[str, str]) -> str | None:
    bitsandbytes = _BITSANDBYTES.match(name)
    if bitsandbytes:
        weight = bitsandbytes["weight"]
        # int8 scales stand beside the weight (fc.SCB), 4-bit ones below it (fc.weight.absmax).
        if weight.endswith("weight") or known.get(weight) == "uint8" or name.endswith(".SCB"):
            return "bitsandbytes"
    stem, _, last = name.rpartition(".")
    if last in ("qweight", "qzeros", "g_idx"):
        gptq = f"{stem}.g_idx".lstrip(".") in known
        return "GPTQ" if gptq else "AWQ, or GPTQ without g_idx"
    if last == "W_q":
        return "HQQ"
    if last == "weight_packed":
        return "compressed-tensors"
    if last == "_packed_params":
        return "torch quantised module"
    if last.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in known:
        return "MXFP4"
    scales = _SCALES.match(name)
    if scales and known.get(f"{scales['stem']}weight", "").startswith(_SCALED):
        stored = known[f"{scales['stem']}weight"]
        return "float8 weights with scales" if "float8" in stored else f"{stored} with scales"
    if last == "scaled_fp8" or (
        last == "scale_weight" and known.get(f"{stem}.weight", "").startswith("float8")
    ):
        return "float8 weights with scales"
    return None


def _configured(config: Mapping[str, Any]) -> str | None:
    """Multimodal models have the entry in the config of a part."""
    for name, value in config.items():
        if name in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            return str(method or "unknown method")
        if name.endswith("_config") and isinstance(value, Mapping):
            inner = _configured(value)
            if inner is not None:
                return inner
    return None
