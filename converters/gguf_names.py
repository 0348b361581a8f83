"""What GGUF calls a model's tensors and what Hugging Face does, one table per architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from jaxmerge.converters.errors import CheckpointError

Change = Literal["none", "query_rows", "key_rows", "plus_one", "transposed"]


class GgufRule(NamedTuple):
    """One line of a table.

    Attributes:
      gguf: the name in GGUF files, `{i}` being the layer.
      hugging_face: the name in Hugging Face's layout.
      change: what was done to the tensor on its way to GGUF: "query_rows" and "key_rows" have the two halves of each
        head interleaved, as GGUF's rotary embedding wants them; "plus_one" has 1 added; "transposed" is transposed.
    """

    gguf: str
    hugging_face: str
    change: Change = "none"


# Recomputed from the configuration, or buffers that carry nothing.
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")


def _decoder(rotary: bool = False, plus_one: bool = False) -> tuple[GgufRule, ...]:
    norm: Change = "plus_one" if plus_one else "none"
    layer, attention = "model.layers.{i}.", "model.layers.{i}.self_attn."
    rules = [
        GgufRule("token_embd.weight", "model.embed_tokens.weight"),
        GgufRule("output_norm.weight", "model.norm.weight", norm),
        GgufRule("output.weight", "lm_head.weight"),
        GgufRule("blk.{i}.attn_norm.weight", f"{layer}input_layernorm.weight", norm),
        GgufRule("blk.{i}.ffn_norm.weight", f"{layer}post_attention_layernorm.weight", norm),
        GgufRule("blk.{i}.attn_q_norm.weight", f"{attention}q_norm.weight", norm),
        GgufRule("blk.{i}.attn_k_norm.weight", f"{attention}k_norm.weight", norm),
    ]
    projections: tuple[tuple[str, str, Change], ...] = (
        ("attn_q", "self_attn.q_proj", "query_rows" if rotary else "none"),
        ("attn_k", "self_attn.k_proj", "key_rows" if rotary else "none"),
        ("attn_v", "self_attn.v_proj", "none"),
        ("attn_output", "self_attn.o_proj", "none"),
        ("ffn_gate", "mlp.gate_proj", "none"),
        ("ffn_up", "mlp.up_proj", "none"),
        ("ffn_down", "mlp.down_proj", "none"),
    )
    for gguf, hugging_face, change in projections:
        for part in ("weight", "bias"):
            rules.append(
                GgufRule(f"blk.{{i}}.{gguf}.{part}", f"{layer}{hugging_face}.{part}", change)
            )
    return tuple(rules)


def _gpt2() -> tuple[GgufRule, ...]:
    rules = [
        GgufRule("token_embd.weight", "transformer.wte.weight"),
        GgufRule("position_embd.weight", "transformer.wpe.weight"),
        GgufRule("output.weight", "lm_head.weight"),
    ]
    for gguf, hugging_face, change in (
        ("output_norm", "ln_f", "none"),
        ("blk.{i}.attn_norm", "h.{i}.ln_1", "none"),
        ("blk.{i}.attn_qkv", "h.{i}.attn.c_attn", "transposed"),
        ("blk.{i}.attn_output", "h.{i}.attn.c_proj", "transposed"),
        ("blk.{i}.ffn_norm", "h.{i}.ln_2", "none"),
        ("blk.{i}.ffn_up", "h.{i}.mlp.c_fc", "transposed"),
        ("blk.{i}.ffn_down", "h.{i}.mlp.c_proj", "transposed"),
    ):
        weight: Change = "transposed" if change == "transposed" else "none"
        rules.append(GgufRule(f"{gguf}.weight", f"transformer.{hugging_face}.weight", weight))
        rules.append(GgufRule(f"{gguf}.bias", f"transformer.{hugging_face}.bias"))
    return tuple(rules)


RULES: Mapping[str, tuple[GgufRule, ...]] = {
    "llama": _decoder(rotary=True),
    "qwen2": _decoder(),
    "qwen3": _decoder(),
    "gemma": _decoder(plus_one=True),
    "gpt2": _gpt2(),
}


def hugging_face(
    architecture: str, names: Iterable[str], where: str
) -> dict[str, tuple[str, Change]]:
    """Maps a GGUF file's tensors to Hugging Face's layout.

    Args:
      architecture: `general.architecture` of the file.
      names: its tensors' names.
      where: the file, for messages.

    Returns:
      Hugging Face's name -> GGUF's name and what was changed. Buffers that carry nothing are left out. An architecture
      without a table keeps its own names.

    Raises:
      CheckpointError: the architecture has no such tensors.

    Example:
      >>> hugging_face("llama", ["blk.3.attn_q.weight"], "m.gguf")
      {'model.layers.3.self_attn.q_proj.weight': ('blk.3.attn_q.weight', 'query_rows')}
    """
    if architecture not in RULES:
        return {name: (name, "none") for name in names}
    table = {rule.gguf: rule for rule in RULES[architecture]}
    found: dict[str, tuple[str, Change]] = {}
    unknown = []
    for name in names:
        if _IGNORED.fullmatch(name):
            continue
        layer = re.match(r"blk\.(\d+)\.", name)
        rule = table.get(name if layer is None else f"blk.{{i}}.{name[layer.end() :]}")
        if rule is None:
            unknown.append(name)
            continue
        index = "" if layer is None else layer[1]
        found[rule.hugging_face.replace("{i}", index)] = (name, rule.change)
    if unknown:
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{where}: {len(unknown)} tensors that the architecture {architecture!r} does not have: {some}"
        )
    return found
