"""The config.json that a GGUF file's metadata stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmerge.converters.errors import CheckpointError, nearest

_MISSING = object()
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def config(
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    frequencies: np.ndarray | None,
    where: str,
) -> dict[str, Any] | None:
    """Derives a Hugging Face configuration.

    Args:
      fields: the file's metadata.
      shapes: the tensors' shapes by Hugging Face's names.
      frequencies: `rope_freqs.weight` [head_dim / 2]: what each rotary frequency is divided by; None without it.
      where: the file, for messages.

    Returns:
      What `config.json` would hold, or None for an architecture without a table.

    Raises:
      CheckpointError: an entry is missing or is not what it must be.
    """
    architecture = fields.get("general.architecture")
    read = _Fields(fields, f"{architecture}.", where)
    if architecture == "gpt2":
        found = _gpt2(read)
    elif architecture in ("llama", "qwen2", "qwen3", "gemma"):
        found = _decoder(str(architecture), read, shapes, frequencies)
    else:
        return None
    embedding = "transformer.wte.weight" if architecture == "gpt2" else "model.embed_tokens.weight"
    if embedding not in shapes:
        raise CheckpointError(f"{where}: the file has no tensor token_embd.weight")
    found["vocab_size"] = shapes[embedding][0]
    found["tie_word_embeddings"] = "lm_head.weight" not in shapes
    for name in ("bos", "eos", "pad"):
        token = fields.get(f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id")
        if isinstance(token, int):
            found[f"{name}_token_id"] = token
    return {"architectures": [_CLASSES[found["model_type"]]], **found}


class _Fields:
    """The metadata of one architecture."""

    def __init__(self, fields: Mapping[str, Any], prefix: str, where: str) -> None:
        self.where = where
        self._fields, self._prefix = fields, prefix

    def number(self, name: str, default: Any = _MISSING) -> Any:
        value = self._fields.get(self._prefix + name, default)
        if value is _MISSING:
            raise CheckpointError(
                f"{self.where}: no metadata {self._prefix + name!r}.{nearest(self._prefix + name, self._fields)}"
            )
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()
        if value is not default and not isinstance(value, int | float):
            raise self.refused(name, "one number", value)
        # Metadata have float32: 1e-05 is meant, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def text(self, name: str, default: str) -> str:
        value = self._fields.get(self._prefix + name, default)
        if not isinstance(value, str):
            raise self.refused(name, "text", value)
        return value

    def refused(self, name: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: metadata {self._prefix + name!r}: expected {expected}, found {found!r:.80}"
        )


def _decoder(
    architecture: str,
    read: _Fields,
    shapes: Mapping[str, tuple[int, ...]],
    frequencies: np.ndarray | None,
) -> dict[str, Any]:
    heads = read.number("attention.head_count")
    hidden = read.number("embedding_length")
    window = read.number("attention.sliding_window", 0)
    if not heads:
        raise read.refused("attention.head_count", "at least 1", heads)
    found = {
        "model_type": "mistral" if architecture == "llama" and window else architecture,
        "hidden_size": hidden,
        "intermediate_size": read.number("feed_forward_length"),
        "num_hidden_layers": read.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.number("attention.head_count_kv", heads),
        "head_dim": read.number(
            "attention.key_length", read.number("rope.dimension_count", hidden // heads)
        ),
        "max_position_embeddings": read.number("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
    }
    if architecture == "gemma":
        found |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    else:
        found["hidden_act"] = "silu"
    attention = "model.layers.0.self_attn."
    # Qwen2's query, key and value always have biases; its configuration does not say so.
    if architecture != "qwen2":
        found["attention_bias"] = f"{attention}q_proj.bias" in shapes
    if architecture == "llama":
        found["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    if window:
        found["sliding_window"] = window
        if architecture.startswith("qwen"):
            found["use_sliding_window"] = True
    scaling = _scaling(read, found, frequencies)
    return found if scaling is None else {**found, "rope_scaling": scaling}


def _scaling(
    read: _Fields, found: Mapping[str, Any], frequencies: np.ndarray | None
) -> dict[str, Any] | None:
    if frequencies is not None:
        return _llama3(read, found, frequencies)
    kind = read.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": read.number("rope.scaling.factor")}
    original = read.number("rope.scaling.original_context_length", 0)
    return {**scaling, "original_max_position_embeddings": original} if original else scaling


def _llama3(read: _Fields, found: Mapping[str, Any], frequencies: np.ndarray) -> dict[str, Any]:
    """GGUF has Llama 3's scaled frequencies, not the numbers that they come from; all models share all but one."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(frequencies.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    size = found["head_dim"]
    if frequencies.size != size // 2:
        raise CheckpointError(
            f"{read.where}: tensor 'rope_freqs.weight': expected {size // 2} values, found {frequencies.size}"
        )
    inverse = found["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    # Between the two wavelengths the frequency is interpolated.
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * np.pi)
    share = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - share) / scaling["factor"] + share)
    if not np.allclose(frequencies, expected, rtol=1e-4):
        raise CheckpointError(
            f"{read.where}: tensor 'rope_freqs.weight': expected the frequencies of Llama 3's scaling (low 1, high 4, "
            "8192 positions), found others, which config.json cannot express"
        )
    return scaling


def _gpt2(read: _Fields) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": read.number("embedding_length"),
        "n_inner": read.number("feed_forward_length"),
        "n_layer": read.number("block_count"),
        "n_head": read.number("attention.head_count"),
        "n_positions": read.number("context_length"),
        "layer_norm_epsilon": read.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }
